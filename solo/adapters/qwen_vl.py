"""Qwen-VL conversations: one JSON array of {"id", "conversations": [{"from", "value": "... <img>path</img> ..."}]}.

Sample: the picture stands where its <img> tag stood, with the words before it (`Picture 1: `) left out; with
`caption_only` the answer alone is kept, as one assistant turn of picture and caption. Key: the record's content.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from solo.acquire.image_files import Names, Pictures
from solo.acquire.upstream import Record, canonical, existing, json_array, odd_turn
from solo.sample import IMAGE, Item, Message, Rejected, Sample, make_key, text

ROLES = ("user", "assistant")
TAG = re.compile(r"(?:Picture \d+: ?)?<img>(.*?)</img>\n?")


def read(
    location: Path,
    *,
    source: str,
    records: str,
    images: Names,
    caption_only: bool = False,
) -> Iterator[Sample | Rejected]:
    """Records in order."""
    pictures = Pictures(location, images)
    for place, record in json_array(existing(location, records)):
        yield record if isinstance(record, Rejected) else _sample(place, record, source, pictures, caption_only)


def _sample(place: str, record: Record, source: str, pictures: Pictures, caption_only: bool) -> Sample | Rejected:
    identity = record["id"] if isinstance(record.get("id"), str) else place
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        return Rejected(identity, "bad_record", "conversations is not a list of questions and answers")
    messages: list[Message] = []
    shown: list[bytes] = []
    for i, turn in enumerate(turns):
        value = turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(value, str) or turn.get("from") != ROLES[i % 2]:
            why = odd_turn(f"conversations[{i}]", turn, "from", "value", ROLES[i % 2])
            return Rejected(identity, "bad_record", why)
        content: list[Item] = []
        for j, part in enumerate(TAG.split(value)):
            if j % 2:
                data = pictures.read(part, identity)
                if isinstance(data, Rejected):
                    return data
                shown.append(data)
                content.append(IMAGE)
            elif part.strip():
                content.append(text(part))
        if not content:
            return Rejected(identity, "empty" if i % 2 else "bad_record", f"conversations[{i}].value is empty")
        messages.append({"role": ROLES[i % 2], "content": content})
    if caption_only:
        answers = [item for message in messages[1::2] for item in message["content"]]
        messages = [{"role": "assistant", "content": [*(IMAGE for _ in shown), *answers]}]
    return Sample(make_key(source, canonical(record)), source, tuple(shown), tuple(messages), {"id": identity})
