"""What adapters read: JSON records by line or in one array, and the files that hold them.

In: files as upstream published them. Out: records with an identity. Invariants: a damaged record or member, and one
that would fill the memory, is a Rejected with a status, never a crash; a missing file is a ValueError that names what
its folder has; a zip is read in place, so no name in it is ever a path. Cost: one pass; memory holds one line or one
item of an array (and a megabyte around it).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from solo.acquire.mistaken import dangling, mistaken
from solo.sample import IMAGE, Message, Rejected, Sample, make_key, text

CHUNK_BYTES = 1 << 20
ITEM_BYTES = 64 << 20  # a longer line is a bomb; an array's longer item is damage: what follows cannot be told from it
MEMBER_BYTES = 256 << 20  # a larger member of an archive is a bomb or a mistake
BETWEEN_ITEMS = re.compile(r"[\s,]*")

Record = dict[str, Any]


def existing(location: Path, name: str) -> Path:
    """`location/name`, or ValueError with what the folder has."""
    path = location / name
    if not path.exists() and not dangling(path):
        raise ValueError(f"{path}: no such file; {_have(location, name)}")
    _refuse_mistaken([path])
    return path


def _have(location: Path, wanted: str) -> str:
    """What a folder has in place of what is wanted, and whether that lies a folder further down."""
    if not location.is_dir():
        return f"{location} is no folder"
    if deeper := next((p for d in (f"*/{wanted}", f"*/*/{wanted}") for p in sorted(location.glob(d))), None):
        place = deeper.relative_to(location).as_posix()
        return f"it lies further down, at {place}: put that folder's files in {location} or correct acquire.location"
    names = sorted(p.name for p in location.iterdir())
    shown = f"{names[:20]} and {len(names) - 20:,} more" if len(names) > 20 else names
    return f"{location} has {shown}"


def _refuse_mistaken(paths: Sequence[Path]) -> None:
    for path in paths:
        if (path.is_file() or dangling(path)) and (what := mistaken(path)):
            raise ValueError(f"{path}: {what}")


def matching(location: Path, patterns: Sequence[str]) -> list[Path]:
    """Files below `location` that match a pattern, in order of their relative path; a file stands for itself."""
    if location.is_file():
        _refuse_mistaken([location])
        return [location]
    found = {p for pattern in patterns for p in location.rglob(pattern) if p.is_file() or dangling(p)}
    if not found:
        raise ValueError(f"{location}: no file matches {list(patterns)}; {_have(location, patterns[0])}")
    paths = sorted(found, key=lambda p: p.relative_to(location).as_posix())
    _refuse_mistaken(paths)
    return paths


def globbed(location: Path, pattern: str) -> list[Path]:
    """Files and folders that match the pattern from `location` itself, in order."""
    found = sorted(location.glob(pattern))
    if not found:
        raise ValueError(f"{location}: nothing matches {pattern!r}; {_have(location, pattern)}")
    _refuse_mistaken(found)
    return found


def printable(name: str) -> str:
    """A name that encodes as UTF-8: bytes a tar or JSON smuggled in become backslash escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def odd_turn(place: str, turn: object, role: str, value: str, due: str) -> str:
    """What is wrong with a turn of a record, by field."""
    if not isinstance(turn, dict):
        return f"{place} is no object"
    for field in (role, value):
        if field not in turn:
            keys = [printable(str(key)[:40]) for key in sorted(turn, key=str)[:10]]
            return f"{place}.{field} is absent; the turn has {keys}"
    if not isinstance(turn[value], str):
        return f"{place}.{value} is no text"
    return f"{place}.{role} is {printable(str(turn[role])[:40])!r} where {due!r} is due"


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
    """Records of a file of JSON lines as (`file:line`, record): plain, .gz, .zst, .lz4, .bz2 or the only one in a .zip.

    Blank lines are no records.
    """
    n = 0
    with _lines(path) as lines:
        try:
            for n, line in enumerate(_bounded(lines), start=1):
                identity = f"{path.name}:{n}"
                if line is None:
                    yield identity, Rejected(identity, "bad_record", f"a line of over {ITEM_BYTES} bytes")
                elif line.strip():
                    yield identity, parse(line, identity)
        except (OSError, zipfile.BadZipFile, EOFError):
            identity = f"{path.name}:{n + 1}"
            yield identity, Rejected(identity, "bad_record", "the file is damaged from here on")


