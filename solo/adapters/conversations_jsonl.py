"""The authors' instruction release (VLM-SFT): lines of {"conversations": [text or {"value": text}, ...], "image"?}.

Sample: user and assistant in turn; the image comes first in the first user turn and `<image>` marks are removed, as
the authors' SFT code does. Key: the record's content, since upstream gives no id. An empty answer is a bad record.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from solo.acquire.image_files import Names, Pictures
from solo.acquire.upstream import Record, canonical, dialogue, existing, json_lines
from solo.sample import Rejected, Sample, make_key

MARKS = ("<image>\n", "\n<image>", "<image>")


def read(
    location: Path,
    *,
    source: str,
    records: str = "all_data.jsonl",
    images: Names = "images.tar",
    flat: bool = False,
) -> Iterator[Sample | Rejected]:
    """Records in order; `images` and `flat` as for `Pictures`."""
    pictures = Pictures(location, images, flat=flat)
    for place, record in json_lines(existing(location, records)):
        yield record if isinstance(record, Rejected) else _sample(place, record, source, pictures)


def _sample(place: str, record: Record, source: str, pictures: Pictures) -> Sample | Rejected:
    identity = record["id"] if isinstance(record.get("id"), str) else place
    turns = record.get("conversations")
    if isinstance(turns, list):
        turns = [turn.get("value") if isinstance(turn, dict) else turn for turn in turns]
    if not turns:
        return Rejected(identity, "empty" if turns == [] else "bad_record", "no conversations")
    name = record.get("image")
    if isinstance(turns, list) and isinstance(turns[0], str):
        if name is None and "<image>" in turns[0]:
            return Rejected(identity, "missing_image", "the question shows an image but the record names none")
        for mark in MARKS:
            turns[0] = turns[0].replace(mark, "")
        turns[0] = turns[0].strip()
    try:
        messages = dialogue(turns, n_images=0 if name is None else 1)
    except ValueError as error:
        return Rejected(identity, "bad_record", f"conversations: {error}")
    data = pictures.read(name, identity) if name is not None else b""
    if isinstance(data, Rejected):
        return data
    meta = {"id": identity, **({"image": name} if name is not None else {})}
    return Sample(make_key(source, canonical(record)), source, (data,) if data else (), messages, meta)
