"""Mix SQL: a mix whose samples and repeats one SELECT gives, for what weights and predicates cannot say.

In: `sql` of a mix: one SELECT of `key`, `source` and `n_repeats` over two views: `ledger`, every row of the mix's
ledgers with all their columns and `reason` (NULL, or why it cannot be drawn), and `eligible`, those without a reason.
Out: table `asked` of the rows it gave. Invariants: the query reads nothing else and writes nothing; each row names a
sample that can be drawn, once; the answer does not depend on threads, so it runs on one, with fixed memory and scratch,
and no function that another run would answer otherwise. Cost: the query, at most TIMEOUT_S.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from solo import predicate, query
from solo.exclude import Ledger, literal
from solo.query import QueryError
from solo.spec import SpecError

VIEWS = ("ledger", "eligible")
HINT = f"views are {' and '.join(VIEWS)}, of the mix's own sources"
MEMORY_BYTES, SCRATCH_BYTES, TIMEOUT_S = 4 << 30, 32 << 30, 600.0
MAX_REPEATS = 1_000  # a mix that shows a sample more often is a mistake of the query
BATCH_ROWS = 122_880
GROWING = {"repeat", "repeat_row", "lpad", "rpad", "bar", "printf", "format", "list_resize", "array_resize"}
ANSWER = pa.schema([("key", pa.string()), ("source", pa.string()), ("n_repeats", pa.int32())])
INTEGERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT"}

ROWS = """
SELECT * REPLACE ({source} AS source), {reason} AS reason
FROM read_parquet({files}, union_by_name := TRUE)"""
LEDGER = """
CREATE VIEW ledger AS
WITH judged AS ({rows}
)
SELECT judged.* {replaced}
FROM judged {joined}
"""
ELIGIBLE = "CREATE VIEW eligible AS SELECT * FROM ledger WHERE reason IS NULL"
EXCLUDED = 'LEFT JOIN (SELECT key, reason AS "excluded for" FROM read_parquet({files})) AS excluded USING (key)'
REPLACED = 'REPLACE (coalesce(reason, "excluded for") AS reason)'

# Each query finds one row that may not be in the answer, and says what is wrong with it.
WRONG = {
    "is NULL in a column": "SELECT key, source FROM asked WHERE key IS NULL OR source IS NULL OR n_repeats IS NULL",
    f"has n_repeats outside 1 ... {MAX_REPEATS}": (
        f"SELECT key, source FROM asked WHERE n_repeats NOT BETWEEN 1 AND {MAX_REPEATS}"
    ),
    "is given twice": "SELECT key, source FROM asked GROUP BY ALL HAVING count(*) > 1",
    "is in no ledger of the mix": "SELECT key, source FROM asked ANTI JOIN samples USING (key, source)",
    "cannot be drawn, its reason in `ledger` is not NULL": (
        "SELECT key, source FROM asked SEMI JOIN samples USING (key, source) "
        "ANTI JOIN (SELECT key, source FROM samples WHERE reason IS NULL{left}) AS free USING (key, source)"
    ),
}


def run(
    con: duckdb.DuckDBPyConnection,
    text: str,
    ledgers: Sequence[Ledger],
    excluded: Path | None,
    *,
    where: str,
    work: Path,
) -> None:
    """Table `asked` in `con`, from the answer of `text`; SpecError, in one line, where either may not be."""
    work.mkdir(parents=True, exist_ok=True)
    answer = work / "asked.parquet"
    try:
        check(text)
        _ask(text, ledgers, excluded, answer, work)
    except (QueryError, duckdb.Error, OSError) as error:  # an OSError where DuckDB fails while Arrow reads
        said = predicate.one_line(duckdb.Error(str(error))).removeprefix("sql: ")
        if "INTERRUPT Error" in said:
            said = f"no answer within {TIMEOUT_S:g} s; ask for less"
        raise SpecError(f"{where}: sql: {said}") from None
    con.execute(f"CREATE OR REPLACE TEMP TABLE asked AS FROM read_parquet({literal(str(answer))})")
    for what, sql in WRONG.items():
        wrong = sql.format(left=" AND key NOT IN (SELECT key FROM excluded)" if excluded else "")
        for key, source in con.execute(f"{wrong} ORDER BY ALL LIMIT 1").fetchall():
            raise SpecError(f"{where}: sql: sample {key!r} of {source!r} {what}; change the query")


def check(text: str) -> None:
    """Refuse what is no SELECT over the views, and what another run would answer otherwise."""
    with duckdb.connect() as parser:
        query.check(parser, text, VIEWS, HINT)
        unstable = predicate.unstable()
        for node in query.parse(parser, text):
            names = [str(node.get("function_name", "")), *node.get("column_names", [])]
            for name in (n.lower() for n in names if isinstance(n, str)):
                if name in unstable or name.startswith(("approx_", "reservoir_")):
                    raise QueryError(f"{name}() gives another answer at another time; take it out")
                if name in GROWING:
                    raise QueryError(f"{name}() can make a value of any size, which no cap sees; take it out")
            if node.get("sample"):
                raise QueryError("a sample is another one at another time; order by md5(key) and limit instead")


def _ask(text: str, ledgers: Sequence[Ledger], excluded: Path | None, answer: Path, work: Path) -> None:
    files = [str(f) for c in ledgers for f in sorted(Path(c.files).parent.glob("*.parquet"))]
    files += [c.files for c in ledgers] + ([str(excluded)] if excluded else [])
    con = query.lock(work / "sql", memory_bytes=MEMORY_BYTES, scratch_bytes=SCRATCH_BYTES, files=files, threads=1)
    late = threading.Timer(TIMEOUT_S, con.interrupt)
    try:
        left_out = literal(str(excluded)) if excluded else None
        con.execute(view(ledgers, {c.name: literal(c.files) for c in ledgers}, left_out))
        con.execute(ELIGIBLE)
        late.start()
        _write(con.sql(text), answer)
    finally:
        late.cancel()
        con.close()


def view(ledgers: Sequence[Ledger], files: dict[str, str], excluded: str | None) -> str:
    """The query of view `ledger`."""
    rows = "\nUNION ALL BY NAME".join(
        ROWS.format(source=literal(c.name), reason=c.reason, files=files[c.name]) for c in ledgers
    )
    joined = EXCLUDED.format(files=excluded) if excluded else ""
    return LEDGER.format(rows=rows, replaced=REPLACED if excluded else "", joined=joined)


def _write(rows: Any, answer: Path) -> None:  # noqa: ANN401 - DuckDB's relation
    kinds = dict(zip(rows.columns, map(str, rows.types), strict=True))
    if set(kinds) != set(ANSWER.names) or len(rows.columns) != len(ANSWER.names):
        raise QueryError(f"its columns are {rows.columns}; give key, source and n_repeats")
    if kinds["n_repeats"] not in INTEGERS or {kinds["key"], kinds["source"]} != {"VARCHAR"}:
        raise QueryError(f"its types are {kinds}; key and source are VARCHAR, n_repeats is a whole number")
    with pq.ParquetWriter(answer, ANSWER) as writer:
        for batch in rows.to_arrow_reader(BATCH_ROWS):
            table = pa.Table.from_batches([batch]).select(ANSWER.names)
            try:
                writer.write_table(table.cast(ANSWER))
            except pa.ArrowInvalid as error:
                raise QueryError(f"n_repeats: {' '.join(str(error).split())}") from None
