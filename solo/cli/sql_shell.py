"""SQL shell: queries from the command line, a pipe or a terminal, and their rows as a table, JSON or CSV.

In: a session of solo/sql.py and text. Out: lines. Invariant: JSON and CSV hold every row in full; a table for people
shows at most N_ROWS and says how many there are. Cost: the rows of one answer in memory.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

from solo.curate.query import QueryError
from solo.sql import CATALOG, VIEWS, Answer, Session, split

Form = Literal["table", "json", "csv"]

N_ROWS = 200
CELL = 60  # characters of a cell shown to people
BANNER = f"views: {', '.join(VIEWS)}; SELECT * FROM {CATALOG} says what they hold. End a query with ; and leave with ^D"


def written(answer: Answer, form: Form) -> str:
    """An answer as text."""
    if form == "json":
        rows = [dict(zip(answer.columns, map(_plain, row), strict=True)) for row in answer.rows]
        return json.dumps(rows, ensure_ascii=False, allow_nan=False)
    if form == "csv":
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(answer.columns)
        writer.writerows([[_field(v) for v in row] for row in answer.rows])
        return out.getvalue().rstrip("\n")
    return "\n".join(_table(answer))


def _plain(value: Any) -> Any:  # noqa: ANN401 - any value of DuckDB
    """A value as JSON has it; what JSON lacks is text, and no number is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, bytes):
        return value.hex()
    return value if isinstance(value, str | int | bool | None) else str(value)


def _field(value: Any) -> Any:  # noqa: ANN401 - any value of DuckDB
    plain = _plain(value)
    return json.dumps(plain, ensure_ascii=False) if isinstance(plain, dict | list) else plain


def _table(answer: Answer) -> Iterator[str]:
    shown = [[_cell(v) for v in row] for row in answer.rows[:N_ROWS]]
    widths = [max(map(len, column)) for column in zip(answer.columns, *shown, strict=True)]
    right = [all(isinstance(r[i], int | float | None) for r in answer.rows) for i in range(len(widths))]
    for cells in (answer.columns, *shown):
        aligned = [f"{c:>{w}}" if r else f"{c:<{w}}" for c, w, r in zip(cells, widths, right, strict=True)]
        yield "  ".join(aligned).rstrip()
    more = f", {N_ROWS} shown; --json and --csv give all" if len(answer.rows) > N_ROWS else ""
    yield f"({len(answer.rows):,} rows{more})"


def _cell(value: Any) -> str:  # noqa: ANN401 - any value of DuckDB
    """One line of printable text: a caption may hold the escapes that a terminal obeys."""
    text = "" if value is None else str(_field(value))
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= CELL else text[: CELL - 3] + "..."


def converse(session: Session, say: Callable[[str], None], read: Callable[[str], str] = input) -> None:
    """Answer what is typed until the end of the input; a mistake costs a line."""
    import readline  # noqa: F401 - importing it gives `input` history and editing

    say(BANNER)
    typed = ""
    while True:
        try:
            typed += read("solo> " if not typed.strip() else "  ... ") + "\n"
        except EOFError:
            return
        except KeyboardInterrupt:
            say("")
            typed = ""
            continue
        queries, typed = split(typed)
        for query in queries:
            try:
                say(written(session.ask(query), "table"))
            except QueryError as error:
                say(f"error: {error}")
