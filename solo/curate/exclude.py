"""Exclude: which samples of a mix may not be drawn, because another source or a benchmark holds them too.

In: the mix's ledgers, `unique`, `near` and `decontaminate` of its spec. Out: table `excluded` (key, source, reason,
tokens, winner and its source), to which solo/curate/quotas.py adds what is over a quota before it becomes
`excluded.parquet`, and `contamination.parquet` (one row per benchmark, item and sample). Invariants: only samples that
pass their source's predicates compete; contaminated ones go first; of twins in several sources the one whose source is
listed first in the mix stays, then the one of the smallest key, and repeats within one source are left to its filter; a
winner may itself not be drawn for want of budget. Nothing is written, and the lock stays as it was, where the mix asks
for none of it. Cost: one scan of the columns compared, solo/filter/duplicates.py's joins,
solo/filter/decontaminate.py's scan of text; where only equal values are compared, one scan of their sums and a second
one that keeps just what several sources hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from solo.artifact import Artifact, Job
from solo.curate.query import literal
from solo.filter import decontaminate, duplicates
from solo.filter.decontaminate import HITS, Benchmark
from solo.filter.measure import write_table
from solo.spec import MixSource, MixSpec, SpecError

EXCLUDED_FILE, HITS_FILE = "excluded.parquet", "contamination.parquet"
CONTAMINATED = "contaminated"
IMAGE_COLUMNS = ("image_sha256", "phash", "colours")  # a source without images has none to compare
IMAGE_BITS, COLOUR_LEVELS = 3, 16
ROW_GROUP = 122_880  # DuckDB's own: one scan unit per thread

ELIGIBLE = """
SELECT {rank} AS side, {source} AS source, key, n_tokens, {columns}
FROM (SELECT *, {reason} AS "out of it" FROM read_parquet({files}, union_by_name := TRUE))
WHERE "out of it" IS NULL"""
HAS_IMAGES = "SELECT coalesce(max(n_images), 0) > 0 FROM read_parquet($files, union_by_name := TRUE)"
RANKED = """
CREATE OR REPLACE TEMP TABLE ranked AS
SELECT row_number() OVER (ORDER BY side, key) - 1 AS item, * FROM {candidates}
"""
# What one source alone holds has no twin; sums of 64 bits find what several hold and now and then a little more.
SHARED = """
CREATE OR REPLACE TEMP TABLE shared_{i} AS
SELECT sum64 FROM (SELECT hash({identity}) AS sum64, side FROM eligible WHERE {identity} IS NOT NULL)
GROUP BY sum64 HAVING min(side) <> max(side)
"""
EVIDENCE = "CREATE OR REPLACE TEMP VIEW evidence AS SELECT * EXCLUDE (side, source, key, n_tokens) FROM ranked"
JUDGED = """
CREATE OR REPLACE TABLE judged AS
SELECT item, side, source, key, n_tokens, IF(key IN (SELECT key FROM hits), $contaminated, NULL) AS reason,
  CAST(NULL AS BIGINT) AS winner
FROM ranked
"""
EXCLUDED = """
CREATE OR REPLACE TEMP TABLE excluded AS
SELECT own.key, own.source, own.reason, own.n_tokens, winners.key AS winner, winners.source AS winner_source
FROM judged AS own LEFT JOIN judged AS winners ON winners.item = own.winner
WHERE own.reason IS NOT NULL
"""
# Sorted, because else row groups would end where a thread did. A dictionary of keys is never smaller than the keys.
WRITE = """
COPY ({rows}) TO {path} (
  FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, DICTIONARY_SIZE_LIMIT 4096, ROW_GROUP_SIZE {row_group}
)
"""
SORTED = "FROM excluded ORDER BY source, key"
NOTHING = """
CREATE OR REPLACE TEMP TABLE excluded (
  key VARCHAR, source VARCHAR, reason VARCHAR, n_tokens BIGINT, winner VARCHAR, winner_source VARCHAR
)
"""
# As the lock keeps it: what other sources and benchmarks leave out is found by more than SQL, so it is read here.
KEPT = f"""
CREATE OR REPLACE TEMP TABLE excluded AS
FROM read_parquet($excluded) WHERE winner IS NOT NULL OR reason = '{CONTAMINATED}'
"""
COUNTED = """
SELECT source, reason, winner_source, count(*) AS samples
FROM excluded GROUP BY ALL ORDER BY source, reason, winner_source NULLS FIRST
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
    """Table `excluded` and the file of hits; returns what the manifest says, nothing if nothing is compared."""
    if not (mix.unique or mix.near != type(mix.near)() or mix.decontaminate):
        return {}
    _gather(con, mix, ledgers)
    wanted = decontaminate.benchmarks(job, job.spec.get("benchmarks", {}))
    absent = set(mix.decontaminate) - {b.name for b in wanted}
    assert not absent, f"curate/{mix.name} was given no benchmark {sorted(absent)}"
    hits = contamination(job, con, ledgers, wanted)
    con.register("hits", hits)
    con.execute(JUDGED, {"contaminated": CONTAMINATED})
    duplicates.drop(con, mix.unique, mix.near, job.work)
    con.execute(EXCLUDED)
    if wanted:
        write_table(job.out / HITS_FILE, hits, row_group=ROW_GROUP)
    con.execute("DROP TABLE judged; DROP VIEW evidence; DROP TABLE ranked; DROP VIEW eligible")
    con.unregister("hits")
    return {"contamination": decontaminate.summary(wanted, hits)}


