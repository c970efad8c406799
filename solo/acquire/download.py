"""URL lists through img2dataset, as a guarded subprocess in its own environment.

In: a list of URLs and captions (.parquet, .csv, .jsonl, or a folder of them). Out: one Fetched item for each row,
rows that were not asked for first, then the rest by key; `fetch.parquet` with times and headers.
Invariants: success is read from img2dataset's stats files and tables, never from its exit code; a row it loses is
`lost`; items do not depend on the order or speed of downloads. A finished img2dataset shard is not fetched again.
Bytes: a JPEG within max_side_px is stored as served; everything else becomes JPEG of quality 95 (solo/isolated/).
"""

from __future__ import annotations

import contextlib
import dataclasses
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
import pyarrow as pa
import pyarrow.parquet as pq

from solo.acquire import passes
from solo.acquire.distributor import Images, crew
from solo.acquire.origin import Origin
from solo.acquire.part import Fetched
from solo.acquire.passes import FETCH
from solo.acquire.raw import write_groups
from solo.acquire.url_rows import NOT_FETCHED, WHY, UrlList, n_shards, rows_per_shard, write_list, write_rows
from solo.artifact import CHECKOUT, Job
from solo.isolated.rules import VARIABLE
from solo.lineage.takedown import Listed
from solo.sample import IMAGE, Message, Sample, text

log = logging.getLogger(__name__)

GUARD = CHECKOUT / "solo" / "isolated" / "guard.py"
ATTEMPTS = 3
THREADS = 16
STALLED_S = 600.0  # img2dataset's pool waits for ever for a worker that the kernel killed
FETCHES = """
WITH line AS (
  SELECT *, row_number() OVER (PARTITION BY key ORDER BY fetched_at DESC) AS nth
  FROM read_json($lines, format = 'newline_delimited', columns = {
    key: 'VARCHAR', fetched_at: 'DOUBLE', seconds: 'DOUBLE', status: 'VARCHAR', http_status: 'INTEGER',
    evidence: 'VARCHAR', robots: 'VARCHAR', headers: 'MAP(VARCHAR, VARCHAR)', redirects: 'VARCHAR[]',
    n_tries: 'INTEGER', served_sha256: 'VARCHAR'})
)
SELECT list.key, list.url, to_timestamp(fetched_at) AS fetched_at, seconds, status, http_status, evidence, robots,
       headers, redirects, n_tries, served_sha256
FROM read_parquet($list) AS list LEFT JOIN line ON line.key = list.key AND line.nth = 1
ORDER BY list.key
"""


def environment() -> Path:
    """The python of the isolated environment that holds img2dataset."""
    default = CHECKOUT / ".img2dataset/bin/python"
    python = Path(os.environ.get("SOLO_IMG2DATASET") or default)
    if not python.is_file():
        remedy = "run `make setup`, or set SOLO_IMG2DATASET to the python of an environment that has it"
        raise ValueError(f"img2dataset: no environment at {python}; {remedy}")
    return python


def fetch(urls: UrlList, job: Job) -> Iterator[Fetched]:
    """One item for each row of the list; in a pass, for each row that is asked for again."""
    rows, listed = job.work / "rows.parquet", job.work / "list.parquet"
    with duckdb.connect() as db:
        db.execute(f"SET threads = {job.workers:d}")
        db.execute("SET temp_directory = $folder", {"folder": str(job.work / "duckdb")})
        if not listed.exists():
            write_rows(urls, rows, Listed.of(job.specs))
        db.execute("CREATE VIEW rows AS FROM read_parquet('" + str(rows).replace("'", "''") + "')")
        again = passes.choose(db, job)
        if not listed.exists():
            write_list(db, listed, job.work / "requests", again=again)
        n_urls = pq.read_metadata(listed).num_rows
        if n_urls and not (job.work / "fetched").exists():
            _download(urls, job, n_urls)
            (job.work / "fetched").touch()
        _write_fetches(db, job, listed, rows_per_shard(n_urls))
        dropped = db.execute(NOT_FETCHED)
        while not again and (some := dropped.fetchmany(10_000)):
            yield from (Fetched(f"row {row}", url, key, why, WHY[why]) for row, key, url, why in some)
    for shard in range(n_shards(n_urls)):
        yield from _shard_items(urls, job, listed, shard)


def command(urls: UrlList, job: Job, images: str, n_urls: int) -> list[str]:
    """img2dataset's arguments."""
    options: dict[str, Any] = {
        "url_list": str(job.work / "requests"),
        "input_format": "parquet",
        "url_col": "url",
        "save_additional_columns": ["solo_key"],
        "output_folder": images,
        "output_format": "webdataset",
        "number_sample_per_shard": rows_per_shard(n_urls),
        "distributor": crew().distributor,
        "processes_count": job.workers,
        "thread_count": THREADS,
        "resize_mode": "keep_ratio_largest",
        "image_size": urls.rules.max_side_px,
        "resize_only_if_bigger": True,
        "skip_reencode": True,
        "encode_quality": 95,
        "extract_exif": False,
        "compute_hash": None,
        "retries": 0,
        "incremental_mode": "incremental",
        "enable_wandb": False,
    }
    return [f"--{name}={value if isinstance(value, str) else repr(value)}" for name, value in options.items()]


