"""Measuring: signals of one raw shard in one pass, kept apart from any decision.

In: a raw tar and dotted names of functions `f(sample, pictures) -> TypedDict` in solo/signals/. Out: one Parquet per
name: `key` and the columns that the function's return type declares, in the order of the tar. Invariants: columns
and types are known without data; a pass decodes each image at most once, however many signals want it.
Cost: a read of the tar and the decodes; memory holds one sample and the shard's columns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints, is_typeddict

import pyarrow as pa
import pyarrow.parquet as pq

from solo.artifact import write_atomic
from solo.pictures import Pictures
from solo.plugin import resolve
from solo.sample import Sample, read_samples
from solo.spec import SpecError

ARROW = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
META = "sample.meta"  # measured for every source
RESERVED = ("key", "raw_shard")


@dataclass(frozen=True)
class Signal:
    """One signal function: dotted name, version, columns (None: `meta_*` strings, known from the data alone)."""

    name: str
    function: Callable[[Sample, Pictures], Any]
    version: int
    columns: dict[str, pa.DataType] | None

    @property
    def folder(self) -> str:
        """Name of its cache folder."""
        return f"{self.name}-v{self.version}"


@dataclass(frozen=True)
class Unit:
    """One raw shard and the files to measure from it, signal name -> path."""

    tar: Path
    targets: dict[str, Path]


@dataclass(frozen=True)
class Measured:
    """What one pass over a raw shard cost."""

    tar: Path
    n_samples: int
    n_decodes: int


def find(name: str) -> Signal:
    """The signal of a dotted name; its columns come from the TypedDict that the function returns."""
    function = resolve("signals", name)
    version = sys.modules[function.__module__].VERSION
    returned = get_type_hints(function).get("return")
    if returned == dict[str, str]:
        return Signal(name, function, version, None)
    if not is_typeddict(returned):
        raise SpecError(f"signal {name}: its return type is {returned}; declare its columns in a TypedDict")
    columns = {column: _arrow(name, column, hint) for column, hint in get_type_hints(returned).items()}
    return Signal(name, function, version, columns)


def find_all(names: Iterable[str]) -> list[Signal]:
    """The signals of a spec in order, then META unless it is listed; no two may make one column."""
    names = list(names)
    signals = [find(name) for name in (names if META in names else [*names, META])]
    makers: dict[str, str] = dict.fromkeys(RESERVED, "the filter itself")
    for signal in signals:
        for column in signal.columns or {}:
            if column in makers:
                raise SpecError(f"signal {signal.name}: column {column!r} is made by {makers[column]} too; drop one")
            makers[column] = signal.name
    return signals


def versions(names: Iterable[str]) -> dict[str, int]:
    """VERSION behind each signal of a spec: part of what the signals are, so a plan should carry it."""
    return {signal.name: signal.version for signal in find_all(names)}


def _arrow(name: str, column: str, hint: object) -> pa.DataType:
    kinds = [k for k in get_args(hint) if k is not type(None)] if isinstance(hint, UnionType) else [hint]
    if len(kinds) != 1 or kinds[0] not in ARROW:
        raise SpecError(f"signal {name}: column {column!r} is {hint}; use bool, int, float or str, or `| None` of one")
    return ARROW[kinds[0]]


def measure(signal: Signal, sample: Sample, pictures: Pictures) -> dict[str, Any]:
    """One signal of one sample; an exception is raised again with the key and the signal's name."""
    try:
        row = dict(signal.function(sample, pictures))
    except Exception as error:  # a plug-in may raise anything; the sample and the signal must be named
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{sample.key}: signal {signal.name} raised {what}; let it return None instead") from error
    if signal.columns is not None and row.keys() != signal.columns.keys():
        raise ValueError(f"{sample.key}: signal {signal.name} gave {sorted(row)}; it declares {sorted(signal.columns)}")
    return row


def measure_shard(unit: Unit) -> Measured:
    """Measure all missing signals of one raw shard and write their files."""
    signals = [find(name) for name in unit.targets]
    keys: list[str] = []
    rows: dict[str, list[dict[str, Any]]] = {signal.name: [] for signal in signals}
    n_decodes = 0
    for sample in read_samples(unit.tar):
        pictures = Pictures(sample.images)
        keys.append(sample.key)
        for signal in signals:
            rows[signal.name].append(measure(signal, sample, pictures))
        n_decodes += pictures.n_decodes
    for signal in signals:
        write_table(unit.targets[signal.name], _table(signal, keys, rows[signal.name]))
    return Measured(unit.tar, len(keys), n_decodes)


def _table(signal: Signal, keys: list[str], rows: list[dict[str, Any]]) -> pa.Table:
    columns = signal.columns
    if columns is None:
        columns = dict.fromkeys(sorted({column for row in rows for column in row}), pa.string())
    arrays = [pa.array(keys, pa.string())]
    arrays += [pa.array([row.get(column) for row in rows], kind) for column, kind in columns.items()]
    return pa.Table.from_arrays(arrays, names=["key", *columns])


def write_table(path: Path, table: pa.Table, *, row_group: int | None = None) -> None:
    """Write a table that fits in memory as Parquet, aside and renamed."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=row_group)
    write_atomic(path, sink.getvalue().to_pybytes())