def seal(con: duckdb.DuckDBPyConnection, path: Path) -> list[dict[str, Any]]:
    """Write table `excluded`; returns samples by source, reason and the source that keeps their twin."""
    write(con, SORTED, path)
    return list(con.sql(COUNTED).to_arrow_table().to_pylist())


def write(con: duckdb.DuckDBPyConnection, rows: str, path: Path) -> None:
    """Write the rows of a sorted query as Parquet, by all threads and with the bytes that one would write."""
    con.execute(WRITE.format(rows=rows.strip(), path=literal(str(path)), row_group=ROW_GROUP))


def check_names(mix: MixSpec) -> None:
    """Refuse a predicate or quota that has the name of a reason which the mix gives itself."""
    reserved = reasons(mix)
    for source in mix.sources:
        if taken := sorted(reserved & set(source.where)):
            where = f"mixes/{mix.name}.yaml: sources.{source.source}.where.{taken[0]}"
            raise SpecError(f"{where}: that is a reason the mix gives itself; rename the predicate")


def reasons(mix: MixSpec) -> set[str]:
    """Why a mix leaves samples out that pass its predicates."""
    return {CONTAMINATED, *duplicates.reasons(mix.unique, mix.near)}


def _gather(con: duckdb.DuckDBPyConnection, mix: MixSpec, ledgers: list[Ledger]) -> None:
    """Table `ranked`: every eligible sample that may be left out or win, ranked, with the columns compared."""
    columns = dict.fromkeys(duplicates.compared(mix.unique, mix.near))
    needed = [*columns, *(["image_sha256", "phash"] if mix.decontaminate else [])]
    columns |= dict.fromkeys(IMAGE_COLUMNS if mix.decontaminate else ())
    kinds = {column: "BLOB" if column == "minhash" else "VARCHAR" for column in columns}
    branches = []
    for rank, ledger in enumerate(ledgers):
        if lacking := [column for column in needed if column not in ledger.columns]:
            ((has_images,),) = con.execute(HAS_IMAGES, {"files": ledger.files}).fetchall()
            for column in (c for c in lacking if has_images or c not in IMAGE_COLUMNS):
                raise SpecError(
                    f"mixes/{mix.name}.yaml: it compares by {column!r}, which the ledger of {ledger.name} lacks; "
                    f"add its signal to filter.signals in sources/{ledger.name}.yaml"
                )
        chosen = ", ".join(
            f"CAST({duplicates.quoted(c) if c in ledger.columns else 'NULL'} AS {kind}) AS {duplicates.quoted(c)}"
            for c, kind in kinds.items()
        )
        given = {"rank": rank, "source": literal(ledger.name), "files": literal(ledger.files)}
        branches.append(ELIGIBLE.format(**given, columns=chosen, reason=ledger.reason))
    con.execute(f"CREATE OR REPLACE TEMP VIEW eligible AS {' UNION ALL '.join(branches)}")
    everyone = mix.near != type(mix.near)() or mix.decontaminate
    con.execute(RANKED.format(candidates="eligible" if everyone else _suspects(con, mix.unique)))
    con.execute(EVIDENCE)


def _suspects(con: duckdb.DuckDBPyConnection, unique: tuple[str, ...]) -> str:
    """A query for the samples that share a value with another source's: all that exact comparison can leave out."""
    shared = []
    for i, entry in enumerate(unique):
        identity = duplicates.identity(entry)
        con.execute(SHARED.format(i=i, identity=identity))
        shared.append(f"hash({identity}) IN (FROM shared_{i})")
    return f"eligible WHERE {' OR '.join(shared)}"


def contamination(job: Job, con: duckdb.DuckDBPyConnection, ledgers: list[Ledger], wanted: list[Benchmark]) -> pa.Table:
    """Every hit on a sample that could be drawn, in order."""
    rows = _picture_hits(con, wanted) if any(b.counts["by_image"] for b in wanted) else []
    found = [hit for c in (ledgers if wanted else ()) for hit in decontaminate.text_hits(job, c.name, c.shards, wanted)]
    con.register("found", pa.table({"key": pa.array([hit["key"] for hit in found], pa.string())}))
    eligible = {key for (key,) in con.execute("SELECT key FROM ranked SEMI JOIN found USING (key)").fetchall()}
    con.unregister("found")
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
