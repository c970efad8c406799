import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from solo.sequence.patches import ImageError, grid, image_size, open_rgb, patchify

PX = {"patch_px": 32, "max_side_px": 1024}
WHITE = (255, 255, 255)


def encode(image, form, **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def pixels(image):
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((448, 448), (14, 14)),
        ((640, 480), (15, 20)),
        ((500, 375), (12, 16)),
        ((1920, 1080), (18, 32)),
        ((1080, 1920), (32, 18)),
        ((336, 336), (11, 11)),
        ((1025, 1024), (32, 32)),
        ((1, 1), (1, 1)),
    ],
)
def test_checked_grids(size, expected):
    assert grid(*size, **PX) == expected


def test_a_hair_has_no_grid():
    with pytest.raises(ValueError, match="10000x5 px is too thin"):
        grid(10_000, 5, **PX)
    with pytest.raises(ValueError, match="too thin"):
        grid(5, 10_000, **PX)
    with pytest.raises(ValueError, match="no area"):
        grid(0, 5, **PX)
    with pytest.raises(ValueError, match="not a multiple"):
        grid(64, 64, patch_px=32, max_side_px=1000)


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_grid_is_upstreams_rule(width, height):
    long, short = max(width, height), min(width, height)
    long_px = min(int(np.ceil(long / 32)) * 32, 1024)
    short_px = int(np.ceil(int(long_px * short / long) / 32)) * 32
    if short_px == 0:
        with pytest.raises(ValueError, match="too thin"):
            grid(width, height, **PX)
        return
    rows, cols = grid(width, height, **PX)
    assert (max(rows, cols) * 32, min(rows, cols) * 32) == (long_px, short_px)
    assert rows == cols or (cols > rows) == (width > height)
    assert 1 <= rows * cols <= 1024


def test_patches_in_raster_order_rebuild_the_image():
    image = noise(96, 64)
    patches = patchify(encode(image, "PNG"), **PX)  # sides are whole patches: nothing is resized
    assert patches.shape == (6, 3072) and patches.dtype == np.uint8
    array = np.asarray(image)
    for i, patch in enumerate(patches):
        row, col = divmod(i, 3)
        for c, y, x in [(0, 0, 0), (1, 0, 31), (2, 31, 0), (2, 17, 5)]:
            assert patch[c * 1024 + y * 32 + x] == array[row * 32 + y, col * 32 + x, c]
    rebuilt = patches.reshape(2, 3, 3, 32, 32).transpose(0, 3, 1, 4, 2).reshape(64, 96, 3)
    assert np.array_equal(rebuilt, array)


@pytest.mark.parametrize("size", [(336, 336), (70, 33), (1500, 700)])
def test_resize_is_pillows_bilinear(size):
    image = noise(*size)
    rows, cols = grid(*size, **PX)
    expected = np.asarray(image.resize((cols * 32, rows * 32), Image.Resampling.BILINEAR))
    got = patchify(encode(image, "PNG"), **PX).reshape(rows, cols, 3, 32, 32)
    assert np.array_equal(got.transpose(0, 3, 1, 4, 2).reshape(expected.shape), expected)


def test_palette_keeps_its_colours():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    for form in ("PNG", "GIF"):
        assert pixels(open_rgb(encode(image, form))) == [(10, 20, 30), (200, 100, 50)]


def test_transparency_lies_on_white():
    clear, half, solid = (9, 9, 9, 0), (255, 0, 0, 128), (1, 2, 3, 255)
    image = Image.new("RGBA", (3, 1))
    for x, pixel in enumerate((clear, half, solid)):
        image.putpixel((x, 0), pixel)
    got = pixels(open_rgb(encode(image, "PNG")))
    assert got == [WHITE, (255, 127, 127), (1, 2, 3)]
    assert pixels(open_rgb(encode(Image.new("LA", (1, 1), (7, 0)), "PNG"))) == [WHITE]
    palette = Image.new("P", (1, 1))
    palette.putpalette([10, 20, 30])
    assert pixels(open_rgb(encode(palette, "PNG", transparency=0))) == [WHITE]
    key = encode(Image.new("RGB", (1, 1), (4, 5, 6)), "PNG", transparency=(4, 5, 6))
    assert pixels(open_rgb(key)) == [WHITE]


def test_cmyk_becomes_rgb():
    assert pixels(open_rgb(encode(Image.new("CMYK", (1, 1), (255, 0, 0, 0)), "TIFF"))) == [(0, 255, 255)]
    jpeg = open_rgb(encode(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"))
    assert min(jpeg.getpixel((3, 3))) >= 250  # no ink is white, not black: Adobe's inversion is undone


def test_sixteen_bits_keep_the_high_byte():
    levels = np.array([[0, 255, 256, 0x7FFF, 0xFFFF]], np.uint16)
    for form in ("PNG", "TIFF"):
        got = np.asarray(open_rgb(encode(Image.fromarray(levels), form)))[0, :, 0]
        assert got.tolist() == [0, 0, 1, 127, 255]


def test_grey_and_bilevel():
    assert pixels(open_rgb(encode(Image.new("L", (1, 1), 77), "PNG"))) == [(77, 77, 77)]
    assert pixels(open_rgb(encode(Image.new("1", (1, 1), 1), "PNG"))) == [WHITE]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = noise(5, 3)
    options = {"lossless": True} if form == "WEBP" else {}
    data = encode(image, form, exif=exif, **options)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert shown.size == ((3, 5) if orientation >= 5 else (5, 3))
    assert image_size(data) == shown.size
    assert np.array_equal(np.asarray(open_rgb(data)), np.asarray(shown))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(form):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("black", "white", "white")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encode(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames > 1
    assert set(pixels(open_rgb(data))) == {(0, 0, 0)}


def test_what_cannot_be_decoded_is_one_error():
    jpeg = encode(noise(64, 64), "JPEG")
    assert image_size(jpeg[: len(jpeg) // 2]) == (64, 64)  # the header is whole
    for bad in (jpeg[: len(jpeg) // 2], b"", b"<html>", encode(Image.new("F", (2, 2)), "TIFF")):
        with pytest.raises(ImageError):
            open_rgb(bad)
    with pytest.raises(ImageError):
        image_size(b"<html>")


@given(
    st.integers(1, 80),
    st.integers(1, 80),
    st.sampled_from(["RGB", "L", "RGBA", "P", "LA", "1"]),
    st.sampled_from(["PNG", "WEBP", "TIFF"]),
)
def test_the_header_tells_the_number_of_patches(width, height, mode, form):
    data = encode(Image.new(mode, (width, height)), form)
    rows, cols = grid(*image_size(data), **PX)
    patches = patchify(data, **PX)
    assert patches.shape == (rows * cols, 3072)
    assert np.array_equal(patches, patchify(data, **PX))
