"""UltraChat: one JSON dialogue per line, {"id", "data": [question, answer, ...]}; text only.

Sample: user and assistant in turn. Key: the record's content, since ids restart in each upstream file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from solo.acquire.upstream import Record, canonical, dialogue, json_lines, matching
from solo.sample import Rejected, Sample, make_key


def read(
    location: Path,
    *,
    source: str,
    files: Sequence[str] = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.jsonl.lz4"),
) -> Iterator[Sample | Rejected]:
    """Dialogues in order of file and line."""
    for path in matching(location, files):
        for place, record in json_lines(path):
            yield record if isinstance(record, Rejected) else _sample(place, record, source)


def _sample(place: str, record: Record, source: str) -> Sample | Rejected:
    turns = record.get("data")
    if turns == []:
        return Rejected(place, "empty", "the dialogue has no turns")
    try:
        messages = dialogue(turns, n_images=0)
    except ValueError as error:
        return Rejected(place, "bad_record", f"data: {error}")
    meta = {"id": place, **({"upstream_id": record["id"]} if isinstance(record.get("id"), str) else {})}
    return Sample(make_key(source, canonical(record)), source, (), messages, meta)
