"""filter: signals of one source, measured once, and verdicts, decided in one query over them.

In: raw tars of `acquire`, a `Filter` spec. Out: `signals.parquet` (key, raw_shard, every signal column, `meta_*`) and
`verdicts.parquet` (key, keep, reason, winner: the key kept in place of a duplicate), both sorted by key. Invariants: a
sample is kept iff every predicate is true (false and NULL drop it, the first such is the reason) and no kept sample
with a smaller key equals it in a `unique` column or is in its cluster of `near` ones; in = kept + dropped. Cost: a
decode per image where a signal is missing, else one scan: a threshold that moves reads no pixel. Signals lie at
ROOT/signals/<source>/<signal>-v<VERSION>/<sha256 of a raw tar>.parquet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from pydantic import ValidationError

from solo import pool
from solo.artifact import Job, Result
from solo.filter import verdicts
from solo.filter.measure import Measured, Signal, Unit, find_all, measure_shard, write_table
from solo.spec import Filter, SpecError

VERSION = 2  # 2: verdicts name the winner of a duplicate

ROW_GROUP = 122_880  # rows; DuckDB's own size, so that a scan splits evenly over its threads
SIGNALS_FILE = "signals.parquet"
FIXED = pa.schema([("key", pa.string()), ("raw_shard", pa.int32())])
VERDICT = pa.schema([("key", pa.string()), ("keep", pa.bool_()), ("reason", pa.string()), ("winner", pa.string())])

TWICE = "SELECT key, count(*) AS n FROM signals GROUP BY key HAVING n > 1 ORDER BY key LIMIT 1"
SIGNALS = "SELECT * FROM read_parquet($paths, union_by_name => true) ORDER BY key"
VERDICTS = """
SELECT judged.key, judged.reason IS NULL AS keep, judged.reason, winners.key AS winner
FROM judged LEFT JOIN judged AS winners ON winners.item = judged.winner
ORDER BY judged.key
"""
REASONS = "SELECT coalesce(reason, '') AS r, count(*) FROM judged GROUP BY r ORDER BY r"


def run(job: Job) -> Result:
    """Make one source's signals and verdicts."""
    spec = _spec(job)
    raw = sorted((job.one("acquire").path / "raw").glob("*.tar"))
    wanted = find_all(spec.signals, spec.arguments)
    for signal in wanted:
        signal.at(job.specs)
    _check_early(job, spec, wanted)
    passes = measure_missing(job, spec, wanted, raw)
    if not (job.out / SIGNALS_FILE).exists():
        write_signals(job, wanted, raw)
    n_in = job.one("acquire").manifest.counts["kept"]
    reasons = write_verdicts(job, spec)
    n_kept = reasons.pop("", 0)
    stats = {
        "n_samples": n_kept + sum(reasons.values()),
        "reasons": reasons,
        "n_decodes": sum(p.n_decodes for p in passes),  # of this run: 0 where every signal was there
        "n_shards_measured": len(passes),
        "signals": [s.folder for s in wanted],
    }
    job.progress(f"filter/{job.name}: kept {n_kept} of {n_in} samples, dropped {reasons}")
    return Result(n_in, n_kept, reasons, stats)


def _spec(job: Job) -> Filter:
    try:
        return Filter.model_validate(job.spec["filter"])
    except ValidationError as error:
        what = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise SpecError(f"{_where(job)}: filter.{what}") from None


def measure_missing(job: Job, spec: Filter, wanted: list[Signal], raw: list[Path]) -> list[Measured]:
    """Measure what the cache lacks: one pass over each raw shard that misses a signal."""
    cache, names = cache_folder(job), cache_names(job)
    cache.mkdir(parents=True, exist_ok=True)
    passes = []
    with FileLock(cache / ".lock"):  # a second filter of this source waits, then finds all files there
        units = []
        for tar in raw:
            targets = {s.name: cache / s.folder / names[tar.name] for s in wanted}
            missing = {name: path for name, path in targets.items() if not path.exists()}
            if missing:
                units.append(Unit(tar, missing, job.specs, spec.arguments))
        for unit, done in zip(units, pool.each(measure_shard, units, job.workers), strict=True):
            passes.append(done)
            job.progress(
                f"filter/{job.name}: {done.tar.name}: {done.n_samples} samples, {done.n_decodes} decodes, "
                f"measured {', '.join(unit.targets)}"
            )
    return passes


def cache_folder(job: Job) -> Path:
    """Where the signals of this source's raw shards are kept, apart from any decision."""
    return job.root / "signals" / job.name


