"""Images by name, in tars (gzipped or not), zips or folders.

In: archives below a location, and the names that records use. Out: encoded bytes. Invariant: a name that is nowhere, or
a damaged member, is a Rejected with a status, never a crash; nothing outside the named archives and folders is read,
whatever a name or a link says; of members with one name the last counts, as where they are unpacked.
Cost: one pass over each archive's headers (about 200 bytes of memory an image), then a seek and a read for each image;
a gzipped tar is unpacked once for its headers, keeps 3 MB of memory for each GB, and unpacks on average half of
EVERY_BYTES more for an image that does not lie behind the one before it.
"""

from __future__ import annotations

import logging
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from solo.acquire.gzipped import Damaged, Gzipped
from solo.acquire.tars import is_bomb, tar_members, tar_opened
from solo.acquire.upstream import MEMBER_BYTES, existing, globbed
from solo.sample import Rejected

log = logging.getLogger(__name__)

EVERY_BYTES = 16 << 20

Names = str | Sequence[str] | Mapping[str, str]


class Pictures:
    """Images by name in one or more archives or folders; the first that has a name answers.

    `names` are paths below `location` (`*` allowed). As a mapping, {"coco/": "train2017.zip"}, an image whose name
    begins with the key is looked up there without it. `flat`: only the last part of a path counts, on both sides, as
    after `unzip -j`.
    """

    def __init__(self, location: Path, names: Names, *, flat: bool = False) -> None:
        self.flat = flat
        self.sources: list[tuple[str, Callable[[str], bytes | None]]] = []
        if isinstance(names, str):
            names = [names]
        pairs = names.items() if isinstance(names, Mapping) else [("", name) for name in names]
        for prefix, name in pairs:
            paths = globbed(location, name) if "*" in name else [existing(location, name)]
            self.sources += [(prefix, _opened(path, flat)) for path in paths]

    def read(self, name: object, identity: str) -> bytes | Rejected:
        """The image's bytes, or the record's rejection."""
        if not isinstance(name, str) or not name:
            return Rejected(identity, "bad_record", "image is not a file name")
        try:
            data = self._find(name)
        except (ValueError, OSError, zipfile.BadZipFile, tarfile.TarError, NotImplementedError, RuntimeError) as error:
            return Rejected(identity, "bad_record", f"{name}: cannot be read ({type(error).__name__})")
        if data is None:
            return Rejected(identity, "missing_image", f"{name} is in none of the image archives")
        return data or Rejected(identity, "empty", f"{name} has 0 bytes")

    def _find(self, name: str) -> bytes | None:
        for prefix, source in self.sources:
            if not name.startswith(prefix):
                continue
            asked = name.removeprefix(prefix).removeprefix("./")
            if (data := source(_last(asked) if self.flat else asked)) is not None:
                return data
        return None


def first_name(location: Path, names: Names) -> str:
    """What the first of the archives or folders begins with, in words."""
    wanted = [names] if isinstance(names, str) else list(names.values() if isinstance(names, Mapping) else names)
    path = globbed(location, wanted[0])[0]
    if path.is_dir():
        name = next((p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()), "nothing")
    elif path.suffix == ".zip":
        name = next((i.filename for i in zipfile.ZipFile(path).infolist() if not i.is_dir()), "nothing")
    else:
        with tar_opened(path) as file:
            name = next((member.name for _, member in tar_members(file) if member.isreg()), "nothing")
    return f"{path.name} begins with {name}"


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _opened(path: Path, flat: bool) -> Callable[[str], bytes | None]:
    if path.is_dir():
        root = path.resolve()
        return lambda name: _below(root, name)
    if path.suffix == ".zip":
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path}: {error}; fetch it again") from None
        members = {_last(i.filename) if flat else i.filename: i for i in archive.infolist() if not i.is_dir()}
        return lambda name: _zipped(archive, members.get(name))
    index: dict[str, tuple[int, int]] = {}
    file = tar_opened(path, every_bytes=EVERY_BYTES)
    try:
        for _, member in tar_members(file):
            if member.isreg():
                name = member.name.removeprefix("./")
                size = MEMBER_BYTES + 1 if is_bomb(member) else member.size
                index[_last(name) if flat else name] = (member.offset_data, size)
    except Damaged as error:
        raise ValueError(f"{path}: {error}; fetch it again") from None
    except tarfile.TarError as error:
        if not index:
            raise ValueError(f"{path}: {error}; give a tar, gzipped or not, a zip or a folder") from None
        log.warning("%s: %s after %d members; images behind that are missing", path, error, len(index))
    return lambda name: _sliced(file, index.get(name))


def _below(root: Path, name: str) -> bytes | None:
    path = (root / name).resolve()
    inside = path.is_relative_to(root) and path.is_file()
    if inside and path.stat().st_size > MEMBER_BYTES:
        raise ValueError("too large")
    return path.read_bytes() if inside else None


def _zipped(archive: zipfile.ZipFile, member: zipfile.ZipInfo | None) -> bytes | None:
    if member is None:
        return None
    if member.file_size > MEMBER_BYTES:
        raise ValueError("too large")
    return archive.read(member)


def _sliced(file: BinaryIO | Gzipped, place: tuple[int, int] | None) -> bytes | None:
    if place is None:
        return None
    if place[1] > MEMBER_BYTES:
        raise ValueError("too large")
    file.seek(place[0])
    data = file.read(place[1])
    if len(data) < place[1]:
        raise ValueError("the archive is cut short")
    return data
