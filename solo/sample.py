"""The one record that flows through the line, and its form in a tar.

A sample in a tar is `{key}.json` followed by `{key}.{i}.{jpg|png|webp|gif|bmp|tif|bin}`: readable with plain
`webdataset` and with `tar`. Invariant: the same samples in the same order give the same bytes, on any machine.
"""

from __future__ import annotations

import hashlib
import io
import json
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
    """Samples of an open tar (or of the slice of one that holds whole samples), in order."""
    record: dict[str, Any] | None = None
    images: list[bytes] = []
    with tarfile.open(fileobj=tar, mode="r|") as members:
        for member in members:
            file = members.extractfile(member)
            data = file.read() if file else b""
            if member.name.endswith(".json"):
                if record is not None:
                    yield _sample(record, images)
                record, images = json.loads(data), []
            else:
                images.append(data)
    if record is not None:
        yield _sample(record, images)


def read_samples(path: Path) -> Iterator[Sample]:
    """Samples of one tar, streamed in file order."""
    with path.open("rb") as file:
        yield from parse_samples(file)


def read_sample(path: Path, offset: int, length: int) -> Sample:
    """One sample by the ledger's byte range: one seek, one read."""
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(length)
    return next(parse_samples(io.BytesIO(data + bytes(2 * BLOCK_BYTES))))


def _sample(record: dict[str, Any], images: list[bytes]) -> Sample:
    return Sample(record["key"], record["source"], tuple(images), tuple(record["messages"]), record["meta"])
