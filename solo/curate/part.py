"""Curate: which samples one training stage sees, and how often, as a query over ledgers.

In: the ledgers `shards/*.parquet` of the mix's sources and its `MixSpec`. Out: `lock.parquet` (membership with repeats,
sorted by source and key) and `mix.sql` (the queries that made it, with their parameters); where the mix compares
sources or benchmarks, `excluded.parquet` and `contamination.parquet` (solo/curate/exclude.py). Invariants: what is
drawn of a source depends on its own ledger, amount and seed alone, so adding a source moves no row of another (but
where a source listed before it holds a sample's twin); every ledger row is drawn or counted under one reason. Cost: two
scans of the ledgers and one sort of what is drawn, in DuckDB, which spills to disk (solo/curate/draw.py).
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import psutil
import pyarrow as pa

from solo import predicate
from solo.artifact import Artifact, Job, Result, write_atomic
from solo.curate import amounts, draw, exclude, mix_sql, query, quotas
from solo.curate.amounts import Draw
from solo.curate.exclude import Ledger
from solo.curate.query import literal
from solo.spec import MixSource, MixSpec, SpecError

log = logging.getLogger(__name__)

# 3: samples left out for a twin in another source or a benchmark's item
VERSION = 4  # 4: DuckDB writes the Parquet files (other bytes, the same rows); excluded.parquet has n_tokens

NOT_DRAWN = "not_drawn"
MEMORY_SHARE, SCRATCH_SHARE = 0.5, 0.5  # of the machine's memory, and of what is free on the disk

LOCK = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("template", pa.string()),
        ("n_images", pa.int32()),
        ("n_patches", pa.int32()),
        ("n_text_tokens", pa.int32()),
        ("n_loss_tokens", pa.int32()),
        ("n_tokens", pa.int32()),
        ("n_repeats", pa.int32()),
    ]
)
COUNTED = ("n_tokens", "n_patches", "n_text_tokens", "n_loss_tokens")

LEDGER = "SELECT * FROM read_parquet($files, union_by_name := TRUE)"


def run(job: Job) -> Result:
    """Write lock.parquet and mix.sql for one mix."""
    mix = MixSpec.model_validate(job.spec["mix"])
    amounts.check_weights(mix)
    exclude.check_names(mix)
    ledgers = job.of("shard")
    absent = [s.source for s in mix.sources if s.source not in ledgers]
    assert not absent, f"curate/{mix.name} was given no shard artifact of {absent}"
    con = connect(job, [job.out, *(artifact.path / "shards" for artifact in ledgers.values())])
    checked = [check(con, mix, source, ledgers[source.source]) for source in mix.sources]
    compared, kept = leave_out(job, mix, con, checked)
    kept.append(draw.judge(con, checked))
    found = judge(con, mix, checked, excluded=bool(compared))
    kept += [draw.TOTALS, *([draw.EXCLUDED_TOTALS] if compared else [])]
    eligible = {c.name: found[c.name][None] for c in checked}
    draws, quoted = ({}, {}) if mix.sql else amounts.of(mix, eligible)
    aside = job.out / "lock.parquet.tmp"
    if mix.sql:
        kept += by_sql(job, mix, con, checked, aside, excluded=bool(compared))
    else:
        asked = [(draws[c.name], *eligible[c.name]) for c in checked]
        kept += draw.write(con, asked, aside, seed=str(mix.seed), excluded=bool(compared))
    drawn = draw.drawn(con, aside, COUNTED)
    con.close()
    stats = {c.name: of_source(drawn.get(c.name, {}), found[c.name], draws.get(c.name)) for c in by_name(checked)}
    for name, own in stats.items():
        said = draws[name].why if name in draws else "by the sql of the mix"
        job.progress(f"curate/{mix.name}: {name}: {own['n_samples']} samples, {said}")
    totals = in_all(mix, stats)
    warn(mix, draws)
    aside.replace(job.out / "lock.parquet")
    write_atomic(job.out / "mix.sql", "\n".join(script(mix, checked, draws, kept)).encode())
    dropped: Counter[str] = Counter()
    for own in stats.values():
        dropped.update(own["dropped"])
    n_in = totals["n_samples"] + sum(dropped.values())
    groups = {"sources": stats} | ({"quotas": quoted_of(mix, quoted, stats)} if quoted else {})
    return Result(n_in, totals["n_samples"], dict(dropped), totals | groups | compared)


def connect(job: Job, folders: list[Path]) -> duckdb.DuckDBPyConnection:
    """A DuckDB that can read the ledgers and nothing else, so a predicate of a mix cannot reach the machine."""
    memory = int(psutil.virtual_memory().total * MEMORY_SHARE)
    scratch = int(shutil.disk_usage(job.root).free * SCRATCH_SHARE)
    return query.lock(
        job.work / "duckdb", memory_bytes=memory, scratch_bytes=scratch, folders=folders, threads=max(1, job.workers)
    )


def by_name(ledgers: list[Ledger]) -> list[Ledger]:
    """In the order of the lock."""
    return sorted(ledgers, key=lambda c: c.name)


def leave_out(
    job: Job, mix: MixSpec, con: duckdb.DuckDBPyConnection, ledgers: list[Ledger]
) -> tuple[dict[str, Any], list[str]]:
    """Table and file of samples that pass their predicates and cannot be drawn; what the manifest says, and queries."""
    compared = exclude.run(job, mix, con, ledgers)
    limited = any(c.spec.quotas for c in ledgers)
    if not (compared or limited):
        return {}, []
    if not compared:
        con.execute(exclude.NOTHING)
    kept = [exclude.KEPT, *quotas.run(con, mix, ledgers, draw.named(ledgers))]
    counted = exclude.seal(con, job.out / exclude.EXCLUDED_FILE)
    told = {"class_quotas": quotas.told(counted, ledgers)} if limited else {}
    return {"excluded": counted} | compared | told, kept


def by_sql(
    job: Job, mix: MixSpec, con: duckdb.DuckDBPyConnection, ledgers: list[Ledger], path: Path, *, excluded: bool
) -> list[str]:
    """Write the lock of a mix whose sql says what is drawn; returns its queries."""
    assert mix.sql is not None
    left_out = job.out / exclude.EXCLUDED_FILE if excluded else None
    mix_sql.run(con, mix.sql, ledgers, left_out, where=f"mixes/{mix.name}.yaml", work=job.work)
    exclude.write(con, draw.LOCK_OF_SQL, path)
    kept = mix_sql.view(ledgers, draw.named(ledgers), "$excluded" if excluded else None)
    asked = f"CREATE TEMP TABLE asked AS\n{mix.sql.strip().removesuffix(';')}"
    return [kept, mix_sql.ELIGIBLE, asked, draw.LOCK_OF_SQL]


def check(con: duckdb.DuckDBPyConnection, mix: MixSpec, source: MixSource, shards: Artifact) -> Ledger:
    """A source's ledger, after a look at its predicates."""
    where = f"mixes/{mix.name}.yaml: sources.{source.source}"
    folder = shards.path / "shards"
    if not any(folder.glob("*.parquet")):
        raise SpecError(empty(where, source.source))
    files = str(folder / "*.parquet")
    if NOT_DRAWN in source.where:
        raise SpecError(
            f"{where}.where.{NOT_DRAWN}: {NOT_DRAWN} is the reason of samples beyond the amount; rename the predicate"
        )
    rows = con.sql(LEDGER, params={"files": files})
    predicate.check(con, rows, source.where, f"{where}.where")
    whens = "".join(f"\n    WHEN ({p}\n    ) IS NOT TRUE THEN {literal(name)}" for name, p in source.where.items())
    reason = f"CASE{whens}\n  END" if whens else "CAST(NULL AS VARCHAR)"
    ledger = Ledger(source, files, reason, shards, tuple(rows.columns))
    quotas.check(con, mix, ledger, exclude.reasons(mix) | {NOT_DRAWN})
    return ledger


