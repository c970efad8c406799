"""A URL list as a table: every row numbered, keyed and judged, and the rows worth fetching in key order.

In: .parquet, .csv or .jsonl, or a folder of one of them. Out: `rows.parquet` (all rows) and `list.parquet` (each
URL and caption once, by key, one row group per img2dataset shard). Invariant: a row is in the list or in NOT_FETCHED.
Cost: one pass in batches, then a DuckDB sort.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import csv

from solo.sample import make_key

FORMATS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json"}
SCHEMA = pa.schema({"row": pa.int64()} | dict.fromkeys(("key", "url", "caption", "extra", "fault"), pa.string()))
RANKED = "(SELECT *, row_number() OVER (PARTITION BY key ORDER BY fault IS NOT NULL, row) AS nth FROM rows)"
TO_FETCH = f"SELECT row, key, url, caption, extra FROM {RANKED} WHERE fault IS NULL AND nth = 1 ORDER BY key"
NOT_FETCHED = f"""
SELECT row, key, url, coalesce(fault, 'duplicate_row') FROM {RANKED} WHERE fault IS NOT NULL OR nth > 1 ORDER BY row
"""
WHY = {
    "bad_record": "the row has no URL",
    "empty": "the row has no caption",
    "duplicate_row": "URL and caption are those of an earlier row",
}


@dataclass(frozen=True)
class UrlList:
    """What to fetch and how; `origin` is a folder to serve on loopback as `origin_host`."""

    source: str
    location: Path
    url_column: str
    caption_column: str
    extra_columns: tuple[str, ...]
    timeout_s: int
    max_side_px: int
    origin: Path | None = None
    origin_host: str | None = None


def write_rows(urls: UrlList, path: Path) -> None:
    """All rows of the list with row number (from 0), key and, where it cannot be asked for, the fault."""
    table, n = _open_list(urls), 0
    columns = list(dict.fromkeys((urls.url_column, urls.caption_column, *urls.extra_columns)))
    missing = [name for name in columns if name not in table.schema.names]
    if missing:
        raise ValueError(f"{urls.location}: no column {missing}; it has {table.schema.names}")
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as out:
        for batch in table.to_batches(columns=columns):
            values = [_values(batch.column(name)) for name in columns]
            rows = (dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True))
            listed = [_listed(urls, n + i, row) for i, row in enumerate(rows)]
            n += len(listed)
            out.write_table(pa.Table.from_pylist(listed, SCHEMA))


def _open_list(urls: UrlList) -> ds.Dataset:
    paths = [urls.location] if urls.location.is_file() else sorted(urls.location.iterdir())
    paths = [path for path in paths if path.suffix in FORMATS]
    formats = {FORMATS[path.suffix] for path in paths}
    if len(formats) != 1:
        have = sorted(p.name for p in urls.location.iterdir()) if urls.location.is_dir() else urls.location.name
        raise ValueError(f"{urls.location}: give files of one of {sorted(FORMATS)}; it has {have}")
    kind: Any = formats.pop()
    if kind == "csv":  # a column of numbers is still a column of texts
        names = (urls.url_column, urls.caption_column, *urls.extra_columns)
        convert = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), check_utf8=False)
        kind = ds.CsvFileFormat(csv.ParseOptions(newlines_in_values=True), convert_options=convert)
    return ds.dataset([str(path) for path in paths], format=kind)


def _values(column: pa.Array) -> list[Any]:
    """Python values of a column; bytes that are no UTF-8 become backslash escapes."""
    if not pa.types.is_string(column.type) and not pa.types.is_large_string(column.type):
        return list(column.to_pylist())
    raw = column.cast(pa.large_binary()).to_pylist()
    return [None if value is None else value.decode("utf-8", "backslashreplace") for value in raw]


def _listed(urls: UrlList, row: int, values: dict[str, Any]) -> dict[str, Any]:
    url, caption = values[urls.url_column], values[urls.caption_column]
    url = url.strip() if isinstance(url, str) else ""
    caption = caption if isinstance(caption, str) else ""
    fault = "bad_record" if not url else "empty" if not caption.strip() else None
    key = make_key(urls.source, f"row {row}" if fault else f"{url}\0{caption}")
    given = {name: values[name] for name in urls.extra_columns if values[name] is not None}
    extra = json.dumps(given, ensure_ascii=False, default=str)
    return {"row": row, "key": key, "url": url or None, "caption": caption, "extra": extra, "fault": fault}


def write_list(db: duckdb.DuckDBPyConnection, path: Path) -> None:
    """The rows to fetch, by key; one row group for each img2dataset shard."""
    aside = path.with_suffix(".tmp")
    table = db.sql(TO_FETCH).to_arrow_table()
    pq.write_table(table, aside, compression="zstd", row_group_size=rows_per_shard(table.num_rows))
    aside.replace(path)


def rows_per_shard(n_urls: int) -> int:
    """Rows of one img2dataset shard: a function of the list alone, since a resumed run must cut it alike."""
    return min(max(-(-n_urls // 16), 100), 5_000)


def n_shards(n_urls: int) -> int:
    """Number of img2dataset shards of a list."""
    return -(-n_urls // rows_per_shard(n_urls))
