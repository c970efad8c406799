"""Duplicates: of samples that are equal or nearly so, which one stays.

In: DuckDB tables `judged` (item, side, reason, winner; item = rank, the smaller wins; side = rank of its source where
sources are compared, else the item: two of one side are left alone) and `evidence` (item, the columns compared). Out:
`judged` with a reason for each that goes and the item that stays instead. Invariants: only samples without a reason
compete, so a winner has none; near pairs make clusters by connection (a like b, b like c: one cluster) and the
smallest item of each stays; the result is the same on 1 or N threads. Of two images within 3 of 64 bits every pair is
found: 3 bits touch at most 3 of 5 blocks, so 2 blocks agree, in one of 10 ways. Of two texts alike to 0.8 a pair is
found with 99.8 % (20 bands of 6 minima; at 0.7, 92 %), and judged by all 120 minima. Cost: 10 joins over distinct
hashes (10 M in about 20 s on two cores) or 20 over distinct signatures; pairs are streamed, not stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from solo.spec import Near, SpecError

N_BLOCKS = 5  # 4 blocks of which 1 agrees took 11 times as long on 10 M hashes: its buckets hold 153, these 0.3
BANDS, ROWS = 20, 6
COLOUR_BYTES = 48
MAX_EDGES = 4_000_000  # held at once
BATCH_ROWS = 262_144
COLUMNS = {
    "image": ("phash", "image.hashes"),
    "colour": ("colours", "image.colours"),
    "text": ("minhash", "text.minhash"),
}

REPEATS = """
SELECT item, winner FROM (
  SELECT item, side, min(item) OVER same AS winner, min(side) OVER same AS its
  FROM evidence JOIN judged USING (item)
  WHERE reason IS NULL AND {identity} IS NOT NULL
  WINDOW same AS (PARTITION BY {identity})
)
WHERE side <> its
"""
# A winner that goes in a later step hands its own losers on, so that every winner is kept in the end.
DROP = """
CREATE OR REPLACE TABLE judged AS
SELECT judged.* REPLACE (
  IF(own.item IS NULL, judged.reason, $reason) AS reason,
  coalesce(own.winner, its.winner, judged.winner) AS winner
)
FROM judged
LEFT JOIN lost AS own ON own.item = judged.item
LEFT JOIN lost AS its ON its.item = judged.winner
"""
IMAGES = """
CREATE OR REPLACE TEMP TABLE nodes AS
SELECT row_number() OVER (ORDER BY first) - 1 AS node, first, ('0x' || phash)::UBIGINT AS bits, phash, colours
FROM (
  SELECT min(item) AS first, phash, {colours} AS colours
  FROM evidence JOIN judged USING (item)
  WHERE reason IS NULL AND phash IS NOT NULL
  GROUP BY ALL
)
"""
TEXTS = """
CREATE OR REPLACE TEMP TABLE nodes AS
SELECT row_number() OVER (ORDER BY first) - 1 AS node, first, minhash
FROM (
  SELECT min(item) AS first, minhash
  FROM evidence JOIN judged USING (item)
  WHERE reason IS NULL AND minhash IS NOT NULL
  GROUP BY minhash
)
"""
CLOSE = """
SELECT a.node, b.node
FROM {left} AS a JOIN {right} AS b ON (a.bits & $mask::UBIGINT) = (b.bits & $mask::UBIGINT)
WHERE {unlike} bit_count(xor(a.bits, b.bits)) <= $most
"""
BAND = """
SELECT a.node, b.node
FROM nodes AS a JOIN nodes AS b ON array_slice(a.minhash, $first, $last) = array_slice(b.minhash, $first, $last)
WHERE a.node < b.node
"""
LOST = """
SELECT judged.item, winners.first AS winner
FROM evidence JOIN judged USING (item) JOIN nodes ON {same} JOIN labels USING (node)
JOIN nodes AS winners ON winners.node = labels.label
JOIN judged AS its ON its.item = winners.first
WHERE judged.reason IS NULL AND judged.side <> its.side
"""


def check(columns: list[str], unique: tuple[str, ...], near: Near, where: str) -> None:
    """Refuse columns that are not there; `where` is the file and field that errors name."""
    for entry in unique:
        for column in parts(entry):
            if column not in columns:
                raise SpecError(f"{where}unique: no column {column!r}; columns are {columns}")
    for field, (column, signal) in COLUMNS.items():
        if getattr(near, field) is not None and column not in columns:
            raise SpecError(f"{where}near.{field} needs column {column!r}; add {signal} to filter.signals")


def parts(entry: str) -> list[str]:
    """The columns of an entry of `unique`."""
    return [column.strip() for column in entry.split("+")]


def reasons(unique: tuple[str, ...], near: Near) -> list[str]:
    """The reasons that a spec can give, in the order in which they are looked for."""
    found = [f"duplicate_{'_'.join(parts(entry))}" for entry in unique]
    return found + [f"near_{kind}" for kind in ("image", "text") if getattr(near, kind) is not None]


def compared(unique: tuple[str, ...], near: Near) -> list[str]:
    """The columns that `evidence` must have."""
    found = [column for entry in unique for column in parts(entry)]
    found += [column for field, (column, _) in COLUMNS.items() if getattr(near, field) is not None]
    return list(dict.fromkeys(found))


def drop(con: duckdb.DuckDBPyConnection, unique: tuple[str, ...], near: Near, scratch: Path) -> None:
    """Give a reason and a winner to every sample of `judged` that another one makes superfluous."""
    for entry, reason in zip(unique, reasons(unique, Near()), strict=True):
        con.execute(f"CREATE OR REPLACE TEMP TABLE lost AS {REPEATS.format(identity=identity(entry))}")
        con.execute(DROP, {"reason": reason})
    if near.image is not None:
        colours = "''" if near.colour is None else "coalesce(evidence.colours, '')"
        con.execute(IMAGES.format(colours=colours))
        pairs, alike = close(con, "nodes", "nodes", near.image), None
        if near.colour is not None:
            alike = _colours_alike(con, near.colour)
        same = f"nodes.phash = evidence.phash AND nodes.colours = {colours}"
        _drop_clusters(con, pairs, alike, reason="near_image", same=same)
    if near.text is not None:
        con.execute(TEXTS)
        alike = _minima_alike(con, near.text, scratch)
        _drop_clusters(con, _bands(con), alike, reason="near_text", same="nodes.minhash = evidence.minhash")


def identity(entry: str) -> str:
    """What is equal in samples that an entry of `unique` calls the same; NULL is like nothing."""
    return "(" + " || chr(0) || ".join(f"CAST({quoted(column)} AS VARCHAR)" for column in parts(entry)) + ")"


def quoted(column: str) -> str:
    """A column's name in SQL."""
    return '"' + column.replace('"', '""') + '"'


