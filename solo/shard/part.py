"""shard: kept samples as WebDataset tars of equal size, with a ledger row each.

In: raw tars and outcomes of `acquire`, verdicts and signals of `filter`, a `Shard` and a `Tokens` spec. Out:
`shards/NNNNN.tar`, `.parquet` (ledger rows), `.json` (counts; written last, so a shard counts when it is there) and
`dropped.parquet`. Invariants: samples lie in the order (raw shard, key), every tar but the last holds
samples_per_shard; a row's (offset, length) is one whole sample; its counts are those of `tokens.tokenize`; image bytes
stay as they came but for their metadata (`solo.shard.exif`), or are those of `solo.shard.regrid` where the source asks
for its pictures at their grid; a row says which. Cost: two reads of the kept bytes, one tokenisation; images are
decoded for `grid_pictures` alone.

Dropping comes before cutting, hence two passes: `count` over raw shards, `write` over output shards.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from solo import pool
from solo.artifact import Job, Result, write_atomic
from solo.filter.measure import write_table
from solo.filter.part import connect
from solo.sample import Sample, end_tar, read_sample, write_sample
from solo.shard import exif
from solo.shard.counts import COUNTED, COUNTS, REASONS, CountUnit, Rules, count
from solo.shard.regrid import FORMS, Stored, regrid
from solo.spec import Shard, Spec, SpecError, Tokens

log = logging.getLogger(__name__)

# 3: pictures that stay as served lose their metadata; the ledger carries what curate compares
VERSION = 4  # 4: a JPEG's JFIF segment stays without its thumbnail, also where pictures lie at their grid

# Signals that curate may ask for; those of pictures tell of them as they came.
CARRIED = (
    *("image_sha256", "phash", "colours", "text_sha256", "minhash"),
    *("width_px", "height_px", "n_chars", "language", "meta_label", "meta_category"),
)

FORM_COUNTS = tuple(f"n_images_{form}" for form in FORMS)
IMAGE_BYTES = ("image_bytes_in", "image_bytes")

PLACE = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        *((name, pa.int32()) for name in COUNTS),
        ("template", pa.string()),
        ("sha256", pa.string()),  # of the sample's bytes in the tar
        *((name, pa.int32()) for name in FORM_COUNTS),
        *((name, pa.int64()) for name in IMAGE_BYTES),  # encoded, as acquired and as stored
        ("psnr_db", pa.float64()),  # the lowest of its JPEGs made here against the exact pixels; NULL without one
    ]
)

KEPT = """
SELECT key, o.raw_shard, o."offset", o.length, carried.* EXCLUDE (key)
FROM read_parquet($verdicts) AS v
JOIN read_parquet($outcomes) AS o USING (key)
JOIN carried USING (key)
WHERE v.keep AND o.raw_shard IS NOT NULL
ORDER BY o.raw_shard, key
"""
PLAN = """
SELECT kept.*, counted.* EXCLUDE (key, reason, error)
FROM read_parquet($kept) AS kept
JOIN read_parquet($counted) AS counted USING (key)
WHERE counted.reason IS NULL
ORDER BY kept.raw_shard, key
"""
PSNR = """
SELECT round(min(psnr_db), 2) AS lowest, round(median(psnr_db), 2) AS median FROM read_parquet($ledgers)
"""
DROPPED = """
SELECT key, reason, error FROM read_parquet($counted) WHERE reason IS NOT NULL ORDER BY key
"""


@dataclass(frozen=True)
class WriteUnit:
    """One output shard: row group `index` of the plan."""

    plan: Path
    index: int
    raw: Path  # folder of the raw tars
    out: Path  # folder of the shards
    scratch: Path
    source: str
    rules: Rules


def run(job: Job) -> Result:
    """Make one source's shards and ledger."""
    spec = _parse(Shard, job, "shard")
    rules = Rules(spec.template, _parse(Tokens, job, "tokens"), spec.grid_pictures)
    if rules.tokens.max_side_px % rules.tokens.patch_px:
        raise SpecError(
            f"tokens: max_side_px {rules.tokens.max_side_px} is not a multiple of patch_px {rules.tokens.patch_px}"
        )
    kept = job.work / "kept.parquet"
    n_in = select_kept(job, kept)
    counted = count_all(job, kept, rules)
    plan = job.work / "plan.parquet"
    n_shards, dropped = cut(job, kept, counted, plan, spec.samples_per_shard)
    raw = job.one("acquire").path / "raw"
    units = [
        WriteUnit(plan, i, raw, job.out / "shards", job.work, job.name, rules)
        for i in range(n_shards)
        if not (job.out / "shards" / f"{i:05d}.json").exists()
    ]
    if len(units) < n_shards:
        job.progress(f"shard/{job.name}: {n_shards - len(units)} of {n_shards} shards are in {job.out} already")
    for done in pool.each(write, units, job.workers):
        job.progress(f"shard/{job.name}: {done['shard'] + 1} of {n_shards}: {done['n_samples']} samples")
    stats = total(job.out / "shards", n_shards)
    with connect(job) as con:
        stats["psnr_db"] = psnr(con, job.out / "shards")
    return Result(n_in, stats["n_samples"], dropped, stats)


