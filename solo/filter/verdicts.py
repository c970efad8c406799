"""Verdicts: which samples a source keeps and why not the others, from signal columns alone.

In: a DuckDB view `signals` and a `Filter` spec. Out: table `judged` (item: rank by key, key, reason, winner; NULL
reason = keep). Invariants: a sample is kept iff every predicate is true, in the order of the YAML, so false and NULL
both drop it and the first such is the reason; of the samples that pass, all but the smallest key of each value in a
`unique` column are repeats, and of each cluster of `near` ones too (solo/filter/duplicates.py). These are taken in
order and only among samples still kept; NULL equals nothing. Cost: one scan, and a sort per `unique` column.
"""

from __future__ import annotations

from pathlib import Path

import duckdb
from duckdb import CaseExpression, ColumnExpression, ConstantExpression, SQLExpression

from solo import predicate
from solo.filter import duplicates
from solo.spec import Filter, SpecError

JUDGED = """
CREATE OR REPLACE TABLE judged AS
SELECT row_number() OVER (ORDER BY key) - 1 AS item, item AS side, key, reason, CAST(NULL AS BIGINT) AS winner
FROM passed
"""


def judge(con: duckdb.DuckDBPyConnection, where: str, spec: Filter, scratch: Path) -> None:
    """Make table `judged` from view `signals`; `where` is the file that errors name."""
    check(con, where, spec)
    reason = ConstantExpression(None).cast("VARCHAR")
    for name, expression in reversed(spec.keep.items()):
        reason = CaseExpression(SQLExpression(expression), reason).otherwise(ConstantExpression(name))
    try:
        con.table("signals").select("key", reason.alias("reason")).create("passed")
    except duckdb.Error:
        if culprit := predicate.failing(con.table("signals"), spec.keep):
            raise SpecError(f"{where}: filter.keep.{culprit}") from None
        raise
    con.execute(JUDGED)
    columns = duplicates.compared(spec.unique, spec.near)
    if not columns:
        return
    numbered = con.table("signals").join(con.table("judged").select("key", "item"), "key")
    numbered.select(ColumnExpression("item"), *map(ColumnExpression, columns)).create("evidence")
    duplicates.drop(con, spec.unique, spec.near, scratch)


def check(con: duckdb.DuckDBPyConnection, where: str, spec: Filter) -> None:
    """Check every predicate and compared column against the columns of view `signals`."""
    signals = con.table("signals")
    duplicates.check(signals.columns, spec.unique, spec.near, f"{where}: filter.")
    for name in set(duplicates.reasons(spec.unique, spec.near)) & set(spec.keep):
        field = "unique" if name.startswith("duplicate_") else "near"
        raise SpecError(f"{where}: filter.keep.{name}: that is the reason given by filter.{field}; choose another name")
    predicate.check(con, signals, spec.keep, f"{where}: filter.keep")
