"""LLaVA-style sets: one JSON array of {"id", "image", "conversations": [{"from", "value"}]}, and images.

Sample: human is user, gpt is assistant; the turn with `<image>` is split there into text, image, text (the newline
beside the mark stays), as the authors' converter does. Key: the record's content, since ids repeat across such sets.
`follow_ups` is a second such file (ALLaVA's instructions): its turns go on the conversation about the same image, and a
record without one stays as it is; with `follow_ups_alone` those about other images are records of their own, last.
`image_prefix` keeps one part of a mixture, the rest is `excluded_set`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from solo.acquire.follow_ups import FollowUps
from solo.acquire.image_files import Names, Pictures
from solo.acquire.upstream import Record, canonical, existing, json_array, odd_turn
from solo.sample import IMAGE, Item, Message, Rejected, Sample, make_key, text

log = logging.getLogger(__name__)

ROLES = {"human": "user", "gpt": "assistant"}
MARK = "<image>"


def read(  # noqa: PLR0913 - one argument for each field of the spec
    location: Path,
    *,
    source: str,
    records: str = "chat.json",
    images: Names = "images.zip",
    flat: bool = False,
    image_prefix: str = "",
    follow_ups: str | None = None,
    follow_ups_alone: bool = False,
) -> Iterator[Sample | Rejected]:
    """Records in order; `images` and `flat` as for `Pictures`."""
    path = existing(location, records)
    more = FollowUps(existing(location, follow_ups)) if follow_ups else None
    pictures = Pictures(location, images, flat=flat)
    for place, record in json_array(path):
        if isinstance(record, Rejected):
            yield record
        elif image_prefix and not str(record.get("image")).startswith(image_prefix):
            yield Rejected(place, "excluded_set", f"its image is not below {image_prefix}")
        else:
            turns = more.turns(record.get("image")) if more else []
            yield _sample(place, record, source, pictures, turns)
    if more and follow_ups_alone:
        for place, record in more.alone():
            yield record if isinstance(record, Rejected) else _sample(place, record, source, pictures, [])
    elif more and (n := len(more.left())):
        log.warning("%s: %d records are about images not in %s; follow_ups_alone keeps them", follow_ups, n, records)


def _sample(place: str, record: Record, source: str, pictures: Pictures, more: list[object]) -> Sample | Rejected:
    identity = record["id"] if isinstance(record.get("id"), str) else place
    turns = record.get("conversations")
    try:
        messages = _messages([*turns, *more] if isinstance(turns, list) and turns else turns)
    except ValueError as error:
        return Rejected(identity, "bad_record", str(error))
    n_marks = sum(item["type"] == "image" for message in messages for item in message["content"])
    name = record.get("image")
    if n_marks != (0 if name is None else 1):
        why = "but no image" if name is None else "a record with an image needs exactly one"
        return Rejected(identity, "bad_record", f"{n_marks} {MARK} marks, {why}")
    data = pictures.read(name, identity) if name is not None else b""
    if isinstance(data, Rejected):
        return data
    meta = {"id": identity, **({"image": name} if name is not None else {})}
    key = make_key(source, canonical(record | {"follow_ups": more} if more else record))
    return Sample(key, source, (data,) if data else (), messages, meta)


def _messages(turns: object) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise ValueError("conversations is not a list of questions and answers")
    messages: list[Message] = []
    for i, turn in enumerate(turns):
        value = turn.get("value") if isinstance(turn, dict) else None
        role = ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if not isinstance(value, str) or role != ("user", "assistant")[i % 2]:
            raise ValueError(odd_turn(f"conversations[{i}]", turn, "from", "value", ("human", "gpt")[i % 2]))
        content = _split(value) if role == "user" else [text(value)]
        if not any(item["type"] == "image" or item["text"].strip() for item in content):
            raise ValueError(f"conversations[{i}].value is empty")
        messages.append({"role": role, "content": content})
    return tuple(messages)


def _split(value: str) -> list[Item]:
    content: list[Item] = []
    for i, part in enumerate(value.split(MARK)):
        content += [IMAGE] if i else []
        content += [text(part)] if part else []
    return content
