"""Erase: what the list of takedowns means, gone from an acquire artifact that is being made.

In: a job's raw tars, its outcome table put aside, what was seen of each URL; the list. Out: the outcome table in its
place, the tars of those samples written anew without them. Invariants: there is one row for each input as before, and
one that was taken down says nothing but that, and by which entry; tars without such a sample keep their bytes, so what
was measured of them stays; a source read anew and one that is changed give the same bytes. Cost: one scan where nothing
is meant; else a read of the tars concerned and one write of the rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from solo.acquire.passes import FETCH, LINK_ROT
from solo.acquire.raw import OUTCOMES, SCHEMA, write_groups
from solo.artifact import Job, write_atomic
from solo.lineage import takedown
from solo.lineage.takedown import TAKEN_DOWN, Entry, Listed
from solo.sample import end_tar, read_samples, write_sample

MEMORY = "takedown"  # folder of the data root: by source, hashes of the keys that were taken down
ROW = "row [0-9]+"  # the one identity that says nothing of a record; passes find their rows by it
MEANT = "SELECT * FROM read_parquet($outcomes, file_row_number := TRUE) JOIN meant ON file_row_number = n"
ERASED = """
SELECT rows.* REPLACE (
  coalesce(moved."offset", rows."offset") AS "offset", coalesce(moved.length, rows.length) AS length)
FROM read_parquet($outcomes, file_row_number := TRUE) AS rows
LEFT JOIN moved USING (key, raw_shard)
WHERE file_row_number NOT IN (SELECT n FROM meant)
UNION ALL BY NAME
SELECT IF(regexp_full_match(identity, $row), identity, NULL) AS identity, $taken_down AS status, entry AS evidence,
  file_row_number
FROM read_parquet($outcomes, file_row_number := TRUE) JOIN meant ON file_row_number = n
ORDER BY key, identity, file_row_number
"""
APPLIED = "SELECT DISTINCT evidence FROM read_parquet($outcomes) WHERE status = $taken_down"
SEEN = "SELECT * FROM read_parquet($fetches) WHERE key NOT IN (SELECT key FROM erased) ORDER BY ALL"


def run(job: Job, aside: Path, listed: Listed) -> None:
    """Put the outcomes in their place, without what is listed."""
    raw = job.out / "raw"
    meant = takedown.matches(listed, aside, job.out / FETCH, raw)
    if not meant:
        target = job.out / (OUTCOMES + ".tmp")
        target.write_bytes(aside.read_bytes())
        target.replace(job.out / OUTCOMES)
        return
    table = pa.table({"n": pa.array(meant, pa.int64()), "entry": [entry.id for entry in meant.values()]})
    with duckdb.connect() as con:
        con.execute(f"SET threads = {job.workers:d}")
        con.register("meant", table)
        rows = con.sql(MEANT, params={"outcomes": str(aside)}).to_arrow_table().to_pylist()
        remember(job, rows)
        con.register("moved", _rewritten(raw, rows))
        _forget_seen(con, job, rows, listed)
        given = {"outcomes": str(aside), "row": ROW, "taken_down": TAKEN_DOWN}
        found = con.sql(ERASED, params=given)
        named = found.select(*(f'"{name}"' if name in found.columns else f"NULL AS {name}" for name in SCHEMA.names))
        write_groups(job.out / OUTCOMES, SCHEMA, named.to_arrow_reader(10_000))
    job.progress(
        f"acquire/{job.name}: {len(meant)} inputs are taken down by {len({e.id for e in meant.values()})} entries"
    )


def _rewritten(raw: Path, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Write the tars of these rows anew without them; where the other samples of those tars lie now."""
    gone: dict[int, set[str]] = {}
    for row in rows:
        if row["raw_shard"] is not None:
            gone.setdefault(row["raw_shard"], set()).add(row["key"])
    moved: dict[str, list[Any]] = {"key": [], "raw_shard": [], "offset": [], "length": []}
    for shard, keys in sorted(gone.items()):
        path, offset = raw / f"{shard:05d}.tar", 0
        aside = path.with_name(path.name + ".tmp")
        with aside.open("wb") as tar:  # a file of its own: the old name may be a link to an older artifact's
            for sample in read_samples(path):
                if sample.key not in keys:
                    length = write_sample(tar, sample)
                    for name, value in zip(moved, (sample.key, shard, offset, length), strict=True):
                        moved[name].append(value)
                    offset += length
            end_tar(tar)
        aside.replace(path)
    kinds = {"key": pa.string(), "raw_shard": pa.int32(), "offset": pa.int64(), "length": pa.int64()}
    return pa.table({name: pa.array(moved[name], kind) for name, kind in kinds.items()})


