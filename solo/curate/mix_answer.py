"""Mix answer: the query of one mix, run in a process of its own whose memory the kernel bounds.

In: a Question on standard input. Out: rows of `ANSWER` as an Arrow stream in a file, or one line on standard output
that says why not. Invariants: DuckDB's cap does not see a single huge string or list, RLIMIT_DATA does, and where it
says no DuckDB reports want of memory as any other; whatever the query does to this process, the one that asked for it
only reads an exit code. Cost: a start with DuckDB and Arrow alone, 0.25 s.
"""

from __future__ import annotations

import ctypes
import json
import math
import resource
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from solo.curate import query
from solo.curate.query import QueryError

VIEWS = ("ledger", "eligible")
HINT = f"views are {' and '.join(VIEWS)}, of the mix's own sources"
ROOM_BYTES = 1 << 30  # beside DuckDB's cap: the interpreter, libraries, batches on their way out
BATCH_ROWS = 122_880
LONGEST = 1_024  # bytes of a key or source: what is longer is no sample's, and whoever asked is to read it
SAID = 500  # characters of a refusal, whose values may be of any length
ANSWER = pa.schema([("key", pa.string()), ("source", pa.string()), ("n_repeats", pa.int32())])
INTEGERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT"}
SHORT = "CASE WHEN strlen({0}) > {1} THEN error('{0} of ' || strlen({0}) || ' bytes; at most {1}') ELSE {0} END AS {0}"
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Question:
    """A query, the queries that make its views, the files these read, and where and how large its answer may be."""

    text: str
    views: list[str]
    files: list[str]
    scratch: str
    answer: str
    memory_bytes: int
    scratch_bytes: int
    timeout_s: float

    @property
    def limit_bytes(self) -> int:
        """All the memory of the process that answers."""
        return self.memory_bytes + ROOM_BYTES


def check(text: str) -> None:
    """Refuse what is no SELECT over the views, and what another run would answer otherwise."""
    with duckdb.connect() as parser:
        query.check(parser, text, VIEWS, HINT)
        unstable = query.unstable()
        for node in query.parse(parser, text):
            names = [str(node.get("function_name", "")), *node.get("column_names", [])]
            for name in (n.lower() for n in names if isinstance(n, str)):
                if name in unstable or name.startswith(("approx_", "reservoir_")):
                    raise QueryError(f"{name}() gives another answer at another time; take it out")
            if node.get("sample"):
                raise QueryError("a sample is another one at another time; order by md5(key) and limit instead")


def write(asked: Question) -> None:
    """Write the rows that the query gives."""
    con = query.lock(
        Path(asked.scratch),
        memory_bytes=asked.memory_bytes,
        scratch_bytes=asked.scratch_bytes,
        files=asked.files,
        threads=1,
    )
    for view in asked.views:
        con.execute(view)
    rows = con.sql(asked.text)
    _check_columns(rows)
    rows = rows.project(", ".join([*(SHORT.format(name, LONGEST) for name in ("key", "source")), "n_repeats"]))
    with pa.OSFile(asked.answer, "wb") as file, pa.ipc.new_stream(file, ANSWER) as writer:
        for batch in rows.to_arrow_reader(BATCH_ROWS):
            try:
                writer.write_batch(batch.cast(ANSWER))
            except pa.ArrowInvalid as error:
                raise QueryError(f"n_repeats: {' '.join(str(error).split())}") from None


def _check_columns(rows: Any) -> None:  # noqa: ANN401 - DuckDB's relation
    kinds = dict(zip(rows.columns, map(str, rows.types), strict=True))
    if set(kinds) != set(ANSWER.names) or len(rows.columns) != len(ANSWER.names):
        raise QueryError(f"its columns are {rows.columns}; give key, source and n_repeats")
    if kinds["n_repeats"] not in INTEGERS or {kinds["key"], kinds["source"]} != {"VARCHAR"}:
        raise QueryError(f"its types are {kinds}; key and source are VARCHAR, n_repeats is a whole number")


def confine(asked: Question) -> None:
    """Let the kernel bound this process, and end it with the one that asked."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    cpu_s = math.ceil(asked.timeout_s) + 1
    for kind, most in (
        (resource.RLIMIT_DATA, asked.limit_bytes),
        (resource.RLIMIT_FSIZE, asked.scratch_bytes + ROOM_BYTES),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (least, least))


def main() -> None:
    """Answer one question."""
    asked = Question(**json.load(sys.stdin))
    confine(asked)
    sys.stdout.write(answer(asked))


def answer(asked: Question) -> str:
    """Write the answer to a question, or return in one line why there is none."""
    try:
        check(asked.text)
        write(asked)
    except (QueryError, duckdb.Error, pa.ArrowException, MemoryError, OSError) as error:
        return _said(error, asked)
    return ""


def _said(error: Exception, asked: Question) -> str:
    line = query.one_line(duckdb.Error(str(error))).removeprefix("sql: ")
    line = line if len(line) <= SAID else f"{line[:SAID]} ..."
    if isinstance(error, MemoryError) or "Out of Memory" in line or "File too large" in line:
        line = f"{line.split(' Possible solutions')[0]}; {want_of_memory(asked)}"  # which are settings, and final
    return line


def want_of_memory(asked: Question) -> str:
    """What a query may take, and what to do."""
    n, rest, disk = (size >> 20 for size in (asked.memory_bytes, ROOM_BYTES, asked.scratch_bytes))
    return (
        f"a query of a mix has {n:,} MiB of memory, {rest:,} MiB of them again for single values, and {disk:,} MiB of "
        "scratch; ask for fewer rows or shorter strings and lists"
    )


if __name__ == "__main__":
    main()