def _bounded(lines: BinaryIO) -> Iterator[bytes | None]:
    """Lines; None for one of over ITEM_BYTES, which is passed over in pieces."""
    while line := lines.readline(ITEM_BYTES + 1):
        if len(line) <= ITEM_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = lines.readline(CHUNK_BYTES)
        yield None


@contextlib.contextmanager
def _lines(path: Path) -> Iterator[BinaryIO]:
    if path.suffix != ".zip":
        with pa.input_stream(str(path), compression="detect") as stream, io.BufferedReader(stream) as lines:
            yield lines
        return
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise ValueError(f"{path}: not a zip; fetch it again") from None
    with archive:
        names = [info.filename for info in archive.infolist() if not info.is_dir()]
        if len(names) != 1:
            raise ValueError(f"{path}: expected one file of JSON lines in the zip, found {names[:5]}")
        with archive.open(names[0]) as lines:
            yield lines  # type: ignore[misc]


def json_array(path: Path) -> Iterator[tuple[str, Record | Rejected]]:
    """Records of a file that is one JSON array, as (`file[i]`, record), one after the other."""
    for i, (_, raw) in enumerate(array_items(path)):
        identity = f"{path.name}[{i}]"
        yield identity, parse(raw, identity) if raw else Rejected(identity, "bad_record", "damaged from here on")


def array_items(path: Path) -> Iterator[tuple[int, bytes]]:
    """Byte offset and bytes of each item of a JSON array; b"" stands for all from where it is damaged."""
    decoder = json.JSONDecoder()
    with path.open("rb") as file:
        # Latin-1 gives one character for each byte, so places in the text are places in the file.
        buffer, start, at = file.read(CHUNK_BYTES).decode("latin-1"), 0, 0
        at = len(buffer) - len(buffer.removeprefix("\xef\xbb\xbf").lstrip())
        if buffer[at : at + 1] != "[":
            raise ValueError(
                f"{path}: expected a JSON array of records, found {buffer[at : at + 20]!r}; fetch it again"
            )
        at += 1
        while True:
            at = BETWEEN_ITEMS.match(buffer, at).end()  # type: ignore[union-attr]
            if buffer[at : at + 1] == "]":
                return
            end = _end_of_item(decoder, buffer, at)
            if end is not None and (end < len(buffer) or buffer[end - 1] in '}]"'):  # a number may go on
                yield start + at, buffer[at:end].encode("latin-1")
                at = end
                continue
            more = file.read(max(CHUNK_BYTES, len(buffer) - at)) if len(buffer) - at < ITEM_BYTES else b""
            if not more:
                yield start + at, b""
                return
            buffer, start, at = buffer[at:] + more.decode("latin-1"), start + at, 0


def _end_of_item(decoder: json.JSONDecoder, buffer: str, at: int) -> int | None:
    try:
        return decoder.raw_decode(buffer, at)[1]
    except (ValueError, RecursionError):
        return None


def by_content(
    source: str, images: Sequence[bytes], messages: tuple[Message, ...], meta: Record, *, identity: str = ""
) -> Sample:
    """A sample whose key is its content (and `identity`), for sets that give no id which is surely unique."""
    digests = [hashlib.sha256(data).hexdigest() for data in images]
    key = make_key(source, canonical({"identity": identity, "images": digests, "messages": messages}))
    return Sample(key, source, tuple(images), messages, meta)


def dialogue(turns: object, *, n_images: int) -> tuple[Message, ...]:
    """User and assistant in turn, the images first in the first user turn; ValueError says what is wrong."""
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise ValueError("turns are not a list of texts")
    if len(turns) % 2:
        raise ValueError(f"{len(turns)} turns; the last question has no answer")
    messages: list[Message] = []
    for i, turn in enumerate(turns):
        images = [IMAGE] * n_images if i == 0 else []
        if not turn.strip() and not images:
            raise ValueError(f"turn {i} is empty")
        content = [*images, *([text(turn)] if turn.strip() else [])]
        messages.append({"role": ("user", "assistant")[i % 2], "content": content})
    return tuple(messages)
