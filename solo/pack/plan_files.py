"""Pack plan: the two files that say which documents share a sequence, and what they are made from.

In: pieces of documents and the packs they are in. Out: `plan.parquet` (one row per piece in a pack, sorted by pack and
slot) and `packs.parquet` (one row per pack). Invariant: bytes depend on rows alone. Cost: memory for one row group.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP = 65_536
MIX = "mix"  # the source of a pack that may hold any, or that holds the ends of several

PLAN = pa.schema(
    [
        ("pack", pa.int32()),
        ("slot", pa.int32()),
        ("key", pa.string()),
        ("exposure", pa.int32()),
        ("source", pa.string()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("template", pa.string()),
        ("begin", pa.int32()),
        ("end", pa.int32()),
        ("n_tokens", pa.int32()),
        ("n_patches", pa.int32()),
        ("n_loss_tokens", pa.int32()),
    ]
)
PACKS = pa.schema(
    [
        ("pack", pa.int32()),
        ("first_row", pa.int64()),
        ("n_rows", pa.int32()),
        ("n_tokens", pa.int32()),
        ("n_patches", pa.int32()),
        ("n_loss_tokens", pa.int32()),
        ("source", pa.string()),
    ]
)
COUNTED = ("n_tokens", "n_patches", "n_loss_tokens")


@dataclass(frozen=True)
class Pieces:
    """What is put into packs: whole documents and the pieces of long ones, in stream order.

    n_exposures: every sample of the lock counted once per repeat.
    """

    exposures: pa.Table  # n_exposures rows
    sources: list[str]
    source_of: np.ndarray  # (n_exposures,) index into `sources`
    totals: dict[str, np.ndarray]  # column -> (n_exposures,) int64
    n_pieces: np.ndarray  # (n_exposures,) 1 = whole, 0 = dropped as over-long
    row: np.ndarray  # (n_pieces,) the exposure it comes from
    begin: np.ndarray  # (n_pieces,) its first token in the document
    end: np.ndarray
    counts: dict[str, np.ndarray]  # column -> (n_pieces,) int64

    @property
    def source(self) -> np.ndarray:
        """Index into `sources` of each piece."""
        return np.take(self.source_of, self.row)


@dataclass(frozen=True)
class Planned:
    """Pieces of the packs that are trained, pack after pack."""

    piece: np.ndarray  # (n_rows,)
    pack: np.ndarray  # (n_rows,) 0, 0, ..., 1, 1, ...

    @property
    def first(self) -> np.ndarray:
        """Row at which each pack begins."""
        return np.flatnonzero(np.diff(self.pack, prepend=-1))


def write_plan(out: Path, pieces: Pieces, plan: Planned) -> None:
    """One row per planned piece; row groups are cut by row number alone."""
    slot = np.arange(len(plan.pack)) - plan.first[plan.pack]
    aside = out / "plan.parquet.tmp"
    with pq.ParquetWriter(aside, PLAN, compression="zstd") as writer:
        for low in range(0, len(slot), ROW_GROUP):
            part = slice(low, low + ROW_GROUP)
            piece = plan.piece[part]
            rows = pieces.exposures.take(pa.array(pieces.row[piece]))
            columns = {name: rows[name] for name in PLAN.names if name in rows.column_names}
            columns |= {"pack": plan.pack[part], "slot": slot[part]}
            columns |= {"begin": pieces.begin[piece], "end": pieces.end[piece]}
            columns |= {name: pieces.counts[name][piece] for name in COUNTED}
            table = pa.table({name: columns[name] for name in PLAN.names}).cast(PLAN)
            writer.write_table(table.combine_chunks(), row_group_size=ROW_GROUP)
    aside.replace(out / "plan.parquet")


def write_packs(out: Path, pieces: Pieces, plan: Planned, *, by_source: bool) -> None:
    """One row per pack: its rows in the plan, its sums and its source."""
    first = plan.first
    held = pieces.source[plan.piece]
    least, most = np.minimum.reduceat(held, first), np.maximum.reduceat(held, first)
    is_one = by_source & (least == most)
    sources = [pieces.sources[i] if one else MIX for i, one in zip(least, is_one, strict=True)]
    columns = {"pack": np.arange(len(first)), "first_row": first, "n_rows": np.diff(first, append=len(plan.pack))}
    columns |= {name: np.add.reduceat(pieces.counts[name][plan.piece], first) for name in COUNTED}
    table = pa.table(columns | {"source": pa.array(sources)}).cast(PACKS)
    aside = out / "packs.parquet.tmp"
    pq.write_table(table, aside, compression="zstd", row_group_size=ROW_GROUP)
    aside.replace(out / "packs.parquet")
