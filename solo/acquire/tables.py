"""Tables as published: rows of Parquet, JSON lines, CSV and TSV files, and the picture in a cell.

In: files below a location. Out: (`file:row`, row) in order of file and row, rows numbered from 1. Invariant: a row
that cannot be read is a Rejected; a file without a named column is a ValueError that lists what it has. Cost: one pass;
memory holds one Parquet row group or one line.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from solo.acquire.upstream import MEMBER_BYTES, Record, json_lines, matching, printable
from solo.sample import Rejected

BATCH_ROWS = 64  # pictures of a Hugging Face set are about a megabyte each
BATCH_CHUNK_BYTES = 32 << 20  # so a batch never takes more than BATCH_ROWS times that, or one row
SEPARATORS = {".csv": ",", ".tsv": "\t"}


def rows(location: Path, files: Sequence[str], columns: Sequence[str]) -> Iterator[tuple[str, Record | Rejected]]:
    """Rows of every matching file with at least these columns."""
    for path in matching(location, files):
        if path.suffix == ".parquet":
            yield from _parquet(path, columns)
        elif path.suffix in SEPARATORS:
            yield from _separated(path, columns)
        else:
            yield from json_lines(path)


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Record | Rejected]]:
    n = 0
    try:
        with pq.ParquetFile(path) as file:
            _check(path, columns, file.schema_arrow.names)
            for batch in _batches(file, columns):
                for i in range(batch.num_rows):
                    n += 1
                    identity = f"{path.name}:{n}"
                    yield identity, _row(batch, i, identity)
    except (pa.ArrowException, OSError) as error:
        if not n and isinstance(error, pa.ArrowInvalid):
            raise ValueError(f"{path}: no Parquet file ({error}); fetch it again") from None
        identity = f"{path.name}:{n + 1}"
        yield identity, Rejected(identity, "bad_record", "the file is damaged from here on")


def _batches(file: pq.ParquetFile, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Batches of each row group: few rows where one value, which every row may repeat by its number, may be large."""
    for group in range(file.num_row_groups):
        meta = file.metadata.row_group(group)
        chunks = [meta.column(i) for i in range(meta.num_columns)]
        named = [c.total_uncompressed_size for c in chunks if c.path_in_schema.partition(".")[0] in columns]
        n_rows = BATCH_ROWS * BATCH_CHUNK_BYTES // max([BATCH_CHUNK_BYTES, *named])
        yield from file.iter_batches(max(n_rows, 1), row_groups=[group], columns=list(columns))


def _row(batch: pa.RecordBatch, i: int, identity: str) -> Record | Rejected:
    try:
        return {name: batch.column(name)[i].as_py() for name in batch.schema.names}
    except UnicodeDecodeError:
        return Rejected(identity, "bad_record", "not valid UTF-8 text")


def _separated(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Record | Rejected]]:
    """CSV or TSV with a first line of names; bytes that are no UTF-8 become backslash escapes."""
    csv.field_size_limit(1 << 24)
    with path.open(encoding="utf-8", errors="backslashreplace", newline="") as file:
        lines = csv.DictReader(file, delimiter=SEPARATORS[path.suffix], strict=True)
        _check(path, columns, list(lines.fieldnames or ()))
        n = 0
        while True:
            identity = f"{path.name}:{(n := n + 1)}"
            try:
                yield identity, next(lines)
            except StopIteration:
                return
            except csv.Error as error:
                yield identity, Rejected(identity, "bad_record", f"not a row: {error}")


def _check(path: Path, columns: Sequence[str], have: Sequence[str]) -> None:
    if missing := [name for name in columns if name not in have]:
        raise ValueError(f"{path}: no column {missing}; it has {list(have)}; name its columns in acquire.args")


def cell_pictures(cell: object, identity: str) -> list[bytes] | Rejected:
    """Encoded pictures of a cell: bytes, a struct {bytes, path} as Hugging Face stores them, or a list of either."""
    found: list[bytes] = []
    for item in cell if isinstance(cell, list) else [cell]:
        data = item.get("bytes") if isinstance(item, dict) else item
        if data is None:
            name = item.get("path") if isinstance(item, dict) else None
            return Rejected(identity, "missing_image", f"the cell holds no bytes ({printable(str(name))})")
        if not isinstance(data, bytes):
            return Rejected(identity, "bad_record", f"the picture is {type(data).__name__}, not bytes")
        if not data:
            return Rejected(identity, "empty", "the picture has 0 bytes")
        if len(data) > MEMBER_BYTES:
            return Rejected(identity, "bad_record", f"the picture has {len(data)} bytes")
        found.append(data)
    return found or Rejected(identity, "missing_image", "the list of pictures is empty")


def filled(template: str, row: Record) -> str:
    """`template` with each {column} replaced by that cell's text; '' where a cell is empty or no text."""

    def cell(match: re.Match[str]) -> str:
        value = row.get(match[1])
        return value if isinstance(value, str) else "" if value is None else str(value)

    return re.sub(r"\{(\w+)\}", cell, template)


def named(template: str) -> list[str]:
    """Columns that a template names."""
    return re.findall(r"\{(\w+)\}", template)
