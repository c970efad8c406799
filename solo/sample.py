"""The one record that flows through the line, and its form in a tar.

A sample in a tar is `{key}.json` followed by `{key}.{i}.{jpg|png|webp|gif|bmp|tif|bin}`: readable with plain
`webdataset` and with `tar`. Invariant: the same samples in the same order give the same bytes, on any machine.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

SUFFIXES = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\x00": "tif",
    b"MM\x00*": "tif",
}

BLOCK_BYTES = 512
IMAGE_SUFFIXES = "|".join([*SUFFIXES.values(), "webp", "bin"])
MEMBER = re.compile(rf"(?P<key>[^./]+)\.(?:json|(?P<index>\d+)\.(?:{IMAGE_SUFFIXES}))")


class Item(TypedDict, total=False):
    """One piece of a message: {"type": "text", "text": ...} or {"type": "image"}, in order."""

    type: str
    text: str


class Message(TypedDict):
    """One turn in the chat-content form of Hugging Face processors."""

    role: str
    content: list[Item]


@dataclass(frozen=True, slots=True)
class Sample:
    """One image-text record; `images` are encoded bytes in the order of the {"type": "image"} items."""

    key: str
    source: str
    images: tuple[bytes, ...]
    messages: tuple[Message, ...]
    meta: dict[str, Any]  # small JSON values of the record worth a column later (url, label, category, ...)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record an adapter could not turn into a sample; it becomes an outcome row, never a missing one."""

    identity: str  # what names the record upstream: its id, member name or line number
    status: str  # one of solo.acquire.STATUSES
    error: str


def make_key(source: str, identity: str | bytes) -> str:
    """`{source}-{16 hex}` from the source's own id or the content; no dots, as webdataset splits there."""
    raw = identity if isinstance(identity, bytes) else identity.encode()
    return f"{source}-{hashlib.sha256(raw).hexdigest()[:16]}"


def image_suffix(data: bytes) -> str:
    """File suffix by magic bytes; `bin` where no known image format begins the data."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((suffix for magic, suffix in SUFFIXES.items() if data.startswith(magic)), "bin")


def text(value: str) -> Item:
    """A text item."""
    return {"type": "text", "text": value}


IMAGE: Item = {"type": "image"}


def write_sample(out: BinaryIO, sample: Sample) -> int:
    """Append one sample's tar members to `out`; returns the bytes written (a multiple of 512)."""
    record = {"key": sample.key, "source": sample.source, "messages": sample.messages, "meta": sample.meta}
    payload = json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    written = _member(out, f"{sample.key}.json", payload)
    for i, data in enumerate(sample.images):
        written += _member(out, f"{sample.key}.{i}.{image_suffix(data)}", data)
    return written


def end_tar(out: BinaryIO) -> None:
    """Write the two zero blocks that end a tar."""
    out.write(bytes(2 * BLOCK_BYTES))


def _member(out: BinaryIO, name: str, data: bytes) -> int:
    info = tarfile.TarInfo(name)  # mtime, uid and gid stay 0, so that bytes depend on content alone
    info.size = len(data)
    header = info.tobuf(tarfile.USTAR_FORMAT)
    padding = -len(data) % BLOCK_BYTES
    out.write(header)
    out.write(data)
    out.write(bytes(padding))
    return len(header) + len(data) + padding


def parse_samples(tar: BinaryIO) -> Iterator[Sample]:
    """Samples of an open tar (or of the slice of one that holds whole samples), in order; nothing else may be there.

    A member that is not a regular `{key}.json` or the key's next `{i}.{image suffix}` is an error that names it, so no
    archive can bring a pickle, a program or a link here: bytes are only ever JSON or handed to an image decoder.
    """
    record: dict[str, Any] | None = None
    images: list[bytes] = []
    for name, data in _members(tar):
        found = MEMBER.fullmatch(name)
        if found is None:
            raise ValueError(f"tar member {name!r} is neither a sample's JSON nor its image; make the tar again")
        if found["index"] is None:
            if record is not None:
                yield _sample(record, images)
            record, images = json.loads(data), []
            if record["key"] != found["key"]:
                raise ValueError(f"tar member {name!r} holds the key {record['key']!r}; make the tar again")
        elif record is None or (found["key"], int(found["index"])) != (record["key"], len(images)):
            raise ValueError(f"tar member {name!r} is not the next image of the sample before it; make the tar again")
        else:
            images.append(data)
    if record is not None:
        yield _sample(record, images)


def parse_sample(data: bytes) -> Sample:
    """The one sample that these bytes of a tar hold."""
    samples = list(parse_samples(io.BytesIO(data)))
    if len(samples) != 1:
        raise ValueError(f"{len(data)} bytes hold {len(samples)} samples, not one; make the ledger again")
    return samples[0]


def read_samples(path: Path) -> Iterator[Sample]:
    """Samples of one tar, streamed in file order."""
    with path.open("rb") as file:
        yield from parse_samples(file)


def read_sample(path: Path, offset: int, length: int) -> Sample:
    """One sample by the ledger's byte range: one seek, one read."""
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(length)
    if len(data) != length:
        raise ValueError(f"{path.name} ends {length - len(data)} bytes before {offset} + {length}; make it again")
    return parse_sample(data)


def read_messages(tar: BinaryIO, offset: int) -> tuple[Message, ...]:
    """The messages of the sample at a ledger's offset; its images are not read."""
    tar.seek(offset)
    name, data = next(_members(tar))
    if not name.endswith(".json"):
        raise ValueError(f"tar member {name!r} at {offset} is not a sample's JSON; make the tar again")
    return tuple(json.loads(data)["messages"])


def _members(tar: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of each member, as `_member` writes them; many times as fast as tarfile, and stricter."""
    while header := tar.read(BLOCK_BYTES):
        if not any(header):
            return  # the zero blocks that end a tar
        name, size = _header(header)
        padding = -size % BLOCK_BYTES
        data, rest = tar.read(size), tar.read(padding)  # apart: a picture cut from its padding would be copied
        if len(data) + len(rest) != size + padding:
            early = size + padding - len(data) - len(rest)
            raise ValueError(f"tar member {name!r} ends {early} bytes early; make the tar again")
        yield name, data


def _header(header: bytes) -> tuple[str, int]:
    """Name and size of a regular file in the one form `_member` writes: ustar, no prefix, octal numbers."""
    try:
        name = header[:100].rstrip(b"\0").decode()
        size, checksum = int(header[124:135], 8), int(header[148:154], 8)
    except ValueError:
        raise ValueError("tar header is damaged or of another form; make the tar again") from None
    form = header[154:156] == b"\0 " and header[257:263] == b"ustar\0" and size >= 0
    if not form or sum(header) - sum(header[148:156]) + 8 * 32 != checksum:  # the checksum counts itself as spaces
        raise ValueError("tar header is damaged or of another form; make the tar again")
    if header[156:157] != tarfile.REGTYPE:
        raise ValueError(f"tar member {name!r} is no regular file (type {header[156:157]!r}); make the tar again")
    return name, size


def _sample(record: dict[str, Any], images: list[bytes]) -> Sample:
    return Sample(record["key"], record["source"], tuple(images), tuple(record["messages"]), record["meta"])
