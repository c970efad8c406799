"""Quotas: at most so much of each class of a source, and the rest of the class cannot be drawn.

In: the ledgers of a mix and the quotas of its sources. Out: rows of table `excluded`, under the quota's name.
Invariants: of a class, the longest prefix in hash order `md5(key || seed)` stays, as in a draw; only what passes the
predicates, is no twin and no benchmark's item is counted, and quotas of one source apply in their order; another source
moves nothing. Cost: one scan and one sort of a source that has a quota.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import duckdb

from solo import predicate
from solo.curate.exclude import Ledger
from solo.curate.query import literal, one_line
from solo.spec import MixSpec, SpecError

OVER = """
INSERT INTO excluded  -- {source}: what quota {name} leaves out
WITH classes AS (
  SELECT key, n_tokens, {reason} AS "out of it", ({by}
  ) AS class
  FROM read_parquet({files}, union_by_name := TRUE)
),
placed AS (
  SELECT key, n_tokens, sum({amount}) OVER (PARTITION BY class ORDER BY md5(key || $seed), key) AS place
  FROM classes ANTI JOIN excluded USING (key)
  WHERE "out of it" IS NULL
)
SELECT key, {source} AS source, {name} AS reason, n_tokens, NULL AS winner, NULL AS winner_source
FROM placed WHERE place > {most}
"""


def run(con: duckdb.DuckDBPyConnection, mix: MixSpec, ledgers: Sequence[Ledger], files: dict[str, str]) -> list[str]:
    """Leave out what is over; returns the queries with `files` in place of each source's path."""
    kept = []
    for ledger in ledgers:
        for name, quota in ledger.spec.quotas.items():
            unit, most = ("1", quota.samples) if quota.samples is not None else ("n_tokens", quota.tokens)
            words = {"source": literal(ledger.name), "name": literal(name), "reason": ledger.reason, "by": quota.by}
            words |= {"amount": unit, "most": str(most)}
            try:
                con.execute(OVER.format(**words, files=literal(ledger.files)), {"seed": str(mix.seed)})
            except duckdb.Error as error:
                where = f"mixes/{mix.name}.yaml: sources.{ledger.name}.quotas.{name}.by"
                raise SpecError(f"{where}: {one_line(error)}; try_cast gives NULL") from None
            kept.append(OVER.format(**words, files=files[ledger.name]))
    return kept


def check(con: duckdb.DuckDBPyConnection, mix: MixSpec, ledger: Ledger, reserved: set[str]) -> None:
    """Refuse a class that is no fixed function of one sample, and a name that is another reason already."""
    where = f"mixes/{mix.name}.yaml: sources.{ledger.name}.quotas"
    rows = con.sql("SELECT * FROM read_parquet($files, union_by_name := TRUE)", params={"files": ledger.files})
    for name, quota in ledger.spec.quotas.items():
        if name in reserved | set(ledger.spec.where):
            raise SpecError(f"{where}.{name}: that is another reason to leave a sample out; rename the quota")
        predicate.check(con, rows, {"by": quota.by}, f"{where}.{name}", boolean=False)


def told(excluded: list[dict[str, Any]], ledgers: Sequence[Ledger]) -> list[dict[str, Any]]:
    """What each quota left out, with its limit; also one that left out nothing."""
    found = []
    for ledger in ledgers:
        for name, quota in ledger.spec.quotas.items():
            n = sum(r["samples"] for r in excluded if (r["source"], r["reason"]) == (ledger.name, name))
            limit = f"{quota.samples} samples" if quota.samples is not None else f"{quota.tokens} tokens"
            found.append({"source": ledger.name, "quota": name, "each": quota.by, "most": limit, "left_out": n})
    return found
