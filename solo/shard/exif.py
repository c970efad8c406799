"""Metadata inside an image's bytes: whether it tells a place, and the same image without it.

In: encoded JPEG, PNG, WebP or GIF bytes, hostile ones included. Out: what the metadata says, or bytes that hold no
EXIF but the orientation, no XMP, IPTC, comment or text, no thumbnail or second picture and nothing behind the end.
Invariants: no pixel is decoded and no coded byte changes, so the picture stays the same to the last bit and is turned
the same way; what cannot be parsed comes back as it was up to where it was understood (and decodes no better); twice
is the same as once. Cost: a walk over the file's segments, some 0.1 ms.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator

from PIL import ExifTags, Image

from solo.sequence import patches

PNG = b"\x89PNG\r\n\x1a\n"
PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"tIME")
EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
SOI, EOI, SOS, COM, TEM = 0xD8, 0xD9, 0xDA, 0xFE, 0x01
APP = range(0xE0, 0xF0)
JFIF, ICC_PROFILE = 0xE0, 0xE2
JFIF_BYTES = 18  # of a segment without a thumbnail
APP_KEPT = {JFIF: b"JFIF\0", ICC_PROFILE: b"ICC_PROFILE\0", 0xEE: b"Adobe"}  # what a decoder reads
VP8X_EXIF, VP8X_XMP = 0x08, 0x04
GIF_KEPT = (b"NETSCAPE2.0", b"ANIMEXTS1.0", b"ICCRGBG1012")


def read(data: bytes) -> tuple[bool, bool]:
    """Whether the image tells a place, and whether it moves; false where its header says nothing."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")  # of broken EXIF, which then says nothing
            moves = image.format != "MPO" and bool(getattr(image, "is_animated", False))
            place = bool(Image.Image.getexif(image).get_ifd(ExifTags.IFD.GPSInfo))
    except Exception:  # parsers of hostile bytes raise anything
        return False, False
    return place or b"GPSLatitude" in data, moves  # XMP names it in plain text


def strip(data: bytes, *, profile: bool = True) -> bytes:
    """The same image without metadata but its orientation; another format comes back as it is.

    `profile=False` drops a JPEG's colour profile too, which moves no pixel: it only says what the colours mean.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data, _orientation(data), profile=profile)
    if data.startswith(PNG):
        return _png(data, _orientation(data))
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data, _orientation(data))
    return _gif(data) if data.startswith(b"GIF8") else data


def _orientation(data: bytes) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            turned = patches.orientation(data)
    except patches.ImageError:
        return 1
    return turned if turned in patches.TRANSPOSE else 1


def _tiff(orientation: int) -> bytes:
    """EXIF of one entry: orientation, SHORT."""
    return b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, ExifTags.Base.Orientation, 3, 1, orientation, 0, 0)


def _jpeg(data: bytes, orientation: int, *, profile: bool) -> bytes:
    out = [data[:2]]
    if orientation != 1:
        tag = EXIF + _tiff(orientation)
        out.append(b"\xff\xe1" + struct.pack(">H", len(tag) + 2) + tag)
    for marker, start, end in _segments(data):
        body = data[start + 4 : end]
        if marker == COM or (marker in APP and not body.startswith(APP_KEPT.get(marker, b"\0no"))):
            continue
        if marker == ICC_PROFILE and not profile:
            continue
        if marker == JFIF and end - start > JFIF_BYTES:
            size = struct.pack(">H", JFIF_BYTES - 2)
            out.append(data[start : start + 2] + size + data[start + 4 : start + JFIF_BYTES - 2] + b"\0\0")
            continue
        out.append(data[start:end])
    return b"".join(out)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment after SOI, coded data with its SOS; ends with EOI or the data."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1  # a fill byte
            continue
        if marker == EOI:
            break
        alone = marker == TEM or 0xD0 <= marker <= 0xD7
        end = at + 2 + (0 if alone else struct.unpack_from(">H", data, at + 2)[0])
        if marker == SOS:
            end = _coded_end(data, end)
        yield marker, at, min(end, len(data))
        at = end
    if at < len(data):  # EOI alone, or what is no segment and so ends what can be decoded
        yield EOI, at, at + 2 if data[at : at + 2] == b"\xff\xd9" else len(data)


def _coded_end(data: bytes, at: int) -> int:
    """Where the next marker begins that is no restart and no stuffed byte."""
    while (at := data.find(b"\xff", at)) >= 0 and at + 1 < len(data):
        if data[at + 1] != 0 and not 0xD0 <= data[at + 1] <= 0xD7 and data[at + 1] != 0xFF:
            return at
        at += 1 if data[at + 1] == 0xFF else 2
    return len(data)


def _png(data: bytes, orientation: int) -> bytes:
    out, at = [PNG], len(PNG)
    while at + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        end = min(at + 12 + size, len(data))
        if kind not in PNG_TEXT:
            out.append(data[at:end])
        if kind == b"IHDR" and orientation != 1:
            body = b"eXIf" + _tiff(orientation)
            out.append(struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)))
        at = end
        if kind == b"IEND":
            return b"".join(out)
    return b"".join([*out, data[at:]])


def _webp(data: bytes, orientation: int) -> bytes:
    out, at = [], 12
    end_of_file = min(len(data), 8 + struct.unpack_from("<I", data, 4)[0])
    while at + 8 <= end_of_file:
        kind, size = struct.unpack_from("<4sI", data, at)
        end = min(at + 8 + size + size % 2, end_of_file)
        chunk = data[at:end]
        if kind == b"VP8X" and len(chunk) > 8:
            flags = chunk[8] & ~(VP8X_EXIF | VP8X_XMP) | (VP8X_EXIF if orientation != 1 else 0)
            chunk = chunk[:8] + bytes([flags]) + chunk[9:]
        if kind not in (b"EXIF", b"XMP "):
            out.append(chunk)
        at = end
    if orientation != 1:
        tag = _tiff(orientation)
        out.append(b"EXIF" + struct.pack("<I", len(tag)) + tag)
    body = b"WEBP" + b"".join(out) + data[at:end_of_file]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _gif(data: bytes) -> bytes:
    """Without comments and application blocks but those that a player reads."""
    at = 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 0x80 else 0)
    out = [data[:at]]
    while at < len(data) and data[at] in b"\x21\x2c":
        begin, kind = at, data[at : at + 2]
        if kind[:1] == b"\x2c":
            packed = data[at + 9] if at + 9 < len(data) else 0
            at += 11 + (3 << (packed & 7) + 1 if packed & 0x80 else 0)  # with the code size
        else:
            at += 2
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
        block = data[begin:at]
        if kind != b"\x21\xfe" and (kind != b"\x21\xff" or block[3:14] in GIF_KEPT):
            out.append(block)
    return b"".join([*out, data[at : at + 1] if data[at : at + 1] == b";" else data[at:]])
