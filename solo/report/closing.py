"""The closing table of a run, as lines of text that fit a terminal or a log without cutting a name.

In: the rows of `solo.report.closing_rows` and a width. Out: lines. Invariant: every name stands in full and every
artifact has one line; where the width is short, first the gaps shrink, then big counts become 1.23M.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

NUMBERS = ("in", "kept", "dropped", "tokens", "seconds")
COLUMNS = ("part", "name", "state", *NUMBERS)
UNITS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))


def table(rows: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    """A heading and one line per artifact; a part's name stands at its first artifact."""
    for gap, whole in ((2, True), (1, True), (2, False), (1, False)):
        cells = [COLUMNS, *_cells(rows, whole=whole)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
        if sum(widths) + gap * (len(COLUMNS) - 1) <= width:
            break
    return [(" " * gap).join(_align(row, widths)).rstrip() for row in cells]


def dropped(rows: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    """One line per artifact that dropped anything, the largest first; reasons that do not fit go on below."""
    losers = sorted((r for r in rows if _sum(r)), key=_sum, reverse=True)
    if not losers:
        return []
    names = [f"{r['part']}/{r['name']}" for r in losers]
    first, second = max(map(len, names)), max(len(f"{_sum(r):,}") for r in losers)
    lines = []
    for name, row in zip(names, losers, strict=True):
        head = f"{name:<{first}}  {_sum(row):>{second},}  "
        shown = sorted(row["dropped"].items(), key=lambda item: (-item[1], item[0]))
        for line in _fill([f"{reason} {n:,}" for reason, n in shown if n], width - len(head)):
            lines.append(head + line)
            head = " " * len(head)
    return lines


def _cells(rows: Sequence[Mapping[str, Any]], *, whole: bool) -> Iterator[tuple[str, ...]]:
    part = None
    for row in rows:
        values = {**row, "dropped": _sum(row), "seconds": f"{row['seconds']:,.1f}" if row["state"] == "ran" else ""}
        if row["part"] == part:
            values["part"] = ""
        part = row["part"]
        yield tuple(values[c] if isinstance(values[c], str) else count(values[c], whole=whole) for c in COLUMNS)


def _sum(row: Mapping[str, Any]) -> int:
    return sum(row["dropped"].values())


def count(n: int, *, whole: bool) -> str:
    """`1,234,567`, or `1.23M` where there is no room."""
    if not whole:
        for unit, letter in UNITS:
            if n >= max(unit, 10_000):
                return f"{n / unit:.3g}{letter}" if n < 999.5 * unit else f"{n / unit:.0f}{letter}"
    return f"{n:,}"


def _align(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        f"{cell:>{width}}" if column in NUMBERS else f"{cell:<{width}}"
        for column, cell, width in zip(COLUMNS, row, widths, strict=True)
    ]


def _fill(items: Sequence[str], width: int) -> Iterator[str]:
    """Items joined by commas, as many to a line as fit; an item is never broken."""
    line = ""
    for item in items:
        if line and len(line) + len(item) + 3 > width:
            yield line + ","
            line = ""
        line += f", {item}" if line else item
    yield line
