"""Webdataset tars of pictures with captions, as img2dataset writes them (CC3M): `<key>.jpg`, `<key>.txt`, `<key>.json`.

Sample: with a `question` a user turn (image, question) and an assistant turn (caption), else one assistant turn, image
then caption. Key: the stem and the content, since stems restart in some sets. `caption` is a suffix, or `json:field`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from solo.acquire.tars import IMAGE_SUFFIXES, tar_records
from solo.acquire.upstream import by_content, matching, parse
from solo.sample import IMAGE, Message, Rejected, Sample, text


def read(
    location: Path, *, source: str, shards: str = "*.tar", caption: str = "txt", question: str | None = None
) -> Iterator[Sample | Rejected]:
    """Samples of every tar, in order of file and member."""
    suffix, _, field = caption.partition(":")
    for path in matching(location, [shards]):
        for stem, members in tar_records(path, {*IMAGE_SUFFIXES, suffix}):
            place = f"{path.name}/{stem}"
            if isinstance(members, Rejected):
                yield members
                continue
            data = next((members[s] for s in IMAGE_SUFFIXES if s in members), None)
            said = _caption(members.get(suffix), field, place)
            if data is None:
                yield Rejected(place, "missing_image", "no member of this record is an image")
            elif not data:
                yield Rejected(place, "empty", "the image has 0 bytes")
            elif isinstance(said, Rejected):
                yield said
            else:
                meta = {"id": place, "stem": stem}
                yield by_content(source, [data], _messages(said, question), meta, identity=stem)


def _caption(raw: bytes | None, field: str, place: str) -> str | Rejected:
    if raw is None:
        return Rejected(place, "bad_record", "no member of this record is a caption")
    try:
        said: object = raw.decode()
    except UnicodeDecodeError:
        return Rejected(place, "bad_record", "the caption is not valid UTF-8 text")
    if field:
        record = parse(raw, place)
        if isinstance(record, Rejected):
            return record
        said = record.get(field)
    if not isinstance(said, str):
        return Rejected(place, "bad_record", f"the caption's JSON has no text {field!r}")
    return said if said.strip() else Rejected(place, "empty", "the caption is empty")


def _messages(said: str, question: str | None) -> tuple[Message, ...]:
    if question is None:
        return ({"role": "assistant", "content": [IMAGE, text(said)]},)
    asked: Message = {"role": "user", "content": [IMAGE, text(question)]}
    return (asked, {"role": "assistant", "content": [text(said)]})
