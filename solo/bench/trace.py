"""Bench of `solo trace`: seconds from the command to its answer on a ledger of many rows.

In: a number of rows. Out: for each way to ask, the median and worst seconds of whole processes and of the look-up
alone, and what a full scan by DuckDB takes. The tables are made, their row groups, order and columns are those that
the parts write, of an archive whose keys are in no order on disk. Cost: 10 M rows take about 3 GB and some minutes.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from solo import artifact
from solo.acquire import raw
from solo.artifact import Artifact, Job, Result
from solo.curate import part as curate
from solo.filter import part as filter_part
from solo.lineage import trace
from solo.pack import plan_files as pack_plan
from solo.shard import part as shard
from solo.train import trained

SOURCE, ROWS_PER_SHARD, ROWS_PER_PACK, BATCH_PACKS = "crawl", 10_000, 40, 128
MADE = """
CREATE TABLE made AS
SELECT i, $source || '-' || substr(sha256(i::VARCHAR), 1, 16) AS key, i // $per_shard AS raw_shard,
  'https://host' || (hash(i) % 50_000) || '.example/pictures/' || i || '.jpg' AS url, sha256('p' || i) AS sha256
FROM range($rows) AS r(i)
"""
OUTCOMES = """
SELECT 'row ' || i AS identity, url, key, 'ok' AS status, 200 AS http_status, sha256 AS served_sha256, sha256,
  60_000 AS bytes, 1 AS n_images, raw_shard, (i % $per_shard) * 61_440 AS "offset", 61_440 AS length
