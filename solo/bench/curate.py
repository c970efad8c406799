"""Bench of curate: filter, exact dedup across sources, caps, weights and order over synthetic ledgers.

In: nothing; ledgers of 32 sources are made here, a twentieth of their pictures twins across sources. Out: one dict:
rows a second of one core and peak memory of the real part, at n / 16, n / 4 and n rows; the same under a memory cap,
where it must spill and make the same lock; and the same work in polars or pandas, run just before on the same files.
Each run is a process of its own, so its peak is its own. Cost: about a minute per million rows on two cores.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import duckdb

from solo import artifact
from solo.artifact import CHECKOUT, Artifact, Job, Result
from solo.curate import part as curate
from solo.spec import MixSpec

ROWS_PER_CORE = 1_000_000
N_SOURCES = 32
CAP_BYTES, CAP_ROWS = 4 << 30, 20_000_000  # 4 GB for that many rows, less for fewer, or the cap would say nothing
GROWTH = (16, 4, 1)  # n / rows
TWINS = 20  # one picture in as many is that of the same row of every source with the same twin
SEED = 11
# A Python with polars, or with pandas and pyarrow; by default img2dataset's, which brings pandas.
REFERENCE = os.environ.get("SOLO_FRAME_PYTHON", str(CHECKOUT / ".img2dataset" / "bin" / "python"))

LEDGER = """
COPY (
  SELECT printf('%s-%012x', $source, hash(i, $number) & 281474976710655) AS key, $source AS source,
    CAST(i // 10000 AS INTEGER) AS shard, i * 4096 AS "offset", 4096::BIGINT AS length, 1::INTEGER AS n_images,
    64::INTEGER AS n_patches, CAST(20 + hash(i, 1) % 200 AS INTEGER) AS n_text_tokens,
    CAST(5 + hash(i, 1) % 100 AS INTEGER) AS n_loss_tokens, CAST(84 + hash(i, 1) % 200 AS INTEGER) AS n_tokens,
    'plain' AS template, md5(concat(i, IF(i % $twins = 0, 0, $number))) AS image_sha256,
    CAST(32 + hash(i, $number, 2) % 1000 AS BIGINT) AS width_px
  FROM range($n) AS r(i)
  ORDER BY key
) TO '{path}' (FORMAT parquet)
"""


def run(*, n: int | None = None, cap_bytes: int | None = None) -> dict[str, Any]:
    """All figures."""
    threads = os.cpu_count() or 1
    n = n or ROWS_PER_CORE * threads
    cap_bytes = cap_bytes or CAP_BYTES * n // CAP_ROWS
    sizes = []
    for share in GROWTH:
        with tempfile.TemporaryDirectory(prefix="solo-bench-") as folder:
            root = Path(folder)
            make_ledgers(root, max(n // share // N_SOURCES, 1))
            reference = other(root)
            sizes.append(apart(root, threads))
            capped = apart(root, threads, cap_bytes=cap_bytes)
    largest = sizes[-1]
    return {
        "bench": "curate",
        **largest,
        "growth": sizes,
        "growth_s_per_row": round(largest["wall_s"] / largest["rows"] / (sizes[0]["wall_s"] / sizes[0]["rows"]), 3),
        "capped": capped | {"cap_mib": cap_bytes >> 20, "same_lock": capped["digest"] == largest["digest"]},
        "reference": reference,
        "rows_per_s_ratio": round(reference["wall_s"] / largest["wall_s"], 2) if reference else None,
        "peak_ratio": round(largest["peak_mib"] / reference["peak_mib"], 3) if reference else None,
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "threads": threads,
            "python": platform.python_version(),
            "duckdb": version("duckdb"),
        },
    }


def make_ledgers(root: Path, rows: int) -> dict[str, Artifact]:
    """A shard artifact of `rows` samples for each source, without tars; found again where they are there."""
    made = {}
    for number in range(N_SOURCES):
        source = f"source-{number:02d}"

        def write(job: Job, number: int = number, source: str = source) -> Result:
            (job.out / "shards").mkdir()
            given = {"source": source, "number": number + 1, "n": rows, "twins": TWINS}
            path = job.out / "shards" / "00000.parquet"
            duckdb.connect().execute(LEDGER.format(path=path), given)
            return Result(rows, rows, {}, {})

        made[source] = artifact.make(Job("shard", source, 1, {"n": rows}, {}, root, root, 1), write)[0]
    return made


def mix(rows: int) -> MixSpec:
    """Every source by weight, the odd ones capped below their share; small pictures and twins left out."""
    sources = [
        {
            "source": f"source-{number:02d}",
            "weight": 1 / N_SOURCES,
            "where": {"wide": "width_px >= 128", "said": "n_loss_tokens BETWEEN 8 AND 100"},
        }
        | ({"max_epochs": 0.5} if number % 2 else {})
        for number in range(N_SOURCES)
    ]
    fields = {"name": "bench", "title": "Bench", "seed": SEED, "budget_tokens": rows * N_SOURCES * 120}
    return MixSpec.model_validate(fields | {"unique": ["image_sha256"], "sources": sources})


def measured(root: Path, threads: int) -> dict[str, Any]:
    """One curate run over the ledgers under `root`, in this process."""
    rows = json.loads(next(root.glob("shard/*/*/manifest.json")).read_bytes())["counts"]["kept"]
    ledgers = make_ledgers(root, rows)
    spec = {"mix": mix(rows).model_dump(mode="json")}
    inputs = {f"shard/{source}": a for source, a in ledgers.items()}
    job = Job("curate", "bench", curate.VERSION, spec, inputs, root, root, threads, lambda line: None)
    before, spilled = _peak_mib(), Spilled(job.work / "duckdb")
    began, cpu = time.perf_counter(), time.process_time()
    spilled.start()
    made, _ = artifact.make(job, curate.run, force=True)
    wall, spent = time.perf_counter() - began, time.process_time() - cpu
    n = rows * N_SOURCES
    return {
        "rows": n,
        "drawn": made.manifest.stats["n_samples"],
        "twins_left_out": sum(v for k, v in made.manifest.counts["dropped"].items() if k.startswith("duplicate")),
        "wall_s": round(wall, 2),
        "rows_per_s_core": round(n / spent),
        "peak_mib": _peak_mib(),
        "peak_mib_before": before,
        "spilled_mib": spilled.end(),
        "digest": made.manifest.digest,
    }


class Spilled(threading.Thread):
    """The most bytes that lay in DuckDB's scratch at one time, looked at a hundred times a second."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.most, self._over = folder, 0, threading.Event()

    def end(self) -> float:
        """Stop looking; the most in MiB."""
        self._over.set()
        self.join()
        return round(self.most / 2**20, 1)

    def run(self) -> None:
        """Look until told to stop; a file may go while it is looked at."""
        while not self._over.wait(0.01):
            with contextlib.suppress(OSError):
                self.most = max(self.most, sum(f.stat().st_size for f in self.folder.rglob("*") if f.is_file()))


def apart(root: Path, threads: int, *, cap_bytes: int | None = None) -> dict[str, Any]:
    """`measured` in a process of its own; with a cap DuckDB has that much memory and the disk."""
    command = [sys.executable, "-m", "solo.bench.curate", str(root), str(threads), str(cap_bytes or 0)]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return found


def other(root: Path) -> dict[str, Any] | None:
    """The same work in polars or pandas; None where there is no Python that has one."""
    if not Path(REFERENCE).is_file():
        return None
    script = Path(__file__).with_name("curate_frame.py")
    command = [REFERENCE, str(script), str(root), str(N_SOURCES)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return dict(json.loads(done.stdout)) if done.returncode == 0 else None


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def _main(root: str, threads: str, cap: str) -> None:
    logging.disable()  # half the sources are short of their share here, which a run would say
    if int(cap):
        connect = duckdb.connect

        def capped(config: dict[str, Any] | None = None) -> duckdb.DuckDBPyConnection:
            return connect(config=(config or {}) | {"memory_limit": f"{cap}B"})

        duckdb.connect = capped  # type: ignore[assignment]
    sys.stdout.write(json.dumps(measured(Path(root), int(threads))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
