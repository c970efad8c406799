"""Curate: which samples one training stage sees, and how often, as a query over ledgers.

In: the ledgers `shards/*.parquet` of the mix's sources and its `MixSpec`. Out: `lock.parquet` (membership with
repeats, sorted by source and key) and `mix.sql` (the queries that made it, with their parameters); where the mix
compares sources or benchmarks, `excluded.parquet` and `contamination.parquet` (solo/exclude.py). Invariants: what is
drawn of a source depends on its own ledger, amount and seed alone, so adding a source moves no row of another (but
where a source listed before it holds a sample's twin); every ledger row is drawn or counted under one reason. Cost:
one scan and one sort per source in DuckDB, which spills to disk.

Rounding: an amount becomes whole passes over the eligible samples and a rest; the rest is the longest prefix in hash
order `md5(key || seed), key` whose cumulative tokens (or samples) do not exceed it. A draw in tokens is thus short of
its amount by less than one sample, never over.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from solo import exclude, predicate
from solo.artifact import Artifact, Job, Result, write_atomic
from solo.exclude import Ledger, literal
from solo.spec import MixSource, MixSpec, SpecError

log = logging.getLogger(__name__)

VERSION = 3  # 3: samples left out for a twin in another source or a benchmark's item

NOT_DRAWN = "not_drawn"
WEIGHTS_TOLERANCE = 1e-6
ROW_GROUP = 122_880  # DuckDB's own row group: one scan unit per thread

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

# {reason} is a CASE with one WHEN per predicate of the mix, in its order; each was checked alone before.
LEDGER = "SELECT * FROM read_parquet($files, union_by_name := TRUE)"
JUDGED = """
WITH ledger AS (
  SELECT * FROM read_parquet($files, union_by_name := TRUE)
),
judged AS (  -- the first predicate that is not true (false or NULL) is the reason a sample is dropped
  SELECT *, {reason} AS reason FROM ledger
)"""

# As above, where samples are left out for what other sources or benchmarks hold; their names are no column of a ledger.
EXCLUDED = """
WITH ledger AS (
  SELECT * FROM read_parquet($files, union_by_name := TRUE)
),
excluded AS (
  SELECT key, reason AS "excluded for" FROM read_parquet($excluded)
),
judged AS (  -- the first predicate that is not true (false or NULL) is the reason a sample is dropped
  SELECT *, coalesce({reason}, "excluded for") AS reason FROM ledger LEFT JOIN excluded USING (key)
)"""

COUNT = """
SELECT reason, count(*) AS n_samples, CAST(sum(n_tokens) AS BIGINT) AS n_tokens
FROM judged
GROUP BY reason
ORDER BY reason
"""

# Where the rest ends in hash order: a sum over 4,096 stretches of that order finds the stretch, so only one of them is
# sorted; a window over whole rows cost three times the rest of the draw. Keys are unique in a source, so hashes are.
EDGE = """,
hashed AS MATERIALIZED (
  SELECT md5(key || $seed) AS hash, IF($in_samples, 1, n_tokens) AS amount
  FROM judged
  WHERE reason IS NULL
),
stretches AS (
  SELECT substr(hash, 1, 3) AS stretch, sum(amount) AS amount
  FROM hashed
  GROUP BY stretch
),
reached AS (  -- how much there is before each stretch
  SELECT stretch, amount, sum(amount) OVER (ORDER BY stretch) - amount AS before
  FROM stretches
),
last AS (
  SELECT hash, before + sum(hashed.amount) OVER (ORDER BY hash) AS cumulative
  FROM hashed
  JOIN reached ON stretch = substr(hash, 1, 3)
  WHERE before <= $rest AND before + reached.amount > $rest
)
SELECT min(hash) AS edge FROM last WHERE cumulative > $rest
"""

# {more} says which samples are drawn once more than the others. Shard and offset order what a key should tell apart.
DRAW = """,
drawn AS (
  SELECT *, $whole + IF({more}, 1, 0) AS n_repeats
  FROM judged
  WHERE reason IS NULL
)
SELECT key, source, shard, "offset", length, template, n_images, n_patches, n_text_tokens, n_loss_tokens, n_tokens,
  n_repeats
