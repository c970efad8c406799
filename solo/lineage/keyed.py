"""Keyed: rows of a Parquet file by their key, without reading the rest of it.

In: a file whose rows are sorted by `key`, in all or in stretches (outcomes, signals, verdicts, locks, one shard's
ledger). Out: rows as dicts. Invariant: the answer is that of a full scan, whatever the order; only its cost depends on
it. Cost: the footer once, then the row groups whose statistics allow the key; of sorted files one, 10,000 to 122,880
rows of the columns asked for.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

Row = dict[str, Any]

AFTER = "\x7f"  # above every character of a key


class Keyed:
    """A Parquet file with a column `key`; its last row group read is kept."""

    def __init__(self, path: Path, key: str = "key") -> None:
        self.path, self.key = path, key
        self._file = pq.ParquetFile(path, memory_map=True)
        self.columns: list[str] = self._file.schema_arrow.names
        place = self.columns_on_disk().index(key)
        meta = self._file.metadata
        self.n_rows = meta.num_rows
        self._bounds = [_bounds(meta.row_group(g).column(place).statistics) for g in range(meta.num_row_groups)]
        self._kept: tuple[int, pa.ChunkedArray] | None = None

    def columns_on_disk(self) -> list[str]:
        """Leaf columns in the order of the footer's statistics."""
        schema = self._file.schema
        return [schema.column(i).path for i in range(len(schema))]

    def rows(self, key: str, columns: Sequence[str] | None = None) -> list[Row]:
        """The rows of one key, in the order of the file."""
        return list(self._matching(key, key, columns))

    def many(self, keys: Collection[str], columns: Sequence[str] | None = None) -> list[Row]:
        """The rows of many keys: each row group that may hold one is read once."""
        wanted, found = sorted(keys), []
        for group, (least, most) in enumerate(self._bounds):
            here = wanted[bisect_left(wanted, least) : bisect_right(wanted, most)]
            if not here:
                continue
            is_hit = pc.is_in(self._keys(group), pa.array(here, pa.string()))
            if pc.any(is_hit).as_py():
                found += self._file.read_row_group(group, columns=columns).filter(is_hit).to_pylist()
        return found

    def beginning(self, prefix: str, most: int, columns: Sequence[str] | None = None) -> list[Row]:
        """The first rows, `most` of them, whose key begins with a prefix."""
        found: list[Row] = []
        for row in self._matching(prefix, prefix + AFTER, columns):
            found.append(row)
            if len(found) == most:
                break
        return found

    def around(self, key: str, most: int) -> list[str]:
        """Keys of the row group in which a key would lie that share the most first characters with it."""
        reached = [g for g, (low, _) in enumerate(self._bounds) if low <= key] or [0]
        if not self._bounds:
            return []
        keys = [k for k in self._keys(reached[-1]).to_pylist() if k is not None]
        return sorted(keys, key=lambda other: (-_shared(key, other), other))[:most]

    def keys_at(self, rows: Iterable[int]) -> list[str | None]:
        """The keys of rows by their number in the file."""
        keys = self._file.read(columns=[self.key])[self.key]
        return [keys[n].as_py() for n in sorted(rows)]

    def first_key(self) -> str | None:
        """The key of the first row; None of an empty file."""
        return self._keys(0)[0].as_py() if self.n_rows else None

    def _keys(self, group: int) -> pa.ChunkedArray:
        if self._kept is None or self._kept[0] != group:
            self._kept = (group, self._file.read_row_group(group, columns=[self.key])[self.key])
        return self._kept[1]

    def _matching(self, low: str, high: str, columns: Sequence[str] | None) -> Iterator[Row]:
        for group, (least, most) in enumerate(self._bounds):
            if most < low or least > high:
                continue
            keys = self._keys(group)
            is_hit = pc.and_(pc.greater_equal(keys, low), pc.less_equal(keys, high))
            if pc.any(is_hit).as_py():
                yield from self._file.read_row_group(group, columns=columns).filter(is_hit).to_pylist()


def _bounds(statistics: Any) -> tuple[str, str]:  # noqa: ANN401 - pyarrow's own type
    """Least and greatest key of a row group; any key where the file does not say."""
    return (statistics.min, statistics.max) if statistics is not None and statistics.has_min_max else ("", AFTER)


def _shared(one: str, other: str) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
