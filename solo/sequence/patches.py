"""Images to patches: SOLO's resize rule and channel-first patch vectors.

In: encoded image bytes. Out: a grid (rows, cols), or (n_patches, 3 * patch_px**2) uint8 in raster order.
Invariant: `grid(*image_size(data))` from the header alone equals the grid of the patches cut from the pixels.
Cost: a decode and one bilinear resize per image; patches are never stored, being many times the JPEG's bytes.

One treatment of every kind of image, so that a count made in `shard` holds in the loader: EXIF (or XMP)
orientation is applied; of an animation the first frame counts; alpha and colour-key transparency lie on
white; 16-bit grey keeps its high byte; palette, grey, bilevel, CMYK and YCbCr become RGB by Pillow's
conversion; colour profiles are ignored; floating-point pixels have no fixed range and are an error.

Two paths: `exact` is Pillow alone, as upstream, and the reference; `fast` is `solo.sequence.decode`, held to it by
tests.
"""

from __future__ import annotations

import io
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image

from solo.spec import Decode

if TYPE_CHECKING:
    from solo.sequence.raster import Room

TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS_SIDES = (5, 6, 7, 8)


class ImageError(ValueError):
    """These bytes are not an image that can be decoded."""


def grid(width: int, height: int, *, patch_px: int, max_side_px: int) -> tuple[int, int]:
    """(rows, cols) after SOLO's resize: native aspect, sides rounded up to patches, long side capped."""
    if max_side_px % patch_px:
        raise ValueError(f"max_side_px {max_side_px} is not a multiple of patch_px {patch_px}; make it one")
    long, short = max(width, height), min(width, height)
    if short < 1:
        raise ValueError(f"image {width}x{height} px has no area; drop it")
    long_px = min(-(-long // patch_px) * patch_px, max_side_px)
    short_px = long_px * short // long  # truncated, then rounded up to whole patches, as upstream
    n_long, n_short = long_px // patch_px, -(-short_px // patch_px)
    if n_short == 0:
        raise ValueError(
            f"image {width}x{height} px is too thin: short side {long_px} * {short} // {long} = 0 px; drop it"
        )
    return (n_short, n_long) if width >= height else (n_long, n_short)


def image_size(data: bytes | Image.Image, *, path: Decode = "exact") -> tuple[int, int]:
    """(width, height) as displayed, from the header alone."""
    if path == "fast":
        size: tuple[int, int] = _fast().image_size(data)
        return size
    image = _open(data)
    width, height = image.size
    return (height, width) if _orientation(image) in SWAPS_SIDES else (width, height)


def open_rgb(data: bytes | Image.Image) -> Image.Image:
    """The image as displayed, in RGB; ImageError where it cannot be decoded to the last pixel."""
    image = _open(data)
    orientation = _orientation(image)
    try:
        image.load()
        rgb = _to_rgb(image)
    except Exception as error:  # decoders raise OSError, SyntaxError, EOFError, struct.error, zlib.error, ...
        raise ImageError(f"image: cannot be decoded: {type(error).__name__}: {error}; drop it") from error
    return rgb.transpose(TRANSPOSE[orientation]) if orientation in TRANSPOSE else rgb


def at_grid(image: Image.Image, *, patch_px: int, max_side_px: int) -> Image.Image:
    """The image with the sides of its grid; the same image where it has them already."""
    rows, cols = grid(*image.size, patch_px=patch_px, max_side_px=max_side_px)
    size = (cols * patch_px, rows * patch_px)
    # Pillow's bilinear widens its support when it shrinks: what torchvision's Resize does to a PIL image.
    return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)


def patchify(
    data: bytes | Image.Image,
    *,
    patch_px: int,
    max_side_px: int,
    path: Decode = "exact",
    out: np.ndarray | Room | None = None,
) -> np.ndarray | Room:
    """(n_patches, 3 * patch_px**2) uint8; patches in raster order, index in a patch = channel, y, x.

    `out`, where given, is filled and returned: a pack's patches need no second copy. The fast path takes a `Room`
    too, whose patches are cut where they are read.
    """
    if path == "fast":
        cut: np.ndarray | Room = _fast().cut(data, patch_px=patch_px, max_side_px=max_side_px, out=out)
        return cut
    image = at_grid(open_rgb(data), patch_px=patch_px, max_side_px=max_side_px)
    rows, cols = image.height // patch_px, image.width // patch_px
    pixels = np.asarray(image).reshape(rows, patch_px, cols, patch_px, 3).transpose(0, 2, 4, 1, 3)
    if out is None:
        return pixels.reshape(rows * cols, 3 * patch_px * patch_px)
    assert isinstance(out, np.ndarray), "the exact path cuts patches itself"
    out.reshape(pixels.shape)[...] = pixels
    return out


def orientation(data: bytes) -> int:
    """EXIF (or XMP) orientation 1..8 as the header tells it."""
    return _orientation(_open(data))


def _fast() -> ModuleType:
    """The fast path, which needs torch and libjpeg-turbo: shards are counted without either."""
    try:
        from solo.sequence import decode
    except ImportError as error:
        raise ValueError(
            f"decode: fast needs simplejpeg ({error}); pip install simplejpeg, or say decode: exact"
        ) from None
    return decode


def _open(data: bytes | Image.Image) -> Image.Image:
    if isinstance(data, Image.Image):
        return data
    try:
        return Image.open(io.BytesIO(data))
    except Exception as error:  # as in a decode: plug-ins of Pillow raise many types on hostile headers
        raise ImageError(f"image: not readable: {type(error).__name__}: {error}; drop it") from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8 as the header tells it, before any pixel is read."""
    if image.format == "TIFF":
        return 1  # Pillow turns TIFF itself, and its `size` is already the turned one
    try:
        # The base class's method: PNG's own would decode all pixels to look for EXIF behind them.
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except Exception:  # a broken EXIF block says nothing, and the pixels may still be good
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode.startswith("I"):  # I;16, I;16B, and I as Pillow opens some 16-bit files
        wide = np.asarray(image).astype(np.int64)
        return Image.fromarray((wide.clip(0, 65_535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