FROM drawn
WHERE n_repeats > 0
ORDER BY key, shard, "offset"
"""
MORE = "md5(key || $seed) < $edge"


@dataclass(frozen=True)
class Draw:
    """How much of one source is drawn: `whole` passes, then a prefix of at most `rest` tokens or samples."""

    whole: int
    rest: int
    in_samples: bool
    short_tokens: int  # asked for by weight, but beyond max_epochs
    why: str


@dataclass(frozen=True)
class Drawn:
    """What became of one source: its rows of the lock, its ledger by reason (None = eligible), the queries."""

    rows: pa.Table
    judged: dict[str | None, tuple[int, int]]  # reason -> (samples, tokens)
    draw: Draw
    sql: str

    @property
    def dropped(self) -> dict[str, int]:
        """Samples by the reason they are not in the lock."""
        by_predicate = {reason: n for reason, (n, _) in self.judged.items() if reason is not None}
        return by_predicate | {NOT_DRAWN: self.judged[None][0] - self.rows.num_rows}

    @property
    def stats(self) -> dict[str, Any]:
        """Samples, exposures and tokens (each repeat counted), and how often an eligible token is seen on average."""
        repeats = self.rows["n_repeats"].to_numpy().astype(np.int64)
        sums = {name: int(repeats @ self.rows[name].to_numpy().astype(np.int64)) for name in COUNTED}
        epochs = round(sums["n_tokens"] / max(1, self.judged[None][1]), 6)
        counts = {"n_samples": self.rows.num_rows, "n_exposures": int(repeats.sum())}
        return counts | sums | {"epochs": epochs, "short_tokens": self.draw.short_tokens, "dropped": self.dropped}


def run(job: Job) -> Result:
    """Write lock.parquet and mix.sql for one mix."""
    mix = MixSpec.model_validate(job.spec["mix"])
    check_weights(mix)
    ledgers = job.of("shard")
    absent = [s.source for s in mix.sources if s.source not in ledgers]
    assert not absent, f"curate/{mix.name} was given no shard artifact of {absent}"
    con = connect(job, [job.out, *(artifact.path / "shards" for artifact in ledgers.values())])
    checked = [check(con, mix, source, ledgers[source.source]) for source in mix.sources]
    compared = exclude.run(job, mix, con, checked)
    script = [f"-- mix {mix.name}: {' '.join(mix.title.split())}; each query reads the ledger named above it\n"]
    stats: dict[str, dict[str, Any]] = {}
    dropped: Counter[str] = Counter()
    aside = job.out / "lock.parquet.tmp"
    with pq.ParquetWriter(aside, LOCK, compression="zstd") as writer:
        for ledger in sorted(checked, key=lambda c: c.name):
            drawn = draw_source(con, mix, ledger, job.out / exclude.EXCLUDED_FILE if compared else None)
            writer.write_table(drawn.rows, row_group_size=ROW_GROUP)
            script.append(drawn.sql)
            stats[ledger.name] = drawn.stats
            dropped.update(drawn.dropped)
            job.progress(f"curate/{mix.name}: {ledger.name}: {drawn.rows.num_rows} samples, {drawn.draw.why}")
    con.close()
    totals = {k: sum(s[k] for s in stats.values()) for k in ("n_samples", "n_exposures", *COUNTED, "short_tokens")}
    if not totals["n_samples"]:
        raise SpecError(f"mixes/{mix.name}.yaml: no sample is drawn from any source; raise budget_tokens or epochs")
    aside.replace(job.out / "lock.parquet")
    write_atomic(job.out / "mix.sql", "\n".join(script).encode())
    n_in = totals["n_samples"] + sum(dropped.values())
    return Result(n_in, totals["n_samples"], dict(dropped), totals | {"sources": stats} | compared)


def check_weights(mix: MixSpec) -> None:
    """Weights of a mix are shares of one budget, so they add up to 1."""
    weights = {s.source: s.weight for s in mix.sources if s.weight is not None}
    if weights and abs(sum(weights.values()) - 1) > WEIGHTS_TOLERANCE:
        equation = " + ".join(f"{weight:g} ({source})" for source, weight in weights.items())
        raise SpecError(
            f"mixes/{mix.name}.yaml: sources.weight: {equation} = {sum(weights.values()):g}, not 1; "
            f"weights are shares of budget_tokens, change one so that they add up"
        )


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


def draw_source(con: duckdb.DuckDBPyConnection, mix: MixSpec, ledger: Ledger, excluded: Path | None) -> Drawn:
    """Judge and draw one source."""
    where, source = f"mixes/{mix.name}.yaml: sources.{ledger.name}", ledger.spec
    judged_sql = (EXCLUDED if excluded else JUDGED).format(reason=ledger.reason)
    files = {"files": ledger.files} | ({"excluded": str(excluded)} if excluded else {})
    try:
        counts = con.execute(judged_sql + COUNT, files).fetchall()
    except duckdb.Error:
        if culprit := predicate.failing(con.sql(LEDGER, params={"files": ledger.files}), source.where):
            raise SpecError(f"{where}.where.{culprit}") from None
        raise
    judged = {reason: (int(n), int(n_tokens)) for reason, n, n_tokens in counts}
    if not judged:
        raise SpecError(empty(where, source.source))
    if None not in judged:
        drops = ", ".join(f"{reason} drops {n}" for reason, (n, _) in judged.items())
        field, remedy = ("", "leave the source out") if excluded else (".where", "loosen a predicate")
        raise SpecError(f"{where}{field}: no sample passes ({drops}); {remedy}")
    draw = amount(mix, source, *judged[None])
    if draw.short_tokens:
        asked = f"{source.weight:g} of {mix.budget_tokens} tokens"
        log.warning("%s: %s is %d tokens more than max_epochs allows", where, asked, draw.short_tokens)
    rows, queries = draw_rows(con, judged_sql, draw, seed=str(mix.seed), files=files)
    origin = f"'shards/*.parquet' of shard/{source.source}, content {ledger.shards.manifest.digest[:16]}"
    sql = [f"-- source {source.source}: {draw.why}\n-- $files = {origin}"]
    sql += [f"-- $excluded = '{exclude.EXCLUDED_FILE}' beside this file"] if excluded else []
    for query, given in [(judged_sql + COUNT, {}), *queries]:
        header = "".join(f"-- ${name} = {literal(value)}\n" for name, value in given.items())
        sql.append(f"{header}{query.strip()};\n")
    return Drawn(rows.cast(LOCK).combine_chunks(), judged, draw, "\n".join(sql))


def draw_rows(
    con: duckdb.DuckDBPyConnection, judged_sql: str, draw: Draw, *, seed: str, files: dict[str, str]
) -> tuple[pa.Table, list[tuple[str, dict[str, Any]]]]:
    """The rows of one source's draw, and the queries that found them with their parameters."""
    whole, queries = {"whole": draw.whole}, []
    if not draw.rest:
        queries.append((judged_sql + DRAW.format(more="FALSE"), whole))
    else:
        given: dict[str, Any] = {"seed": seed, "in_samples": draw.in_samples, "rest": draw.rest}
        queries.append((judged_sql + EDGE, given))
        ((edge,),) = con.execute(queries[0][0], files | given).fetchall()
        queries.append((judged_sql + DRAW.format(more=MORE), whole | {"seed": seed, "edge": edge}))
    sql, given = queries[-1]
    return con.sql(sql, params=files | given).to_arrow_table(), queries


