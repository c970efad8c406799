"""Decode: the fast path from encoded image bytes to patches.

In: image bytes. Out: the grid and the patches of `solo.sequence.patches`, or a `Room` filled with pixels that are cut
where they are read. Invariants: every image keeps the treatment that `solo.sequence.patches` documents; JPEG pixels
equal Pillow's (both are libjpeg-turbo with the accurate DCT), and a resized value is at most two levels off (each pass
rounds), so no picture is below 42 dB. Cost: libjpeg at 340 megapixels a second, half as much again for a resize; a
picture stored at its grid is decoded in place. See `solo bench loader`.

What is not done, and why: DCT-scaled decoding. At half scale with a total shrink of 4, photographs keep 43 dB against
the exact path but gratings and line art fall to 21 dB, and nothing cheap tells them apart, as what is lost is not in
the half-size picture. `fastupsample` costs 36 dB, `fastdct` gains 5 % for 45 dB.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import simplejpeg
import torch
from PIL import Image

from solo.sequence import patches
from solo.sequence.raster import BYTES, Room

JPEG = b"\xff\xd8\xff"
APP1, START_OF_SCAN = 0xE1, 0xDA
RESIZE = torch.ops.aten._upsample_bilinear2d_aa.out  # what F.interpolate calls, with memory of our own
PLAIN_COLOURS = ("YCbCr", "Gray")  # CMYK, YCCK and Adobe RGB go through Pillow and its conversions
TURN: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].T,
    8: np.rot90,
}  # EXIF orientation -> what shows a (height, width) array upright

SCRATCH_BYTES = 32 << 20  # of one buffer; larger pictures get memory of their own


class Scratch(threading.local):
    """Buffers of one thread, used again for each picture: fresh pages cost a third of a decode."""

    def __init__(self) -> None:
        self.buffers: dict[str, np.ndarray] = {}
        self.header: tuple[bytes, tuple[int, int, int] | None] = (b"", None)  # of the picture asked about last

    def take(self, name: str, n_bytes: int) -> np.ndarray:
        """(n_bytes,) uint8 with anything in it, good until the same name is taken again."""
        if n_bytes > SCRATCH_BYTES:
            return np.empty(n_bytes, np.uint8)
        if name not in self.buffers or len(self.buffers[name]) < n_bytes:
            self.buffers[name] = np.empty(n_bytes, np.uint8)
        return self.buffers[name][:n_bytes]


scratch = Scratch()


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) as displayed, from the header alone."""
    found = _jpeg(data)
    if found is None:
        return patches.image_size(data)
    width, height, orientation = found
    return (height, width) if orientation in patches.SWAPS_SIDES else (width, height)


def cut(data: bytes, *, patch_px: int, max_side_px: int, out: np.ndarray | Room | None = None) -> np.ndarray | Room:
    """What `patches.patchify` gives, up to two levels where the picture is resized; a `Room` is only filled."""
    rows, cols = patches.grid(*image_size(data), patch_px=patch_px, max_side_px=max_side_px)
    if isinstance(out, Room):
        lay(data, out.picture(rows, cols))
        return out
    room = Room.of(np.empty((rows * cols * patch_px, BYTES * patch_px), np.uint8), patch_px)
    lay(data, room.picture(rows, cols))
    cut = np.asarray(room)
    if out is None:
        return cut
    out[...] = cut
    return out


def lay(data: bytes, out: np.ndarray) -> None:
    """Decode a picture and bring it to the size of `out`, (height, width) uint32 with red in the low byte."""
    shown = pixels(data, out)
    if shown.shape != out.shape:
        _resize(shown, out)
    elif shown is not out:
        out[...] = shown


def pixels(data: bytes, out: np.ndarray | None = None) -> np.ndarray:
    """(height, width) little-endian uint32, red in the low byte, as displayed; in `out` if it fits there as decoded."""
    found = _jpeg(data)
    if found is not None:
        width, height, orientation = found
        if out is not None and (out.shape != (height, width) or orientation in TURN):
            out = None
        room = scratch.take("decoded", BYTES * width * height) if out is None else out.view(np.uint8).reshape(-1)
        try:
            rgba = simplejpeg.decode_jpeg(data, "RGBA", buffer=room)
        except ValueError:  # strict: what libjpeg warns about; Pillow decides whether that is an image
            pass
        else:
            if out is not None:
                return out
            words: np.ndarray = rgba.view("<u4")[..., 0]
            turn = TURN.get(orientation)
            return words if turn is None else np.ascontiguousarray(turn(words))
    image = patches.open_rgb(data)
    return np.array(image.convert("RGBA")).view("<u4")[..., 0]


def _resize(shown: np.ndarray, out: np.ndarray) -> None:
    """Both (1, 4, h, w) channels last, the form that is worked on without unpacking: twice as fast."""
    whole = (torch.from_numpy(a.view(np.uint8).reshape(1, *a.shape, BYTES)) for a in (shown, out))
    source, target = (tensor.permute(0, 3, 1, 2) for tensor in whole)
    RESIZE(source, list(out.shape), False, None, None, out=target)


def _jpeg(data: bytes) -> tuple[int, int, int] | None:
    """`_header`, read once for the three who ask one after the other."""
    if scratch.header[0] is not data:
        scratch.header = (data, _header(data))
    return scratch.header[1]


def _header(data: bytes) -> tuple[int, int, int] | None:
    """(width, height as stored, EXIF orientation) of a JPEG that needs no conversion of Pillow's, else None."""
    if not data.startswith(JPEG):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    limit = Image.MAX_IMAGE_PIXELS
    if colours not in PLAIN_COLOURS or (limit is not None and width * height > limit):
        return None  # beyond the limit Pillow warns, then refuses, and so does this path
    return width, height, patches.orientation(data) if _has_app1(data) else 1


def _has_app1(data: bytes) -> bool:
    """True where EXIF or XMP may tell an orientation; damaged markers count as yes, Pillow then looks."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == APP1:
            return True
        if marker == START_OF_SCAN:
            return False
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return True
