import inspect
import io
import struct
import zlib

import imagehash
import pytest
from PIL import Image
from raw import picture, sample

from solo.filter.measure import META, Signal, find, find_all, measure, versions
from solo.filter.pictures import MAX_PIXELS, Pictures
from solo.sample import IMAGE, Sample, text
from solo.signals import clip, image, nsfw, pii
from solo.signals import sample as sample_signals
from solo.signals import text as text_signals
from solo.spec import SpecError

JPEG = picture(80, 60, seed=1, kind="JPEG")
GIVEN = {"clip.similarity": {"weights": "clip", "revision": "sha256:0"}}


def measured(name, one):
    return measure(find(name), one, Pictures(one.images))


def bomb():
    """A PNG of 65 million pixels in a few kilobytes: header and zlib stream are valid."""
    side = 8_100
    assert side * side > MAX_PIXELS

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((side // 8 + 2) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def tiff():
    out = io.BytesIO()
    Image.new("RGB", (40, 40)).save(out, "TIFF")
    return out.getvalue()


BAD = {
    "empty": b"",
    "text": b"<html>not found</html>",
    "header only": JPEG[:30],
    "truncated jpeg": JPEG[: len(JPEG) // 2],
    "truncated png": picture(80, 60, seed=1)[:-40],
    "truncated webp": picture(80, 60, seed=1, kind="WEBP", lossless=True)[:-60],
    "truncated gif": picture(80, 60, seed=1, kind="GIF")[:-40],
    "bomb": bomb(),
    "format not allowed": tiff(),
}


def test_size_of_good_images():
    row = measured("image.size", sample(1, images=[JPEG]))
    assert row == {
        "decodes": True,
        "n_images": 1,
        "width_px": 80,
        "height_px": 60,
        "min_side_px": 60,
        "aspect": 80 / 60,
        "megapixels": 0.0048,
        "image_format": "JPEG",
    }


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_formats_that_decode(kind):
    row = measured("image.size", sample(1, images=[picture(32, 16, kind=kind)]))
    assert (row["decodes"], row["image_format"], row["aspect"]) == (True, kind, 2.0)


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_decode_is_false_and_null(name):
    one = sample(1, images=[BAD[name]])
    row = measured("image.size", one)
    assert (row.pop("decodes"), row.pop("n_images")) == (False, 1)
    assert set(row.values()) == {None}
    hashes = measured("image.hashes", one)
    assert hashes["phash"] is None
    assert len(hashes["image_sha256"]) == 64


@pytest.mark.parametrize("name", ["empty", "text", "bomb", "format not allowed"])
def test_no_pixel_of_a_hostile_image_is_decoded(name):
    pictures = Pictures([BAD[name]])
    assert pictures.rgb(0) is None
    assert pictures.n_decodes == 0


def test_the_bomb_would_go_off():
    with Image.open(io.BytesIO(bomb())) as image:
        assert image.width * image.height > MAX_PIXELS
        image.load()
    assert len(bomb()) < 100_000


def test_exif_orientation_turns_the_sides():
    exif = Image.Exif()
    exif[0x0112] = 6
    row = measured("image.size", sample(1, images=[picture(80, 60, kind="JPEG", exif=exif.tobytes())]))
    assert (row["width_px"], row["height_px"]) == (60, 80)


def test_several_images():
    a, b = picture(80, 60, seed=1), picture(20, 200, seed=2)
    row = measured("image.size", sample(1, images=[a, b]))
    assert (row["n_images"], row["width_px"], row["height_px"]) == (2, 80, 60)
    assert (row["min_side_px"], row["aspect"], row["megapixels"]) == (20, 10.0, 0.0048)
    assert measured("image.size", sample(1, images=[a, b[:50]]))["decodes"] is False
    one, both = (measured("image.hashes", sample(1, images=x)) for x in ([a], [a, b]))
    assert one["phash"] == both["phash"] == str(imagehash.phash(Image.open(io.BytesIO(a))))
    assert one["image_sha256"] != both["image_sha256"]


def test_no_image_is_no_failure():
    one = sample(1)
    row = measured("image.size", one)
    assert (row.pop("decodes"), row.pop("n_images")) == (True, 0)
    assert set(row.values()) == {None}
    assert measured("image.hashes", one) == {"image_sha256": None, "phash": None}


def test_each_image_is_decoded_once_for_all_signals():
    one = sample(1, images=[JPEG, picture(9, 9)])
    pictures = Pictures(one.images)
    images = ["image.size", "image.hashes", "image.claim", "image.exif", "image.texture", "image.colours"]
    for signal in find_all([*images, "text.size", "text.language", "sample.record"]):
        measure(signal, one, pictures)
    assert pictures.n_decodes == 2


def test_text_size():
    messages = (
        {"role": "user", "content": [IMAGE, text(" What is it? ")]},
        {"role": "assistant", "content": [text("A cat.")]},
    )
    row = measured("text.size", Sample("k", "web", (JPEG,), messages, {}))
    assert (row["n_chars"], row["n_words"], row["n_assistant_chars"]) == (17, 5, 6)
    assert row["text_sha256"] == measured("text.size", sample(2, caption="What is it?\nA cat."))["text_sha256"]


@pytest.mark.parametrize("caption", [None, "", " \n "])
def test_without_text_there_is_no_hash_and_no_language(caption):
    one = sample(1, images=[JPEG], caption=caption)
    assert measured("text.size", one) == {"n_chars": 0, "n_words": 0, "n_assistant_chars": 0, "text_sha256": None}
    assert measured("text.language", one) == {"language": None, "language_score": None}


@pytest.mark.parametrize(
    ("caption", "language"),
    [
        ("a small cat sits on the mat\nand looks out of the window", "en"),
        ("eine kleine Katze sitzt auf der Matte\r\nund schaut aus dem Fenster", "de"),
        ("un petit chat est assis sur le tapis et regarde par la fenetre", "fr"),
    ],
)
def test_language(caption, language):
    row = measured("text.language", sample(1, caption=caption))
    assert row["language"] == language
    assert 0.5 < row["language_score"] <= 1


def test_record_hash_looks_at_content_alone():
    a, b = sample(1, images=[JPEG], label="cat"), sample(2, images=[JPEG], label="dog")
    assert measured("sample.record", a) == measured("sample.record", b)
    assert measured("sample.record", a) != measured("sample.record", sample(1, images=[JPEG], caption="other"))


def test_meta_columns_are_strings():
    one = sample(1, Label="cat", score=0.5, tags=["a", "b"], none=None)
    assert measured("sample.meta", one) == {"meta_label": "cat", "meta_score": "0.5", "meta_tags": '["a", "b"]'}
    with pytest.raises(ValueError, match="in case only"):
        measured("sample.meta", sample(1, Label="cat", label="dog"))


def test_meta_is_always_measured_once():
    assert [s.name for s in find_all(["text.size"])] == ["text.size", META]
    assert [s.name for s in find_all([META, "text.size"])] == [META, "text.size"]
    assert versions(["text.size"]) == {"text.size": 1, META: 1}


def test_every_signal_has_a_version_of_its_own_and_no_other_has():
    for module in (image, text_signals, pii, sample_signals, clip, nsfw):
        stem = module.__name__.rpartition(".")[2]
        public = {n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
        assert {n for n in public if not n.startswith("_")} == set(module.VERSIONS)
        assert all(find(f"{stem}.{n}", GIVEN).version == v for n, v in module.VERSIONS.items())


def test_a_signal_twice_or_unknown_is_an_error():
    with pytest.raises(SpecError, match=r"column 'n_chars' is made by text\.size too"):
        find_all(["text.size", "text.size"])
    with pytest.raises(SpecError, match=r"'text\.sise' is not in .* it has \[.*'language', .*'size'\]"):
        find("text.sise")


def test_a_signal_that_raises_names_the_sample_and_itself():
    def broken(one, pictures):
        raise KeyError("x")

    with pytest.raises(ValueError, match=r"web-000000000007: signal text\.broken raised KeyError"):
        measure(Signal("text.broken", broken, 1, {}), sample(7), Pictures([]))
    with pytest.raises(ValueError, match=r"gave .*n_chars.*; it declares"):
        measure(Signal("text.other", lambda s, p: {"n_chars": 1}, 1, {}), sample(7), Pictures([]))
