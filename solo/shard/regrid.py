"""Regrid: a picture at the patch grid it will be cut to, so that the loader only decodes.

In: encoded image bytes and a quality. Out: the bytes to store, which of FORMS they are, and the PSNR of a JPEG against
the exact pixels. Invariants: the stored picture's grid is the original's, so no token count moves; it has no EXIF,
profile, comment or second picture, stands upright and is RGB by the treatment of `solo.sequence.patches`; pixels that
already lie on the grid are not compressed twice. Cost: a decode, a resize, one or two encodes: 40 to 75 ms a megapixel.

Bytes depend on the libjpeg and zlib inside Pillow, as patches do: pinned, and integer arithmetic in both.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from solo.sequence import patches
from solo.shard import exif
from solo.spec import GridPictures, Tokens

FORMS = ("as_came", "bare", "jpeg", "png")  # bare: as it came but for its metadata, the same pixels
JPEG = b"\xff\xd8\xff"
LOSSLESS = (b"\x89PNG", b"GIF8")
# 4:2:0 decodes a third faster than 4:4:4 at quality 90 (365 against 270 megapixels a second of one core) and costs
# photograph-like pictures 0.5 dB; saturated line art loses up to 10 dB to it (31 instead of 42), at any quality.
# So 4:4:4 only where 4:2:0 is under 40 dB and 4:4:4 wins clearly: noise alone is not better for it.
ENOUGH_DB, CLEARLY_DB = 40.0, 3.0
SUBSAMPLED, FULL = "4:2:0", "4:4:4"


@dataclass(frozen=True, slots=True)
class Stored:
    """One picture as a shard keeps it."""

    data: bytes
    form: str  # one of FORMS
    psnr_db: float | None  # against the exact pixels; None where the pixels are these


def regrid(data: bytes, tokens: Tokens, spec: GridPictures) -> Stored:
    """The picture at its grid."""
    shown = patches.open_rgb(data)
    exact = patches.at_grid(shown, patch_px=tokens.patch_px, max_side_px=tokens.max_side_px)
    if exact.size == shown.size and (kept := _bare(data, shown)) is not None:
        return Stored(kept, "as_came" if kept == data else "bare", None)
    jpeg, psnr_db = _jpeg(exact, spec.jpeg_quality)
    if data.startswith(LOSSLESS):
        # Flat colours on the grid: a PNG is then exact and mostly the smaller one; resized ones rarely are.
        png = _encode(exact, "PNG")
        if len(png) <= len(jpeg):
            return Stored(png, "png", None)
    return Stored(jpeg, "jpeg", psnr_db)


def _jpeg(exact: Image.Image, quality: int) -> tuple[bytes, float | None]:
    data = _encode(exact, "JPEG", quality=quality, subsampling=SUBSAMPLED, optimize=True)
    error = _error(exact, data)
    if error is None or error >= ENOUGH_DB:
        return data, error
    full = _encode(exact, "JPEG", quality=quality, subsampling=FULL, optimize=True)
    full_error = _error(exact, full)
    wins = full_error is None or full_error >= error + CLEARLY_DB
    return (full, full_error) if wins else (data, error)


def _encode(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def _error(exact: Image.Image, data: bytes) -> float | None:
    """PSNR in dB of an encoded picture, to a hundredth; None where it is exact."""
    difference = np.asarray(exact).astype(np.int32) - np.asarray(patches.open_rgb(data))
    squares = int((difference * difference).sum(dtype=np.int64))
    return round(10 * math.log10(255 * 255 * difference.size / squares), 2) if squares else None


def _bare(data: bytes, shown: Image.Image) -> bytes | None:
    """An upright JPEG without its metadata; None where it is no such thing, or would show other pixels."""
    if not data.startswith(JPEG) or patches.orientation(data) != 1:
        return None
    if Image.open(io.BytesIO(data)).mode not in ("RGB", "L"):
        return None
    kept = exif.strip(data, profile=False)
    try:
        same = kept == data or patches.open_rgb(kept).tobytes() == shown.tobytes()
    except patches.ImageError:
        return None
    return kept if same else None
