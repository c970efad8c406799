"""URL lists through img2dataset, as a guarded subprocess in its own environment.

In: a list of URLs and captions (.parquet, .csv, .jsonl, or a folder of them). Out: one Fetched item for each row,
rows that were not asked for first, then the rest by key; `fetch.parquet` with times and headers.
Invariants: success is read from img2dataset's stats files and tables, never from its exit code; a row it loses is
`lost`; items do not depend on the order or speed of downloads. A finished img2dataset shard is not fetched again.
Bytes: a JPEG (JFIF or EXIF) within max_side_px is stored as served; everything else becomes JPEG of quality 95.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq

from solo.acquire import FETCH, Fetched
from solo.artifact import Job
from solo.origin import Origin
from solo.sample import IMAGE, Message, Sample, text
from solo.url_rows import NOT_FETCHED, WHY, UrlList, n_shards, rows_per_shard, write_list, write_rows

log = logging.getLogger(__name__)

GUARD = Path(__file__).with_name("img2dataset_guard.py")
ATTEMPTS = 3
THREADS = 16
MAX_PIXELS = 100_000_000  # a decoded image above this would take 0.3 GB in each process
DISALLOWED = ("noai", "noimageai", "noindex", "noimageindex", "none")
FETCHES = """
WITH line AS (
  SELECT *, row_number() OVER (PARTITION BY url ORDER BY fetched_at DESC) AS nth
  FROM read_json($lines, format = 'newline_delimited', columns = {
    url: 'VARCHAR', fetched_at: 'DOUBLE', seconds: 'DOUBLE', http_status: 'INTEGER', redirects: 'VARCHAR[]',
    x_robots_tag: 'VARCHAR', content_type: 'VARCHAR', error: 'VARCHAR'})
)
SELECT list.key, list.url, to_timestamp(fetched_at) AS fetched_at, seconds, http_status, redirects, x_robots_tag,
       content_type, error
FROM read_parquet($list) AS list LEFT JOIN line ON line.url = list.url AND line.nth = 1
ORDER BY list.key
"""


def environment() -> Path:
    """The python of the isolated environment that holds img2dataset."""
    default = Path(__file__).parents[1] / ".img2dataset/bin/python"
    python = Path(os.environ.get("SOLO_IMG2DATASET") or default)
    if not python.is_file():
        remedy = "run `make setup`, or set SOLO_IMG2DATASET to the python of an environment that has it"
        raise ValueError(f"img2dataset: no environment at {python}; {remedy}")
    return python


def fetch(urls: UrlList, job: Job) -> Iterator[Fetched]:
    """One item for each row of the list."""
    rows, listed = job.work / "rows.parquet", job.work / "list.parquet"
    with duckdb.connect() as db:
        db.execute(f"SET threads = {job.workers:d}")
        if not listed.exists():
            write_rows(urls, rows)
        db.execute("CREATE VIEW rows AS FROM read_parquet('" + str(rows).replace("'", "''") + "')")
        if not listed.exists():
            write_list(db, listed)
        n_urls = pq.read_metadata(listed).num_rows
        if n_urls and not (job.work / "fetched").exists():
            _download(urls, job, listed)
            (job.work / "fetched").touch()
        _write_fetches(db, job, listed)
        dropped = db.execute(NOT_FETCHED)
        while some := dropped.fetchmany(10_000):
            yield from (Fetched(f"row {row}", url, key, why, WHY[why]) for row, key, url, why in some)
    for shard in range(n_shards(n_urls)):
        yield from _shard_items(urls, job, listed, shard)


def command(urls: UrlList, listed: Path, images: Path, workers: int) -> list[str]:
    """img2dataset's arguments."""
    options: dict[str, Any] = {
        "url_list": str(listed),
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "save_additional_columns": ["solo_key"],
        "output_folder": str(images),
        "output_format": "webdataset",
        "number_sample_per_shard": rows_per_shard(pq.read_metadata(listed).num_rows),
        "processes_count": workers,
        "thread_count": THREADS,
        "resize_mode": "keep_ratio_largest",
        "image_size": urls.max_side_px,
        "resize_only_if_bigger": True,
        "skip_reencode": True,
        "encode_quality": 95,
        "extract_exif": False,
        "compute_hash": None,
        "timeout": urls.timeout_s,
        "retries": 0,
        "incremental_mode": "incremental",
        "disallowed_header_directives": list(DISALLOWED),
        "enable_wandb": False,
    }
    return [f"--{name}={value if isinstance(value, str) else repr(value)}" for name, value in options.items()]


