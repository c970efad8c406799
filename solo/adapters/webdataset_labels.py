"""ImageNet-21K winter-21: tars of `<wnid>_<n>.jpg` and a mapping of wnid to one name.

Sample: one assistant turn, image then label (the name with `_` and `-` as spaces, case kept, no template), as the
authors' converter makes it. Members with one stem are one record, as in webdataset. Key: the stem.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

from solo.sample import IMAGE, Message, Rejected, Sample, make_key, text
from solo.upstream import existing, matching, printable, tar_members

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")


def read(
    location: Path, *, source: str, mapping: str = "mapping.txt", shards: str = "*.tar"
) -> Iterator[Sample | Rejected]:
    """Samples of every tar, in order of file and member; a class that `mapping` lacks is `no_label`."""
    labels = _labels(existing(location, mapping))
    for path in matching(location, [shards]):
        for stem, data in _records(path):
            yield data if isinstance(data, Rejected) else _sample(stem, data, labels, source)


def _records(path: Path) -> Iterator[tuple[str, bytes | Rejected | None]]:
    """Stem and image of each run of members with one stem; what follows damage is one rejected record."""
    stem, image, damage = "", None, None
    try:
        for tar, member in tar_members(path):
            if member.isdir():
                continue
            name, data = _stem(member), None
            if member.isreg() and member.name.rpartition(".")[2].lower() in IMAGE_SUFFIXES:
                file = tar.extractfile(member)
                assert file is not None
                data = file.read()
            if name != stem and stem:
                yield stem, image
            stem, image = name, data if name != stem or data is not None else image
    except (tarfile.TarError, OSError):
        place = f"{path.name} after {stem or 'its beginning'}"
        damage = Rejected(place, "bad_record", "the tar is damaged from here on")
    if stem:
        yield stem, image
    if damage:
        yield stem, damage


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


def _stem(member: tarfile.TarInfo) -> str:
    folder, _, name = printable(member.name.removeprefix("./")).rpartition("/")
    return f"{folder}/{name.split('.')[0]}" if folder else name.split(".")[0]


def _labels(path: Path) -> dict[str, str]:
    """Lines of exactly two fields; upstream reads no others."""
    fields = (line.split() for line in path.read_text("utf-8").splitlines())
    return {pair[0]: pair[1] for pair in fields if len(pair) == 2}
