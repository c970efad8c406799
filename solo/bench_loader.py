"""Bench of the loader: tokens a second that one core turns from shards into training sequences.

In: nothing; pictures are made here, words are the sample's SlimPajama, in the proportions of stage 2 (54 % of tokens
are patches). Out: one dict. Two ways on the same bytes in one process: ours (`PackLoader`, fast decode), and the
straightforward one (Pillow, float32 normalisation, unfold, fp16 patches), in the order A B A B. Times are CPU seconds
of one thread, so a busy machine moves them little; wall times stand beside them. Cost: about a minute.
"""

from __future__ import annotations

import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from solo.adapters import jsonl_text
from solo.loader import NO_TARGET, PackLoader, read_piece
from solo.pack import PACKS, PLAN
from solo.patches import grid
from solo.sample import IMAGE, Sample, end_tar, make_key, read_sample, text, write_sample
from solo.spec import Tokens
from solo.tokenizer import SOLO, Tokenizer

PACK_TOKENS = 32_768
N_PACKS = 2
VISION_SHARE = 0.54  # of stage 2's tokens, Table 1 of the paper
LONG_SIDES_PX = (500, 1024)
ASPECTS = (4 / 3, 3 / 2, 1.0, 16 / 9, 3 / 4, 2 / 3)
JPEG_QUALITY = 85
GPU_TOKENS_PER_S = 52_000  # what one H100 trains
REPEATS = 5
GOAL = 5.0
SEED = 20
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
TOKENS = {
    "tokenizer": "mistral_common:data/tokenizer.model.v1",
    "tokenizer_sha256": "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
    "patch_px": 32,
    "max_side_px": 1024,
    "image_close": {"plain": "</vision>", "inst": "<vision>"},
}
TEXTS = Path(__file__).resolve().parents[1] / "datasets_spec" / "sample" / "slimpajama"


def run(*, repeats: int = REPEATS, n_packs: int = N_PACKS) -> dict[str, Any]:
    """Both ways on the same packs, `repeats` times each."""
    tokens = Tokens.model_validate(TOKENS)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="solo-bench-") as folder:
            mix = make_mix(Path(folder), tokens, n_packs)
            places = {"bench": Path(folder)}
            fast = PackLoader(Path(folder), places, tokens, PACK_TOKENS, decode="fast")
            exact = PackLoader(Path(folder), places, tokens, PACK_TOKENS)
            check(fast, tokens)
            reference, ours, uint8 = [], [], []
            for _ in range(repeats):
                reference.append(_timed(lambda: [straightforward(fast, i) for i in range(n_packs)]))
                ours.append(_timed(lambda: [fast.load(i).n_tokens for i in range(n_packs)]))
            for _ in range(min(repeats, 3)):
                uint8.append(_timed(lambda: [exact.load(i).n_tokens for i in range(n_packs)]))
    finally:
        torch.set_num_threads(n_threads)
    rate = {
        name: _rate(mix["n_tokens"], got) for name, got in (("ours", ours), ("reference", reference), ("exact", uint8))
    }
    per_core = rate["ours"]["tokens_per_s"]
    return {
        "bench": "loader",
        "ratio": round(per_core / rate["reference"]["tokens_per_s"], 2),
        "ratio_wall": round(rate["ours"]["tokens_per_s_wall"] / rate["reference"]["tokens_per_s_wall"], 2),
        "goal": GOAL,
        "reference": rate["reference"] | {"what": "Pillow, float32 normalise, unfold, fp16 patches"},
        "ours": rate["ours"] | {"what": "PackLoader, decode: fast"},
        "exact": rate["exact"] | {"what": "PackLoader, decode: exact"},
        "feeds": {"gpu_tokens_per_s": GPU_TOKENS_PER_S, "gpus_per_core": round(per_core / GPU_TOKENS_PER_S, 2)},
        "mix": mix,
        "repeats": repeats,
        "machine": _machine(),
    }