S = TypeVar("S", bound=Spec)


def _parse(kind: type[S], job: Job, field: str) -> S:
    try:
        return kind.model_validate(job.spec[field])
    except ValidationError as error:
        what = "; ".join(f"{'.'.join(map(str, (field, *e['loc'])))}: {e['msg']}" for e in error.errors())
        raise SpecError(f"shard/{job.name}: {what}") from None


def select_kept(job: Job, out: Path) -> int:
    """Where each kept sample lies in raw/, with the signal columns a ledger carries; returns their number."""
    acquired, filtered = job.one("acquire").path, job.one("filter").path
    there = pq.read_schema(filtered / "signals.parquet").names
    if "decodes" not in there and "image_sha256" in there:
        log.warning("shard/%s: filter measured no `decodes`, so a truncated image may reach training", job.name)
    with connect(job) as con:
        signals = con.read_parquet(str(filtered / "signals.parquet"))
        signals.select(*["key", *(c for c in ("decodes", *CARRIED) if c in there)]).create_view("carried")
        files = {"verdicts": str(filtered / "verdicts.parquet"), "outcomes": str(acquired / "outcomes.parquet")}
        rows = con.sql(KEPT, params=files).to_arrow_table()
    n_in: int = job.one("filter").manifest.counts["kept"]
    if rows.num_rows != n_in:
        raise ValueError(f"shard/{job.name}: filter kept {n_in} keys, outcomes place {rows.num_rows} of them in raw/")
    write_table(out, rows)
    return n_in


def count_all(job: Job, kept: Path, rules: Rules) -> list[Path]:
    """First pass, over raw shards: what each kept sample counts, or why it cannot be used."""
    raw = job.one("acquire").path / "raw"
    empty = job.work / "counted" / "empty.parquet"  # gives the queries their columns where there is no raw shard
    write_table(empty, COUNTED.empty_table())
    numbers = sorted(set(pq.read_table(kept, columns=["raw_shard"])["raw_shard"].to_pylist()))
    units = [CountUnit(kept, raw / f"{i:05d}.tar", job.work / "counted" / f"{i:05d}.parquet", rules) for i in numbers]
    for n_samples in pool.each(count, [u for u in units if not u.out.exists()], job.workers):
        job.progress(f"shard/{job.name}: counted {n_samples} samples of a raw shard")
    return [empty, *(u.out for u in units)]


