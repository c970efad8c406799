"""Tars as they are published, plain or gzipped: their members, and the records of webdataset tars.

In: a tar. Out: members with their places, or records of a run of members. Invariants: a damaged record or member, and
one that would fill the memory, is a Rejected with a status, never a crash; a tar is read in place, so no name in it is
ever a path. Cost: one pass; memory holds one record.
"""

from __future__ import annotations

import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from solo.acquire.gzipped import Damaged, Gzipped
from solo.acquire.upstream import CHUNK_BYTES, MEMBER_BYTES, printable
from solo.sample import BLOCK_BYTES, Rejected

GZIPPED = (".gz", ".tgz")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")


def tar_opened(path: Path, *, every_bytes: int = 0) -> BinaryIO | Gzipped:
    """A tar to be read from any place, also a gzipped one (`every_bytes`: as there)."""
    return Gzipped(path, every_bytes=every_bytes) if path.suffix in GZIPPED else path.open("rb")


def tar_members(file: BinaryIO | Gzipped) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Members of a tar in order; TarError where it is damaged, which tarfile itself takes for its end."""
    with tarfile.open(fileobj=cast(BinaryIO, file), mode="r:") as tar:
        for member in tar:
            yield tar, member
            tar.members = []  # type: ignore[attr-defined]  # a million TarInfos are a gigabyte
        file.seek(tar.offset)
        if any(file.read(BLOCK_BYTES)):
            raise tarfile.ReadError("damaged header")
        while isinstance(file, Gzipped) and file.read(CHUNK_BYTES):
            pass  # up to the sum of all bytes at its end


def tar_records(path: Path, suffixes: Collection[str]) -> Iterator[tuple[str, dict[str, bytes] | Rejected]]:
    """Records of a webdataset tar: (stem, suffix -> bytes of the members wanted); what follows damage is one Rejected.

    A record is a run of members with one stem, up to the first dot of the name; its suffix is what follows the last.
    Of members with one name the last counts, as where they are unpacked. Links, devices and names that begin with a
    dot are no members, as in webdataset.
    """
    stem, members = "", dict[str, bytes]()
    refused: Rejected | None = None
    damage = None
    try:
        for name, suffix, data in _wanted(path, suffixes):
            if name != stem and stem:
                yield stem, refused or members
            if name != stem:
                stem, members, refused = name, {}, None
            if isinstance(data, Rejected):
                refused = data
            elif data is not None:
                members[suffix] = data
    except (tarfile.TarError, OSError) as error:
        place = f"{path.name} after {stem or 'its beginning'}"
        why = f": {error}" if isinstance(error, Damaged) else ""
        damage = Rejected(place, "bad_record", f"the tar is damaged from here on{why}")
    if stem:
        yield stem, refused or members
    if damage:
        yield stem, damage


def _wanted(path: Path, suffixes: Collection[str]) -> Iterator[tuple[str, str, bytes | Rejected | None]]:
    """Stem, suffix and bytes of each member that is no folder; None where it is not wanted."""
    with tar_opened(path) as opened:
        for tar, member in tar_members(opened):
            stem, suffix, data = _stem(member), member.name.rpartition(".")[2].lower(), None
            if member.isreg() and suffix in suffixes:
                place, odd = f"{path.name}/{stem}", f"its {suffix} is sparse or of {member.size} bytes"
                file = tar.extractfile(member)
                assert file is not None
                data = Rejected(place, "bad_record", odd) if is_bomb(member) else file.read()
            if not member.isdir():
                yield stem, suffix, data


def is_bomb(member: tarfile.TarInfo) -> bool:
    """Whether a member is too large, or says that it is mostly holes: a kilobyte then reads as a terabyte of zeros."""
    return member.issparse() or member.size > MEMBER_BYTES


def _stem(member: tarfile.TarInfo) -> str:
    folder, _, name = printable(member.name.removeprefix("./")).rpartition("/")
    return f"{folder}/{name.split('.')[0]}" if folder else name.split(".")[0]
