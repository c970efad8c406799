"""Exclude: which samples of a mix may not be drawn, because another source or a benchmark holds them too.

In: the mix's ledgers, `unique`, `near` and `decontaminate` of its spec. Out: `excluded.parquet` (key, source, reason,
winner and its source) and `contamination.parquet` (one row per benchmark, item and sample). Invariants: only samples
that pass their source's predicates compete; contaminated ones go first; of twins in several sources the one whose
source is listed first in the mix stays, then the one of the smallest key, and repeats within one source are left to
its filter; a winner may itself not be drawn for want of budget. Nothing is written, and the lock stays as it was,
where the mix asks for none of it. Cost: one scan of the columns compared, solo/duplicates.py's joins,
solo/decontaminate.py's scan of text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from solo import decontaminate, duplicates
from solo.artifact import Artifact, Job
from solo.decontaminate import HITS, Benchmark
from solo.measure import write_table
from solo.spec import MixSource, MixSpec, SpecError

EXCLUDED_FILE, HITS_FILE = "excluded.parquet", "contamination.parquet"
CONTAMINATED = "contaminated"
IMAGE_COLUMNS = ("image_sha256", "phash", "colours")  # a source without images has none to compare
IMAGE_BITS, COLOUR_LEVELS = 3, 16
ROW_GROUP = 122_880

CANDIDATES = """
SELECT {rank} AS side, {source} AS source, key, {columns}
FROM (SELECT *, {reason} AS "out of it" FROM read_parquet($files, union_by_name := TRUE))
WHERE "out of it" IS NULL
"""
HAS_IMAGES = "SELECT coalesce(max(n_images), 0) > 0 FROM read_parquet($files, union_by_name := TRUE)"
RANKED = """
CREATE OR REPLACE TABLE ranked AS
SELECT row_number() OVER (ORDER BY side, key) - 1 AS item, * FROM candidates
"""
EVIDENCE = "CREATE OR REPLACE VIEW evidence AS SELECT * EXCLUDE (side, source, key) FROM ranked"
JUDGED = """
CREATE OR REPLACE TABLE judged AS
SELECT item, side, source, key, IF(key IN (SELECT key FROM hits), $contaminated, NULL) AS reason,
  CAST(NULL AS BIGINT) AS winner
FROM ranked
"""
EXCLUDED = """
SELECT judged.key, judged.source, judged.reason, winners.key AS winner, winners.source AS winner_source
FROM judged LEFT JOIN judged AS winners ON winners.item = judged.winner
WHERE judged.reason IS NOT NULL
ORDER BY judged.source, judged.key
"""
SAME_BYTES = """
SELECT benchmark, pictures.item, source, key
FROM ranked JOIN pictures USING (image_sha256)
"""
NODES = """
CREATE OR REPLACE TEMP TABLE {table} AS
SELECT row_number() OVER (ORDER BY phash) - 1 AS node, ('0x' || phash)::UBIGINT AS bits, phash
FROM (SELECT DISTINCT phash FROM {origin} WHERE phash IS NOT NULL)
"""
ALIKE = """
SELECT benchmark, pictures.item, source, key, ranked.colours AS ours, pictures.colours AS theirs,
  bit_count(xor(own.bits, their.bits)) AS bits
FROM pairs
JOIN own ON own.node = pairs.own JOIN their ON their.node = pairs.their
JOIN ranked ON ranked.phash = own.phash JOIN pictures ON pictures.phash = their.phash
"""


@dataclass(frozen=True)
class Ledger:
    """One source of a mix: its ledger's files and columns, and the CASE that gives a row the reason to leave it out."""

    spec: MixSource
    files: str
    reason: str
    shards: Artifact
    columns: tuple[str, ...]

    @property
    def name(self) -> str:
        """The source's name."""
        return self.spec.source


def run(job: Job, mix: MixSpec, con: duckdb.DuckDBPyConnection, ledgers: list[Ledger]) -> dict[str, Any]:
    """Write the two files; returns what the manifest says of them, nothing where the mix compares nothing."""
    if not (mix.unique or mix.near != type(mix.near)() or mix.decontaminate):
        return {}
    _check_names(mix)
    _gather(con, mix, ledgers)
    wanted = decontaminate.benchmarks(job, job.spec.get("benchmarks", {}))
    absent = set(mix.decontaminate) - {b.name for b in wanted}
    assert not absent, f"curate/{mix.name} was given no benchmark {sorted(absent)}"
    hits = contamination(job, con, ledgers, wanted)
    con.register("hits", hits)
    con.execute(JUDGED, {"contaminated": CONTAMINATED})
    duplicates.drop(con, mix.unique, mix.near, job.work)
    excluded = con.sql(EXCLUDED).to_arrow_table()
    write_table(job.out / EXCLUDED_FILE, excluded, row_group=ROW_GROUP)
    if wanted:
        write_table(job.out / HITS_FILE, hits, row_group=ROW_GROUP)
    con.execute("DROP TABLE judged; DROP VIEW evidence; DROP TABLE ranked; DROP TABLE candidates")
    con.unregister("hits")
    return {"excluded": _counted(excluded), "contamination": decontaminate.summary(wanted, hits)}


