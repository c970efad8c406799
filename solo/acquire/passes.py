"""Passes: what a URL list gave when it was asked again, kept apart from the first download.

In: the acquire artifact of a source and the causes to try again (or all that was fetched, for a re-crawl). Out: an
artifact ROOT/pass/<source>/<fingerprint>/ with the outcomes, and the pictures that came now. Invariants: passes are
numbered and immutable; the acquire artifact names the passes it holds, so `solo plan` says why it runs again; its tars
of before keep their bytes and their numbers, new samples get new tars. A re-crawl changes no sample: it is compared.
Cost: the requests of the chosen rows; putting together is hard links and one sort of the outcome rows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from solo.acquire.raw import OUTCOMES, SCHEMA, write_groups
from solo.artifact import Artifact, Job, damage, read_manifest

PART = "pass"
FETCH = "fetch.parquet"
LINK_ROT = "link_rot.parquet"
TRANSIENT = ("timeout", "dns", "connection", "http_429", "http_5xx", "robots_unreachable", "lost")
CHOSEN = "SELECT key FROM read_parquet($outcomes) WHERE list_contains($causes, status) AND url IS NOT NULL"
OVERLAID = """
WITH old AS (SELECT * FROM read_parquet($old)), new AS (SELECT * FROM read_parquet($new))
SELECT * FROM old ANTI JOIN new USING (identity)  -- `row 17`; a row taken down has no key
UNION ALL BY NAME
SELECT * REPLACE (CAST(raw_shard + $n_shards AS INTEGER) AS raw_shard) FROM new
ORDER BY key, identity, status
"""
COMPARED = """
WITH found AS (
  SELECT regexp_extract(old.url, '^[a-zA-Z]+://([^/?#]+)', 1) AS host, CASE
    WHEN new.status = 'ok' AND new.served_sha256 = old.served_sha256 THEN 'same'
    WHEN new.status IN ('ok', 'hash_mismatch', 'not_image', 'undecodable', 'refused_format', 'empty', 'bomb',
                        'too_large') THEN 'changed'
    WHEN new.status = 'disallowed' THEN 'withdrawn'
    WHEN list_contains($transient, new.status) THEN 'unknown'
    ELSE 'gone' END AS became
  FROM read_parquet($old) AS old JOIN read_parquet($new) AS new USING (key, identity)
)
SELECT lower(host) AS host, count(*)::INTEGER AS urls, count_if(became = 'same')::INTEGER AS same,
       count_if(became = 'changed')::INTEGER AS changed, count_if(became = 'gone')::INTEGER AS gone,
       count_if(became = 'withdrawn')::INTEGER AS withdrawn, count_if(became = 'unknown')::INTEGER AS unknown
FROM found GROUP BY ALL ORDER BY gone DESC, changed DESC, urls DESC, host
"""
N_HOSTS = 50  # of the link-rot table that the manifest holds; the file has all


def base(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What the first download of a source depends on: a pass holds for this and nothing else."""
    return {name: spec[name] for name in ("source", "revision", "acquire")}


def made_of(root: Path, part: str, version: int, spec: Mapping[str, Any]) -> list[Artifact]:
    """The whole artifacts of a part that were made of one source's list as it stands in the spec."""
    wanted, found = base(spec), []
    for folder in sorted((root / part / spec["source"]).glob("*/")):
        manifest = read_manifest(folder)
        if manifest and manifest.version == version and base(manifest.spec) == wanted and damage(folder) is None:
            found.append(Artifact(folder, manifest))
    return found


