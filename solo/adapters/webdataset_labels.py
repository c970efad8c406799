"""ImageNet-21K winter-21: tars of `<wnid>_<n>.jpg` and a mapping of wnid to one name.

Sample: one assistant turn, image then label (the name with `_` and `-` as spaces, case kept, no template), as the
authors' converter makes it. Members with one stem are one record, as in webdataset. Key: the stem.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from solo.acquire.tars import IMAGE_SUFFIXES, tar_records
from solo.acquire.upstream import existing, matching
from solo.sample import IMAGE, Message, Rejected, Sample, make_key, text


def read(
    location: Path, *, source: str, mapping: str = "mapping.txt", shards: str = "*.tar"
) -> Iterator[Sample | Rejected]:
    """Samples of every tar, in order of file and member; a class that `mapping` lacks is `no_label`."""
    labels = _labels(existing(location, mapping))
    for path in matching(location, [shards]):
        for stem, members in tar_records(path, IMAGE_SUFFIXES):
            if isinstance(members, Rejected):
                yield members
            else:
                yield _sample(stem, next(iter(members.values()), None), labels, source)


def _sample(stem: str, data: bytes | None, labels: dict[str, str], source: str) -> Sample | Rejected:
    wnid = stem.rpartition("/")[2].split("_")[0]
    if data is None:
        return Rejected(stem, "missing_image", "no member of this record is an image")
    if wnid not in labels:
        return Rejected(stem, "no_label", f"the mapping has no name for {wnid}")
    if not data:
        return Rejected(stem, "empty", "the image has 0 bytes")
    label = labels[wnid].replace("_", " ").replace("-", " ")
    turn: Message = {"role": "assistant", "content": [IMAGE, text(label)]}
    meta = {"id": stem, "wnid": wnid, "label": label}
    return Sample(make_key(source, stem), source, (data,), (turn,), meta)


def _labels(path: Path) -> dict[str, str]:
    """Lines of exactly two fields; upstream reads no others."""
    fields = (line.split() for line in path.read_text("utf-8").splitlines())
    return {pair[0]: pair[1] for pair in fields if len(pair) == 2}
