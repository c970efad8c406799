"""Measuring: signals of one raw shard in one pass, kept apart from any decision.

In: a raw tar and dotted names of functions `f(sample, pictures) -> TypedDict` in solo/signals/. Out: one Parquet per
name: `key` and the columns that the function's return type declares, in the order of the tar. A function's keyword-only
parameters are given by the spec; one of type Path is a place relative to the spec folder, so no part of what the signal
is (the function pins its content by another). Invariants: columns and types are known without data; a pass decodes each
image at most once, however many signals want it. Cost: a read of the tar and the decodes; memory holds one sample and
the shard's columns.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints, is_typeddict

import pyarrow as pa
import pyarrow.parquet as pq

from solo.artifact import canonical, write_atomic
from solo.filter.pictures import Pictures
from solo.plugin import resolve
from solo.sample import Sample, read_samples
from solo.spec import SpecError

ARROW = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string(), bytes: pa.binary()}
Arguments = Mapping[str, Mapping[str, Any]]  # signal name -> what the spec gives it

META = "sample.meta"  # measured for every source
RESERVED = ("key", "raw_shard")


@dataclass(frozen=True)
class Signal:
    """One signal function: dotted name, version, columns (None: `meta_*` strings, known from the data alone)."""

    name: str
    function: Callable[..., Any]
    version: int
    columns: dict[str, pa.DataType] | None
    arguments: dict[str, Any] = field(default_factory=dict)
    places: tuple[str, ...] = ()  # arguments that are paths

    @property
    def folder(self) -> str:
        """Name of its cache folder: another one for other arguments, the same wherever its files lie."""
        what = {name: value for name, value in sorted(self.arguments.items()) if name not in self.places}
        given = f"-{hashlib.sha256(canonical(what)).hexdigest()[:8]}" if what else ""
        return f"{self.name}-v{self.version}{given}"

    def at(self, specs: Path) -> Signal:
        """The same signal with its places resolved; one that is not there is an error."""
        found = {name: specs / self.arguments[name] for name in self.places}
        for name, path in found.items():
            if not path.exists():
                raise SpecError(f"signal {self.name}: {name} {path} does not exist; put the files there or drop it")
        return replace(self, function=partial(self.function, **self.arguments | found))


@dataclass(frozen=True)
class Unit:
    """One raw shard and the files to measure from it, signal name -> path."""

    tar: Path
    targets: dict[str, Path]
    specs: Path
    arguments: Arguments


@dataclass(frozen=True)
class Measured:
    """What one pass over a raw shard cost."""

    tar: Path
    n_samples: int
    n_decodes: int


def find(name: str, arguments: Arguments | None = None) -> Signal:
    """The signal of a dotted name; its columns come from the TypedDict that the function returns."""
    function = resolve("signals", name)
    versions: dict[str, int] = getattr(sys.modules[function.__module__], "VERSIONS", {})
    if function.__name__ not in versions:
        raise SpecError(f"signal {name}: VERSIONS of its module lacks {function.__name__!r}; add it, from 1")
    given = dict((arguments or {}).get(name, {}))
    places = _check_arguments(name, function, given)
    returned = get_type_hints(function).get("return")
    columns = None
    if returned != dict[str, str]:
        if not is_typeddict(returned):
            raise SpecError(f"signal {name}: its return type is {returned}; declare its columns in a TypedDict")
        columns = {column: _arrow(name, column, hint) for column, hint in get_type_hints(returned).items()}
    return Signal(name, function, versions[function.__name__], columns, given, places)


def _check_arguments(name: str, function: Callable[..., Any], given: Mapping[str, Any]) -> tuple[str, ...]:
    """Refuse a missing, unknown or ill-typed argument; returns those that are paths."""
    hints = get_type_hints(function)
    takes = {p.name: p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for argument in [*given, *takes]:
        where = f"signal {name}: argument {argument!r}"
        if argument not in takes:
            raise SpecError(f"{where} is not one of {sorted(takes)}; correct filter.arguments")
        if argument not in given:
            if takes[argument].default is inspect.Parameter.empty:
                raise SpecError(
                    f"{where} is missing; give it as filter.arguments.{name}.{argument}, or drop the signal"
                )
        elif not isinstance(given[argument], str if hints[argument] is Path else hints[argument]):
            raise SpecError(f"{where} is {given[argument]!r}, not of type {hints[argument].__name__}")
    return tuple(argument for argument in given if hints[argument] is Path)


def find_all(names: Iterable[str], arguments: Arguments | None = None) -> list[Signal]:
    """The signals of a spec in order, then META unless it is listed; no two may make one column."""
    names = list(names)
    if idle := sorted(set(arguments or ()) - set(names)):
        raise SpecError(
            f"filter.arguments: {idle[0]} is not among filter.signals {names}; add it there or drop it here"
        )
    signals = [find(name, arguments) for name in (names if META in names else [*names, META])]
    makers: dict[str, str] = dict.fromkeys(RESERVED, "the filter itself")
    for signal in signals:
        for column in signal.columns or {}:
            if column in makers:
                raise SpecError(f"signal {signal.name}: column {column!r} is made by {makers[column]} too; drop one")
            makers[column] = signal.name
    return signals


def versions(names: Iterable[str], arguments: Arguments | None = None) -> dict[str, int]:
    """Version behind each signal of a spec: part of what the signals are, so a plan should carry it."""
    return {signal.name: signal.version for signal in find_all(names, arguments)}


def _arrow(name: str, column: str, hint: object) -> pa.DataType:
    kinds = [k for k in get_args(hint) if k is not type(None)] if isinstance(hint, UnionType) else [hint]
    if len(kinds) != 1 or kinds[0] not in ARROW:
        raise SpecError(
            f"signal {name}: column {column!r} is {hint}; use bool, int, float, str or bytes, or `| None` of one"
        )
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
    signals = [find(name, unit.arguments).at(unit.specs) for name in unit.targets]
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
