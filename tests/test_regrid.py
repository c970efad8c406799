"""Pictures at their grid: the same number of patches, upright, bare, and as near to the exact pixels as it says."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_decode import encode, noise, psnr, smooth

from solo.sequence.patches import grid, image_size, open_rgb, orientation, patchify
from solo.shard.regrid import FORMS, regrid
from solo.spec import GridPictures, Tokens

TOKENS = Tokens.model_validate(
    {
        "tokenizer": "mistral_common:data/tokenizer.model.v1",
        "tokenizer_sha256": "0" * 64,
        "patch_px": 16,
        "max_side_px": 128,
        "image_close": {"plain": "</vision>", "inst": "<vision>"},
    }
)
PX = {"patch_px": 16, "max_side_px": 128}
GOOD = GridPictures(jpeg_quality=90)
PLACE = Image.Exif()
PLACE[0x0112] = 1
PLACE.get_ifd(0x8825)[1] = "N"  # GPS


def line_art(width, height):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[::2, ::3] = (255, 0, 0)
    pixels[1::2] = (0, 0, 255)
    return Image.fromarray(pixels)


def bare(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return not image.getexif() and not set(image.info) - {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


@settings(max_examples=120)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from(["RGB", "L", "RGBA", "P", "CMYK"]),
    st.sampled_from(["JPEG", "PNG", "WEBP", "GIF"]),
    st.integers(1, 8),
    st.integers(1, 95),
)
def test_the_grid_stays_and_the_error_is_what_it_says(width, height, mode, form, turned, quality):
    if 128 * min(width, height) // max(width, height, 128) == 0:
        return
    if mode in (("RGBA", "P") if form == "JPEG" else ("CMYK",)):
        mode = "RGB"
    image = noise(width, height, quality, 4).convert("RGB" if mode == "CMYK" else mode)
    exif = Image.Exif()
    exif[0x0112] = turned
    data = encode(image.convert(mode), form, **({} if form == "GIF" else {"exif": exif}))
    stored = regrid(data, TOKENS, GridPictures(jpeg_quality=quality))
    rows, cols = grid(*image_size(data), **PX)
    assert image_size(stored.data) == (16 * cols, 16 * rows)
    assert grid(*image_size(stored.data), **PX) == (rows, cols)
    assert stored.form in FORMS and bare(stored.data) and orientation(stored.data) == 1
    exact, got = patchify(data, **PX), patchify(stored.data, **PX)
    assert np.array_equal(got, patchify(stored.data, **PX, path="fast"))
    if stored.psnr_db is None:
        assert np.array_equal(exact, got)
    else:
        assert stored.psnr_db == pytest.approx(psnr(exact, got), abs=0.006)
    again = regrid(stored.data, TOKENS, GridPictures(jpeg_quality=quality))
    assert again.data == stored.data and again.psnr_db is None


def test_a_plain_jpeg_on_its_grid_keeps_its_bytes():
    for image in (smooth(64, 48), smooth(128, 96).convert("L")):
        for progressive in (False, True):
            data = encode(image, "JPEG", quality=60, progressive=progressive)
            stored = regrid(data, TOKENS, GOOD)
            assert (stored.form, stored.data, stored.psnr_db) == ("as_came", data, None)


def test_metadata_goes_and_the_coded_pixels_stay():
    image = smooth(64, 48)
    plain = encode(image, "JPEG", quality=60)
    profile = bytes(70_000)  # several segments
    for dressed in (
        encode(image, "JPEG", quality=60, exif=PLACE),
        encode(image, "JPEG", quality=60, exif=PLACE, icc_profile=profile, comment=b"who and where"),
        encode(image, "JPEG", quality=60, xmp=b"<x:xmpmeta/>"),
        plain + b"and more",
        plain + encode(image, "JPEG", exif=PLACE),
        plain[:2] + b"\xff" + plain[2:],  # a fill byte
    ):
        assert dressed != plain
        stored = regrid(dressed, TOKENS, GOOD)
        assert (stored.form, stored.data, stored.psnr_db) == ("bare", plain, None)
    pair = encode(image, "MPO", quality=60, save_all=True, append_images=[image], exif=PLACE)
    stored = regrid(pair, TOKENS, GOOD)
    assert stored.form == "bare" and bare(stored.data) and np.array_equal(open_rgb(stored.data), open_rgb(pair))


def test_what_only_looks_like_a_plain_jpeg_is_compressed_again():
    exif = Image.Exif()
    exif[0x0112] = 3
    assert regrid(encode(smooth(64, 48), "JPEG", exif=exif), TOKENS, GOOD).form == "jpeg"
    assert regrid(encode(smooth(64, 48).convert("CMYK"), "JPEG"), TOKENS, GOOD).form == "jpeg"


def test_flat_colours_stay_exact_where_a_png_is_the_smaller_file():
    flat = Image.new("RGB", (96, 64), "navy")
    flat.paste("orange", (10, 10, 50, 40))
    clear = flat.convert("RGBA")
    clear.putalpha(128)
    for image in (flat, clear, flat.convert("P")):
        stored = regrid(encode(image, "PNG"), TOKENS, GOOD)
        assert stored.form == "png" and np.array_equal(open_rgb(stored.data), open_rgb(encode(image, "PNG")))
    assert regrid(encode(smooth(96, 64), "PNG"), TOKENS, GOOD).form == "jpeg"
    assert regrid(encode(flat, "WEBP"), TOKENS, GOOD).form == "jpeg"  # came lossy already


def test_colour_keeps_its_resolution_only_where_that_shows():
    def is_full(image):
        stored = regrid(encode(image, "PNG"), TOKENS, GOOD)
        return stored.form == "jpeg" and Image.open(io.BytesIO(stored.data)).layer[0][1:3] == (1, 1)

    grain = np.random.default_rng(1).normal(0, 12, (60, 100, 1))
    photograph = Image.fromarray((np.asarray(smooth(100, 60)) + grain).clip(0, 255).astype(np.uint8))
    assert is_full(line_art(101, 61).resize((100, 60), Image.Resampling.BILINEAR))
    assert not is_full(photograph)
