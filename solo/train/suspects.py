"""Suspects: the documents of the highest loss in a sick step, to be looked at: picture, words, loss.

In: sick steps (`solo.train.sick`), the plan, the shards. Out: `suspects.parquet`, one row per document, and the same as
Markdown. Invariant: a document that a shard does not give is a row that says so, and ends no training. Cost: a ranged
read and a small JPEG a document, in the supervisor and not in the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from solo.pack.plan import Plan
from solo.report import gallery
from solo.report.markdown import escape, picture
from solo.sample import parse_sample
from solo.sequence.shards import Shards
from solo.train import sick

FILE = "suspects.parquet"
N_STEPS = 20  # sick steps whose documents are kept, the newest
N_SHOWN = 5  # of them, on a page
N_COLUMNS = 4
ROW = pa.schema(
    [
        ("step", pa.int64()),
        ("kind", pa.string()),
        ("pack", pa.int64()),
        ("source", pa.string()),
        ("key", pa.string()),
        ("exposure", pa.int64()),
        ("begin", pa.int64()),  # token of the document with which the pack's piece begins
        ("loss", pa.float64()),  # mean over the piece's supervised tokens; null where it is not finite
        ("text", pa.string()),  # the first words
        ("thumbnail", pa.binary()),  # a JPEG of the first image; null where there is none
        ("error", pa.string()),
    ]
)


def write(out: Path, events: Sequence[Mapping[str, Any]], plan: Path, shards: Mapping[str, Path | str]) -> None:
    """`suspects.parquet` of an artifact, in place of the one before; none where no step was sick."""
    aside = out / f"{FILE}.tmp"
    if events:
        rows = list(_rows(events[-N_STEPS:], Plan(plan), Shards(shards)))
        pq.write_table(pa.Table.from_pylist(rows, ROW), aside, compression="zstd")
        aside.replace(out / FILE)
    else:
        (out / FILE).unlink(missing_ok=True)


def blocks(folder: Path, most: int = N_SHOWN) -> Iterator[str]:
    """What `write` left in an artifact, the newest steps first."""
    path = folder / FILE
    steps: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in pq.read_table(path).to_pylist() if path.is_file() else []:
        steps.setdefault((row["step"], row["kind"]), []).append(row)
    events = [event for event in sick.read(folder) if (event["step"], event["kind"]) in steps]
    for event in reversed(events[-most:]):
        yield f"{_head(event)}\n\n{_grid(steps[event['step'], event['kind']])}"


def _head(event: Mapping[str, Any]) -> str:
    loss = "not finite" if event["loss"] is None else f"{event['loss']:.3f}"
    limit = f" above {event['limit']:.3f}" if event["limit"] else ""
    return f"Step {event['step']:,}, {event['kind']}, {event['done']}: loss {loss}{limit}. Its worst documents:"


def _rows(events: Sequence[Mapping[str, Any]], plan: Plan, shards: Shards) -> Iterator[dict[str, Any]]:
    for event in events:
        for document in event["worst"]:
            names = ("key", "exposure", "begin")
            (row,) = (r for r in plan.rows(document["pack"]) if all(r[name] == document[name] for name in names))
            known = {name: document[name] for name in ("pack", "source", *names, "loss")}
            yield {"step": event["step"], "kind": event["kind"], **known, **_seen(row, shards)}


def _seen(row: Mapping[str, Any], shards: Shards) -> dict[str, Any]:
    """The words and the picture of a document."""
    try:
        sample = parse_sample(shards.read(row["source"], row["shard"], row["offset"], row["length"]))
    except Exception as error:  # a shard that is gone or damaged may raise anything, and is the ranks' to judge
        return {"error": f"{type(error).__name__}: {error}"}
    words = " ".join(i["text"] for m in sample.messages for i in m["content"] if i["type"] == "text")
    return {"text": words[:400], "thumbnail": gallery.thumbnail(sample.images[0]) if sample.images else None}


def _grid(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [_cell(row) for row in rows]
    cells += [""] * (-len(cells) % N_COLUMNS)
    lines = [cells[i : i + N_COLUMNS] for i in range(0, len(cells), N_COLUMNS)]
    return gallery.grid([""] * N_COLUMNS, lines)


def _cell(row: Mapping[str, Any]) -> str:
    small = picture(row["thumbnail"], "first image") if row["thumbnail"] else ""
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.3f}"
    piece = f" from token {row['begin']:,}" if row["begin"] else ""
    says = escape(row["error"] or row["text"], limit=90)
    return f"{small} **{loss}** `{row['key']}`{piece}, pack {row['pack']:,}: {says}"
