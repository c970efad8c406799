"""Markdown for the Prefect UI and for report.html: tables, bars, pictures, and text that cannot act.

In: values of any kind, among them captions and URLs of a crawl. Out: GitHub-flavoured Markdown without any raw HTML.
Invariants: escaped text is shown letter by letter and makes no link, picture, code or table cell (sanitising in the UI
stops scripts, not remote pictures); a page stays under its byte budget and says what it left out. Cost: string work.
"""

from __future__ import annotations

import base64
import re
import unicodedata
from collections.abc import Mapping, Sequence

from solo.report.charts import short

PAGE_BYTES = 200_000  # the UI keeps every version of a page in its database; 256 kB is the agreed limit
N_ROWS = 200  # more rows than this in a table are counted, not shown
ACTIVE = re.compile(r"[\\`*\[\]()!#|~$<>&{}]|(?<![^\W_])_|_(?![^\W_])")  # an underscore inside a word does nothing
SELF_LINK = re.compile(r"(?<=:/)(?=/)|(?<=www)(?=\.)|(?=@)", re.IGNORECASE)
BAR = " "  # the column of bars needs no name
PERCENT = re.compile(r"[0-9.,]+%")
BLOCKS = "\u258f\u258e\u258d\u258c\u258b\u258a\u2589\u2588"  # one to eight eighths
PICTURES = {b"\x89PN": "png", b"\xff\xd8\xff": "jpeg"}


class Markup(str):
    """Text that is Markdown already; every other string is escaped where a table shows it."""

    __slots__ = ()


def escape(value: object, *, limit: int = 120) -> Markup:
    """One line of text, shown as it is; characters that could begin markup become character references.

    Controls and bidirectional overrides go; a zero-width space breaks what the UI would turn into a link by itself.
    """
    words = " ".join(str(value).split())
    seen = "".join(c for c in words if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co"))
    if len(seen) > limit:
        seen = seen[: limit - 3] + "..."
    shown = ACTIVE.sub(lambda m: f"&#{ord(m[0])};", seen)
    return Markup(SELF_LINK.sub("\u200b", shown))


def cell(value: object) -> str:
    """One table cell: numbers with thousands separators, None as nothing, strings escaped."""
    if isinstance(value, Markup):
        return value
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return escape(value)


def table(rows: Sequence[Mapping[str, object]], *, most: int = N_ROWS) -> str:
    """A table whose columns are the keys of the first row; columns of numbers are aligned right."""
    if not rows:
        return "(none)"
    columns = sorted(rows[0], key=lambda c: c == BAR)  # bars come last, whatever was added after them
    numeric = [all(_is_number(row.get(c)) for row in rows) for c in columns]
    lines = [
        "| " + " | ".join(escape(c) for c in columns) + " |",
        "| " + " | ".join("---:" if right else "---" for right in numeric) + " |",
    ]
    lines += ["| " + " | ".join(cell(row.get(c)) for c in columns) + " |" for row in rows[:most]]
    more = f"\n\nand {len(rows) - most:,} more rows" if len(rows) > most else ""
    return "\n".join(lines) + more


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | None) or (isinstance(value, str) and PERCENT.fullmatch(value) is not None)


def bar(fraction: float, *, width: int = 16) -> Markup:
    """A horizontal bar of block characters, to an eighth of a character; whatever is above zero is visible."""
    eighths = round(min(max(fraction, 0.0), 1.0) * width * 8)
    if fraction > 0:
        eighths = max(eighths, 1)
    full, rest = divmod(eighths, 8)
    return Markup(BLOCKS[7] * full + (BLOCKS[rest - 1] if rest else ""))


def picture(data: bytes, alt: str) -> Markup:
    """A PNG or JPEG as a data URI: the only kind of picture a page holds, so that opening it fetches nothing."""
    kind = PICTURES[data[:3]]
    return Markup(f"![{escape(alt)}](data:image/{kind};base64,{base64.b64encode(data).decode()})")


def join(blocks: Sequence[str], *, most_bytes: int = PAGE_BYTES) -> str:
    """A page from its blocks, the important ones first; what does not fit is named instead."""
    kept: list[str] = []
    left_out, size = 0, 0
    for block in blocks:
        n_bytes = len(block.encode()) + 2
        if size + n_bytes > most_bytes:
            left_out += 1
            continue
        kept.append(block)
        size += n_bytes
    if left_out:
        kept.append(
            f"{left_out} more blocks do not fit into {short(most_bytes)}B; the files of the artifacts hold all."
        )
    return "\n\n".join(kept) + "\n"
