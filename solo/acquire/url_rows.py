"""A URL list as a table: every row numbered, keyed and judged, and the rows worth fetching in key order.

In: .parquet, .csv or .jsonl, or a folder with files of one of them, at any depth. Out: `rows.parquet` (all rows),
`list.parquet` (each URL and caption once, by key, one row group per img2dataset shard) and `requests/` (the same for
img2dataset, in files of FILE_SHARDS shards, as it reads a file whole). Invariant: a row is in the list or in
NOT_FETCHED. Cost: one pass in batches, then a DuckDB sort; memory holds one file of requests.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import csv

from solo.acquire.raw import regroup
from solo.acquire.upstream import matching
from solo.isolated.rules import Rules
from solo.lineage.takedown import TAKEN_DOWN, Listed
from solo.sample import make_key

FORMATS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json"}
TEXTS = ("key", "url", "caption", "extra", "expected", "fault")
SCHEMA = pa.schema({"row": pa.int64()} | dict.fromkeys(TEXTS, pa.string()))
LISTED = pa.schema([field for field in SCHEMA if field.name != "fault"])
FILE_SHARDS = 200
HASH = re.compile(r"[0-9a-f]{32}|[0-9a-f]{40}|[0-9a-f]{64}")
RANKED = "(SELECT *, row_number() OVER (PARTITION BY key ORDER BY fault IS NOT NULL, row) AS nth FROM rows)"
TO_FETCH = f"""
SELECT row, key, url, caption, extra, expected FROM {RANKED} WHERE fault IS NULL AND nth = 1 ORDER BY key
"""
TO_FETCH_AGAIN = f"""
SELECT row, key, url, caption, extra, expected FROM {RANKED}
WHERE fault IS NULL AND nth = 1 AND key IN (SELECT key FROM chosen) ORDER BY key
"""
NOT_FETCHED = f"""
SELECT row, key, url, coalesce(fault, 'duplicate_row') FROM {RANKED} WHERE fault IS NOT NULL OR nth > 1 ORDER BY row
"""
WHY = {
    "bad_record": "the row has no URL",
    "empty": "the row has no caption",
    "duplicate_row": "URL and caption are those of an earlier row",
    "bad_hash": "the row's hash is no MD5, SHA-1 or SHA-256 in hex",
    TAKEN_DOWN: "it is on the list of takedowns, and is not asked for",
}


@dataclass(frozen=True)
class UrlList:
    """What to fetch and under which rules; `origin` is a folder to serve on loopback as `origin_host`."""

    source: str
    location: Path
    url_column: str
    caption_column: str
    rules: Rules
    extra_columns: tuple[str, ...] = ()
    hash_column: str | None = None
    origin: Path | None = None
    origin_host: str | None = None

    @property
    def columns(self) -> list[str]:
        """Columns of the list that are read."""
        hashes = (self.hash_column,) if self.hash_column else ()
        return list(dict.fromkeys((self.url_column, self.caption_column, *hashes, *self.extra_columns)))


def write_rows(urls: UrlList, path: Path, taken: Listed) -> None:
    """All rows of the list with row number (from 0), key and, where it cannot be asked for, the fault."""
    table, n = _open_list(urls), 0
    columns = urls.columns
    missing = [name for name in columns if name not in table.schema.names]
    if missing:
        raise ValueError(f"{urls.location}: no column {missing}; it has {table.schema.names}")
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as out:
        for batch in table.to_batches(columns=columns):
            values = [_values(batch.column(name)) for name in columns]
            rows = (dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True))
            listed = [_listed(urls, n + i, row, taken) for i, row in enumerate(rows)]
            n += len(listed)
            out.write_table(pa.Table.from_pylist(listed, SCHEMA))


def list_files(location: Path) -> list[Path]:
    """Files of the list, all of one format, in order of their relative path; what else lies there is not looked at."""
    paths = [path for path in matching(location, [f"*{suffix}" for suffix in FORMATS]) if path.suffix in FORMATS]
    if len({path.suffix for path in paths}) != 1:
        have = sorted({path.name for path in paths}) if paths else location.name
        raise ValueError(f"{location}: give files of one of {sorted(FORMATS)}; it has {have}")
    return paths


def _open_list(urls: UrlList) -> ds.Dataset:
    paths = list_files(urls.location)
    kind: Any = FORMATS[paths[0].suffix]
    if kind == "csv":  # a column of numbers is still a column of texts
        convert = csv.ConvertOptions(column_types=dict.fromkeys(urls.columns, pa.string()), check_utf8=False)
        kind = ds.CsvFileFormat(csv.ParseOptions(newlines_in_values=True), convert_options=convert)
    return ds.dataset([str(path) for path in paths], format=kind)


def _values(column: pa.Array) -> list[Any]:
    """Python values of a column; bytes that are no UTF-8 become backslash escapes."""
    if not pa.types.is_string(column.type) and not pa.types.is_large_string(column.type):
        return list(column.to_pylist())
    raw = column.cast(pa.large_binary()).to_pylist()
    return [None if value is None else value.decode("utf-8", "backslashreplace") for value in raw]


def _listed(urls: UrlList, row: int, values: dict[str, Any], taken: Listed) -> dict[str, Any]:
    url, caption = values[urls.url_column], values[urls.caption_column]
    url = url.strip() if isinstance(url, str) else ""
    caption = caption if isinstance(caption, str) else ""
    fault = "bad_record" if not url else "empty" if not caption.strip() else None
    expected = str(values[urls.hash_column] or "").strip().lower() if urls.hash_column else ""
    if expected and not HASH.fullmatch(expected) and fault is None:
        fault = "bad_hash"
    key = make_key(urls.source, f"row {row}" if fault else f"{url}\0{caption}")
    if taken and taken.first(key=key, urls=[url]):
        fault = TAKEN_DOWN
    given = {name: values[name] for name in urls.extra_columns if _is_value(values[name])}
    extra = json.dumps(given, ensure_ascii=False, default=str)
    listed = {"row": row, "key": key, "url": url or None, "caption": caption, "extra": extra}
    return listed | {"expected": expected or None, "fault": fault}


def _is_value(value: object) -> bool:
    """False for what JSON has no word for: null, NaN, infinity."""
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def write_list(db: duckdb.DuckDBPyConnection, path: Path, requests: Path, *, again: bool = False) -> None:
    """The rows to fetch, by key; one row group for each img2dataset shard. `again`: those of the view `chosen`."""
    db.execute(f"CREATE TEMP TABLE listed AS {TO_FETCH_AGAIN if again else TO_FETCH}")
    [(n_urls,)] = db.execute("SELECT count(*) FROM listed").fetchall()
    n_rows = rows_per_shard(n_urls)
    aside, requests_aside = path.with_suffix(".tmp"), requests.with_suffix(".tmp")
    shutil.rmtree(requests_aside, ignore_errors=True)
    requests_aside.mkdir(parents=True)
    with pq.ParquetWriter(aside, LISTED, compression="zstd") as out:
        batches = db.sql("SELECT * FROM listed ORDER BY key").to_arrow_reader(10_000)
        for i, some in enumerate(regroup(LISTED, batches, n_rows * FILE_SHARDS)):
            out.write_table(some, row_group_size=n_rows)
            pq.write_table(_requests(some), requests_aside / f"{i:05d}.parquet")
    shutil.rmtree(requests, ignore_errors=True)
    requests_aside.rename(requests)
    aside.replace(path)


def _requests(listed: pa.Table) -> pa.Table:
    """What our fetch function reads in img2dataset's `url`; the caption stays here."""
    names = zip(*(listed[name].to_pylist() for name in ("key", "expected", "url")), strict=True)
    lines = [f"{key} {expected or '-'} {url}" for key, expected, url in names]
    return pa.table({"url": pa.array(lines, pa.string()), "solo_key": listed["key"]})


def rows_per_shard(n_urls: int) -> int:
    """Rows of one img2dataset shard: a function of the list alone, since a resumed run must cut it alike."""
    return min(max(-(-n_urls // 16), 100), 5_000)


def n_shards(n_urls: int) -> int:
    """Number of img2dataset shards of a list."""
    return -(-n_urls // rows_per_shard(n_urls))