def _forget_seen(con: duckdb.DuckDBPyConnection, job: Job, rows: Sequence[Mapping[str, Any]], listed: Listed) -> None:
    """Take the rows out of what was seen of each URL, and listed hosts out of the table of link rot."""
    fetches, rot = job.out / FETCH, job.out / LINK_ROT
    if fetches.is_file():
        con.register("erased", pa.table({"key": pa.array([r["key"] for r in rows], pa.string())}))
        schema = pq.read_schema(fetches)
        kept = con.sql(SEEN, params={"fetches": str(fetches)})
        write_groups(fetches, schema, kept.to_arrow_reader(10_000))
    if rot.is_file():
        table = pq.read_table(rot)
        is_kept = [not listed.first(urls=[f"http://{host}/"]) for host in table["host"].to_pylist()]
        pq.write_table(table.filter(pa.array(is_kept, pa.bool_())), rot, compression="zstd")


def remember(job: Job, rows: Sequence[Mapping[str, Any]]) -> None:
    """Keep hashes of the keys, so that a later rescan knows them where nothing else says which they were."""
    known = {hashlib.sha256(r["key"].encode()).hexdigest(): r["entry"] for r in rows if r["key"]}
    path = job.root / MEMORY / job.spec["source"] / f"{job.fingerprint}.json"
    if path.is_file():
        known = json.loads(path.read_bytes()) | known
    write_atomic(path, json.dumps(dict(sorted(known.items())), indent=1).encode())


def applied(outcomes: Path) -> set[str]:
    """Ids of the entries that took something down."""
    with duckdb.connect() as con:
        asked = {"outcomes": str(outcomes), "taken_down": TAKEN_DOWN}
        return {entry for (entry,) in con.execute(APPLIED, asked).fetchall()}


def is_asked_for(job: Job, listed: Listed) -> bool:
    """Whether an unfinished download asks for what has been listed since."""
    rows = job.work / "rows.parquet"
    if not listed or not rows.is_file():
        return False
    asked = pq.read_table(rows, columns=["key", "url", "fault"]).to_pylist()
    return any(r["fault"] is None and listed.first(key=r["key"], urls=[r["url"]]) for r in asked)


def identity(root: Path, version: int, spec: dict[str, Any], entries: Sequence[Entry]) -> dict[str, Any]:
    """The spec fields of an acquire node with the entries that mean something of its source.

    As far as what was acquired before can tell; a source never acquired finds them while it is read.
    """
    from solo.acquire import passes

    before = passes.nearest(root, version, spec, {e.id for e in entries})
    if before is None:
        return spec
    ids, listed = takedown.recorded(before.manifest.spec), Listed(entries)
    folders = [before.path]
    for done in spec.get("passes", [])[len(before.manifest.spec.get("passes", [])) :]:
        if done["kind"] != "recrawl":
            folders.append(root / passes.PART / spec["source"] / done["pass"])
    for folder in folders:
        ids |= {e.id for e in takedown.matches(listed, folder / OUTCOMES, folder / FETCH).values()}
    return takedown.with_ids(spec, ids)
