"""Signals of a sample's images.

A sample without images has NULLs, n_images 0 and decodes true (nothing failed). With several images width_px,
height_px, image_format and phash are the first one's; min_side_px, aspect and megapixels the worst one's; decodes
means all of them; image_sha256 names the whole row of them. Cost: one decode, shared; phash 0.5 ms more.
"""

from __future__ import annotations

import hashlib
from typing import TypedDict

import imagehash

from solo.pictures import Pictures
from solo.sample import Sample

VERSION = 1


class Size(TypedDict):
    """Columns of `size`; sides are as displayed (after EXIF orientation)."""

    decodes: bool
    n_images: int
    width_px: int | None
    height_px: int | None
    min_side_px: int | None
    aspect: float | None
    megapixels: float | None
    image_format: str | None


class Hashes(TypedDict):
    """Columns of `hashes`."""

    image_sha256: str | None
    phash: str | None


def size(sample: Sample, pictures: Pictures) -> Size:
    """Whether every image decodes to its last pixel, and how large they are; one that does not makes all NULL."""
    n = len(pictures.images)
    row = Size(
        decodes=all(pictures.rgb(i) is not None for i in range(n)),
        n_images=n,
        width_px=None,
        height_px=None,
        min_side_px=None,
        aspect=None,
        megapixels=None,
        image_format=None,
    )
    headers = [h for i in range(n) if (h := pictures.header(i)) is not None]
    if not row["decodes"] or not headers:
        return row
    sides = [sorted((h.width_px, h.height_px)) for h in headers]
    row["width_px"], row["height_px"] = headers[0].width_px, headers[0].height_px
    row["min_side_px"] = min(short for short, _ in sides)
    row["aspect"] = max(long / short for short, long in sides)
    row["megapixels"] = max(short * long / 1e6 for short, long in sides)
    row["image_format"] = headers[0].format
    return row


def hashes(sample: Sample, pictures: Pictures) -> Hashes:
    """SHA-256 of the encoded bytes (of several: of their digests), and the first image's 64-bit phash in hex."""
    digests = [hashlib.sha256(data) for data in pictures.images]
    if not digests:
        return Hashes(image_sha256=None, phash=None)
    whole = digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(d.digest() for d in digests))
    pixels = pictures.rgb(0)
    return Hashes(image_sha256=whole.hexdigest(), phash=None if pixels is None else str(imagehash.phash(pixels)))
