"""Conversation: what a caller of the processor may say, as samples.

In: Hugging Face's forms, one or a batch: messages of {role, content} with items {"type": "text" | "image"}, or texts
and images apart. Out: a `Sample` a row. Invariant: text stays data, whatever it looks like; a picture is what Pillow
opened, or encoded bytes, and no address is ever fetched. The chat template shows such a sample to a reader, as saved
checkpoints carry it; ids are made without it. Cost: files are read whole.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from PIL import Image

from solo.sample import IMAGE, Item, Message, Sample, text

Picture = bytes | Image.Image
PLACES = ("image", "path", "url", "base64")  # keys of an image item under which Hugging Face's processors look

# `<image>` stands for an image's block.
CHAT_TEMPLATE = """\
{%- macro joined(content) -%}
    {%- set own = namespace(text="") -%}
    {%- for item in content if item.type == "text" and item.text | trim -%}
        {%- set own.text = own.text + ("\\n" if own.text else "") + item.text -%}
    {%- endfor -%}
    {{- own.text -}}
{%- endmacro -%}
{%- macro turns() -%}
    {%- set own = namespace(system="") -%}
    {%- for message in messages -%}
        {%- set text = message.content if message.content is string else joined(message.content) -%}
        {%- if message.role == "user" -%}
            {{- "[INST] " + own.system + text | trim + " [/INST]" -}}
            {%- set own.system = "" -%}
        {%- elif message.role == "system" and loop.first -%}
            {%- set own.system = text | trim + "\\n\\n" if text | trim else "" -%}
        {%- elif message.role != "assistant" -%}
            {{ raise_exception(
                "turn " ~ loop.index0 ~ " is " ~ message.role ~ "; inst takes a leading system, user, assistant"
            ) }}
        {%- elif text | trim -%}
            {{- " " + text + eos_token -}}
        {%- endif -%}
    {%- endfor -%}
{%- endmacro -%}
{%- if form == "plain" -%}
    {{- bos_token -}}
    {%- for message in messages -%}
        {%- for item in message.content -%}
            {{- item.text if item.type == "text" else "<image>" -}}
        {%- endfor -%}
    {%- endfor -%}
{%- else -%}
    {%- for message in messages if message.content is not string -%}
        {%- for item in message.content if item.type == "image" -%}
            {{- "<image>" -}}
        {%- endfor -%}
    {%- endfor -%}
    {{- bos_token + turns() -}}
{%- endif -%}
"""


class Rendered(str):
    """A conversation as a reader sees it; ids do not come back out of it."""


def conversations(said: Any, images: Any = None) -> tuple[list[Sample], bool]:  # noqa: ANN401 - a caller's
    """Rows of one conversation or a list of them, and whether it was a list; `images` fill items that hold none."""
    if not isinstance(said, Sequence) or isinstance(said, str | bytes) or not said:
        raise ValueError("conversation: give a list of {'role', 'content'} messages, or a list of such lists")
    is_batch = not isinstance(said[0], Mapping)
    rows = list(said) if is_batch else [said]
    beside = _per_row(images, len(rows), is_batch=is_batch)
    return [_spoken(f"conversation {i}", row, beside[i]) for i, row in enumerate(rows)], is_batch


def prompts(texts: Any, images: Any = None) -> tuple[list[Sample], bool]:  # noqa: ANN401 - a caller's
    """Rows of one user turn each, its images before its text; and whether texts were a list."""
    is_batch = isinstance(texts, Sequence) and not isinstance(texts, str)
    rows = list(texts) if is_batch else [texts or ""]
    beside = _per_row(images, len(rows), is_batch=is_batch)
    spoken = []
    for i, (value, own) in enumerate(zip(rows, beside, strict=True)):
        items = [*[{"type": "image"}] * len(own), {"type": "text", "text": value}]
        spoken.append(_spoken(f"text {i}", [{"role": "user", "content": items}], own))
    return spoken, is_batch


def read_picture(value: Any) -> Picture:  # noqa: ANN401 - a caller's
    """A picture from what stands for it: an opened image, encoded bytes, a file's path, or a `data:` address."""
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str) and value.startswith("data:"):
        return _base64(value.partition(",")[2])
    if isinstance(value, str) and "://" in value:
        raise ValueError(f"image {value[:80]!r}: addresses are not fetched; download it and give its path")
    if isinstance(value, str | Path):
        path = Path(value).expanduser()
        if not path.is_file():
            raise ValueError(f"image {str(value)[:200]}: no such file; give the path of a picture")
        return path.read_bytes()
    raise ValueError(f"image: a {type(value).__name__} is no picture; give a PIL image, bytes or a path")


def _per_row(images: Any, n_rows: int, *, is_batch: bool) -> list[list[Any]]:  # noqa: ANN401 - a caller's
    """The images of each row: of one row an image or a list, of a batch one entry a row, each None, one or a list."""
    if images is None:
        return [[] for _ in range(n_rows)]
    if not is_batch:
        return [_listed(images)]
    if not isinstance(images, list | tuple) or len(images) != n_rows:
        n = len(images) if isinstance(images, list | tuple) else 1
        raise ValueError(f"images: {n} entries for {n_rows} rows; give each row None, an image or a list of images")
    return [_listed(entry) for entry in images]


def _listed(images: Any) -> list[Any]:  # noqa: ANN401 - a caller's
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def _spoken(name: str, messages: Any, beside: list[Any]) -> Sample:  # noqa: ANN401 - a caller's
    left = iter(beside)
    pictures: list[Picture] = []
    turns: list[Message] = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"{name}: turn {i} is no message; give {{'role': ..., 'content': ...}}")
        content = message["content"]
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        turns.append(
            {"role": message["role"], "content": [_item(f"{name}: turn {i}", x, left, pictures) for x in items]}
        )
    if n := len(list(left)):
        raise ValueError(f"{name}: {n} images more than {{'type': 'image'}} items without one; say where they stand")
    images = cast(
        "tuple[bytes, ...]", tuple(pictures)
    )  # `solo.sequence.patches` takes an opened picture as it takes its bytes
    return Sample(name, "", images, tuple(turns), {})


def _item(where: str, item: Any, left: Iterator[Any], pictures: list[Picture]) -> Item:  # noqa: ANN401 - a caller's
    kind = item.get("type") if isinstance(item, Mapping) else type(item).__name__
    if kind == "text" and isinstance(item.get("text"), str):
        return text(item["text"])
    if kind != "image":
        raise ValueError(f"{where}: an item of type {kind!r}; give {{'type': 'text', 'text': ...}} or 'image'")
    given = [key for key in PLACES if item.get(key) is not None]
    try:
        value = item[given[0]] if given else next(left)
    except StopIteration:
        raise ValueError(f"{where}: an image item without an image; give one of {', '.join(PLACES)}") from None
    pictures.append(_base64(value) if given == ["base64"] else read_picture(value))
    return IMAGE


def _base64(value: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as error:
        raise ValueError(f"image: not base64: {error}") from None
