"""MMC4 documents: JSON lines of {"text_list", "image_info": [{"image_name", "matched_text_index"}], "url"}, and images.

Sample: one assistant turn of all sentences in order, each picture right before the sentence it is matched to, as the
authors' converter does. Key: the record's content. With `drop_incomplete` a document that lacks a picture is dropped
whole, else the document goes on without that picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from solo.acquire.image_files import Names, Pictures
from solo.acquire.upstream import Record, canonical, json_lines, matching
from solo.sample import IMAGE, Item, Message, Rejected, Sample, make_key, text


def read(
    location: Path,
    *,
    source: str,
    images: Names,
    documents: Sequence[str] = ("*.jsonl", "*.jsonl.zip", "*.jsonl.gz"),
    drop_incomplete: bool = True,
) -> Iterator[Sample | Rejected]:
    """Documents in order of file and line."""
    pictures = Pictures(location, images)
    for path in matching(location, documents):
        for place, record in json_lines(path):
            yield record if isinstance(record, Rejected) else _sample(place, record, source, pictures, drop_incomplete)


def _sample(place: str, record: Record, source: str, pictures: Pictures, strict: bool) -> Sample | Rejected:
    sentences, listed = record.get("text_list"), record.get("image_info")
    if not isinstance(sentences, list) or not all(isinstance(s, str) for s in sentences):
        return Rejected(place, "bad_record", "text_list is not a list of texts")
    if not any(s.strip() for s in sentences):
        return Rejected(place, "empty", "the document has no text")
    before: dict[int, list[bytes]] = {}
    for info in listed if isinstance(listed, list) else []:
        at = info.get("matched_text_index") if isinstance(info, dict) else None
        if not isinstance(at, int) or not 0 <= at < len(sentences):
            return Rejected(place, "bad_record", f"matched_text_index {at!r} names no sentence")
        data = pictures.read(info.get("image_name"), place)
        if not isinstance(data, Rejected):
            before.setdefault(at, []).append(data)
        elif strict:
            return data
    if not before:
        return Rejected(place, "missing_image", "image_info names no picture that is there")
    content: list[Item] = []
    for i, sentence in enumerate(sentences):
        content += [IMAGE for _ in before.get(i, ())]
        content += [text(sentence)] if sentence.strip() else []
    turn: Message = {"role": "assistant", "content": content}
    shown = tuple(data for i in sorted(before) for data in before[i])
    meta = {"id": place, **({"url": record["url"]} if isinstance(record.get("url"), str) else {})}
    return Sample(make_key(source, canonical(record)), source, shown, (turn,), meta)