def cut(job: Job, kept: Path, counted: list[Path], plan: Path, samples_per_shard: int) -> tuple[int, dict[str, int]]:
    """Cut what remains into shards, one row group of the plan each; write and count what was dropped."""
    files = {"kept": str(kept), "counted": [str(p) for p in counted]}
    with connect(job) as con:
        rows = con.sql(PLAN, params=files).to_arrow_table()
        dropped = con.sql(DROPPED, params={"counted": files["counted"]}).to_arrow_table()
    write_table(plan, rows, row_group=samples_per_shard)
    write_table(job.out / "dropped.parquet", dropped)
    reasons = dropped["reason"].to_pylist()
    # No sample left still makes one empty shard: a mix that reads it can then say so by name.
    n_shards = max(1, -(-rows.num_rows // samples_per_shard))
    return n_shards, {reason: reasons.count(reason) for reason in REASONS if reason in reasons}


def write(unit: WriteUnit) -> dict[str, Any]:
    """Second pass: one tar, its ledger rows, and last its JSON."""
    plan = pq.ParquetFile(unit.plan)
    rows = plan.read_row_group(unit.index) if plan.num_row_groups else plan.schema_arrow.empty_table()
    name = f"{unit.index:05d}"
    unit.out.mkdir(parents=True, exist_ok=True)
    # The name holds the process: a worker that outlived a killed run may still be writing its own.
    aside = unit.scratch / f"{name}.tar.{os.getpid()}"
    places, tar_sha256 = write_tar(aside, unit, rows.select(["key", "raw_shard", "offset", "length"]).to_pylist())
    counts = rows.select(list(COUNTS))
    ledger = pa.Table.from_pylist(places, pa.schema([f for f in PLACE if f.name not in COUNTS]))
    ledger = pa.table({f.name: (counts if f.name in COUNTS else ledger)[f.name] for f in PLACE}, schema=PLACE)
    for column in rows.column_names:
        if column in CARRIED:
            ledger = ledger.append_column(rows.schema.field(column), rows[column])
    n_bytes = aside.stat().st_size
    aside.replace(unit.out / f"{name}.tar")
    write_table(unit.out / f"{name}.parquet", ledger)
    sums = {column: sum(ledger[column].to_pylist()) for column in (*COUNTS, *FORM_COUNTS, *IMAGE_BYTES)}
    done = {"shard": unit.index, "n_samples": len(places), **sums, "bytes": n_bytes, "sha256": tar_sha256}
    write_atomic(unit.out / f"{name}.json", json.dumps(done, indent=1).encode())
    return done


def write_tar(path: Path, unit: WriteUnit, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Samples from raw/ in one tar; returns where each lies and what its pictures became, and the tar's SHA-256."""
    places, offset, whole = [], 0, hashlib.sha256()
    with path.open("wb") as tar:
        for row in rows:
            raw = unit.raw / f"{row['raw_shard']:05d}.tar"
            buffer = io.BytesIO()
            sample, pictures = with_pictures(read_sample(raw, row["offset"], row["length"]), unit.rules)
            length = write_sample(buffer, sample)
            data = buffer.getvalue()
            tar.write(data)
            whole.update(data)
            places.append(
                {
                    "key": row["key"],
                    "source": unit.source,
                    "shard": unit.index,
                    "offset": offset,
                    "length": length,
                    "template": unit.rules.template,
                    "sha256": hashlib.sha256(data).hexdigest(),
                    **pictures,
                }
            )
            offset += length
        buffer = io.BytesIO()
        end_tar(buffer)
        tar.write(buffer.getvalue())
        whole.update(buffer.getvalue())
        tar.flush()
        os.fsync(tar.fileno())
    return places, whole.hexdigest()


def with_pictures(sample: Sample, rules: Rules) -> tuple[Sample, dict[str, Any]]:
    """The sample as it is stored, and its ledger's columns about pictures."""
    spec, tokens = rules.grid_pictures, rules.tokens
    try:
        stored = [regrid(data, tokens, spec) if spec else _bare(data) for data in sample.images]
    except ValueError as error:
        raise ValueError(f"{sample.key}: {error}; its filter said that it decodes, run filter again") from error
    forms = Counter(one.form for one in stored)
    row: dict[str, Any] = {f"n_images_{form}": forms[form] for form in FORMS}
    row |= {"image_bytes_in": sum(map(len, sample.images)), "image_bytes": sum(len(one.data) for one in stored)}
    row["psnr_db"] = min((one.psnr_db for one in stored if one.psnr_db is not None), default=None)
    return replace(sample, images=tuple(one.data for one in stored)), row


def _bare(data: bytes) -> Stored:
    """A picture as served but for its metadata: where and by whom it was taken is nobody's business here."""
    bare = exif.strip(data)
    return Stored(bare, "as_came" if bare == data else "bare", None)


def total(shards: Path, n_shards: int) -> dict[str, Any]:
    """Sums over the shards' JSON files."""
    each = [json.loads((shards / f"{i:05d}.json").read_bytes()) for i in range(n_shards)]
    summed = ("n_samples", *COUNTS, *FORM_COUNTS, *IMAGE_BYTES, "bytes")
    return {"n_shards": n_shards} | {name: sum(e[name] for e in each) for name in summed}


def psnr(con: duckdb.DuckDBPyConnection, shards: Path) -> dict[str, float] | None:
    """Lowest and median PSNR of the samples with a JPEG made here; None where no sample has one."""
    lowest, median = con.execute(PSNR, {"ledgers": str(shards / "*.parquet")}).fetchall()[0]
    return None if lowest is None else {"lowest": lowest, "median": median}
