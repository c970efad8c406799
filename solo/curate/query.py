"""Query: what users' SQL may be, and the DuckDB it runs in.

In: the text of one query, the views it may name. Out: the views it names, or a `QueryError`; a connection that can open
the files it was given and no other. Invariants: two locks, each enough alone for a read: the parse tree is held against
a list of what may stand in it (in DuckDB 2.0 a CTE may hold a COPY or an INSERT), and DuckDB itself has no extension,
no other file, and settings that are final. Cost: parsing; memory and scratch of the connection are capped. Imports no
module of ours: a process that is started for one query (solo/curate/mix_answer.py) has no time for them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import duckdb

# What may stand in a query's tree. Table functions that make rows from their arguments; all others read something.
NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
TABLE_FUNCTIONS = {"range", "generate_series", "unnest", "json_each", "json_tree", "repeat", "repeat_row"}
REFUSED_FUNCTIONS = {"write_log", "sleep_ms", "nextval", "setval", "currval", "getvariable", "current_setting"}
PARSED = "SELECT json_serialize_sql($text)"
# Functions that give another answer at another time (random, now) or in another session.
UNSTABLE = "SELECT DISTINCT lower(function_name) FROM duckdb_functions() WHERE stability <> 'CONSISTENT'"


class QueryError(ValueError):
    """A query that is refused or fails, in one line."""


def lock(
    scratch: Path,
    *,
    memory_bytes: int,
    scratch_bytes: int,
    files: Sequence[str] = (),
    folders: Sequence[Path] = (),
    threads: int | None = None,
) -> duckdb.DuckDBPyConnection:
    """A DuckDB that can open `files`, `folders` and its scratch, has no extension, and whose settings are final."""
    config: dict[str, str | bool | int | float | list[str]] = {
        "temp_directory": str(scratch),
        "max_temp_directory_size": f"{scratch_bytes}B",
        "memory_limit": f"{memory_bytes}B",
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "allow_community_extensions": False,
        "allow_persistent_secrets": False,
    }
    con = duckdb.connect(config=config if threads is None else config | {"threads": threads})
    con.execute("SET python_enable_replacements = FALSE")  # else a table's name could be a variable of this program
    con.execute(f"SET allowed_paths = {literal(list(files))}")
    con.execute(f"SET allowed_directories = {literal([str(folder) for folder in folders])}")
    con.execute("SET enable_external_access = FALSE")
    con.execute("SET lock_configuration = TRUE")
    return con


def check(parser: duckdb.DuckDBPyConnection, text: str, views: Collection[str], hint: str) -> set[str]:
    """The tables that a query names; QueryError, with the hint, unless it is one SELECT over `views` alone."""
    tables: set[str] = set()
    ctes: set[str] = set()
    for node in parse(parser, text):
        _check_node(node, hint)
        if node.get("type") == "BASE_TABLE":
            tables.add(".".join(node["qualified_name"]["path"]))
        ctes |= {entry["key"].lower() for entry in (node.get("cte_map") or {}).get("map", ())}
        if "cte_name" in node:
            ctes.add(node["cte_name"].lower())
    if unknown := sorted(t for t in tables if t.lower() not in {*views, *ctes}):
        raise QueryError(f"sql: no view {unknown[0]!r}; {hint}")
    return {t.lower() for t in tables}


def parse(parser: duckdb.DuckDBPyConnection, text: str) -> Iterator[dict[str, Any]]:
    """Every node of the tree of one SELECT."""
    ((parsed,),) = parser.execute(PARSED, {"text": text}).fetchall()
    try:
        tree = json.loads(parsed)
    except RecursionError:
        raise QueryError("sql: expressions are nested too deep; write them flatter") from None
    if tree["error"]:
        # A syntax error has its place; any other statement has a message that speaks of JSON.
        said = one_line(duckdb.Error(tree["error_message"]))
        raise QueryError(f"sql: {said}" if tree.get("position") else "sql: only SELECT is answered here, one at a time")
    if len(tree["statements"]) != 1:
        raise QueryError(f"sql: {len(tree['statements'])} statements; give one SELECT")
    yield from _nodes(tree["statements"][0]["node"])


def _check_node(node: Mapping[str, Any], hint: str) -> None:
    kind = node.get("type")
    if isinstance(kind, str) and kind.endswith("_NODE") and kind not in NODES:
        verb = kind.removesuffix("_NODE").removesuffix("_QUERY")
        raise QueryError(f"sql: {verb} inside a query; only SELECT is answered here, nothing can be changed")
    if kind == "SHOW_REF":
        raise QueryError(f"sql: SHOW and DESCRIBE are not answered; {hint}")
    if kind == "TABLE_FUNCTION":
        name = node["function"].get("function_name", "").lower()
        if name not in TABLE_FUNCTIONS:
            raise QueryError(f"sql: {name}() reads what is no view; {hint}")
    elif str(node.get("function_name", "")).lower() in REFUSED_FUNCTIONS:
        raise QueryError(f"sql: {node['function_name']}() is not a function of the data; take it out")


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:  # noqa: ANN401 - JSON
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


def literal(value: object) -> str:
    """A value in SQL's own notation."""
    if isinstance(value, list):
        return f"[{', '.join(literal(v) for v in value)}]"
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(value).upper()


def one_line(error: duckdb.Error) -> str:
    """DuckDB's message without its picture of the query."""
    return " ".join(str(error).split("\n\nLINE ")[0].split())


@cache
def unstable() -> frozenset[str]:
    """Functions whose answer is another at another time; to ask for each source took a tenth of curating a mix."""
    with duckdb.connect() as con:
        return frozenset(name for (name,) in con.execute(UNSTABLE).fetchall())
