"""Verdicts: which samples a source keeps and why not the others, from signal columns alone.

In: a DuckDB view `signals` and a `Filter` spec. Out: table `judged` (key, reason; NULL = keep). Invariants: a sample
is kept iff every predicate is true, in the order of the YAML, so false and NULL both drop it and the first such is
the reason; of the samples that pass, all but the smallest key of each value in a `unique` column are repeats. Columns
are taken in order and only among samples still kept, so each repeat has a kept twin; NULL equals nothing. Cost: one
scan, and a sort per `unique` column.
"""

from __future__ import annotations

import duckdb
from duckdb import CaseExpression, ColumnExpression, ConstantExpression, FunctionExpression, SQLExpression

from solo import predicate
from solo.spec import Filter, SpecError

REPEATS = """
CREATE OR REPLACE TABLE judged AS
SELECT key, identities,
  coalesce(reason, CASE
    WHEN identities[$i] IS NOT NULL
      AND row_number() OVER (PARTITION BY reason IS NULL, identities[$i] ORDER BY key) > 1
    THEN $duplicate
  END) AS reason
FROM judged
"""


def judge(con: duckdb.DuckDBPyConnection, where: str, spec: Filter) -> None:
    """Make table `judged` from view `signals`; `where` is the file that errors name."""
    check(con, where, spec)
    reason = ConstantExpression(None).cast("VARCHAR")
    for name, expression in reversed(spec.keep.items()):
        reason = CaseExpression(SQLExpression(expression), reason).otherwise(ConstantExpression(name))
    identities = FunctionExpression("list_value", *[ColumnExpression(c).cast("VARCHAR") for c in spec.unique])
    judged = con.table("signals").select("key", reason.alias("reason"), identities.alias("identities"))
    try:
        judged.create("judged")
    except duckdb.Error:
        if culprit := predicate.failing(con.table("signals"), spec.keep):
            raise SpecError(f"{where}: filter.keep.{culprit}") from None
        raise
    for i, column in enumerate(spec.unique):
        con.execute(REPEATS, {"i": i + 1, "duplicate": f"duplicate_{column}"})


def check(con: duckdb.DuckDBPyConnection, where: str, spec: Filter) -> None:
    """Check every predicate and `unique` column against the columns of view `signals`."""
    signals = con.table("signals")
    for column in spec.unique:
        if column not in signals.columns:
            raise SpecError(f"{where}: filter.unique: no column {column!r}; columns are {signals.columns}")
    for name in {f"duplicate_{column}" for column in spec.unique} & set(spec.keep):
        raise SpecError(f"{where}: filter.keep.{name}: that is the reason given by filter.unique; choose another name")
    predicate.check(con, signals, spec.keep, f"{where}: filter.keep")
