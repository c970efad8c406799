"""Benchmarks: lines of {"question_id", "image"?, "question", "answer", "category"?}, and images.

Sample: a user turn (image, question) and an assistant turn (answer). Key: question_id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from solo.acquire.image_files import Pictures
from solo.acquire.upstream import Record, dialogue, existing, json_lines
from solo.sample import Rejected, Sample, make_key


def read(
    location: Path,
    *,
    source: str,
    questions: str = "questions.jsonl",
    images: str | Sequence[str] = "images.tar",
) -> Iterator[Sample | Rejected]:
    """Questions in order; `images` names uncompressed tars, zips or folders (`*` allowed)."""
    pictures = Pictures(location, images)
    for place, record in json_lines(existing(location, questions)):
        yield record if isinstance(record, Rejected) else _sample(place, record, source, pictures)


def _sample(place: str, record: Record, source: str, pictures: Pictures) -> Sample | Rejected:
    identity = record.get("question_id")
    if not isinstance(identity, str) or not identity:
        return Rejected(place, "bad_record", "question_id is not a string")
    name, question, answer = (record.get(field) for field in ("image", "question", "answer"))
    if not isinstance(question, str) or not question.strip():
        return Rejected(identity, "bad_record", "question is not a text")
    try:
        messages = dialogue([question, answer], n_images=0 if name is None else 1)
    except ValueError as error:
        return Rejected(identity, "bad_record", str(error))
    data = pictures.read(name, identity) if name is not None else b""
    if isinstance(data, Rejected):
        return data
    small = {"id": identity, "question_id": identity, "category": record.get("category"), "image": name}
    meta = {field: value for field, value in small.items() if isinstance(value, str)}
    return Sample(make_key(source, identity), source, (data,) if data else (), messages, meta)