def cache_names(job: Job) -> dict[str, str]:
    """Raw tar -> its cache file, named by content, so that a pass over a URL list measures only the tars it adds."""
    files = job.one("acquire").manifest.files
    return {Path(f["path"]).name: f"{f['sha256'][:16]}.parquet" for f in files if f["path"].endswith(".tar")}


def write_signals(job: Job, wanted: list[Signal], raw: list[Path]) -> None:
    """Put all signals of all raw shards side by side, sorted by key."""
    cache, names, beside = cache_folder(job), cache_names(job), job.work / "beside"
    # An empty table first: it fixes the order and the types of the columns, whatever the shards hold.
    empty = beside / "empty.parquet"
    write_table(empty, _declared(wanted).empty_table())
    paths = [empty]
    for tar in raw:
        tables = [pq.read_table(cache / s.folder / names[tar.name]) for s in wanted]
        keys = tables[0]["key"]
        shard = pa.table({"key": keys, "raw_shard": pa.array([int(tar.stem)] * len(keys), pa.int32())})
        for table in tables:
            assert table["key"].equals(keys), f"{tar}: the cached signals in {cache} differ in their keys"
            for column in table.column_names[1:]:
                shard = shard.append_column(column, table[column])
        paths.append(beside / f"{tar.stem}.parquet")
        write_table(paths[-1], shard)
    with connect(job) as con:
        rows = con.sql(SIGNALS, params={"paths": [str(p) for p in paths]}).to_arrow_reader(ROW_GROUP)
        meta = sorted(name for name in rows.schema.names if name.startswith("meta_"))
        fixed = [name for name in rows.schema.names if not name.startswith("meta_")]
        order = fixed + meta  # by name: which shard showed a field first must not matter
        batches = (batch.select(order) for batch in rows)
        write_rows(job.out / SIGNALS_FILE, pa.schema([rows.schema.field(name) for name in order]), batches)


def write_verdicts(job: Job, spec: Filter) -> dict[str, int]:
    """Decide on every sample; returns the number per reason, "" for those kept."""
    with connect(job) as con:
        con.read_parquet(str(job.out / SIGNALS_FILE)).create_view("signals")
        for key, n in con.execute(TWICE).fetchall():
            raise ValueError(f"{job.name}: key {key} occurs {n} times in raw/; make the adapter's ids unique")
        verdicts.judge(con, _where(job), spec, job.work)
        write_rows(job.out / "verdicts.parquet", VERDICT, con.sql(VERDICTS).to_arrow_reader(ROW_GROUP))
        return dict(con.execute(REASONS).fetchall())


def _check_early(job: Job, spec: Filter, wanted: list[Signal]) -> None:
    """Refuse what cannot work before anything is measured; only the data can tell which `meta_*` there are."""
    keep = {name: predicate for name, predicate in spec.keep.items() if "meta_" not in predicate.lower()}
    unique = tuple(column for column in spec.unique if "meta_" not in column)
    with duckdb.connect() as con:
        con.from_arrow(_declared(wanted).empty_table()).create("signals")
        verdicts.check(con, _where(job), spec.model_copy(update={"keep": keep, "unique": unique}))


def _where(job: Job) -> str:
    return f"sources/{job.name}.yaml"


def connect(job: Job) -> duckdb.DuckDBPyConnection:
    """An in-memory database that spills into the job's scratch."""
    con = duckdb.connect()
    con.execute("SET threads = $threads", {"threads": job.workers})
    con.execute("SET temp_directory = $folder", {"folder": str(job.work / "duckdb")})
    return con


def _declared(wanted: Iterable[Signal]) -> pa.Schema:
    """Schema of signals.parquet without the `meta_*` columns, which only the data can tell."""
    columns = {column: kind for s in wanted for column, kind in (s.columns or {}).items()}
    return pa.schema([*FIXED, *columns.items()])


def write_rows(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Stream rows to Parquet in row groups of one size, so that the reader's batching leaves no trace in the bytes."""
    aside = path.with_name(path.name + ".tmp")
    with pq.ParquetWriter(aside, schema, compression="zstd") as writer:
        for group in _regroup(schema, batches):
            writer.write_table(group)
    aside.replace(path)


def _regroup(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    pending = schema.empty_table()
    for batch in batches:
        pending = pa.concat_tables([pending, pa.Table.from_batches([batch])])
        while pending.num_rows >= ROW_GROUP:
            yield pending.slice(0, ROW_GROUP)
            pending = pending.slice(ROW_GROUP)
    if pending.num_rows:
        yield pending
