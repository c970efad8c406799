"""Predicate: one boolean SQL expression over the columns of a table of samples, as users write it in YAML.

In: a DuckDB relation and named predicates. Out: nothing, or a `SpecError` that names the predicate, quotes DuckDB and
lists the columns. Invariant: what passes is a fixed function of one sample, so no aggregate, window, subquery, second
statement, random() or now(). Cost: parsing and binding; no row is read but by `failing`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import duckdb
from duckdb import SQLExpression

from solo.curate.query import one_line, unstable
from solo.spec import SpecError

PARSED = "SELECT json_serialize_sql('SELECT ' || $predicate)"

# What an expression over columns consists of; whatever DuckDB adds in a later version is refused until it is listed.
CLASSES = {"BETWEEN", "CASE", "CAST", "COLLATE", "COLUMN_REF", "COMPARISON", "CONJUNCTION", "CONSTANT", "FUNCTION"}
CLASSES |= {"LAMBDA", "LAMBDA_REF", "OPERATOR", "STAR", "TYPE"}


def check(
    con: duckdb.DuckDBPyConnection,
    samples: duckdb.DuckDBPyRelation,
    predicates: Mapping[str, str],
    where: str,
    *,
    boolean: bool = True,
) -> None:
    """Compile each predicate (or value of any type) alone; `where` is the file and field that errors name."""
    columns = samples.columns
    volatile = unstable() - {column.lower() for column in columns}
    for name, predicate in predicates.items():
        field = f"{where}.{name}"
        try:
            # Before it is bound: a subquery that names a file would open it.
            for wrong in _unfit(con, predicate, volatile):
                raise SpecError(f"{field}: {wrong} is not a fixed function of one sample; use its columns only")
            expression = SQLExpression(predicate)
            samples.filter(expression)  # as a WHERE clause it may hold no aggregate
            kinds = [str(kind) for kind in samples.select(expression).types]
        except duckdb.Error as error:
            raise SpecError(f"{field}: {one_line(error)}; columns are {columns}") from None
        if not boolean and len(kinds) != 1:
            raise SpecError(f"{field}: {predicate!r} is {len(kinds)} values, not one; write one expression")
        if boolean and kinds != ["BOOLEAN"]:
            raise SpecError(f"{field}: {predicate!r} is {', '.join(kinds)}, not one BOOLEAN; write a comparison")


def failing(samples: duckdb.DuckDBPyRelation, predicates: Mapping[str, str]) -> str | None:
    """Name of the predicate that fails on the rows, e.g. in a cast, and DuckDB's message."""
    for name, predicate in predicates.items():
        try:
            samples.filter(SQLExpression(predicate)).aggregate("count(*)").fetchall()
        except duckdb.Error as error:
            return f"{name}: {one_line(error)}; try_cast gives NULL"
    return None


def _unfit(con: duckdb.DuckDBPyConnection, predicate: str, volatile: frozenset[str]) -> Iterator[str]:
    """What is no expression, subqueries, windows and unstable functions, anywhere in DuckDB's parse tree."""
    nodes: list[Any] = [json.loads(parsed) for (parsed,) in con.execute(PARSED, {"predicate": predicate}).fetchall()]
    while nodes:
        node = nodes.pop()
        if isinstance(node, list):
            nodes += node
        elif isinstance(node, dict):
            nodes += node.values()
            if node.get("class", "CONSTANT") not in CLASSES:
                yield f"a {node['class'].lower().replace('_', ' ')}"
            if node.get("from_table", {"type": "EMPTY"})["type"] != "EMPTY":
                yield "a FROM"
            names = [node.get("function_name", ""), *node.get("column_names", [])]  # current_date parses as a column
            yield from (f"{name}()" for name in names if name.lower() in volatile)