def straightforward(loader: PackLoader, i: int) -> dict[str, torch.Tensor]:
    """Pack i as one writes it first: lists of ids, and patches as upstream stores them."""
    ids: list[int] = []
    index: list[int] = []
    labels: list[int] = []
    patches: list[torch.Tensor] = []
    n_patches = 0
    for row in loader.rows(i):
        path = loader.shards.where(row["source"], row["shard"])
        sample = read_sample(Path(path), row["offset"], row["length"])
        images = iter(sample.images)
        ids, index, labels = [*ids, SOLO.bos], [*index, -1], [*labels, NO_TARGET]
        for message in sample.messages:
            for item in message["content"]:
                if item["type"] == "text":
                    new = loader.tokenizer.encode(item["text"])
                    ids += new
                    index += [-1] * len(new)
                    labels += new
                    continue
                cut = _float_patches(next(images))
                rows, cols = cut.shape[:2]
                patches.append(cut.reshape(rows * cols, -1))
                ids.append(SOLO.vision)
                index.append(-1)
                for r in range(rows):
                    ids += [SOLO.vpatch] * cols + [SOLO.vrow_sep if r < rows - 1 else SOLO.vision_end]
                    index += [*range(n_patches, n_patches + cols), -1]
                    n_patches += cols
                labels += [NO_TARGET] * (len(ids) - len(labels))
    padding = PACK_TOKENS - len(ids)
    return {
        "input_ids": torch.tensor(ids + [SOLO.eos] * padding),
        "patch_index": torch.tensor(index + [-1] * padding),
        "targets": torch.tensor(labels[1:] + [NO_TARGET] * (padding + 1)),
        "patches": torch.cat(patches),
    }


def _float_patches(data: bytes) -> torch.Tensor:
    """(rows, cols, 3, 32, 32) fp16, normalised."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    rows, cols = grid(*image.size, patch_px=32, max_side_px=1024)
    image = image.resize((cols * 32, rows * 32), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    pixels = (pixels - MEAN) / STD
    return pixels.unfold(1, 32, 32).unfold(2, 32, 32).permute(1, 2, 0, 3, 4).contiguous().to(torch.float16)


def check(loader: PackLoader, tokens: Tokens) -> None:
    """Both ways give the same sequence, else the times compare nothing."""
    ours, plain = loader.load(0), straightforward(loader, 0)
    assert torch.equal(ours.input_ids, plain["input_ids"]) and torch.equal(ours.patch_index, plain["patch_index"])
    # The straightforward labels know no documents; equal all the same, as each begins with BOS, which is no target.
    assert torch.equal(ours.targets, plain["targets"])
    values = ours.patches.view(-1, 3, tokens.patch_px, tokens.patch_px) / 255
    error = ((values - MEAN) / STD).flatten(1) - plain["patches"]
    assert error.abs().max() < 2 / 255 / STD.min() + 0.01


def make_mix(folder: Path, tokens: Tokens, n_packs: int) -> dict[str, Any]:
    """One shard and the plan of `n_packs` packs; what they hold."""
    tokenizer, documents = Tokenizer(tokens), _documents()
    (folder / "shards").mkdir()
    rows: list[dict[str, Any]] = []
    heads: list[dict[str, Any]] = []
    stats = {"n_tokens": 0, "n_patches": 0, "n_images": 0, "image_bytes": 0, "pixels": 0}
    with (folder / "shards" / "00000.tar").open("wb") as tar:
        for pack in range(n_packs):
            left = {"vision": int(PACK_TOKENS * VISION_SHARE), "all": PACK_TOKENS}
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


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """(CPU seconds of this thread, wall seconds)."""
    cpu, wall = time.thread_time(), time.perf_counter()
    work()
    return time.thread_time() - cpu, time.perf_counter() - wall


def _rate(n_tokens: int, seconds: list[tuple[float, float]]) -> dict[str, Any]:
    """Median rates, and the spread of the CPU one."""
    cpu = sorted(n_tokens / c for c, _ in seconds)
    wall = statistics.median(n_tokens / w for _, w in seconds)
    return {
        "tokens_per_s": round(statistics.median(cpu)),
        "lowest": round(cpu[0]),
        "highest": round(cpu[-1]),
        "tokens_per_s_wall": round(wall),
    }


def _machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    packages = {name: version(name) for name in ("torch", "pillow", "simplejpeg", "numpy", "sentencepiece")}
    return {"cpu": cpu, "n_cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2), "packages": packages}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run()) + "\n")
