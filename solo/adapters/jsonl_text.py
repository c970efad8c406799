"""SlimPajama: one JSON document per line, {"text", "meta": {"redpajama_set_name"}}, plain, .gz, .zst or .lz4.

Sample: one assistant turn of text, as the authors' converter makes it. Key: the record's content, since upstream
gives no id; a repeated document is therefore one sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from solo.acquire.upstream import Record, canonical, json_lines, matching
from solo.sample import Message, Rejected, Sample, make_key, text


def read(
    location: Path,
    *,
    source: str,
    exclude_sets: Sequence[str] = (),
    files: Sequence[str] = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.jsonl.lz4"),
) -> Iterator[Sample | Rejected]:
    """Documents in order of file and line, without those whose `redpajama_set_name` is in `exclude_sets`."""
    for path in matching(location, files):
        for identity, record in json_lines(path):
            yield record if isinstance(record, Rejected) else _sample(identity, record, source, exclude_sets)


def _sample(identity: str, record: Record, source: str, exclude_sets: Sequence[str]) -> Sample | Rejected:
    meta = record.get("meta")
    category = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
    body = record.get("text")
    if category in exclude_sets:
        return Rejected(identity, "excluded_set", f"{category} is excluded")
    if not isinstance(body, str):
        return Rejected(identity, "bad_record", "text is not a string")
    if exclude_sets and not isinstance(category, str):
        return Rejected(identity, "bad_record", "meta.redpajama_set_name is absent, so exclusion cannot be judged")
    if not body.strip():
        return Rejected(identity, "empty", "text is empty")
    turn: Message = {"role": "assistant", "content": [text(body)]}
    kept = {"id": identity, **({"category": category} if isinstance(category, str) else {})}
    return Sample(make_key(source, canonical(record)), source, (), (turn,), kept)
