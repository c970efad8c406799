"""Signals of a sample's images.

A sample without images has NULLs, n_images 0 and decodes true (nothing failed). With several images width_px,
height_px, image_format, claimed_format, phash and colours are the first one's; min_side_px, aspect, megapixels, entropy
and flat_share the worst one's; decodes means all of them, animated and has_gps any; image_sha256 names the whole row of
them. Cost: one decode, shared; phash 0.5 ms more, texture and colours 1 to 2 ms a megapixel, the others none.
"""

from __future__ import annotations

import hashlib
import re
from typing import TypedDict
from urllib.parse import unquote, urlsplit

import imagehash
from PIL import Image

from solo.filter.pictures import Pictures
from solo.sample import Sample
from solo.shard import exif as exif_data

VERSIONS = {"size": 1, "hashes": 1, "claim": 1, "exif": 1, "texture": 1, "colours": 1}  # one more: measured again

CLAIMS = ("content_type", "mime_type", "mimetype", "url", "image_url", "image", "file_name")  # meta fields, in order
FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "jpe": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF"}
OTHERS = {"bmp", "tif", "tiff", "avif", "heic", "heif", "jxl", "svg", "ico"}  # claimed, but never opened
SUFFIX = re.compile(r"[./]([a-z]{3,4})(?:\+xml)?$")
COLOUR_CELLS = 4  # a side


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


class Claim(TypedDict):
    """Columns of `claim`: what the record says its picture is, against the bytes (`image_format` of `size`)."""

    claimed_format: str | None
    format_is_true: bool | None


class Exif(TypedDict):
    """Columns of `exif`. A place in the metadata never reaches a shard; this says how many had one."""

    has_gps: bool | None
    animated: bool | None


class Texture(TypedDict):
    """Columns of `texture`: bits of the grey levels' entropy (0 = one level), share of the commonest level."""

    entropy: float | None
    flat_share: float | None


class Colours(TypedDict):
    """Columns of `colours`: mean RGB of 4 x 4 cells, 96 hex digits; a perceptual hash sees no colour."""

    colours: str | None


def claim(sample: Sample, pictures: Pictures) -> Claim:
    """The format that the record's media type, URL or file name claims; NULL where none of them says any."""
    header = pictures.header(0) if pictures.images else None
    for name in CLAIMS:
        value = sample.meta.get(name)
        found = SUFFIX.search(unquote(urlsplit(value).path).lower()) if isinstance(value, str) else None
        if pictures.images and found and (found[1] in FORMATS or found[1] in OTHERS):
            claimed = FORMATS.get(found[1], found[1].upper())
            return Claim(claimed_format=claimed, format_is_true=header is not None and header.format == claimed)
    return Claim(claimed_format=None, format_is_true=None)


def exif(sample: Sample, pictures: Pictures) -> Exif:
    """Whether any image says where it was taken, and whether any moves; NULL where one cannot be read."""
    seen = [exif_data.read(data) for i, data in enumerate(pictures.images) if pictures.header(i) is not None]
    if not seen or len(seen) < len(pictures.images):
        return Exif(has_gps=None, animated=None)
    return Exif(has_gps=any(gps for gps, _ in seen), animated=any(moves for _, moves in seen))


def texture(sample: Sample, pictures: Pictures) -> Texture:
    """How much there is to see: a blank page has entropy 0 and flat_share 1."""
    grey = [_histogram(pictures.rgb(i)) for i in range(len(pictures.images))]
    known = [(entropy, flat) for one in grey if one is not None for entropy, flat in [one]]
    if not known or len(known) < len(grey):
        return Texture(entropy=None, flat_share=None)
    return Texture(entropy=min(entropy for entropy, _ in known), flat_share=max(flat for _, flat in known))


def colours(sample: Sample, pictures: Pictures) -> Colours:
    """The first image's colours by place."""
    pixels = pictures.rgb(0) if pictures.images else None
    if pixels is None:
        return Colours(colours=None)
    cells = pixels.resize((COLOUR_CELLS, COLOUR_CELLS), Image.Resampling.BOX)
    return Colours(colours=cells.tobytes().hex())


def _histogram(pixels: Image.Image | None) -> tuple[float, float] | None:
    if pixels is None:
        return None
    grey = pixels.convert("L")
    return round(float(grey.entropy()), 4), round(max(grey.histogram()) / (grey.width * grey.height), 4)
