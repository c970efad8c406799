"""What the decoding process makes of large pictures, against a full decode by another library and an exact resize."""

import io
import itertools
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw
from test_isolated import RULES, isolated_python

from solo.isolated import probe, resizer

WIDTH, HEIGHT = 600, 452
PERIODS = (2.0, 2.2, 2.4, 2.6, 3.0, 3.9, 5.3, 9.0)  # of stripes, in pixels; those below 4 alias when halved
ANGLES = (0, 17, 45, 73, 90)
SIDES = (150, 233, 420)  # a shrink of 4 (whole in one direction), 2.6 and 1.4


def grating(period, angle, contrast):
    x, y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    along = np.cos(np.radians(angle)) * x + np.sin(np.radians(angle)) * y
    return 127 + contrast * np.sin(2 * np.pi * along / period)


def checkers(size):
    x, y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    return (x // size + y // size) % 2 * 255.0


def page():
    image = Image.new("L", (WIDTH, HEIGHT), 255)
    draw, words = ImageDraw.Draw(image), random.Random(3)
    for top in range(4, HEIGHT, 12):
        draw.text((4, top), " ".join("".join(words.choices("abcdefghilmnopqrstuvw", k=6)) for _ in range(14)), fill=0)
    return np.asarray(image, float)


def soft(seed, cells=(50, 40)):
    """What a photograph is like: large shapes, few fine ones."""
    noise = Image.frombytes("L", cells, random.Random(seed).randbytes(cells[0] * cells[1]))
    return np.asarray(noise.resize((WIDTH, HEIGHT), Image.BICUBIC), float)


def pictures():
    found = {f"{p} px, {a} degrees, {c}": grating(p, a, c) for p, a, c in itertools.product(PERIODS, ANGLES, (120, 18))}
    found |= {f"checkers of {n} px": checkers(n) for n in (1, 2, 3, 5, 8)}
    patch = soft(1)
    patch[100:180, 200:300] = grating(2.4, 0, 120)[100:180, 200:300]
    found |= {"page": page(), "soft": soft(2), "a patch of stripes": patch, "chirp": chirp()}
    return {name: values.clip(0, 255).round().astype(np.uint8) for name, values in found.items()}


def chirp():
    x = np.arange(WIDTH) / WIDTH
    return np.tile(127 + 120 * np.sin(WIDTH * np.pi / 2 * x * x), (HEIGHT, 1))


def colours():
    found = {name: np.stack([soft(i), soft(i + 9), soft(i + 7)], -1) for i, name in enumerate(("one", "two"))}
    stripes = [grating(p, a, 120) for p, a in ((2.4, 0), (3.0, 90), (2.2, 45))]
    return {name: x.astype(np.uint8) for name, x in (found | {"stripes": np.stack(stripes, -1)}).items()}


def area(pixels, width, height):
    """The exact area resize: each target pixel is the mean of what it covers, fractions of pixels counted."""
    for axis, size in ((0, height), (1, width)):
        pixels = np.moveaxis(pixels, axis, 0)
        sums = np.concatenate([np.zeros((1, *pixels.shape[1:])), pixels.cumsum(0)])
        at = np.linspace(0, len(pixels), size + 1)
        low = np.minimum(at.astype(int), len(pixels) - 1)
        edges = sums[low] + (at - low).reshape(-1, *[1] * (pixels.ndim - 1)) * pixels[low]
        pixels = np.moveaxis(np.diff(edges, axis=0) * size / len(pixels), 0, axis)
    return pixels


def encoded(pixels, quality):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality)
    return out.getvalue()


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(data)), float)


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a - b) ** 2), 1e-9))


@pytest.fixture
def decoder(monkeypatch):
    monkeypatch.setattr(resizer.sys, "executable", str(isolated_python()))
    one = resizer.Decoder()
    yield one
    one._stop()


def test_what_is_stored_is_within_40_db_of_a_full_decode_whatever_is_shown(decoder):
    for i, (name, pixels) in enumerate(pictures().items()):
        served, side = encoded(pixels, (75, 92)[i % 2]), SIDES[i % 3]
        stored, width, height, *was = decoder.ask(served, side, probe.probe(served, RULES))
        assert (width, height, was) == (side, round(HEIGHT * side / WIDTH), [WIDTH, HEIGHT])
        exact = area(decoded(served), width, height)
        assert psnr(exact, decoded(stored)) >= 40, name  # with what quality 95 costs


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_colours_are_stored_as_a_full_decode_would_store_them(decoder, form):
    for name, pixels in colours().items():
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, form, **{"quality": 90} if form == "JPEG" else {})
        served = out.getvalue()
        stored, width, height, *_ = decoder.ask(served, 233, probe.probe(served, RULES))
        exact = area(decoded(served), width, height).round().astype(np.uint8)
        assert psnr(decoded(encoded(exact, 95)), decoded(stored)) >= 45, name  # both with half of the colour's size


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (2, 701), (701, 3)])
def test_pictures_of_one_pixel_s_width_are_kept(decoder, size):
    served = encoded(np.full((size[1], size[0]), 90, np.uint8), 90)
    stored, width, height, *_ = decoder.ask(served, 256, probe.probe(served, RULES))
    assert max(width, height) == 256 and min(width, height) == 1 and abs(decoded(stored) - 90).max() < 3