def done(root: Path, version: int, spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The finished passes over one source's list, in order.

    Those that are there, and those that were put together before what they held was taken down.
    """
    found: dict[str, dict[str, Any]] = {}
    for put in made_of(root, "acquire", version, spec):
        found |= {p["pass"]: p for p in put.manifest.spec.get("passes", []) if "takedown" in put.manifest.spec}
    for a in made_of(root, PART, version, spec):
        m = a.manifest
        found[m.fingerprint] = m.spec["pass"] | {"pass": m.fingerprint, "digest": m.digest}
    return sorted(found.values(), key=lambda p: (p["number"], p["pass"]))


def identity(root: Path, version: int, spec: dict[str, Any]) -> dict[str, Any]:
    """The spec fields of an acquire node: its source's, and the passes that exist."""
    found = done(root, version, spec)
    return spec | {"passes": found} if found else spec


def nearest(root: Path, version: int, spec: Mapping[str, Any], taken: set[str]) -> Artifact | None:
    """The acquire artifact that holds most of what is asked for.

    Its passes begin the spec's, and no entry but those of `taken` was applied to it.
    """
    wanted, found = spec.get("passes", []), []
    for a in made_of(root, "acquire", version, spec):
        held, applied = a.manifest.spec.get("passes", []), set(a.manifest.spec.get("takedown", ()))
        if held == wanted[: len(held)] and applied <= taken:
            found.append((len(held), len(applied), a.manifest.fingerprint, a))
    return max(found, key=lambda f: f[:3])[3] if found else None


def job_of(acquired: Artifact, *, kind: str, causes: Sequence[str], where: Job) -> Job:
    """The job of the next pass over what an acquire artifact holds."""
    spec = acquired.manifest.spec
    number = len(spec.get("passes", [])) + 1
    asked = base(spec) | {"pass": {"number": number, "kind": kind, "causes": list(causes)}}
    node = acquired.manifest.id
    return Job(
        PART,
        spec["source"],
        where.version,
        asked,
        {node: acquired},
        where.root,
        where.specs,
        where.workers,
        where.progress,
        where.where,
    )


def choose(db: duckdb.DuckDBPyConnection, job: Job) -> bool:
    """Make the table `chosen` of the keys a pass asks for again; False where the job is no pass."""
    if "pass" not in job.spec:
        return False
    outcomes = job.one("acquire").path / OUTCOMES
    causes = job.spec["pass"]["causes"]
    db.execute(f"CREATE TEMP TABLE chosen AS {CHOSEN}", {"outcomes": str(outcomes), "causes": causes})
    return True


def n_chosen(acquired: Artifact, causes: Sequence[str]) -> int:
    """How many URLs a pass would ask for."""
    with duckdb.connect() as db:
        asked = {"outcomes": str(acquired.path / OUTCOMES), "causes": list(causes)}
        found = db.execute(f"SELECT count(*) FROM ({CHOSEN})", asked).fetchone()
    assert found is not None
    return int(found[0])


def put_together(job: Job, first: Artifact) -> tuple[Path, dict[str, Any]]:
    """What was acquired before with the passes it lacks laid over it, as this job's files; the outcomes stay aside.

    Returns where they are, and what the passes did, for the stats.
    """
    held = len(first.manifest.spec.get("passes", []))
    passes = job.spec.get("passes", [])[held:]
    (job.out / "raw").mkdir(parents=True, exist_ok=True)
    outcomes, fetches = first.path / OUTCOMES, [first.path / FETCH]
    said = list(first.manifest.stats.get("passes", []))
    n_shards = _link(first.path, job.out, 0)
    rot = pq.read_table(first.path / LINK_ROT) if (first.path / LINK_ROT).is_file() else None
    with duckdb.connect() as db:
        db.execute(f"SET threads = {job.workers:d}")
        for asked in passes:
            folder = job.root / PART / job.spec["source"] / asked["pass"]
            manifest = read_manifest(folder)
            assert manifest is not None, f"{folder} has gone since the plan"
            tells = {"number": asked["number"], "kind": asked["kind"], "causes": asked["causes"]}
            said.append(tells | {"asked": manifest.counts["in"], "came": manifest.counts["kept"]})
            fetches.append(folder / FETCH)
            if asked["kind"] == "recrawl":
                rot = compare(db, outcomes, folder / OUTCOMES)
                continue
            overlaid = job.work / f"{asked['number']}.parquet"
            found = {"old": str(outcomes), "new": str(folder / OUTCOMES), "n_shards": n_shards}
            write_groups(overlaid, SCHEMA, db.sql(OVERLAID, params=found).to_arrow_reader(10_000))
            outcomes, n_shards = overlaid, _link(folder, job.out, n_shards)
        _write_fetches(db, fetches, job, held)
    if rot is not None:
        pq.write_table(rot, job.out / LINK_ROT, compression="zstd")
    return outcomes, {"passes": said} if said else {}


def _link(folder: Path, out: Path, n_before: int) -> int:
    """The tars of a folder under the next numbers; how many there are now."""
    tars = sorted((folder / "raw").glob("*.tar"))
    for i, tar in enumerate(tars):
        to = out / "raw" / f"{n_before + i:05d}.tar"
        to.unlink(missing_ok=True)
        os.link(tar, to)
    return n_before + len(tars)


def compare(db: duckdb.DuckDBPyConnection, old: Path, new: Path) -> pa.Table:
    """What became of each host's URLs between two outcome tables."""
    asked = {"old": str(old), "new": str(new), "transient": list(TRANSIENT)}
    return db.sql(COMPARED, params=asked).to_arrow_table()


def link_rot(hosts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The totals of a re-crawl and its worst hosts."""
    names = ("urls", "same", "changed", "gone", "withdrawn", "unknown")
    total = {name: sum(int(host[name]) for host in hosts) for name in names}
    return total | {"n_hosts": len(hosts), "hosts": [dict(host) for host in hosts[:N_HOSTS]]}


def _write_fetches(db: duckdb.DuckDBPyConnection, paths: Sequence[Path], job: Job, n_before: int) -> None:
    """All that was asked, pass 0 being the first download; the first file holds `n_before` passes already."""
    parts = []
    for i, path in enumerate(paths):
        if path.exists():
            number = "" if i == 0 and n_before else f"{i + n_before if i else 0} AS pass, "
            parts.append(f"SELECT {number}* FROM read_parquet('{str(path).replace(chr(39), chr(39) * 2)}')")
    if not parts or not job.spec.get("passes"):
        if parts:
            (job.out / FETCH).write_bytes(paths[0].read_bytes())
        return
    rows = db.sql(" UNION ALL BY NAME ".join(parts) + " ORDER BY key, pass")
    schema = pa.schema(rows.limit(0).to_arrow_table().schema)
    write_groups(job.out / FETCH, schema, rows.to_arrow_reader(10_000))
