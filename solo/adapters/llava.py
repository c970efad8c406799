"""LLaVA pre-training sets: one JSON array of {"id", "image", "conversations": [{"from", "value"}]}, and images.

Sample: human is user, gpt is assistant; the turn with `<image>` is split there into text, image, text (the newline
beside the mark stays), as the authors' converter does. Key: the record's content, since ids repeat across such sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from solo.sample import IMAGE, Item, Message, Rejected, Sample, make_key, text
from solo.upstream import Pictures, Record, canonical, existing, json_array

ROLES = {"human": "user", "gpt": "assistant"}
MARK = "<image>"


def read(
    location: Path,
    *,
    source: str,
    records: str = "chat.json",
    images: str | Sequence[str] = "images.zip",
) -> Iterator[Sample | Rejected]:
    """Records in order; `images` names zips, uncompressed tars or folders (`*` allowed)."""
    pictures = Pictures(location, images)
    for place, record in json_array(existing(location, records)):
        yield record if isinstance(record, Rejected) else _sample(place, record, source, pictures)


def _sample(place: str, record: Record, source: str, pictures: Pictures) -> Sample | Rejected:
    identity = record["id"] if isinstance(record.get("id"), str) else place
    try:
        messages = _messages(record.get("conversations"))
    except ValueError as error:
        return Rejected(identity, "bad_record", str(error))
    n_marks = sum(item["type"] == "image" for message in messages for item in message["content"])
    name = record.get("image")
    if n_marks != (0 if name is None else 1):
        return Rejected(identity, "bad_record", f"{n_marks} {MARK} marks; a record with an image needs exactly one")
    data = pictures.read(name, identity) if name is not None else b""
    if isinstance(data, Rejected):
        return data
    meta = {"id": identity, **({"image": name} if name is not None else {})}
    return Sample(make_key(source, canonical(record)), source, (data,) if data else (), messages, meta)


def _messages(turns: object) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise ValueError("conversations is not a list of questions and answers")
    messages: list[Message] = []
    for i, turn in enumerate(turns):
        value = turn.get("value") if isinstance(turn, dict) else None
        role = ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if not isinstance(value, str) or role != ("user", "assistant")[i % 2]:
            raise ValueError(f"turn {i} is not the {('human', 'gpt')[i % 2]} turn that is due")
        content = _split(value) if role == "user" else [text(value)]
        if not any(item["type"] == "image" or item["text"].strip() for item in content):
            raise ValueError(f"turn {i} is empty")
        messages.append({"role": role, "content": content})
    return tuple(messages)


def _split(value: str) -> list[Item]:
    content: list[Item] = []
    for i, part in enumerate(value.split(MARK)):
        content += [IMAGE] if i else []
        content += [text(part)] if part else []
    return content
