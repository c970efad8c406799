"""Mix SQL: a mix whose samples and repeats one SELECT gives, for what weights and predicates cannot say.

In: `sql` of a mix: one SELECT of `key`, `source` and `n_repeats` over two views: `ledger`, every row of the mix's
ledgers with all their columns and `reason` (NULL, or why it cannot be drawn), and `eligible`, those without a reason.
Out: table `asked` of the rows it gave. Invariants: the query reads nothing else and writes nothing; each row names a
sample that can be drawn, once; the answer does not depend on threads, so it runs on one, with fixed memory and scratch,
and no function that another run would answer otherwise; it runs in a process of its own (solo/curate/mix_answer.py), so
that no query harms this one. Cost: the start of that process and the query, at most TIMEOUT_S.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import duckdb
import pyarrow as pa

from solo.artifact import CHECKOUT
from solo.curate import mix_answer
from solo.curate.exclude import Ledger
from solo.curate.mix_answer import Question
from solo.curate.query import literal
from solo.spec import SpecError

MEMORY_BYTES, SCRATCH_BYTES, TIMEOUT_S = 4 << 30, 32 << 30, 600.0
MAX_REPEATS = 1_000  # a mix that shows a sample more often is a mistake of the query

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
    asked = question(text, ledgers, excluded, work)
    try:
        if said := ask(asked):
            raise SpecError(f"{where}: sql: {said}")
        with pa.memory_map(asked.answer) as file:
            con.from_arrow(pa.ipc.open_stream(file)).query("rows", "CREATE OR REPLACE TEMP TABLE asked AS FROM rows")
    finally:
        shutil.rmtree(asked.scratch)
    for what, sql in WRONG.items():
        wrong = sql.format(left=" AND key NOT IN (SELECT key FROM excluded)" if excluded else "")
        for key, source in con.execute(f"{wrong} ORDER BY ALL LIMIT 1").fetchall():
            raise SpecError(f"{where}: sql: sample {key!r} of {source!r} {what}; change the query")


def question(text: str, ledgers: Sequence[Ledger], excluded: Path | None, work: Path) -> Question:
    """What the process is asked; its scratch is made."""
    files = [str(f) for c in ledgers for f in sorted(Path(c.files).parent.glob("*.parquet"))]
    files += [c.files for c in ledgers] + ([str(excluded)] if excluded else [])
    made = view(ledgers, {c.name: literal(c.files) for c in ledgers}, literal(str(excluded)) if excluded else None)
    scratch = work / "sql"
    scratch.mkdir(exist_ok=True)
    return Question(
        text,
        [made, ELIGIBLE],
        files,
        str(scratch),
        str(scratch / "answer.arrow"),
        MEMORY_BYTES,
        SCRATCH_BYTES,
        TIMEOUT_S,
    )


def ask(asked: Question) -> str:
    """Why there is no answer, in one line; empty where there is one."""
    command = [sys.executable, "-P", "-m", mix_answer.__name__]
    # Of our environment it needs where libraries are, and no token.
    env = {"PYTHONPATH": str(CHECKOUT)} | {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
    try:
        ended = subprocess.run(
            command,
            input=json.dumps(asdict(asked)),
            capture_output=True,
            check=False,
            text=True,
            env=env,
            timeout=asked.timeout_s,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {asked.timeout_s:g} s; ask for less"
    if ended.returncode >= 0:
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip()
    name = signal.Signals(-ended.returncode).name
    return f"its process was ended by {name}; {mix_answer.want_of_memory(asked)}"


def view(ledgers: Sequence[Ledger], files: dict[str, str], excluded: str | None) -> str:
    """The query of view `ledger`."""
    rows = "\nUNION ALL BY NAME".join(
        ROWS.format(source=literal(c.name), reason=c.reason, files=files[c.name]) for c in ledgers
    )
    joined = EXCLUDED.format(files=excluded) if excluded else ""
    return LEDGER.format(rows=rows, replaced=REPLACED if excluded else "", joined=joined)