def _download(urls: UrlList, job: Job, listed: Path) -> None:
    """Run img2dataset until each shard has its stats file, ATTEMPTS times at most."""
    python, images = environment(), job.work / "images"
    for folder in (images, job.work / "seen", job.work / "fetches"):
        folder.mkdir(exist_ok=True)
    for stats in images.glob("*_stats.json"):
        if not (job.work / "seen" / stats.name).exists():
            stats.unlink()
    as_named = job.work / "img2dataset.parquet"  # img2dataset reserves the column name `key`
    columns = pq.read_table(listed, columns=["url", "caption", "key"])
    pq.write_table(columns.rename_columns(["url", "caption", "solo_key"]), as_named)
    n_wanted = n_shards(columns.num_rows)
    with contextlib.ExitStack() as stack:
        mapped = ""
        if urls.origin is not None:
            mapped = f"{urls.origin_host}={stack.enter_context(Origin(urls.origin)).address}"
        env = os.environ | {
            "SOLO_GUARD_MAP": mapped,
            "SOLO_GUARD_LOG": str(job.work / "fetches"),
            "SOLO_GUARD_PARENT": str(os.getpid()),
            "NO_ALBUMENTATIONS_UPDATE": "1",
            "OPENCV_IO_MAX_IMAGE_PIXELS": str(MAX_PIXELS),
            "WANDB_MODE": "disabled",
        }
        for attempt in range(ATTEMPTS):
            if (n_done := _see(job)) == n_wanted:
                break
            job.progress(f"img2dataset: attempt {attempt + 1}, {n_done} of {n_wanted} shards are there")
            arguments = [str(python), "-I", str(GUARD), *command(urls, as_named, images, job.workers)]
            _run(arguments, env, job)
    if _see(job) == 0:
        tail = (job.work / "img2dataset.log").read_text(errors="replace").strip().rpartition("\n")[2]
        raise ValueError(f"{urls.source}: img2dataset finished no shard in {ATTEMPTS} attempts; its last line: {tail}")


def _run(arguments: list[str], env: dict[str, str], job: Job) -> None:
    """One img2dataset process group, gone when this returns or raises."""
    with (job.work / "img2dataset.log").open("ab") as out:
        process = subprocess.Popen(arguments, env=env, stdout=out, stderr=out, start_new_session=True)
        try:
            n_seen = _see(job)
            while process.poll() is None:
                time.sleep(0.1)
                if (n_done := _see(job)) > n_seen:
                    n_seen = n_done
                    job.progress(f"img2dataset: {n_done} shards done")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _see(job: Job) -> int:
    """Mark finished shards as seen by a living process; how many there are.

    img2dataset outlives a killed acquire by some milliseconds, in which the origin is gone already: a shard it
    finishes then holds connection errors that an undisturbed run would not have, so only seen shards are kept.
    """
    for stats in (job.work / "images").glob("*_stats.json"):
        (job.work / "seen" / stats.name).touch()
    return sum(1 for _ in (job.work / "seen").iterdir())


def _shard_items(urls: UrlList, job: Job, listed: Path, shard: int) -> Iterator[Fetched]:
    """The rows of one img2dataset shard by key, whatever order they came in."""
    rows = pq.ParquetFile(listed).read_row_group(shard).to_pylist()
    base = job.work / "images" / f"{shard:05d}"
    if not (job.work / "seen" / f"{base.name}_stats.json").exists():
        for row in rows:
            yield _fetched(row, "lost", f"img2dataset did not finish this shard in {ATTEMPTS} attempts")
        return
    found = {entry["solo_key"]: entry for entry in pq.read_table(base.with_suffix(".parquet")).to_pylist()}
    with tarfile.open(base.with_suffix(".tar"), "r:") as tar:
        members = {member.name: member for member in tar if member.name.endswith(".jpg")}
        for row in rows:
            entry = found.get(row["key"])
            member = members.get(f"{entry['key']}.jpg") if entry else None
            if entry is None or (entry["status"] == "success" and member is None):
                yield _fetched(row, "lost", "img2dataset wrote no result for this row")
            elif member is None:
                status, http_status, error = explain(entry["status"], entry["error_message"])
                yield _fetched(row, status, error, http_status)
            else:
                file = tar.extractfile(member)
                assert file is not None
                sample = _sample(urls, row, file.read())
                size = {"width": entry["width"], "height": entry["height"]}
                yield _fetched(row, "ok", None, 200, sample=sample, **size)


def _fetched(
    row: dict[str, Any],
    status: str,
    error: str | None,
    http_status: int | None = None,
    **more: Any,
) -> Fetched:
    return Fetched(f"row {row['row']}", row["url"], row["key"], status, error, http_status, **more)


def _sample(urls: UrlList, row: dict[str, Any], data: bytes) -> Sample:
    turn: Message = {"role": "assistant", "content": [IMAGE, text(row["caption"])]}
    meta = {"id": f"row {row['row']}", "url": row["url"], **json.loads(row["extra"])}
    return Sample(row["key"], urls.source, (data,), (turn,), meta)


def explain(status: str, message: str | None) -> tuple[str, int | None, str]:
    """Our status, the HTTP status and a text without addresses, for img2dataset's status and error message."""
    message = message or ""
    if message.startswith("solo:"):
        _, ours, http_status, detail = message.split(":", 3)
        return ours, int(http_status) if http_status else None, detail
    if "X-Robots-Tag" in message:
        return "disallowed", 200, "the X-Robots-Tag header refuses use"
    if status == "failed_to_resize":
        return "undecodable", 200, "the image does not decode"
    if "unknown url type" in message:
        return "bad_record", None, "not a URL that can be asked for"
    return "connection", None, "the request failed"


def _write_fetches(db: duckdb.DuckDBPyConnection, job: Job, listed: Path) -> None:
    """When each URL was asked for and what its headers said: facts of this run, outside the artifact's digest."""
    lines = [str(path) for path in sorted((job.work / "fetches").glob("*.jsonl")) if path.stat().st_size]
    if lines:
        table = db.sql(FETCHES, params={"lines": lines, "list": str(listed)}).to_arrow_table()
        aside = job.out / f"{FETCH}.tmp"
        pq.write_table(table, aside, compression="zstd")
        aside.replace(job.out / FETCH)
