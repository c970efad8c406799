"""The mix of `bench_loader`: packs of stage 2's proportions, their pictures as they came and at their grid.

In: nothing; pictures are made here, words are the sample's SlimPajama. Out: two folders, each a plan and one shard of
the same samples. Invariant: the same bytes on every machine with the same libraries. Cost: seconds.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from solo.adapters import jsonl_text
from solo.artifact import CHECKOUT
from solo.pack.part import PACKS, PLAN
from solo.sample import IMAGE, Sample, end_tar, make_key, read_sample, text, write_sample
from solo.sequence.loader import read_piece
from solo.sequence.tokenizer import Tokenizer
from solo.shard.counts import Rules
from solo.shard.part import with_pictures
from solo.spec import GridPictures, Tokens

PACK_TOKENS = 32_768
VISION_SHARE = 0.54  # of stage 2's tokens, Table 1 of the paper
LONG_SIDES_PX = (500, 1024)
ASPECTS = (4 / 3, 3 / 2, 1.0, 16 / 9, 3 / 4, 2 / 3)
JPEG_QUALITY = 85
GRID = GridPictures(jpeg_quality=90)  # as sample-web
SEED = 20
TEXTS = CHECKOUT / "datasets_spec" / "sample" / "slimpajama"


def make_mix(folder: Path, tokens: Tokens, n_packs: int, pack_tokens: int = PACK_TOKENS) -> dict[str, Any]:
    """One shard and the plan of `n_packs` packs; what they hold."""
    tokenizer, documents = Tokenizer(tokens), _documents()
    (folder / "shards").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    heads: list[dict[str, Any]] = []
    stats = {"n_tokens": 0, "n_patches": 0, "n_images": 0, "image_bytes": 0, "pixels": 0}
    with (folder / "shards" / "00000.tar").open("wb") as tar:
        for pack in range(n_packs):
            left = {"vision": int(pack_tokens * VISION_SHARE), "all": pack_tokens}
            first = len(rows)
            while row := _add(tar, next(documents["image" if left["vision"] > 0 else "text"]), tokenizer, left):
                rows.append(row | {"pack": pack, "slot": len(rows) - first})
                for image in row["images"]:
                    stats["n_images"] += 1
                    stats["image_bytes"] += len(image)
                    stats["pixels"] += int(np.prod(Image.open(io.BytesIO(image)).size))
            mine = rows[first:]
            counts = {name: sum(row[name] for row in mine) for name in ("n_tokens", "n_patches", "n_loss_tokens")}
            heads.append({"pack": pack, "first_row": first, "n_rows": len(mine), "source": "bench", **counts})
            stats["n_tokens"] += counts["n_tokens"]
            stats["n_patches"] += counts["n_patches"]
        end_tar(tar)
    pq.write_table(pa.Table.from_pylist(rows, PLAN), folder / "plan.parquet")
    pq.write_table(pa.Table.from_pylist(heads, PACKS), folder / "packs.parquet")
    return {
        "n_packs": n_packs,
        "n_documents": len(rows),
        "n_tokens": stats["n_tokens"],
        "vision_share": round(stats["n_patches"] / stats["n_tokens"], 3),
        "n_images": stats["n_images"],
        "jpeg_quality": JPEG_QUALITY,
        "bits_per_pixel": round(8 * stats["image_bytes"] / stats["pixels"], 2),
    }


def at_grid(original: Path, folder: Path, tokens: Tokens) -> dict[str, Any]:
    """The same plan over a shard whose pictures lie at their grid; what that changed."""
    (folder / "shards").mkdir(parents=True)
    rows, forms = [], []
    with (folder / "shards" / "00000.tar").open("wb") as tar:
        for row in pq.read_table(original / "plan.parquet").to_pylist():
            sample = read_sample(original / "shards" / "00000.tar", row["offset"], row["length"])
            stored, form = with_pictures(sample, Rules(row["template"], tokens, GRID))
            offset = tar.tell()
            rows.append(row | {"offset": offset, "length": write_sample(tar, stored)})
            forms.append(form)
        end_tar(tar)
    pq.write_table(pa.Table.from_pylist(rows, PLAN), folder / "plan.parquet")
    (folder / "packs.parquet").write_bytes((original / "packs.parquet").read_bytes())
    psnr = [form["psnr_db"] for form in forms if form["psnr_db"] is not None]
    sums = {name: sum(form[name] for form in forms) for name in ("image_bytes_in", "image_bytes", "n_images_as_came")}
    found = {"jpeg_quality": GRID.jpeg_quality, **sums}
    return found | {"lowest_psnr_db": min(psnr), "median_psnr_db": float(np.median(psnr))}


def _add(tar: io.BufferedWriter, sample: Sample, tokenizer: Tokenizer, left: dict[str, int]) -> dict[str, Any] | None:
    """Write a document if it fits what is left of the pack; its plan row."""
    piece = read_piece(sample, tokenizer, "plain")
    if len(piece.ids) > left["all"]:
        return None
    left["all"] -= len(piece.ids)
    left["vision"] -= len(piece.patches)
    offset = tar.tell()
    return {
        "key": sample.key,
        "exposure": 0,
        "source": "bench",
        "shard": 0,
        "offset": offset,
        "length": write_sample(tar, sample),
        "template": "plain",
        "begin": 0,
        "end": len(piece.ids),
        "n_tokens": len(piece.ids),
        "n_patches": len(piece.patches),
        "n_loss_tokens": piece.n_loss_tokens,
        "images": sample.images,
    }


def _documents() -> dict[str, Iterator[Sample]]:
    """Endless captioned pictures and texts, the same on every machine."""
    rng = np.random.default_rng(SEED)
    textures = [_texture(rng) for _ in range(6)]

    read = jsonl_text.read(TEXTS, source="bench")
    words = [word for s in read if isinstance(s, Sample) for word in s.messages[0]["content"][0]["text"].split(" ")]
    if not words:
        raise ValueError(f"bench loader: no texts in {TEXTS}; run it from a checkout of the repository")
    at = 0

    def said(n_words: int) -> str:
        nonlocal at
        at = at + n_words if at + 2 * n_words < len(words) else 0
        return " ".join(words[at : at + n_words])

    def pictures() -> Iterator[Sample]:
        for i in range(1 << 30):
            long = int(rng.integers(LONG_SIDES_PX[0], LONG_SIDES_PX[1] + 1))
            aspect = float(rng.choice(ASPECTS))
            size = (long, int(long / aspect)) if aspect >= 1 else (int(long * aspect), long)
            turn = {"role": "assistant", "content": [IMAGE, text(said(int(rng.integers(10, 60))))]}
            yield Sample(make_key("bench", f"i{i}"), "bench", (_picture(textures, size, rng),), (turn,), {})  # type: ignore[arg-type]

    def texts() -> Iterator[Sample]:
        for i in range(1 << 30):
            turn = {"role": "assistant", "content": [text(said(int(rng.integers(100, 700))))]}
            yield Sample(make_key("bench", f"t{i}"), "bench", (), (turn,), {})  # type: ignore[arg-type]

    return {"image": pictures(), "text": texts()}


def _texture(rng: np.random.Generator, side_px: int = 1536) -> np.ndarray:
    """(side, side, 3) uint8: 1 / f**1.4 and a little noise, which at quality 85 cost what photographs cost.

    Eight photographs of scikit-image: 0.6 to 2.2 bits a pixel, median 1.7; `bits_per_pixel` says what these cost.
    """
    f = np.hypot(np.fft.fftfreq(side_px)[:, None], np.fft.rfftfreq(side_px)[None])
    f[0, 0] = 1
    noise = rng.normal(size=(4, side_px, side_px))
    grey, *colour = (
        np.fft.irfft2(np.fft.rfft2(n) / f**power) for n, power in zip(noise, (1.4, 1.8, 1.8, 1.8), strict=True)
    )
    planes = [55 * grey / grey.std() + 15 * c / c.std() for c in colour]
    pixels = np.stack(planes, -1) + 128 + rng.normal(0, 1.5, (side_px, side_px, 1))
    return pixels.clip(0, 255).astype(np.uint8)


def _picture(textures: list[np.ndarray], size: tuple[int, int], rng: np.random.Generator) -> bytes:
    """A JPEG: a crop of a texture with a few sharp-edged shapes of another."""
    width, height = size
    a, b = rng.choice(len(textures), 2, replace=False)
    top, left = (int(rng.integers(0, 1536 - side + 1)) for side in (height, width))
    pixels = textures[a][top : top + height, left : left + width].copy()
    for _ in range(6):
        y, x = int(rng.integers(height - 60)), int(rng.integers(width - 60))
        h, w = rng.integers(20, 200, 2)
        pixels[y : y + h, x : x + w] = textures[b][y : y + h, x : x + w][: height - y, : width - x]
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue()
