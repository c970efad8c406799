"""The fast path against the exact one: the same pictures, the same patches, up to two levels after a resize."""

import io
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from solo.sequence import decode
from solo.sequence.patches import ImageError, image_size, patchify

PX = {"patch_px": 32, "max_side_px": 256}
ImageFile.MAXBLOCK = 1 << 22  # Pillow guesses too small a buffer for progressive noise
SAMPLE = Path(__file__).parents[1] / "datasets_spec" / "sample"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")


def encode(image, form, **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def noise(width, height, seed=0, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def smooth(width, height, seed=0):
    return noise(width // 8 + 1, height // 8 + 1, seed).resize((width, height), Image.Resampling.BICUBIC)


def psnr(a, b):
    error = ((a.astype(np.float64) - b) ** 2).mean()
    return 10 * np.log10(255**2 / error) if error else np.inf


def both(data, **px):
    exact = patchify(data, **PX | px)
    fast = patchify(data, **PX | px, path="fast")
    assert image_size(data) == image_size(data, path="fast")
    assert fast.shape == exact.shape and fast.dtype == np.uint8
    return exact, fast


sides = st.integers(1, 400)


@settings(max_examples=150)
@given(
    st.tuples(sides, sides),
    st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    st.integers(1, 95),
    st.booleans(),
    st.sampled_from(["RGB", "L"]),
    st.integers(0, 9),
)
def test_a_jpeg_is_the_same_within_two_levels(size, subsampling, quality, progressive, mode, seed):
    width, height = size
    if 256 * min(width, height) // max(width, height, 256) == 0:
        return
    image = (noise if seed % 2 else smooth)(width, height, seed).convert(mode)
    options = {"subsampling": subsampling} if mode == "RGB" else {}
    exact, fast = both(encode(image, "JPEG", quality=quality, progressive=progressive, **options))
    assert np.abs(exact.astype(int) - fast).max() <= 2


@settings(max_examples=80)
@given(
    sides,
    sides,
    st.sampled_from(["RGB", "L", "RGBA", "P", "LA", "1", "I;16", "CMYK"]),
    st.sampled_from(["PNG", "WEBP", "TIFF", "JPEG"]),
    st.integers(0, 9),
)
def test_every_mode_keeps_its_treatment(width, height, mode, form, seed):
    if 256 * min(width, height) // max(width, height, 256) == 0:
        return
    if mode == "I;16":
        wide = np.random.default_rng(seed).integers(0, 65_536, (height, width), np.uint16)
        image, form = Image.fromarray(wide), "PNG" if form != "TIFF" else form
    elif mode == "CMYK":
        image, form = noise(width, height, seed, 4).convert("RGB").convert("CMYK"), "JPEG" if form != "TIFF" else form
    else:
        image = noise(width, height, seed, 4)
        image = image.convert(mode)
        if form == "JPEG" and mode not in ("RGB", "L"):
            form = "PNG"
    options = {"lossless": True} if form == "WEBP" else {}
    exact, fast = both(encode(image, form, **options))
    assert np.abs(exact.astype(int) - fast).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(64, 96), (70, 45), (300, 500)])
def test_exif_orientation(orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exact, fast = both(encode(smooth(*size), "JPEG", exif=exif))
    assert np.abs(exact.astype(int) - fast).max() <= 2
    if size == (64, 96):
        assert np.array_equal(exact, fast)  # sides of whole patches: nothing is resized


def test_an_orientation_behind_a_colour_profile_and_in_xmp_counts():
    exif = Image.Exif()
    exif[0x0112] = 6
    profiled = encode(smooth(64, 32), "JPEG", exif=exif, icc_profile=bytes(70_000))
    plain = encode(smooth(64, 32), "JPEG")
    packet = (
        b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'><r tiff:Orientation=\"6\"/></x:xmpmeta>"
    )
    xmp = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(packet) + 2) + packet + plain[2:]
    for data in (profiled, xmp):
        assert image_size(data) == (32, 64)
        exact, fast = both(data)
        assert np.array_equal(exact, fast)


def test_what_libjpeg_warns_about_is_pillows_to_judge():
    data = encode(smooth(96, 64), "JPEG", quality=90)
    odd = [
        data + b"trailing rubbish",
        data[: len(data) // 2],  # truncated
        data[:200] + b"\xff\xd0" + data[202:],
        data[:-200] + bytes(198) + data[-2:],
        data[:30],
        b"\xff\xd8\xff",
    ]
    judged = []
    for bad in odd:
        try:
            exact = patchify(bad, **PX)
        except ImageError:
            judged.append(False)
            with pytest.raises(ImageError):
                patchify(bad, **PX, path="fast")
        else:
            judged.append(True)
            assert np.array_equal(exact, patchify(bad, **PX, path="fast"))
    assert True in judged and False in judged


def test_the_fast_decoder_is_really_used(monkeypatch):
    data = encode(smooth(96, 64), "JPEG")
    expected = patchify(data, **PX)
    monkeypatch.setattr(decode.patches, "open_rgb", lambda _: pytest.fail("Pillow decoded a plain JPEG"))
    assert np.array_equal(patchify(data, **PX, path="fast"), expected)


@pytest.mark.parametrize("path", ["exact", "fast"])
def test_patches_are_written_where_the_pack_wants_them(path):
    data = encode(smooth(100, 70), "JPEG")
    alone = patchify(data, **PX, path=path)
    room = np.full((len(alone) + 4, 3072), 7, np.uint8)
    given_room = room[2:-2]
    assert patchify(data, **PX, path=path, out=given_room) is given_room
    assert np.array_equal(room[2:-2], alone)
    assert (room[:2] == 7).all() and (room[-2:] == 7).all()


def test_other_patch_sizes():
    for patch_px in (8, 14, 16):
        exact, fast = both(encode(smooth(50, 40), "JPEG"), patch_px=patch_px, max_side_px=patch_px * 5)
        assert np.abs(exact.astype(int) - fast).max() <= 2


def sample_pictures():
    for path in sorted(SAMPLE.rglob("*")):
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.endswith(SUFFIXES):
                        yield f"{path.name}:{member.name}", tar.extractfile(member).read()
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith(SUFFIXES):
                        yield f"{path.name}:{name}", archive.read(name)
        elif path.suffix in SUFFIXES:
            yield path.name, path.read_bytes()


def test_all_pictures_of_the_sample_recipe_stay_above_40_db():
    n_pictures, worst, largest = 0, np.inf, 0
    for name, data in sample_pictures():
        try:
            exact = patchify(data, patch_px=32, max_side_px=1024)
        except ValueError:  # truncated and too thin ones are part of the sample
            continue
        fast = patchify(data, patch_px=32, max_side_px=1024, path="fast")
        difference = np.abs(exact.astype(np.int16) - fast)
        n_pictures, largest = n_pictures + 1, max(largest, int(difference.max()))
        if difference.any():
            worst = min(worst, psnr(exact, fast))
        assert worst >= 40, name
    assert n_pictures > 4000 and largest <= 2
