"""Categories: what a sample of a mix counts under, on pages and in comparisons.

In: locks, and the ledgers they were drawn from. Out: SQL. Invariant: the category that the mix gives a source is that
of all its samples; of other sources a sample has the one its own record says, or none. Cost: none here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import duckdb

from solo.artifact import Artifact
from solo.curate.query import literal

NONE = "(none)"


def given(*locks: Artifact) -> dict[str, str]:
    """Source -> the category that its mix gives it; of several locks the last one counts."""
    sources = [s for lock in locks for s in lock.manifest.spec.get("mix", {}).get("sources", [])]
    return {s["source"]: s["category"] for s in sources if s.get("category")}


def named(given: Mapping[str, str], column: str) -> str:
    """The category as an expression over `source` and a column with that of the record."""
    whens = " ".join(f"WHEN {literal(source)} THEN {literal(category)}" for source, category in sorted(given.items()))
    return f"coalesce({f'CASE source {whens} END, ' if whens else ''}{column}, {literal(NONE)})"


def of_records(con: duckdb.DuckDBPyConnection, ledgers: Iterable[Artifact]) -> str:
    """A query for (source, key, category) over the ledgers that have one."""
    selects = ["SELECT '' AS source, '' AS key, '' AS category WHERE FALSE"]
    for a in ledgers:
        if files := [str(f) for f in sorted((a.path / "shards").glob("*.parquet"))]:
            read = f"read_parquet({literal(files)}, union_by_name := TRUE)"
            if "meta_category" in con.sql(f"SELECT * FROM {read} LIMIT 0").columns:
                selects.append(f"SELECT source, key, CAST(meta_category AS VARCHAR) FROM {read}")
    return " UNION ALL ".join(selects)