def empty(where: str, source: str) -> str:
    """The message for a source without samples."""
    return (
        f"{where}: the ledger of {source} is empty, its filter or shard part kept no sample; "
        f"loosen filter.keep in sources/{source}.yaml or take the source out of the mix"
    )


def amount(mix: MixSpec, source: MixSource, n_samples: int, n_tokens: int) -> Draw:
    """What `weight`, `epochs` or `samples` means for `n_samples` eligible samples of `n_tokens` together."""
    if source.samples is not None:
        whole, rest = divmod(source.samples, n_samples)
        return Draw(whole, rest, True, 0, f"{source.samples} of {n_samples} samples")
    # A float prints as the YAML says it, and as a fraction 1.84 epochs are 184 hundredths and not a hair more.
    asked, short_tokens = Fraction(str(source.epochs or 0)) * n_tokens, 0
    why = f"{source.epochs} epochs of {n_tokens} tokens"
    if source.weight is not None:
        asked = Fraction(str(source.weight)) * (mix.budget_tokens or 0)
        why = f"{source.weight} of budget_tokens {mix.budget_tokens}, from {n_tokens} tokens"
        most = Fraction(str(source.max_epochs)) * n_tokens if source.max_epochs is not None else asked
        if asked > most:
            short_tokens = int(asked - most)
            why += f", short by {short_tokens} at max_epochs {source.max_epochs}"
            asked = most
    passes, left = divmod(asked, n_tokens)
    return Draw(int(passes), int(left), False, short_tokens, why)
