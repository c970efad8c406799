"""The images of one sample, decoded lazily and at most once each, however many signals look at them.

In: encoded bytes as they came, hostile ones included. Out: a `Header` and RGB pixels, or None without them.
Invariant: no bytes make it raise; what `rgb` returns is what `patches` will cut, so what decodes here decodes in
the loader. Only FORMATS are opened, and only up to MAX_PIXELS. Cost: header 0.1 ms, then one decode.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from solo.sequence import patches

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_PIXELS = 64_000_000  # above any camera's usual picture; with alpha a decode peaks near 19 bytes a pixel, 1.2 GB


@dataclass(frozen=True, slots=True)
class Header:
    """What an image says about itself before a pixel is decoded; sides as displayed (after EXIF orientation)."""

    format: str
    width_px: int
    height_px: int


class Pictures:
    """The images of one sample; `n_decodes` counts the decodes that were begun."""

    def __init__(self, images: Sequence[bytes]) -> None:
        self.images = tuple(images)
        self.n_decodes = 0
        self._headers: dict[int, Header | None] = {}
        self._pixels: dict[int, Image.Image | None] = {}

    def header(self, i: int) -> Header | None:
        """Format and displayed size, or None where no allowed format begins the data or it is a bomb."""
        if i not in self._headers:
            self._headers[i] = read_header(self.images[i])
        return self._headers[i]

    def rgb(self, i: int) -> Image.Image | None:
        """The pixels, or None where they cannot be decoded to the last one. Signals share it: do not draw on it."""
        if i not in self._pixels:
            self._pixels[i] = self._decode(i)
        return self._pixels[i]

    def _decode(self, i: int) -> Image.Image | None:
        if self.header(i) is None:
            return None
        self.n_decodes += 1
        try:
            return patches.open_rgb(self.images[i])
        except patches.ImageError:
            return None


def read_header(data: bytes) -> Header | None:
    """Probe the header alone; see `Pictures.header`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of bombs and broken EXIF; both are judged below
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                kind, n_pixels = image.format, image.width * image.height
            if not 0 < n_pixels <= MAX_PIXELS:
                return None
            width_px, height_px = patches.image_size(data)
    except Exception:  # parsers of hostile bytes raise anything: OSError, SyntaxError, ValueError, struct.error, ...
        return None
    # A camera's multi-picture file is a JPEG with more behind it, and Pillow reads the first picture.
    return Header("JPEG" if kind == "MPO" else str(kind), width_px, height_px)
