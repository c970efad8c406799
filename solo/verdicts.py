"""Verdicts: which samples a source keeps and why not the others, from signal columns alone.

In: a DuckDB view `signals` and a `Filter` spec. Out: table `judged` (key, reason; NULL = keep). Invariants: a sample
is kept iff every predicate is true, in the order of the YAML, so false and NULL both drop it and the first such is
the reason; of the samples that pass, all but the smallest key of each value in a `unique` column are repeats. Columns
are taken in order and only among samples still kept, so each repeat has a kept twin; NULL equals nothing.
A predicate is a fixed function of one sample: no aggregate, window, subquery, random() or now().
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import duckdb
from duckdb import CaseExpression, ColumnExpression, ConstantExpression, FunctionExpression, SQLExpression

from solo.spec import Filter, SpecError

UNSTABLE = "SELECT DISTINCT function_name FROM duckdb_functions() WHERE stability <> 'CONSISTENT'"
PARSED = "SELECT json_serialize_sql('SELECT ' || $predicate)"
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
    for name, predicate in reversed(spec.keep.items()):
        reason = CaseExpression(SQLExpression(predicate), reason).otherwise(ConstantExpression(name))
    identities = FunctionExpression("list_value", *[ColumnExpression(c).cast("VARCHAR") for c in spec.unique])
    judged = con.table("signals").select("key", reason.alias("reason"), identities.alias("identities"))
    try:
        judged.create("judged")
    except duckdb.Error as error:
        culprit = _culprit(con, spec)
        if culprit is None:
            raise
        raise SpecError(f"{where}: filter.keep.{culprit}: {_line(error)}; try_cast gives NULL") from None
    for i, column in enumerate(spec.unique):
        con.execute(REPEATS, {"i": i + 1, "duplicate": f"duplicate_{column}"})


def check(con: duckdb.DuckDBPyConnection, where: str, spec: Filter) -> None:
    """Compile each predicate alone, so that the error names it, quotes DuckDB and lists the columns."""
    columns = con.table("signals").columns
    for column in spec.unique:
        if column not in columns:
            raise SpecError(f"{where}: filter.unique: no column {column!r}; columns are {columns}")
    unstable = {name for (name,) in con.execute(UNSTABLE).fetchall()}
    for name, predicate in spec.keep.items():
        field = f"{where}: filter.keep.{name}"
        if name in {f"duplicate_{column}" for column in spec.unique}:
            raise SpecError(f"{field}: that is the reason given by filter.unique; choose another name")
        try:
            expression = SQLExpression(predicate)
            con.table("signals").filter(expression)  # as a WHERE clause it may hold no aggregate and no window
            kinds = [str(kind) for kind in con.table("signals").select(expression).types]
        except duckdb.Error as error:
            raise SpecError(f"{field}: {_line(error)}; columns are {columns}") from None
        if kinds != ["BOOLEAN"]:
            raise SpecError(f"{field}: {predicate!r} is {', '.join(kinds)}; write one BOOLEAN expression")
        for wrong in _unfit(con, predicate, unstable - set(columns)):
            raise SpecError(f"{field}: {wrong} is not a fixed function of one sample; use its columns only")


def _unfit(con: duckdb.DuckDBPyConnection, predicate: str, unstable: set[str]) -> Iterator[str]:
    """Subqueries, and functions whose value changes with time, session or call, anywhere in an expression."""
    nodes: list[Any] = [json.loads(parsed) for (parsed,) in con.execute(PARSED, {"predicate": predicate}).fetchall()]
    while nodes:
        node = nodes.pop()
        if isinstance(node, list):
            nodes += node
        elif isinstance(node, dict):
            nodes += node.values()
            if node.get("class") == "SUBQUERY":
                yield "a subquery"
            names = [node.get("function_name", ""), *node.get("column_names", [])]  # current_date parses as a column
            yield from (f"{name}()" for name in names if name.lower() in unstable)


def _culprit(con: duckdb.DuckDBPyConnection, spec: Filter) -> str | None:
    """Name of the predicate that fails on the data, e.g. in a cast."""
    for name, predicate in spec.keep.items():
        try:
            con.table("signals").filter(SQLExpression(predicate)).aggregate("count(*)").fetchall()
        except duckdb.Error:
            return name
    return None


def _line(error: duckdb.Error) -> str:
    """DuckDB's message without its picture of the query, on one line."""
    return " ".join(str(error).split("\n\nLINE ")[0].split())