def judge(con: duckdb.DuckDBPyConnection, mix: MixSpec, ledgers: list[Ledger], *, excluded: bool) -> draw.Totals:
    """What each source has by reason, after a look that some of it passes."""
    try:
        found = draw.totals(con, ledgers, excluded=excluded)
    except duckdb.Error:
        for c in ledgers:
            if culprit := predicate.failing(con.sql(LEDGER, params={"files": c.files}), c.spec.where):
                raise SpecError(f"mixes/{mix.name}.yaml: sources.{c.name}.where.{culprit}") from None
        raise
    for c in ledgers:
        where, own = f"mixes/{mix.name}.yaml: sources.{c.name}", found.get(c.name)
        if not own:
            raise SpecError(empty(where, c.name))
        if None not in own:
            drops = ", ".join(f"{reason} drops {n}" for reason, (n, _) in own.items())
            field, remedy = ("", "leave the source out") if excluded else (".where", "loosen a predicate")
            raise SpecError(f"{where}{field}: no sample passes ({drops}); {remedy}")
    return found


def of_source(drawn: dict[str, int], judged: dict[str | None, tuple[int, int]], own: Draw | None) -> dict[str, Any]:
    """Samples, exposures and tokens (each repeat counted), how often an eligible token is seen on average, drops."""
    sums = {name: drawn.get(name, 0) for name in ("n_samples", "n_exposures", *COUNTED, "n_text_only_tokens")}
    n, n_tokens = judged[None]
    dropped = {reason: n for reason, (n, _) in judged.items() if reason is not None}
    asked = {"unit": own.unit, "asked": own.asked, "short": own.short, "cut": own.cut} if own else {}
    return sums | {
        "epochs": round(sums["n_tokens"] / max(1, n_tokens), 6),
        "short_tokens": own.short if own and not own.in_samples else 0,
        "dropped": dropped | {NOT_DRAWN: n - sums["n_samples"]},
        "amount": asked,
    }


