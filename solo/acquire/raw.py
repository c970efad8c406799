"""What acquire writes: raw tars of samples, and the outcome table in key order.

In: samples and outcome rows in upstream order. Out: `raw/NNNNN.tar` and `outcomes.parquet`. Invariants: a tar bears
its name only when it is whole; rows are in one order and in row groups of one size whatever the number of threads.
Cost: memory holds ROW_GROUP_ROWS rows; DuckDB sorts on disk where it must.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from solo.artifact import Job
from solo.sample import Sample, end_tar, write_sample

OUTCOMES = "outcomes.parquet"
SCHEMA = pa.schema(
    [
        ("identity", pa.string()),  # the record's name upstream; `row 17` (from 0) in a URL list
        ("url", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("http_status", pa.int32()),
        ("evidence", pa.string()),  # what decided, where that does not change between runs: the rule, header, size
        ("served_sha256", pa.string()),  # of the body as it came, before anything is decoded
        ("sha256", pa.string()),  # of the stored image bytes in order; of the text where there is no image
        ("bytes", pa.int64()),
        ("n_images", pa.int32()),
        ("width", pa.int32()),  # as downloaded and stored; null for archives, whose pixels filter measures
        ("height", pa.int32()),
        ("raw_shard", pa.int32()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
    ]
)
ROW_GROUP_ROWS = 10_000
SORTED = "SELECT * EXCLUDE (n) FROM read_parquet($spool) ORDER BY key, identity, n"


class RawTars:
    """Raw tars of n samples each, written aside and renamed; a tar that is there is not written again."""

    def __init__(self, job: Job, samples_per_shard: int) -> None:
        self.folder, self.limit, self.progress = job.out / "raw", samples_per_shard, job.progress
        self.shard, self.n_samples, self.offset = -1, 0, 0
        self._file: BinaryIO | None = None
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, sample: Sample) -> dict[str, int]:
        """Append a sample; its shard and byte range."""
        if self._file is None or self.n_samples == self.limit:
            self.close()
            self.shard, self.n_samples, self.offset = self.shard + 1, 0, 0
            path = Path(os.devnull) if self._path.exists() else self._aside
            self._file = path.open("wb")
        length = write_sample(self._file, sample)
        place = {"raw_shard": self.shard, "offset": self.offset, "length": length}
        self.offset += length
        self.n_samples += 1
        return place

    def close(self) -> None:
        """Finish the open tar."""
        if self._file is None:
            return
        end_tar(self._file)
        self._file.flush()
        if self._aside.exists() and not self._path.exists():
            os.fsync(self._file.fileno())
            self._aside.replace(self._path)
        self._file.close()
        self._file = None
        self.progress(f"raw/{self._path.name}: {self.n_samples} samples, {self.offset} bytes")

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.shard:05d}.tar"

    @property
    def _aside(self) -> Path:
        return self.folder / f"{self.shard:05d}.tar.tmp"


class Spool:
    """Outcome rows in the order they came, on disk, so that memory does not grow with the source."""

    def __init__(self, path: Path) -> None:
        schema = SCHEMA.append(pa.field("n", pa.int64()))
        self.rows: list[dict[str, Any]] = []
        self.n_rows = 0
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")

    def add(self, row: dict[str, Any]) -> None:
        """Append one row."""
        self.rows.append(row | {"n": self.n_rows})
        self.n_rows += 1
        if len(self.rows) == ROW_GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        """Finish the file."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self.rows, self._writer.schema))
        self.rows = []


def write_sorted(job: Job, spool: Path, path: Path) -> None:
    """The outcome table: rows by key, in row groups of one size whatever the number of threads."""
    with duckdb.connect() as db:
        db.execute(f"SET threads = {job.workers:d}")
        rows = db.sql(SORTED, params={"spool": str(spool)}).to_arrow_reader(ROW_GROUP_ROWS)
        write_groups(path, SCHEMA, rows)


def write_groups(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], n: int = ROW_GROUP_ROWS) -> None:
    """Stream rows to Parquet in row groups of n, so that the reader's batching leaves no trace in the bytes."""
    aside = path.with_name(path.name + ".tmp")
    with pq.ParquetWriter(aside, schema, compression="zstd") as out:
        for group in regroup(schema, batches, n):
            out.write_table(group)
    aside.replace(path)


def regroup(schema: pa.Schema, batches: Iterable[pa.RecordBatch], n: int) -> Iterator[pa.Table]:
    """The same rows in tables of n, the last one shorter."""
    pending, n_rows = [], 0
    for batch in batches:
        pending.append(batch.cast(schema))
        n_rows += batch.num_rows
        while n_rows >= n:
            table = pa.Table.from_batches(pending, schema)
            yield table.slice(0, n)
            pending, n_rows = table.slice(n).to_batches(), n_rows - n
    if n_rows:
        yield pa.Table.from_batches(pending, schema)