def _check_names(mix: MixSpec) -> None:
    reserved = {CONTAMINATED, *duplicates.reasons(mix.unique, mix.near)}
    for source in mix.sources:
        if taken := sorted(reserved & set(source.where)):
            where = f"mixes/{mix.name}.yaml: sources.{source.source}.where.{taken[0]}"
            raise SpecError(f"{where}: that is a reason the mix gives itself; rename the predicate")


def _gather(con: duckdb.DuckDBPyConnection, mix: MixSpec, ledgers: list[Ledger]) -> None:
    """Table `ranked`: every eligible sample of every source, ranked, with the columns compared."""
    columns = dict.fromkeys(duplicates.compared(mix.unique, mix.near))
    needed = [*columns, *(["image_sha256", "phash"] if mix.decontaminate else [])]
    columns |= dict.fromkeys(IMAGE_COLUMNS if mix.decontaminate else ())
    for rank, ledger in enumerate(ledgers):
        ((has_images,),) = con.execute(HAS_IMAGES, {"files": ledger.files}).fetchall()
        for column in needed:
            if column not in ledger.columns and (has_images or column not in IMAGE_COLUMNS):
                raise SpecError(
                    f"mixes/{mix.name}.yaml: it compares by {column!r}, which the ledger of {ledger.name} lacks; "
                    f"add its signal to filter.signals in sources/{ledger.name}.yaml"
                )
        kinds = {column: "BLOB" if column == "minhash" else "VARCHAR" for column in columns}
        chosen = [
            f"CAST({duplicates.quoted(c) if c in ledger.columns else 'NULL'} AS {kind}) AS {duplicates.quoted(c)}"
            for c, kind in kinds.items()
        ]
        sql = CANDIDATES.format(rank=rank, source=literal(ledger.name), columns=", ".join(chosen), reason=ledger.reason)
        how = "INSERT INTO candidates" if rank else "CREATE OR REPLACE TABLE candidates AS"
        con.execute(f"{how} {sql}", {"files": ledger.files})
    con.execute(RANKED)
    con.execute(EVIDENCE)


def contamination(job: Job, con: duckdb.DuckDBPyConnection, ledgers: list[Ledger], wanted: list[Benchmark]) -> pa.Table:
    """Every hit on a sample that could be drawn, in order."""
    rows = _picture_hits(con, wanted) if any(b.counts["by_image"] for b in wanted) else []
    eligible = {key for (key,) in con.execute("SELECT key FROM ranked").fetchall()} if wanted else set()
    for ledger in ledgers if wanted else ():
        found = decontaminate.text_hits(job, ledger.name, ledger.shards, wanted)
        rows += [hit for hit in found if hit["key"] in eligible]
    rows.sort(key=lambda r: tuple(r[name] for name in HITS.names))
    return pa.Table.from_pylist(rows, HITS)


def _picture_hits(con: duckdb.DuckDBPyConnection, wanted: list[Benchmark]) -> list[dict[str, str]]:
    pictures = [
        {"benchmark": b.name, "item": row["item"], "image_sha256": sha256, "phash": phash, "colours": colours}
        for b in wanted
        for row in b.items
        for sha256, phash, colours in zip(row["image_sha256"], row["phash"], row["colours"], strict=False)
    ]
    con.register("pictures", pa.Table.from_pylist(pictures))
    hits = {row: ("image_bytes", "the same bytes") for row in con.execute(SAME_BYTES).fetchall()}
    con.execute(NODES.format(table="own", origin="ranked"))
    con.execute(NODES.format(table="their", origin="pictures"))
    pairs = np.concatenate([*duplicates.close(con, "own", "their", IMAGE_BITS), np.zeros((0, 2), np.int64)])
    pairs = np.unique(pairs, axis=0)  # a pair may agree in several blocks
    con.register("pairs", pa.table({"own": pairs[:, 0], "their": pairs[:, 1]}))
    found = con.sql(ALIKE).to_arrow_table().to_pylist()
    ours, theirs = (duplicates.colour_cells([row[side] for row in found]) for side in ("ours", "theirs"))
    alike = np.abs(ours.astype(np.int16) - theirs).max(axis=1, initial=0) <= COLOUR_LEVELS
    for row, same in zip(found, alike.tolist(), strict=True):
        if same or row["ours"] is None:
            place = (row["benchmark"], row["item"], row["source"], row["key"])
            hits.setdefault(place, ("image_near", f"{row['bits']} of 64 bits differ"))
    for name in ("pictures", "pairs"):
        con.unregister(name)
    names = ("benchmark", "item", "source", "key")
    return [dict(zip(names, place, strict=True)) | {"how": how, "evidence": e} for place, (how, e) in hits.items()]


def _counted(excluded: pa.Table) -> list[dict[str, Any]]:
    """Samples left out by source, reason and the source that keeps their twin."""
    by = ["source", "reason", "winner_source"]
    counted = excluded.group_by(by).aggregate([([], "count_all")]).to_pylist()
    rows = [{name: row[name] for name in by} | {"samples": row["count_all"]} for row in counted]
    return sorted(rows, key=lambda r: (r["source"], r["reason"], r["winner_source"] or ""))


def literal(value: object) -> str:
    """A value in SQL's own notation."""
    if isinstance(value, list):
        return f"[{', '.join(literal(v) for v in value)}]"
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(value).upper()