FROM made ORDER BY key
"""
VERDICTS = (
    "SELECT key, TRUE AS keep, CAST(NULL AS VARCHAR) AS reason, CAST(NULL AS VARCHAR) AS winner FROM made ORDER BY key"
)
SIGNALS = "SELECT key, raw_shard, 640 AS width_px, 480 AS height_px, i % 80 AS n_chars FROM made ORDER BY key"
LEDGER = """
CREATE TABLE ledger AS
SELECT *, n // $per_shard AS shard, (n % $per_shard) * 61_440 AS "offset"
FROM (SELECT key, url, sha256, $source AS source, row_number() OVER (ORDER BY raw_shard, key) - 1 AS n FROM made)
"""
COUNTS = """61_440 AS length, 'plain' AS template, 1 AS n_images, 300 AS n_patches, 40 AS n_text_tokens,
  40 AS n_loss_tokens, 340 AS n_tokens"""
SHARDS = f'SELECT key, source, shard, "offset", {COUNTS}, sha256 FROM ledger ORDER BY n'
LOCK = f'SELECT key, source, shard, "offset", {COUNTS}, 1 AS n_repeats FROM ledger ORDER BY key'
PLAN = f"""
SELECT (r // $per_pack)::INTEGER AS pack, r % $per_pack AS slot, key, 0 AS exposure, source, shard, "offset", {COUNTS},
  0 AS "begin", 340 AS "end"
FROM (SELECT *, row_number() OVER (ORDER BY md5(key)) - 1 AS r FROM ledger) ORDER BY r
"""


def run(rows: int, *, n_each: int = 7) -> dict[str, Any]:
    """Make the tables and ask."""
    with tempfile.TemporaryDirectory(prefix="solo-bench-trace-") as folder:
        root = Path(folder)
        began = time.perf_counter()
        asked = make(root, rows)
        made_s = time.perf_counter() - began
        figures = {name: measure(root, arguments, n_each) for name, arguments in asked.items()}
        scan_s = scan(root, asked["key"][0])
        n_bytes = sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
    worst = max(f["worst_s"] for f in figures.values())
    made = {"scan_by_duckdb_s": scan_s, "bytes": n_bytes, "made_in_s": round(made_s, 1)}
    return {"rows": rows, "worst_s": worst, **figures, **made} | {
        "machine": {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    }


def make(root: Path, rows: int) -> dict[str, list[str]]:
    """Artifacts of every part to training, and the ways to ask."""
    con = duckdb.connect(config={"temp_directory": str(root / "duckdb"), "memory_limit": "8GB"})
    given = {"source": SOURCE, "per_shard": ROWS_PER_SHARD}
    con.execute(MADE, given | {"rows": rows})
    con.execute(LEDGER, given)
    done: dict[str, Artifact] = {}

    def add(part: str, name: str, inputs: tuple[str, ...], write: Callable[[Path], None], **more: Any) -> None:
        def work(job: Job) -> Result:
            write(job.out)
            return Result(rows, rows, {}, more.get("stats", {}))

        job = Job(part, name, 1, more.get("spec", {}), {i: done[i] for i in inputs}, root, root, 1)
        done[job.part + "/" + name], _ = artifact.make(job, work)

    per = {"per_shard": ROWS_PER_SHARD}
    per_pack = {"per_pack": ROWS_PER_PACK}
    n_packs = -(-rows // ROWS_PER_PACK)
    a, f, s, c, p = f"acquire/{SOURCE}", f"filter/{SOURCE}", f"shard/{SOURCE}", "curate/mix", "pack/mix"
    add("acquire", SOURCE, (), lambda out: write(con, out / raw.OUTCOMES, OUTCOMES, per, raw.SCHEMA, 10_000))
    add("filter", SOURCE, (a,), lambda out: _filter(con, out))
    add("shard", SOURCE, (a, f), lambda out: _shards(con, out))
    add(
        "curate",
        "mix",
        (s,),
        lambda out: write(con, out / "lock.parquet", LOCK, {}, curate.LOCK, filter_part.ROW_GROUP),
    )
    add(
        *("pack", "mix", (c, s), lambda out: _packs(con, out, n_packs, per_pack)),
        spec={"batch_packs": BATCH_PACKS},
        stats={"n_packs": n_packs},
    )
    add("train", "stage", (p, s), lambda out: _trained(out, n_packs))
    (found,) = con.execute("SELECT key, url, sha256 FROM made WHERE i = $i", {"i": rows // 3}).fetchall()
    con.close()
    key, url, sha256 = found
    step = ["--stage", "stage", "--step", str(max(1, n_packs // BATCH_PACKS // 2))]
    return {"key": [key], "beginning": [key[:-3]], "url": [url], "sha256": [sha256], "step": step}


def write(
    con: duckdb.DuckDBPyConnection, path: Path, sql: str, given: dict[str, Any], schema: pa.Schema, n: int
) -> None:
    """A query's rows under a schema; columns that it does not give are null."""
    columns = ", ".join(f'"{f.name}"' for f in schema)
    have = con.sql(sql, params=given)
    missing = [f'NULL AS "{f.name}"' for f in schema if f.name not in have.columns]
    rows = con.sql(f"SELECT {columns} FROM (SELECT *, {', '.join(missing) or '1 AS none'} FROM ({sql}))", params=given)
    raw.write_groups(path, schema, rows.to_arrow_reader(n), n)


def _filter(con: duckdb.DuckDBPyConnection, out: Path) -> None:
    write(con, out / "verdicts.parquet", VERDICTS, {}, filter_part.VERDICT, filter_part.ROW_GROUP)
    numbers = [(name, pa.int64()) for name in ("width_px", "height_px", "n_chars")]
    schema = pa.schema([*filter_part.FIXED, *numbers])
    write(con, out / filter_part.SIGNALS_FILE, SIGNALS, {}, schema, filter_part.ROW_GROUP)


def _shards(con: duckdb.DuckDBPyConnection, out: Path) -> None:
    (out / "shards").mkdir()
    whole = out / "ledger.parquet"
    write(con, whole, SHARDS, {}, shard.PLACE, ROWS_PER_SHARD)
    with pq.ParquetFile(whole) as file:
        for i in range(file.num_row_groups):
            pq.write_table(file.read_row_group(i), out / "shards" / f"{i:05d}.parquet", compression="zstd")
    whole.unlink()


def _packs(con: duckdb.DuckDBPyConnection, out: Path, n_packs: int, per_pack: dict[str, int]) -> None:
    write(con, out / "plan.parquet", PLAN, per_pack, pack_plan.PLAN, pack_plan.ROW_GROUP)
    first = pa.array(range(0, n_packs * ROWS_PER_PACK, ROWS_PER_PACK))
    columns = {"pack": pa.array(range(n_packs)), "first_row": first, "n_rows": [ROWS_PER_PACK] * n_packs}
    columns |= {n: [340 * ROWS_PER_PACK] * n_packs for n in pack_plan.COUNTED} | {"source": [SOURCE] * n_packs}
    pq.write_table(pa.table(columns).cast(pack_plan.PACKS), out / "packs.parquet", compression="zstd")


def _trained(out: Path, n_packs: int) -> None:
    own = {"n_documents": ROWS_PER_PACK, "n_tokens": 340 * ROWS_PER_PACK, "n_loss_tokens": 40 * ROWS_PER_PACK}
    sources = [{"source": SOURCE, "n_tokens": 1, "n_loss_tokens": 1, "loss": 2.0}]
    row = own | {"loss": 2.0, "sources": sources, "left_out": []}
    rows = [row | {"pack": i, "step": i // BATCH_PACKS + 1} for i in range(n_packs)]
    pq.write_table(pa.Table.from_pylist(rows, trained.ROW), out / "trained.parquet", compression="zstd")


def measure(root: Path, arguments: list[str], n_each: int) -> dict[str, float]:
    """Seconds of whole processes, and of the look-up in one that has everything imported."""
    command = [sys.executable, "-m", "solo.cli", "trace", "--json", *arguments]
    env = os.environ | {"SOLO_ROOT": str(root)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    whole = [timed(lambda: subprocess.run(command, env=env, check=True, capture_output=True)) for _ in range(n_each)]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / n_each
    if arguments[0] == "--stage":
        inside = [timed(lambda: trace.of_step(root, arguments[1], int(arguments[3]))) for _ in range(n_each)]
    else:
        inside = [timed(lambda: trace.trace(root, arguments[0])) for _ in range(n_each)]
    found = {"median_s": statistics.median(whole), "worst_s": max(whole), "cpu_s": cpu_s}
    found |= {"look_up_median_s": statistics.median(inside)}
    return {name: round(value, 3) for name, value in found.items()}


def timed(work: Callable[[], object]) -> float:
    """Seconds that work takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def scan(root: Path, key: str) -> float:
    """Seconds of the straightforward way: a query over every file that may hold the key."""
    names = ["acquire/*/*/outcomes", "filter/*/*/verdicts", "filter/*/*/signals", "shard/*/*/shards/*"]
    names += ["curate/*/*/lock", "pack/*/*/plan"]
    files = [str(root / f"{name}.parquet") for name in names]

    def work() -> None:
        with duckdb.connect() as con:
            for file in files:
                con.execute("SELECT * FROM read_parquet($file) WHERE key = $key", {"file": file, "key": key}).fetchall()

    return round(timed(work), 3)
