"""Bench of the loader: tokens a second that one core turns from shards into training sequences.

In: the packs of `bench_mix` (54 % of tokens are patches, as in stage 2). Out: one dict. Three ways in one process, in
the order A B C A B C: the straightforward one (Pillow, float32 normalisation, unfold, fp16 patches) on the pictures as
they came, ours (`PackLoader`, fast decode) on the same bytes, and ours on shards that keep pictures at their grid.
Times are CPU seconds of one thread, so a busy machine moves them little; wall times stand beside them. Cost: a minute.
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
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from solo.bench.mix import PACK_TOKENS, at_grid, make_mix
from solo.sample import read_sample
from solo.sequence import decode
from solo.sequence.loader import NO_TARGET, PackLoader
from solo.sequence.patches import grid
from solo.sequence.tokenizer import SOLO
from solo.spec import Tokens

N_PACKS = 2
GPU_TOKENS_PER_S = 52_000  # what one H100 trains
REPEATS = 5
GOAL = 5.0
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
TOKENS = {
    "tokenizer": "mistral_common:data/tokenizer.model.v1",
    "tokenizer_sha256": "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
    "patch_px": 32,
    "max_side_px": 1024,
    "image_close": {"plain": "</vision>", "inst": "<vision>"},
}
OURS = ("original", "grid")  # pictures in the shards
Seconds = list[tuple[float, float]]


def run(*, repeats: int = REPEATS, n_packs: int = N_PACKS) -> dict[str, Any]:
    """All ways on the same packs, `repeats` times each."""
    tokens = Tokens.model_validate(TOKENS)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="solo-bench-") as folder:
            places = {name: Path(folder) / name for name in OURS}
            mix = make_mix(places["original"], tokens, n_packs)
            mix["grid"] = at_grid(places["original"], places["grid"], tokens)
            exact, *ours = (
                PackLoader(places[name], {"bench": places[name]}, tokens, PACK_TOKENS, decode=path)  # type: ignore[arg-type]
                for name, path in (("original", "exact"), *((name, "fast") for name in OURS))
            )
            loaders = dict(zip(OURS, ours, strict=True))
            check(exact, loaders, mix["grid"]["lowest_psnr_db"])
            seconds = measure(exact, loaders, repeats)
            spent = {name: where_it_goes(loader) for name, loader in loaders.items()}
    finally:
        torch.set_num_threads(n_threads)
    return _result({name: _rate(mix["n_tokens"], got) for name, got in seconds.items()}, spent) | {
        "mix": mix,
        "repeats": repeats,
        "machine": _machine(),
    }


def measure(exact: PackLoader, loaders: dict[str, PackLoader], repeats: int) -> dict[str, Seconds]:
    """Seconds of each way for all packs."""
    packs = range(len(exact))
    ways: dict[str, Callable[[], object]] = {"reference": lambda: [straightforward(exact, i) for i in packs]}
    ways |= {name: partial(_load_all, loader) for name, loader in loaders.items()}
    seconds: dict[str, Seconds] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            seconds[name].append(_timed(way))
    seconds["exact"] = [_timed(partial(_load_all, exact)) for _ in range(min(repeats, 3))]
    return seconds


def _load_all(loader: PackLoader) -> int:
    return sum(loader.load(i).n_tokens for i in range(len(loader)))


def where_it_goes(loader: PackLoader) -> dict[str, float]:
    """CPU seconds of pack 0: libjpeg, resize, all else (reads, tokens, layout); and of the cut, were it done here."""
    samples = [read_sample(_tar(loader, row), row["offset"], row["length"]) for row in loader.rows(0)]
    images = [data for sample in samples for data in sample.images]
    tokens = loader.tokenizer.tokens
    px = {"patch_px": tokens.patch_px, "max_side_px": tokens.max_side_px}
    grids = [grid(*decode.image_size(data), **px) for data in images]
    room = [np.empty((rows * tokens.patch_px, cols * tokens.patch_px), "<u4") for rows, cols in grids]

    def lay_all() -> None:
        for data, out in zip(images, room, strict=True):
            decode.lay(data, out)

    patches = loader.load(0).patches
    ways = (lambda: [decode.pixels(data) for data in images], lay_all, lambda: loader.load(0), patches.clone)
    decoded, laid, loaded, cut = (min(_timed(way)[0] for _ in range(5)) for way in ways)
    return {"jpeg_decode": decoded, "resize": max(laid - decoded, 0.0), "rest": loaded - laid, "cut_here": cut}


def _result(rate: dict[str, dict[str, Any]], spent: dict[str, dict[str, float]]) -> dict[str, Any]:
    plain = rate["reference"]
    found: dict[str, Any] = {
        "bench": "loader",
        "ratio": {name: round(rate[name]["tokens_per_s"] / plain["tokens_per_s"], 2) for name in OURS},
        "ratio_wall": {name: round(rate[name]["tokens_per_s_wall"] / plain["tokens_per_s_wall"], 2) for name in OURS},
        "goal": GOAL,
        "reference": plain | {"what": "Pillow, float32 normalise, unfold, fp16 patches, original pictures"},
        "exact": rate["exact"] | {"what": "PackLoader, decode: exact, original pictures"},
    }
    for name in OURS:
        per_core, cut_here = rate[name]["tokens_per_s"], spent[name].pop("cut_here")
        loaded = sum(spent[name].values())
        feeds = {
            "gpu_tokens_per_s": GPU_TOKENS_PER_S,
            "gpus_per_core": round(per_core / GPU_TOKENS_PER_S, 2),
            "limited_by": max(spent[name], key=lambda part: spent[name][part]),
            "cpu_shares": {part: round(seconds / loaded, 2) for part, seconds in spent[name].items()},
        }
        slower = loaded / (loaded + cut_here)
        found[name] = rate[name] | {
            "what": f"PackLoader, decode: fast, {name} pictures; uint8, normalised and cut into patches on the device",
            "were_the_cut_done_here": {
                "tokens_per_s": round(per_core * slower),
                "ratio": round(per_core * slower / plain["tokens_per_s"], 2),
            },
            "feeds": feeds,
        }
    return found


def straightforward(loader: PackLoader, i: int) -> dict[str, torch.Tensor]:
    """Pack i as one writes it first: lists of ids, and patches as upstream stores them."""
    ids: list[int] = []
    index: list[int] = []
    labels: list[int] = []
    patches: list[torch.Tensor] = []
    n_patches = 0
    for row in loader.rows(i):
        sample = read_sample(_tar(loader, row), row["offset"], row["length"])
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


def check(exact: PackLoader, loaders: dict[str, PackLoader], lowest_psnr_db: float) -> None:
    """All ways give the same sequence, else the times compare nothing; the grid's pixels are as near as it says."""
    plain, reference = straightforward(exact, 0), exact.load(0)
    for loader in loaders.values():
        ours = loader.load(0)
        # The straightforward labels know no documents; equal all the same, as each begins with BOS, which is no target.
        for name in ("input_ids", "patch_index", "targets"):
            assert torch.equal(getattr(ours, name), plain[name]), name
    values = loaders["original"].load(0).patches.clone().view(-1, 3, 32, 32) / 255
    error = ((values - MEAN) / STD).flatten(1) - plain["patches"]
    assert error.abs().max() < 2 / 255 / STD.min() + 0.01
    error = (loaders["grid"].load(0).patches.clone().float() - reference.patches.clone()).square().mean()
    assert 10 * torch.log10(255**2 / error) > lowest_psnr_db - 0.01


def _tar(loader: PackLoader, row: dict[str, Any]) -> Path:
    return Path(loader.shards.where(row["source"], row["shard"]))


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
