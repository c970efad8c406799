"""Bench of growth: time and memory per row of acquire and filter as one URL list grows 1x, 10x and 100x.

In: the number of rows of 1x. Out: one dict: for each size CPU seconds, peak memory, and microseconds for each row that
it has beyond the size before it (a list of one row is the first), so that starting up is in none; `grows` is the last
size over the one before it, 1.0 where rows cost the same. Each part runs in a process of its own, one worker, on small
pictures from a loopback origin. Cost: four minutes at 300, 3,000 and 30,000 rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from solo.artifact import Job, make
from solo.bench import acquire as bench_acquire
from solo.bench.filter import samples
from solo.filter import part as filter

N_ROWS = 300
TIMES = (1, 10, 100)
PARTS = ("acquire", "filter")
FILTER = {
    "signals": ["image.size", "image.hashes", "text.size", "text.language"],
    "keep": {"decodes": "decodes", "side": "least(width_px, height_px) >= 32", "caption": "n_chars >= 5"},
    "unique": ["text_sha256"],
}


def run(*, n_rows: int = N_ROWS) -> dict[str, Any]:
    """All sizes, acquire then filter of what was acquired."""
    [picture] = samples(1)[0].images
    found: dict[str, list[dict[str, float]]] = {part: [] for part in PARTS}
    with (
        tempfile.TemporaryDirectory(prefix="solo-bench-") as name,
        bench_acquire.origin({f"/{i}.jpg": picture for i in range(10)}) as port,
    ):
        for n in (1, *(n_rows * times for times in TIMES)):
            for part, cost in _measured(Path(name, str(n)), n, port):
                before = found[part][-1] if n > 1 else {"rows": 0, "cpu_s": cost["cpu_s"]}
                per_row = (cost["cpu_s"] - before["cpu_s"]) / (n - before["rows"]) * 1e6
                found[part].append({"rows": n, "cpu_us_per_row": round(per_row, 1), **_rounded(cost)})
    return {"bench": "growth", **found, "grows": {part: _grows(found[part]) for part in PARTS}}


def _rounded(cost: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 2) for key, value in cost.items()}


def _grows(sizes: list[dict[str, float]]) -> dict[str, float]:
    """What a row of the largest list costs, and what it takes of memory, over the size before it."""
    before, last = sizes[-2:]
    return {key: round(last[key] / max(before[key], 1.0), 2) for key in ("cpu_us_per_row", "peak_process_mb")}


def _measured(folder: Path, n: int, port: int) -> list[tuple[str, dict[str, float]]]:
    """CPU and peak memory of both parts on a list of n rows."""
    folder.mkdir()
    urls = [f"http://{bench_acquire.HOST}/{i % 10}.jpg?n={i}" for i in range(n)]
    captions = [f"picture number {i} of a list that grows" for i in range(n)]
    pq.write_table(pa.table({"url": urls, "caption": captions}), folder / "urls.parquet")
    costs = []
    for part in PARTS:
        command = [sys.executable, "-m", "solo.bench.growth", part, str(folder), str(port)]
        with (folder / f"{part}.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
            cost = bench_acquire.watch(process)
        if process.returncode:
            tail = (folder / f"{part}.log").read_text(errors="replace")[-800:]
            raise RuntimeError(f"bench growth: {part} of {n} rows ended with {process.returncode}: {tail}")
        costs.append((part, cost))
    return costs


def work(part: str, folder: Path, port: int) -> None:
    """One part on one list, in a process of its own."""
    acquired = bench_acquire.ours(folder, port)
    assert acquired.manifest.counts["kept"] == acquired.manifest.counts["in"]
    if part == "filter":
        spec = {"filter": FILTER}
        job = Job("filter", "bench", filter.VERSION, spec, {"acquire/bench": acquired}, folder / "root", folder, 1)
        make(job, filter.run)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        work(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    else:
        sys.stdout.write(json.dumps(run()) + "\n")