def in_all(mix: MixSpec, stats: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Sums over sources; SpecError where nothing is drawn or the share of text is not what the mix must have."""
    names = ("n_samples", "n_exposures", *COUNTED, "n_text_only_tokens", "short_tokens")
    totals = {name: sum(s[name] for s in stats.values()) for name in names}
    where = f"mixes/{mix.name}.yaml"
    if not totals["n_samples"]:
        raise SpecError(f"{where}: no sample is drawn from any source; raise the amounts of its sources")
    text, n = totals["n_text_only_tokens"], totals["n_tokens"]
    if mix.text_share and not mix.text_share.least <= text / n <= mix.text_share.most:
        of = " + ".join(f"{s['n_text_only_tokens']} ({name})" for name, s in stats.items() if s["n_text_only_tokens"])
        need = f"between {mix.text_share.least:g} and {mix.text_share.most:g}"
        raise SpecError(
            f"{where}: text_share: ({of or 0}) / {n} tokens = {text / n:.4f}, not {need}; "
            f"change the amounts of sources with samples without images, or the share"
        )
    return totals


def warn(mix: MixSpec, draws: dict[str, Draw]) -> None:
    """Say what caps forbid."""
    for name, own in draws.items():
        if own.short:
            where = f"mixes/{mix.name}.yaml: sources.{name}"
            log.warning("%s: %d of %d %s are more than max_epochs allows", where, own.short, own.asked, own.unit)


def quoted_of(
    mix: MixSpec, quoted: dict[str, dict[str, Any]], stats: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Each category's quota with what its sources gave in its unit."""
    given = {s.source: s.category for s in mix.sources}
    names = {"samples": "n_exposures", "tokens": "n_tokens"}
    return {
        category: q | {"drawn": sum(s[names[q["unit"]]] for source, s in stats.items() if given[source] == category)}
        for category, q in quoted.items()
    }


def script(mix: MixSpec, ledgers: list[Ledger], draws: dict[str, Draw], queries: list[str]) -> list[str]:
    """The queries that made the lock, one after the other in one DuckDB; the last one gives its rows."""
    lines = [f"-- mix {mix.name}: {' '.join(mix.title.split())}"]
    for side, c in enumerate(ledgers):
        said = draws[c.name].why if c.name in draws else "as the mix's sql says"
        origin = f"'shards/*.parquet' of shard/{c.name}, content {c.shards.manifest.digest[:16]}"
        lines += [f"-- side {side}, {c.name}: {said}", f"-- {draw.named(ledgers)[c.name]} = {origin}"]
    lines += [f"-- $excluded = '{exclude.EXCLUDED_FILE}' beside this file"] * any("$excluded" in q for q in queries)
    lines += [f"-- $seed = {literal(str(mix.seed))}"] * any("$seed" in q for q in queries)
    return [*lines, *(f"\n{q.strip()};" for q in queries), ""]


def empty(where: str, source: str) -> str:
    """The message for a source without samples."""
    return (
        f"{where}: the ledger of {source} is empty, its filter or shard part kept no sample; "
        f"loosen filter.keep in sources/{source}.yaml or take the source out of the mix"
    )
