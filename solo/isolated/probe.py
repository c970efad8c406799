"""What a picture's header declares, read without decoding: format, size, frames, and whether it has an end.

In: the bytes of a body. Out: a `Probe`, or Failed (`not_image`, `refused_format`, `undecodable`, `bomb`). Invariants:
no byte is decompressed; more pixels than allowed, over all frames, never reach a decoder; nor do the chunk, segment
and scan counts that cost a decoder minutes. Cost: microseconds for a JPEG; one step per chunk of a PNG or GIF.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from solo.isolated.rules import Failed, Rules

JPEG, PNG, GIF = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", (b"GIF87a", b"GIF89a")
OTHER = {  # formats that are pictures but are not decoded unless a spec asks for it
    "bmp": (b"BM",),
    "tiff": (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"),
    "jpeg2000": (b"\x00\x00\x00\x0cjP", b"\xff\x4f\xff\x51"),
    "jxl": (b"\xff\x0a", b"\x00\x00\x00\x0cJXL "),
    "hdr": (b"#?",),
    "exr": (b"\x76\x2f\x31\x01",),
    "ico": (b"\x00\x00\x01\x00",),
    "psd": (b"8BPS",),
    "svg": (b"<svg",),
    "pnm": (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf", b"PF"),
}
MAX_SEGMENTS = 4_096  # of a JPEG before its first scan
MAX_SCANS = 100  # a progressive JPEG has about ten; each costs a pass over all pixels
MAX_CHUNKS = 512  # of a PNG or WebP beside its pixel data
MAX_PIXEL_CHUNKS = 65_536
TEXT_BYTES = 1 << 20  # of compressed PNG text and profiles, which libpng inflates
START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


@dataclass(frozen=True, slots=True)
class Probe:
    """What the header says."""

    format: str
    width: int
    height: int
    n_frames: int = 1
    n_channels: int = 3


def probe(data: bytes, rules: Rules) -> Probe:
    """The header of a body, or Failed."""
    try:
        found = _find(data)
    except (struct.error, IndexError):
        raise Failed("undecodable", 200, "the image ends inside its header") from None
    if found.format not in rules.formats:
        raise Failed("refused_format", 200, f"{found.format} is not among the formats asked for", found.format)
    if found.format in OTHER:
        return found
    if found.width < 1 or found.height < 1:
        raise Failed("undecodable", 200, "the image has no pixels")
    if found.width * found.height * found.n_frames > rules.max_pixels:
        size = f"{found.width} x {found.height} x {found.n_frames}"
        raise Failed("bomb", 200, f"the header declares over {rules.max_pixels} pixels", size)
    return found


def _find(data: bytes) -> Probe:
    if data.startswith(JPEG):
        return _jpeg(data)
    if data.startswith(PNG):
        return _png(data)
    if data.startswith(GIF):
        return _gif(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    if data[4:8] == b"ftyp":
        return Probe("avif" if data[8:12] in (b"avif", b"avis") else "heif", 0, 0)
    for name, magics in OTHER.items():
        if data.startswith(magics):
            return Probe(name, 0, 0)
    raise Failed("not_image", 200, "the body begins with no known image signature")


def _jpeg(data: bytes) -> Probe:
    at, size, n_channels = 2, (0, 0), 3
    for _ in range(MAX_SEGMENTS):
        if data[at] != 0xFF:
            raise Failed("undecodable", 200, "the JPEG has no marker where one must be")
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        at += 1
        if marker == 0xDA:
            break
        if marker in START_OF_FRAME:
            height, width, n_channels = struct.unpack_from(">xxxHHB", data, at)
            size = (width, height)
        if marker == 0xD9:
            raise Failed("undecodable", 200, "the JPEG ends before its pixels")
        if marker != 0x01 and not 0xD0 <= marker <= 0xD8:
            at += max(struct.unpack_from(">H", data, at)[0], 2)
    else:
        raise Failed("bomb", 200, f"the JPEG has over {MAX_SEGMENTS} segments")
    if data.find(b"\xff\xd9", at) < 0:
        raise Failed("undecodable", 200, "the JPEG ends before its end marker")
    if data.count(b"\xff\xda", at) > MAX_SCANS:
        raise Failed("bomb", 200, f"the JPEG has over {MAX_SCANS} scans")
    return Probe("jpeg", *size, n_channels=n_channels)


def _png(data: bytes) -> Probe:
    if data[12:16] != b"IHDR" or data[8:12] != b"\x00\x00\x00\x0d":
        raise Failed("undecodable", 200, "the PNG does not begin with its header")
    width, height = struct.unpack_from(">II", data, 16)
    at, n_chunks, n_pixel_chunks, n_text, n_frames = 8, 0, 0, 0, 1
    while True:
        length, kind = struct.unpack_from(">I4s", data, at)
        if length > len(data) - at - 12:
            raise Failed("undecodable", 200, "the PNG ends inside a chunk")
        if kind in (b"IDAT", b"fdAT"):
            n_pixel_chunks += 1
        else:
            n_chunks += 1
        if kind == b"acTL":
            n_frames = max(struct.unpack_from(">I", data, at + 8)[0], 1)
        if kind in (b"zTXt", b"iTXt", b"iCCP", b"tEXt"):
            n_text += length
        if n_chunks > MAX_CHUNKS or n_pixel_chunks > MAX_PIXEL_CHUNKS or n_text > TEXT_BYTES:
            raise Failed("bomb", 200, "the PNG has more chunks or text than a picture needs")
        if kind == b"IEND":
            return Probe("png", width, height, n_frames)
        at += 12 + length


def _gif(data: bytes) -> Probe:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    n_frames = 0
    while at < len(data) and data[at] != 0x3B:
        if data[at] == 0x21:  # an extension: its label, then blocks
            at += 2
        elif data[at] == 0x2C:
            n_frames += 1
            local = data[at + 9]
            at += 11 + (3 << ((local & 7) + 1) if local & 0x80 else 0)
        else:
            raise Failed("undecodable", 200, "the GIF has a block of no known kind")
        while data[at]:
            at += data[at] + 1
        at += 1
    return Probe("gif", width, height, max(n_frames, 1))


def _webp(data: bytes) -> Probe:
    kind = data[12:16]
    if struct.unpack_from("<I", data, 4)[0] + 8 > len(data) + 1:
        raise Failed("undecodable", 200, "the WebP is shorter than it says")
    if kind == b"VP8 ":
        if data[23:26] != b"\x9d\x01\x2a":
            raise Failed("undecodable", 200, "the WebP has no key frame")
        width, height = struct.unpack_from("<HH", data, 26)
        return Probe("webp", width & 0x3FFF, height & 0x3FFF)
    if kind == b"VP8L":
        if data[20] != 0x2F:
            raise Failed("undecodable", 200, "the WebP has no lossless header")
        bits = struct.unpack_from("<I", data, 21)[0]
        return Probe("webp", (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1)
    if kind != b"VP8X":
        raise Failed("undecodable", 200, "the WebP has no picture")
    width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    at, n_chunks, n_frames = 12, 0, 0
    while at + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, at)
        n_frames += name == b"ANMF"
        n_chunks += name != b"ANMF"
        if n_chunks > MAX_CHUNKS:
            raise Failed("bomb", 200, "the WebP has more chunks than a picture needs")
        at += 8 + length + (length & 1)
    return Probe("webp", width, height, max(n_frames, 1))