def _download(urls: UrlList, job: Job, n_urls: int) -> None:
    """Run img2dataset until each shard has its stats file, ATTEMPTS times at most."""
    python, images, shared = environment(), Images(job), job.work / "shared"
    for folder in (job.work / "seen", job.work / "fetches", shared):
        folder.mkdir(exist_ok=True)
    for name in images.stats():
        if not (job.work / "seen" / name).exists():
            images.drop(name)
    n_wanted = n_shards(n_urls)
    with contextlib.ExitStack() as stack:
        rules = dataclasses.replace(crew().share(urls.rules), log=str(job.work / "fetches"), shared=str(shared))
        if urls.origin is not None:
            ip, _, port = stack.enter_context(Origin(urls.origin)).address.rpartition(":")
            rules = dataclasses.replace(rules, mapped=(*rules.mapped, (str(urls.origin_host), ip, int(port))))
        own = {VARIABLE: rules.dump(), "SOLO_GUARD_PARENT": str(os.getpid())}
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | own
        for attempt in range(ATTEMPTS):
            if (n_done := _see(job, images)) == n_wanted:
                break
            for places in shared.glob("hosts-*"):  # that killed workers held
                places.unlink()
            job.progress(f"img2dataset: attempt {attempt + 1}, {n_done} of {n_wanted} shards are there")
            _run([str(python), "-I", str(GUARD), *command(urls, job, images.url, n_urls)], env, job, images, n_wanted)
    if _see(job, images) == 0:
        tail = (job.work / "img2dataset.log").read_text(errors="replace").strip().rpartition("\n")[2]
        raise ValueError(f"{urls.source}: img2dataset finished no shard in {ATTEMPTS} attempts; its last line: {tail}")


def _run(arguments: list[str], env: dict[str, str], job: Job, images: Images, n_wanted: int) -> None:
    """One img2dataset process group, gone when this returns or raises; its last shard is its last useful act."""
    with (job.work / "img2dataset.log").open("ab") as out:
        process = subprocess.Popen(arguments, env=env, stdout=out, stderr=out, start_new_session=True)
        try:
            n_seen, looked_s = _see(job, images), 0.0
            while n_seen < n_wanted and process.poll() is None and not _stalled(job):
                time.sleep(max(images.poll_s, 20 * looked_s))  # a look at 20,000 shards is not for free
                began = time.monotonic()
                n_done, looked_s = _see(job, images), time.monotonic() - began
                if n_done > n_seen:
                    n_seen = n_done
                    job.progress(f"img2dataset: {n_done} shards done")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _stalled(job: Job) -> bool:
    """Whether nothing was fetched and nothing written for STALLED_S."""
    last = max(
        p.stat().st_mtime for name in ("fetches", "seen", "requests") for p in [job.work / name, *_newest(job, name)]
    )
    return time.time() - last > STALLED_S


def _newest(job: Job, name: str) -> list[Path]:
    return list((job.work / name).iterdir()) if name == "fetches" else []


def _see(job: Job, images: Images) -> int:
    """Mark finished shards as seen by a living process; how many there are.

    img2dataset outlives a killed acquire by some milliseconds, in which the origin is gone already: a shard it
    finishes then holds connection errors that an undisturbed run would not have, so only seen shards are kept.
    """
    known = {path.name for path in (job.work / "seen").iterdir()}
    new = set(images.stats()) - known
    for name in new:
        (job.work / "seen" / name).touch()
    return len(known) + len(new)


def _shard_items(urls: UrlList, job: Job, listed: Path, shard: int) -> Iterator[Fetched]:
    """The rows of one img2dataset shard by key, whatever order they came in."""
    rows = pq.ParquetFile(listed).read_row_group(shard).to_pylist()
    if not (job.work / "seen" / f"{shard:05d}_stats.json").exists():
        for row in rows:
            yield _fetched(row, "lost", f"img2dataset did not finish this shard in {ATTEMPTS} attempts")
        return
    seen = pq.ParquetFile(job.out / FETCH).read_row_group(shard, columns=["key", "evidence", "served_sha256"])
    facts = {fact.pop("key"): fact for fact in seen.to_pylist()}
    with Images(job).shard(shard) as (table, path), tarfile.open(path, "r:") as tar:
        found = {entry["solo_key"]: entry for entry in pq.read_table(table).to_pylist()}
        members = {member.name: member for member in tar if member.name.endswith(".jpg")}
        for row in rows:
            entry = found.get(row["key"])
            member = members.get(f"{entry['key']}.jpg") if entry else None
            if entry is None or (entry["status"] == "success" and member is None):
                yield _fetched(row, "lost", "img2dataset wrote no result for this row")
            elif member is None:
                status, http_status, error = explain(entry["error_message"])
                yield _fetched(row, status, error, http_status, **facts[row["key"]])
            else:
                file = tar.extractfile(member)
                assert file is not None
                sample = _sample(urls, row, file.read())
                size = {"width": entry["width"], "height": entry["height"]}
                yield _fetched(row, "ok", None, 200, sample=sample, **size, **facts[row["key"]])


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


def explain(message: str | None) -> tuple[str, int | None, str]:
    """Our status, the HTTP status and a text without addresses, from img2dataset's error message."""
    if not (message or "").startswith("solo:"):
        return "lost", None, "img2dataset failed on this row by itself"
    _, ours, http_status, detail = str(message).split(":", 3)
    return ours, int(http_status) if http_status else None, detail


def _write_fetches(db: duckdb.DuckDBPyConnection, job: Job, listed: Path, n_rows: int) -> None:
    """When each URL was asked for and what was seen: facts of this run, outside the artifact's digest."""
    lines = [str(path) for path in sorted((job.work / "fetches").glob("*.jsonl")) if path.stat().st_size]
    if lines:
        rows = db.sql(FETCHES, params={"lines": lines, "list": str(listed)})
        schema = pa.schema(rows.limit(0).to_arrow_table().schema)
        write_groups(job.out / FETCH, schema, rows.to_arrow_reader(10_000), n_rows)
