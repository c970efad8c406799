"""What adapters read: JSON records by line or in one array, and images by name in tars, zips or folders.

In: files as upstream published them. Out: records with an identity, image bytes. Invariant: a damaged record or member
is a Rejected with a status, never a crash; a missing file is a ValueError that names what its folder has; nothing
outside the named files is read. Cost: one pass over an archive's headers, then a seek and a read for each image.
"""

from __future__ import annotations

import io
import json
import logging
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from solo.sample import BLOCK_BYTES, IMAGE, Message, Rejected, text

log = logging.getLogger(__name__)

MEMBER_BYTES = 256 << 20  # a larger image is a decompression bomb or a mistake

Record = dict[str, Any]


def existing(location: Path, name: str) -> Path:
    """`location/name`, or ValueError with what the folder has."""
    path = location / name
    if not path.exists():
        have = sorted(p.name for p in location.iterdir()) if location.is_dir() else "no such folder"
        raise ValueError(f"{path}: no such file; {location} has {have}")
    return path


def matching(location: Path, patterns: Sequence[str]) -> list[Path]:
    """Files below `location` that match a pattern, in order of their relative path; a file stands for itself."""
    if location.is_file():
        return [location]
    found = {p for pattern in patterns for p in location.rglob(pattern) if p.is_file()}
    if not found:
        have = sorted(p.name for p in location.iterdir()) if location.is_dir() else "no such folder"
        raise ValueError(f"{location}: no file matches {list(patterns)}; it has {have}")
    return sorted(found, key=lambda p: p.relative_to(location).as_posix())


def printable(name: str) -> str:
    """A name that encodes as UTF-8: bytes a tar or JSON smuggled in become backslash escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def canonical(record: Record) -> bytes:
    """One byte string per record; the identity of records whose upstream gives none that is surely unique."""
    return json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def parse(raw: bytes | str, identity: str) -> Record | Rejected:
    """One JSON object, or why it is none; text that UTF-8 cannot hold is refused here, once for all adapters."""
    try:
        record = json.loads(raw)
        if isinstance(record, dict):
            canonical(record)
            return record
        return Rejected(identity, "bad_record", f"expected a JSON object, got {type(record).__name__}")
    except UnicodeError:
        return Rejected(identity, "bad_record", "not valid UTF-8 text")
    except (ValueError, RecursionError) as error:
        return Rejected(identity, "bad_record", f"not valid JSON: {type(error).__name__}")


def json_lines(path: Path) -> Iterator[tuple[str, Record | Rejected]]:
    """Records of a .jsonl, .jsonl.gz or .jsonl.zst file as (`file:line`, record); blank lines are no records."""
    n = 0
    with pa.input_stream(str(path), compression="detect") as stream, io.BufferedReader(stream) as lines:
        try:
            for n, line in enumerate(lines, start=1):
                if line.strip():
                    identity = f"{path.name}:{n}"
                    yield identity, parse(line, identity)
        except OSError:
            identity = f"{path.name}:{n + 1}"
            yield identity, Rejected(identity, "bad_record", "the file is damaged from here on")


def json_array(path: Path) -> Iterator[tuple[str, Record | Rejected]]:
    """Records of a file that is one JSON array, as (`file[i]`, record); the file's text is held whole."""
    try:
        items = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({type(error).__name__}); fetch the file again") from None
    if not isinstance(items, list):
        raise ValueError(f"{path}: expected a JSON array of records, got {type(items).__name__}")
    for i, item in enumerate(items):
        identity = f"{path.name}[{i}]"
        yield identity, parse(json.dumps(item), identity)


def tar_members(path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Members of an uncompressed tar in order; TarError where it is damaged, which tarfile itself takes for its end."""
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            yield tar, member
            tar.members = []  # type: ignore[attr-defined]  # a million TarInfos are a gigabyte
        with path.open("rb") as file:
            file.seek(tar.offset)
            if any(file.read(BLOCK_BYTES)):
                raise tarfile.ReadError("damaged header")


class Pictures:
    """Images by name in one or more uncompressed tars, zips or folders; the first that has a name answers."""

    def __init__(self, location: Path, names: str | Sequence[str]) -> None:
        self.sources: list[Callable[[str], bytes | None]] = []
        for name in [names] if isinstance(names, str) else names:
            paths = sorted(location.glob(name)) if "*" in name else [existing(location, name)]
            self.sources += [_opened(path) for path in paths]
        if not self.sources:
            have = sorted(p.name for p in location.iterdir())
            raise ValueError(f"{location}: nothing matches {names!r}; it has {have}")

    def read(self, name: object, identity: str) -> bytes | Rejected:
        """The image's bytes, or the record's rejection."""
        if not isinstance(name, str) or not name:
            return Rejected(identity, "bad_record", "image is not a file name")
        try:
            data = next((found for source in self.sources if (found := source(name)) is not None), None)
        except (ValueError, OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            return Rejected(identity, "bad_record", f"{name}: cannot be read ({type(error).__name__})")
        if data is None:
            return Rejected(identity, "missing_image", f"{name} is in none of the image archives")
        return data or Rejected(identity, "empty", f"{name} has 0 bytes")


def _opened(path: Path) -> Callable[[str], bytes | None]:
    if path.is_dir():
        root = path.resolve()
        return lambda name: _below(root, name)
    if path.suffix == ".zip":
        archive = zipfile.ZipFile(path)
        return lambda name: _zipped(archive, name)
    index: dict[str, tuple[int, int]] = {}
    try:
        for _, member in tar_members(path):
            if member.isreg():
                index[member.name.removeprefix("./")] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        if not index:
            remedy = "give an uncompressed tar, since members are read by index"
            raise ValueError(f"{path}: {error}; {remedy}") from None
        log.warning("%s: %s after %d members; images behind that are missing", path, error, len(index))
    file = path.open("rb")
    return lambda name: _sliced(file, index.get(name.removeprefix("./")))


def _below(root: Path, name: str) -> bytes | None:
    path = (root / name).resolve()
    inside = path.is_relative_to(root) and path.is_file()
    if inside and path.stat().st_size > MEMBER_BYTES:
        raise ValueError("too large")
    return path.read_bytes() if inside else None


def _zipped(archive: zipfile.ZipFile, name: str) -> bytes | None:
    if name not in archive.NameToInfo:
        return None
    if archive.NameToInfo[name].file_size > MEMBER_BYTES:
        raise ValueError("too large")
    return archive.read(name)


def _sliced(file: io.BufferedReader, place: tuple[int, int] | None) -> bytes | None:
    if place is None:
        return None
    if place[1] > MEMBER_BYTES:
        raise ValueError("too large")
    file.seek(place[0])
    data = file.read(place[1])
    if len(data) < place[1]:
        raise ValueError("the archive is cut short")
    return data


def dialogue(turns: object, *, has_image: bool) -> tuple[Message, ...]:
    """User and assistant in turn, the image (if any) first in the first user turn; ValueError says what is wrong."""
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise ValueError("turns are not a list of texts")
    if len(turns) % 2:
        raise ValueError(f"{len(turns)} turns; the last question has no answer")
    messages: list[Message] = []
    for i, turn in enumerate(turns):
        is_answer, image = i % 2 == 1, has_image and i == 0
        if not turn.strip() and not image:
            raise ValueError(f"turn {i} is empty")
        content = [*([IMAGE] if image else []), *([text(turn)] if turn.strip() else [])]
        messages.append({"role": "assistant" if is_answer else "user", "content": content})
    return tuple(messages)