Pairs = Iterator[np.ndarray]  # (n, 2) int64, of nodes
Alike = Callable[[np.ndarray], np.ndarray]  # (n, 2) -> (n,) bool


def close(con: duckdb.DuckDBPyConnection, left: str, right: str, most: int) -> Pairs:
    """Pairs of tables (node, bits) that differ in at most `most` <= 3 bits; of one table with itself each pair once."""
    sql = CLOSE.format(left=left, right=right, unlike="a.node < b.node AND" if left == right else "")
    for mask in masks():
        yield from _stream(con, sql, {"mask": mask, "most": most})


def masks() -> list[int]:
    """The ten pairs of five blocks of a 64-bit word."""
    blocks, start = [], 0
    for i in range(N_BLOCKS):
        width = 64 // N_BLOCKS + (i < 64 % N_BLOCKS)
        blocks.append(((1 << width) - 1) << start)
        start += width
    return [a | b for a, b in combinations(blocks, 2)]


def _bands(con: duckdb.DuckDBPyConnection) -> Pairs:
    for band in range(BANDS):
        first = band * ROWS * 4 + 1
        yield from _stream(con, BAND, {"first": first, "last": first + ROWS * 4 - 1})


def _stream(con: duckdb.DuckDBPyConnection, sql: str, given: Mapping[str, Any]) -> Pairs:
    for batch in con.sql(sql, params=dict(given)).to_arrow_reader(BATCH_ROWS):
        yield np.stack([column.to_numpy(zero_copy_only=False) for column in batch.columns], axis=1)


