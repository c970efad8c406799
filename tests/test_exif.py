import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from raw import picture

from solo.sequence.patches import ImageError, open_rgb
from solo.shard import exif

SECRET = b"Secret Place 17"
XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><exif:GPSLatitude>48,8.1N</exif:GPSLatitude>" + SECRET + b"</x:xmpmeta>"


def tag(orientation):
    found = Image.Exif()
    found[0x0112] = orientation
    found[0x010E] = SECRET.decode()
    found.get_ifd(0x8825).update({1: "N", 2: (48.0, 8.0, 1.0), 3: "E", 4: (11.0, 34.0, 2.0)})
    return found.tobytes()


def tagged(kind, orientation):
    save = {"exif": tag(orientation), "xmp": XMP}
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text("Comment", SECRET.decode())
        info.add_itxt("XML:com.adobe.xmp", XMP.decode(), zip=False)
        save = {"exif": tag(orientation), "pnginfo": info}
    if kind == "JPEG":
        save |= {"comment": SECRET, "progressive": orientation % 2 == 0}
    if kind == "GIF":
        save = {"comment": SECRET}
    return picture(60, 40, seed=3, kind=kind, **save)


def same_pixels(a, b):
    return np.array_equal(np.asarray(open_rgb(a)), np.asarray(open_rgb(b)))


@pytest.mark.parametrize("orientation", [1, 2, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_metadata_goes_and_the_picture_stays(kind, orientation):
    data = tagged(kind, orientation)
    assert SECRET in data
    assert exif.read(data) == (kind != "GIF", False)
    bare = exif.strip(data)
    assert SECRET not in bare
    assert b"GPS" not in bare
    assert exif.read(bare) == (False, False)
    assert same_pixels(data, bare)
    assert exif.strip(bare) == bare
    with Image.open(io.BytesIO(bare)) as image:
        kept = dict(Image.Image.getexif(image))
        assert kept == ({} if orientation == 1 or kind == "GIF" else {0x0112: orientation})


def test_a_profile_and_cmyk_survive():
    out = io.BytesIO()
    Image.new("CMYK", (16, 16), (10, 20, 30, 40)).save(out, "JPEG", icc_profile=b"p" * 200, exif=tag(3))
    bare = exif.strip(out.getvalue())
    assert b"ICC_PROFILE" in bare
    assert same_pixels(out.getvalue(), bare)


def test_what_lies_behind_the_end_goes():
    for kind in ("JPEG", "PNG", "WEBP"):
        data = picture(30, 20, kind=kind) + tagged("JPEG", 6)
        bare = exif.strip(data)
        assert SECRET not in bare
        assert same_pixels(data, bare)


def test_a_second_picture_goes():
    out = io.BytesIO()
    first, second = (Image.open(io.BytesIO(picture(32, 32, seed=i))) for i in (1, 2))
    first.save(out, "MPO", save_all=True, append_images=[second], exif=tag(1))
    bare = exif.strip(out.getvalue())
    assert Image.open(io.BytesIO(bare)).format == "JPEG"
    assert same_pixels(out.getvalue(), bare)


def test_a_thumbnail_in_the_jfif_segment_goes():
    data = picture(30, 20, kind="JPEG")
    assert data[2:4] == b"\xff\xe0" and data[18:20] == b"\0\0"
    pixels = bytes(range(2 * 3 * 3))
    dressed = data[:4] + struct.pack(">H", 16 + len(pixels)) + data[6:18] + b"\2\3" + pixels + data[20:]
    assert same_pixels(data, dressed)
    assert exif.strip(dressed) == data


def test_exif_after_the_pixels_of_a_png_goes_and_turns_nothing():
    data = picture(30, 20)
    body = b"eXIf" + tag(6)[6:]
    late = data[:-12] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + data[-12:]
    assert exif.strip(late) == data


def test_an_animation_keeps_its_frames():
    frames = [Image.open(io.BytesIO(picture(32, 32, seed=i))) for i in range(3)]
    for kind in ("GIF", "WEBP", "PNG"):
        out = io.BytesIO()
        frames[0].save(out, kind, save_all=True, append_images=frames[1:], duration=100, loop=0)
        assert exif.read(out.getvalue()) == (False, True)
        with Image.open(io.BytesIO(exif.strip(out.getvalue()))) as image:
            assert image.n_frames == 3
            assert image.info.get("loop") == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
@settings(max_examples=40)
@given(st.data())
def test_damaged_bytes_raise_nothing_and_show_the_same(kind, data):
    whole = bytearray(tagged(kind, 6))
    for _ in range(data.draw(st.integers(0, 3))):
        whole[data.draw(st.integers(4, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(4, len(whole)))])
    bare = exif.strip(cut)
    assert exif.strip(bare) == bare
    try:
        shown = np.asarray(open_rgb(cut))
    except ImageError:
        return
    assert np.array_equal(shown, np.asarray(open_rgb(bare)))
