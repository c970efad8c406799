"""Curate: which samples one training stage sees, and how often, as a query over ledgers.

In: the ledgers `shards/*.parquet` of the mix's sources and its `MixSpec`. Out: `lock.parquet` (membership with
repeats, sorted by source and key) and `mix.sql` (the queries that made it, with their parameters); where the mix
compares sources or benchmarks, `excluded.parquet` and `contamination.parquet` (solo/exclude.py). Invariants: what is
drawn of a source depends on its own ledger, amount and seed alone, so adding a source moves no row of another (but
where a source listed before it holds a sample's twin); every ledger row is drawn or counted under one reason. Cost:
two scans of the ledgers and one sort of what is drawn, in DuckDB, which spills to disk (solo/draw.py).
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from solo import amounts, draw, exclude, predicate
from solo.amounts import Draw
from solo.artifact import Artifact, Job, Result, write_atomic
from solo.exclude import Ledger, literal
from solo.spec import MixSource, MixSpec, SpecError

log = logging.getLogger(__name__)

# 3: samples left out for a twin in another source or a benchmark's item
VERSION = 4  # 4: DuckDB writes the Parquet files (other bytes, the same rows); excluded.parquet has n_tokens

NOT_DRAWN = "not_drawn"

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
    ledgers = job.of("shard")
    absent = [s.source for s in mix.sources if s.source not in ledgers]
    assert not absent, f"curate/{mix.name} was given no shard artifact of {absent}"
    con = connect(job, [job.out, *(artifact.path / "shards" for artifact in ledgers.values())])
    checked = [check(con, mix, source, ledgers[source.source]) for source in mix.sources]
    compared = exclude.run(job, mix, con, checked)
    excluded = job.out / exclude.EXCLUDED_FILE if compared else None
    kept = [draw.judge(con, checked), draw.TOTALS, *([draw.EXCLUDED_TOTALS] if excluded else [])]
    found = judge(con, mix, checked, excluded)
    draws = [asked(mix, ledger, found[ledger.name][None]) for ledger in checked]
    aside = job.out / "lock.parquet.tmp"
    kept += draw.write(
        con,
        [(d, *found[c.name][None]) for d, c in zip(draws, checked, strict=True)],
        aside,
        seed=str(mix.seed),
        excluded=excluded,
    )
    drawn = draw.drawn(con, aside, COUNTED)
    con.close()
    stats: dict[str, dict[str, Any]] = {}
    for ledger, own in sorted(zip(checked, draws, strict=True), key=lambda pair: pair[0].name):
        stats[ledger.name] = of_source(drawn.get(ledger.name, {}), found[ledger.name], own)
        job.progress(f"curate/{mix.name}: {ledger.name}: {stats[ledger.name]['n_samples']} samples, {own.why}")
    totals = {k: sum(s[k] for s in stats.values()) for k in ("n_samples", "n_exposures", *COUNTED, "short_tokens")}
    if not totals["n_samples"]:
        raise SpecError(f"mixes/{mix.name}.yaml: no sample is drawn from any source; raise budget_tokens or epochs")
    aside.replace(job.out / "lock.parquet")
    write_atomic(job.out / "mix.sql", "\n".join(script(mix, checked, draws, kept)).encode())
    dropped: Counter[str] = Counter()
    for of in stats.values():
        dropped.update(of["dropped"])
    n_in = totals["n_samples"] + sum(dropped.values())
    return Result(n_in, totals["n_samples"], dict(dropped), totals | {"sources": stats} | compared)


def connect(job: Job, folders: list[Path]) -> duckdb.DuckDBPyConnection:
    """A DuckDB that can read the ledgers and nothing else, so a predicate of a mix cannot reach the machine."""
    con = duckdb.connect(config={"threads": max(1, job.workers), "temp_directory": str(job.work / "duckdb")})
    con.execute(f"SET allowed_directories = {literal([str(folder) for folder in folders])}")
    con.execute("SET enable_external_access = FALSE")
    con.execute("SET lock_configuration = TRUE")
    return con


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
    return Ledger(
        source, files, f"CASE{whens}\n  END" if whens else "CAST(NULL AS VARCHAR)", shards, tuple(rows.columns)
    )


def judge(con: duckdb.DuckDBPyConnection, mix: MixSpec, ledgers: list[Ledger], excluded: Path | None) -> draw.Totals:
    """What each source has by reason, after a look that some of it passes."""
    try:
        found = draw.totals(con, ledgers, excluded)
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


def asked(mix: MixSpec, ledger: Ledger, eligible: tuple[int, int]) -> Draw:
    """How much of one source is drawn; what max_epochs forbids is said."""
    own = amounts.amount(mix, ledger.spec, *eligible)
    if own.short_tokens:
        share = f"{ledger.spec.weight:g} of {mix.budget_tokens} tokens"
        where = f"mixes/{mix.name}.yaml: sources.{ledger.name}"
        log.warning("%s: %s is %d tokens more than max_epochs allows", where, share, own.short_tokens)
    return own


def of_source(drawn: dict[str, int], judged: dict[str | None, tuple[int, int]], own: Draw) -> dict[str, Any]:
    """Samples, exposures and tokens (each repeat counted), how often an eligible token is seen on average, drops."""
    sums = {name: drawn.get(name, 0) for name in ("n_samples", "n_exposures", *COUNTED)}
    n, n_tokens = judged[None]
    dropped = {reason: n for reason, (n, _) in judged.items() if reason is not None}
    return sums | {
        "epochs": round(sums["n_tokens"] / max(1, n_tokens), 6),
        "short_tokens": own.short_tokens,
        "dropped": dropped | {NOT_DRAWN: n - sums["n_samples"]},
    }


def script(mix: MixSpec, ledgers: list[Ledger], draws: list[Draw], queries: list[str]) -> list[str]:
    """The queries that made the lock, one after the other in one DuckDB; the last one gives its rows."""
    lines = [f"-- mix {mix.name}: {' '.join(mix.title.split())}"]
    for side, (c, own) in enumerate(zip(ledgers, draws, strict=True)):
        origin = f"'shards/*.parquet' of shard/{c.name}, content {c.shards.manifest.digest[:16]}"
        lines += [f"-- side {side}, {c.name}: {own.why}", f"-- ${draw.named(c.name)} = {origin}"]
    lines += [f"-- $excluded = '{exclude.EXCLUDED_FILE}' beside this file"] * any("$excluded" in q for q in queries)
    return [*lines, f"-- $seed = {literal(str(mix.seed))}", *(f"\n{q.strip()};" for q in queries), ""]


def empty(where: str, source: str) -> str:
    """The message for a source without samples."""
    return (
        f"{where}: the ledger of {source} is empty, its filter or shard part kept no sample; "
        f"loosen filter.keep in sources/{source}.yaml or take the source out of the mix"
    )