def _drop_clusters(
    con: duckdb.DuckDBPyConnection, pairs: Pairs, alike: Alike | None, *, reason: str, same: str
) -> None:
    ((n_nodes,),) = con.execute("SELECT count(*) FROM nodes").fetchall()
    found = (batch if alike is None else batch[alike(batch)] for batch in pairs)
    label = connected(found, n_nodes)
    con.register("labels", pa.table({"node": np.arange(n_nodes), "label": label}))
    con.execute(f"CREATE OR REPLACE TEMP TABLE lost AS {LOST.format(same=same)}")
    con.unregister("labels")
    con.execute(DROP, {"reason": reason})


def connected(pairs: Iterator[np.ndarray], n_nodes: int) -> np.ndarray:
    """For each node the smallest one that it is connected with; at most MAX_EDGES pairs are held."""
    label = np.arange(n_nodes)
    held: list[np.ndarray] = []
    n_held = 0
    for batch in pairs:
        edges = label[batch]
        edges = edges[edges[:, 0] != edges[:, 1]]
        held.append(edges)
        n_held += len(edges)
        if n_held > MAX_EDGES:
            label, held, n_held = _joined(label, held), [], 0
    return _joined(label, held)


def _joined(label: np.ndarray, held: list[np.ndarray]) -> np.ndarray:
    edges = np.concatenate([*held, np.zeros((0, 2), np.int64)])
    if not len(edges):
        return label
    graph = coo_array((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), shape=(len(label), len(label)))
    _, component = connected_components(graph, directed=False)
    _, smallest = np.unique(component, return_index=True)
    joined: np.ndarray = smallest[component][label]
    return joined


def _colours_alike(con: duckdb.DuckDBPyConnection, most: int) -> Alike:
    """Whether no cell of two pictures differs in any channel by more than `most` levels; unknown colours are alike."""
    column = con.sql("SELECT colours FROM nodes ORDER BY node").to_arrow_table()["colours"].to_pylist()
    known = np.array([bool(c) for c in column])
    cells = colour_cells(column)

    def alike(pairs: np.ndarray) -> np.ndarray:
        a, b = pairs.T
        same: np.ndarray = np.abs(cells[a].astype(np.int16) - cells[b]).max(axis=1) <= most
        same[~known[a] | ~known[b]] = True
        return same

    return alike


def colour_cells(column: Sequence[str | None]) -> np.ndarray:
    """The column `colours` as numbers, (n, 48) uint8; what is unknown is black."""
    blank = "00" * COLOUR_BYTES
    return np.frombuffer(bytes.fromhex("".join(c or blank for c in column)), np.uint8).reshape(-1, COLOUR_BYTES)


def _minima_alike(con: duckdb.DuckDBPyConnection, least: float, scratch: Path) -> Alike:
    """Whether the share of equal minima reaches `least`; signatures lie in a file, 480 bytes a distinct text."""
    ((n_nodes,),) = con.execute("SELECT count(*) FROM nodes").fetchall()
    width = BANDS * ROWS
    scratch.mkdir(parents=True, exist_ok=True)
    minima = np.memmap(scratch / "minhash.u4", np.uint32, "w+", shape=(max(n_nodes, 1), width))
    at = 0
    for batch in con.sql("SELECT minhash FROM nodes ORDER BY node").to_arrow_reader(BATCH_ROWS):
        rows = np.frombuffer(b"".join(batch.column(0).to_pylist()), "<u4").reshape(-1, width)
        minima[at : at + len(rows)] = rows
        at += len(rows)

    def alike(pairs: np.ndarray) -> np.ndarray:
        found = np.zeros(len(pairs), bool)
        for start in range(0, len(pairs), 65_536):
            a, b = pairs[start : start + 65_536].T
            found[start : start + len(a)] = (minima[a] == minima[b]).mean(axis=1) >= least
        return found

    return alike
