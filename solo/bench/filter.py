"""Bench of the filter: what each signal costs, and the search for near duplicates as sources grow.

In: nothing; pictures and texts are made here. Out: one dict: samples a second of one core by signal, once alone with
its decode and once after a decode that others needed anyway; near images among random 64-bit hashes with planted
pairs, and near texts among random signatures, in a process of their own each, so that its peak memory is its own; the
same for 1x, 10x and 100x rows. Cost: two to three minutes at 10 M
hashes.
"""

from __future__ import annotations

import io
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from PIL import Image

from solo.filter import duplicates
from solo.filter.measure import find, measure
from solo.filter.pictures import Pictures
from solo.sample import IMAGE, Sample, text
from solo.spec import Near

N_HASHES = 10_000_000
N_TEXTS = 1_000_000
PLANTED = 1_000  # one pair in as many rows
SECONDS = 1.0  # of CPU a signal is measured for
GROWTH = (100, 10, 1)  # rows / n
SEED = 4
SIGNALS = (
    *("image.size", "image.hashes", "image.claim", "image.exif", "image.texture", "image.colours"),
    *("text.size", "text.language", "text.repetition", "text.shares", "text.minhash", "pii.shapes"),
    *("sample.record", "sample.meta"),
)
IMAGE_PX, CAPTION_WORDS = (640, 480), 100


def run(*, n_hashes: int = N_HASHES, n_texts: int = N_TEXTS, seconds: float = SECONDS) -> dict[str, Any]:
    """All figures."""
    threads = os.cpu_count() or 1
    images = [_apart("images", n_hashes // share, threads) for share in GROWTH]
    texts = [_apart("texts", n_texts // share, threads) for share in GROWTH]
    return {
        "bench": "filter",
        "signals_per_core": {name: signal_rate(name, seconds) for name in SIGNALS},
        "near_images": images[-1],
        "near_images_growth": images,
        "near_texts": texts[-1],
        "near_texts_growth": texts,
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "threads": threads,
            "python": platform.python_version(),
            "duckdb": version("duckdb"),
            "rensa": version("rensa"),
        },
    }


def signal_rate(name: str, seconds: float) -> dict[str, float]:
    """Samples a CPU second of one signal: alone, and with the pixels there already."""
    signal, made = find(name), samples()
    decoded = [Pictures(one.images) for one in made]
    for one, pictures in zip(made, decoded, strict=True):  # models are loaded, and pixels there, before the clock runs
        pictures.rgb(0)
        measure(signal, one, pictures)
    rates = {}
    for how in ("alone", "decoded"):
        n, began = 0, time.process_time()
        while (spent := time.process_time() - began) < seconds / 2:
            i = n % len(made)
            measure(signal, made[i], decoded[i] if how == "decoded" else Pictures(made[i].images))
            n += 1
        rates[how] = round(n / spent, 1)
    return rates


def samples(n: int = 8) -> list[Sample]:
    """Photograph-like JPEGs of 640 x 480 with a caption of 100 words."""
    rng = random.Random(SEED)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5_000)]
    made = []
    for i in range(n):
        noise = Image.frombytes("RGB", (40, 30), rng.randbytes(3600)).resize(IMAGE_PX, Image.Resampling.BICUBIC)
        out = io.BytesIO()
        noise.save(out, "JPEG", quality=85)
        caption = " ".join(rng.choices(vocabulary, k=CAPTION_WORDS))
        messages: Any = ({"role": "assistant", "content": [IMAGE, text(caption)]},)
        made.append(Sample(f"bench-{i:016x}", "bench", (out.getvalue(),), messages, {"url": f"https://a.test/{i}.jpg"}))
    return made


def _apart(what: str, n: int, threads: int) -> dict[str, Any]:
    """`near` in a process of its own."""
    command = [sys.executable, "-m", "solo.bench.filter", what, str(n), str(threads)]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def near(what: str, n: int, threads: int) -> dict[str, Any]:
    """Search `n` rows with planted pairs; every pair that was planted must be found and no row besides."""
    make, spec = (hashes, Near(image=3)) if what == "images" else (signatures, Near(text=0.8))
    column, planted = make(n)
    with tempfile.TemporaryDirectory(prefix="solo-bench-") as folder, duckdb.connect() as con:
        con.execute("SET threads = $threads", {"threads": threads})
        con.execute("SET temp_directory = $folder", {"folder": folder})
        con.register("made", column)
        con.execute("CREATE TABLE evidence AS SELECT * FROM made")
        con.execute(
            "CREATE TABLE judged AS SELECT item, item AS side, CAST(NULL AS VARCHAR) AS reason, "
            "CAST(NULL AS BIGINT) AS winner FROM evidence"
        )
        con.unregister("made")
        del column
        before = _peak_mib()
        began, cpu = time.perf_counter(), time.process_time()
        duplicates.drop(con, (), spec, Path(folder))
        wall, spent = time.perf_counter() - began, time.process_time() - cpu
        lost = dict(con.execute("SELECT item, winner FROM judged WHERE reason IS NOT NULL").fetchall())
    return {
        "rows": n,
        "planted": len(planted),
        "recall": round(sum(lost.get(b) == a for a, b in planted) / max(len(planted), 1), 6),
        "others": len(set(lost) - {b for _, b in planted}),
        "wall_s": round(wall, 2),
        "cpu_us_per_row": round(spent / n * 1e6, 2),
        "peak_mib": _peak_mib(),
        "peak_mib_before": before,
    }


def hashes(n: int) -> tuple[pa.Table, list[tuple[int, int]]]:
    """Random 64-bit hashes; the last rows are earlier ones with 1 to 3 bits turned."""
    rng = np.random.default_rng(SEED)
    bits = rng.integers(0, 2**64, n, np.uint64)
    n_planted = max(n // PLANTED, 1)
    for i in range(n_planted):
        turned = sum(1 << int(b) for b in rng.choice(64, 1 + i % 3, replace=False))
        bits[n - 1 - i] = bits[i] ^ np.uint64(turned)
    digits = np.frombuffer(bits.astype(">u8").tobytes().hex().encode(), "S16")
    column = pa.array(digits.astype("U16")) if n < 100_000 else _strings(digits)
    return pa.table({"item": np.arange(n), "phash": column}), [(i, n - 1 - i) for i in range(n_planted)]


def _strings(digits: np.ndarray) -> pa.Array:
    """Fixed-width ASCII as Arrow strings, without a Python object each."""
    offsets = pa.py_buffer(np.arange(0, 16 * (len(digits) + 1), 16, dtype=np.int64).tobytes())
    return pa.LargeStringArray.from_buffers(len(digits), offsets, pa.py_buffer(digits.tobytes()))


def signatures(n: int) -> tuple[pa.Table, list[tuple[int, int]]]:
    """Random signatures; the last rows share 85 to 100 % of an earlier one's minima."""
    width = duplicates.BANDS * duplicates.ROWS
    rng = np.random.default_rng(SEED)
    minima = rng.integers(0, 2**32, (n, width), np.uint32)
    n_planted = max(n // PLANTED, 1)
    for i in range(n_planted):
        other = rng.random(width) < 0.15 * rng.random()
        minima[n - 1 - i] = np.where(other, minima[n - 1 - i], minima[i])
    pairs = [(i, n - 1 - i) for i in range(n_planted) if (minima[i] == minima[n - 1 - i]).mean() >= 0.8]
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width * 4), n, [None, pa.py_buffer(minima.tobytes())])
    return pa.table({"item": np.arange(n), "minhash": column}), pairs


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    print(json.dumps(near(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))  # noqa: T201 - its parent reads it
