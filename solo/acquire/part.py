"""acquire: one source, as published, to raw tars of samples and one outcome row for each input.

In: a source's location (a path, or what solo/acquire/copies.py fetches), pinned revision and adapter, and the passes
made since (solo/acquire/passes.py). Out: `raw/NNNNN.tar` (sample tars of samples_per_shard), `outcomes.parquet` (one
row per record or URL, kept or not, sorted by key) and, for URL lists, `fetch.parquet` (what was asked and seen,
volatile). Invariants: every input has one status of STATUSES; a key is kept once, later ones are `duplicate_row`; the
same upstream bytes give the same bytes. Cost: one pass; memory holds one sample, 10,000 outcome rows and, for archives,
the keys.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq

from solo import artifact
from solo.acquire import copies, location, passes
from solo.acquire.distributor import remove_images
from solo.acquire.location import UNPINNED
from solo.acquire.passes import FETCH
from solo.acquire.raw import OUTCOMES, SCHEMA, RawTars, Spool, write_sorted
from solo.artifact import Artifact, Job, Result, combined_sha256, file_sha256, make
from solo.lineage import erase, takedown
from solo.plugin import resolve
from solo.sample import Rejected, Sample, make_key
from solo.spec import Acquire, SpecError

log = logging.getLogger(__name__)

VERSION = 3  # a picture made smaller is decoded whole and resized exactly; an odd turn's error names its field

STATUSES = (
    *("ok", "duplicate_row", "bad_record", "missing_image", "no_label", "excluded_set", "empty", "bad_hash"),
    *("http_3xx", "http_404", "http_4xx", "http_429", "http_5xx", "timeout", "dns", "connection"),
    *("refused_address", "refused_scheme", "refused_encoding", "refused_format", "disallowed", "robots_unreachable"),
    *("too_large", "bomb", "hash_mismatch", "not_image", "undecodable", "decoder_died", "lost", takedown.TAKEN_DOWN),
)
TOTALS = """
SELECT status, count(*), coalesce(sum(n_images), 0) FROM read_parquet($outcomes) GROUP BY status ORDER BY status
"""


@dataclass(frozen=True, slots=True)
class Fetched:
    """One row of a URL list: a sample, or the status and error of why there is none."""

    identity: str
    url: str | None
    key: str
    status: str
    error: str | None = None
    http_status: int | None = None
    sample: Sample | None = None
    width: int | None = None
    height: int | None = None
    evidence: str | None = None
    served_sha256: str | None = None


class Touched(Exception):
    """The list of takedowns means samples of a source that the spec of its job does not say yet; `ids` are all."""

    def __init__(self, ids: set[str]) -> None:
        super().__init__(f"entries of {takedown.FILE} that mean samples of the source: {sorted(ids)}")
        self.ids = ids


def made(job: Job, run: Callable[[Job], Result], *, force: bool = False) -> tuple[Artifact, bool]:
    """The acquire artifact of a job, under the identity of what was taken down in it.

    Which entries of the list mean something of a source is known for sure once its records are there: a source never
    read before then moves, whole, to the name it turned out to have.
    """
    try:
        return make(job, run, force=force)
    except Touched as touched:
        other = dataclasses.replace(job, spec=takedown.with_ids(job.spec, touched.ids))
        if artifact.damage(other.out) is not None:
            shutil.rmtree(other.out, ignore_errors=True)
            job.out.rename(other.out)
        return make(other, run)


def run(job: Job) -> Result:
    """Acquire one source, or make it from what was acquired before; what an interrupted attempt finished stays."""
    listed = takedown.Listed.of(job.specs)
    told: dict[str, Any] = {}
    before = _before(job)
    if before is not None:
        outcomes, told = passes.put_together(job, before)
        erase.run(job, outcomes, listed)
    elif not (job.out / OUTCOMES).is_file():
        _acquire(job, listed)
        erase.run(job, job.work / OUTCOMES, listed)
    remove_images(job)
    if "pass" not in job.spec and (found := erase.applied(job.out / OUTCOMES)) != takedown.recorded(job.spec):
        raise Touched(found)
    return _result(job, told)


def _before(job: Job) -> Artifact | None:
    """What was acquired of this very source before and is to be changed; None where it is to be read anew."""
    if not (job.spec.get("passes") or job.spec.get("takedown")):
        return None
    found = passes.nearest(job.root, job.version, job.spec, takedown.recorded(job.spec))
    if found is not None or not job.spec.get("passes"):
        return found
    return made(dataclasses.replace(job, spec=passes.base(job.spec)), run)[0]


def _acquire(job: Job, listed: takedown.Listed) -> None:
    spec = Acquire.model_validate({**job.spec["acquire"], **job.where})
    source = job.spec["source"]
    items = _items(job, source, _locate(job, source, spec), spec)
    begun = job.work / "begun"
    if begun.exists() and erase.is_asked_for(job, listed):
        remove_images(job)  # an attempt that began before the list was longer would go on fetching what is on it
        shutil.rmtree(job.work)
    if not begun.exists():  # tars without their scratch may stem from other downloads
        shutil.rmtree(job.out / "raw", ignore_errors=True)
        job.work.mkdir(parents=True, exist_ok=True)
        begun.touch()
    spool, tars = Spool(job.work / "spool.parquet"), RawTars(job, spec.samples_per_shard)
    stores = job.spec.get("pass", {}).get("kind") != "recrawl"  # which only compares
    seen: set[str] = set()  # not of URL lists, where 100 M keys would be 12 GB and solo/acquire/url_rows.py saw to it
    for item in items:
        row = _row(item, source)
        sample = item if isinstance(item, Sample) else getattr(item, "sample", None)
        if isinstance(item, Sample) and item.key in seen:
            row |= {"status": "duplicate_row", "error": "its key is that of an earlier record"}
        elif sample is not None:
            if isinstance(item, Sample):
                seen.add(item.key)
            row |= _content(sample) | (tars.add(sample) if stores else {})
        spool.add(row)
    tars.close()
    spool.close()
    write_sorted(job, job.work / "spool.parquet", job.work / OUTCOMES)


def _items(job: Job, source: str, path: Path, spec: Acquire) -> Iterator[Sample | Rejected | Fetched]:
    """The adapter's generator; arguments that do not bind are the spec's fault."""
    read: Callable[..., Any] = resolve("adapters", spec.adapter)
    args: dict[str, Any] = {"source": source, **spec.args}
    signature = inspect.signature(read)
    if "job" in signature.parameters:
        args["job"] = job
    try:
        signature.bind(path, **args)
    except TypeError as error:
        takes = [name for name in signature.parameters if name not in ("location", "source", "job")]
        raise SpecError(f"{source}: acquire.args: {error}; {spec.adapter} takes {takes}") from None
    return iter(read(path, **args))


def _row(item: Sample | Rejected | Fetched, source: str) -> dict[str, Any]:
    """The outcome row of an item, before it is stored."""
    row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
    if isinstance(item, Sample):
        identity = str(item.meta.get("id", item.key))
        row |= {"identity": identity, "url": item.meta.get("url"), "key": item.key, "status": "ok"}
    elif isinstance(item, Rejected):
        key = make_key(source, item.identity)
        row |= {"identity": item.identity, "key": key, "status": item.status, "error": item.error}
    else:
        row |= {name: getattr(item, name) for name in Fetched.__slots__ if name != "sample"}
    assert row["status"] in STATUSES, f"{source}: {row['identity']}: {row['status']!r} is no status of {STATUSES}"
    return row


def _content(sample: Sample) -> dict[str, Any]:
    turns = (item for message in sample.messages for item in message["content"])
    texts = [item["text"].encode() for item in turns if item["type"] == "text"]
    digest, n_bytes = hashlib.sha256(), 0
    for part in sample.images or texts:
        digest.update(part)
        n_bytes += len(part)
    return {"sha256": digest.hexdigest(), "bytes": n_bytes, "n_images": len(sample.images)}


def _result(job: Job, told: dict[str, Any]) -> Result:
    with duckdb.connect() as db:
        totals = db.execute(TOTALS, {"outcomes": str(job.out / OUTCOMES)}).fetchall()
    by_status = {status: n for status, n, _ in totals}
    tars = sorted((job.out / "raw").glob("*.tar"))
    stats = {
        "bytes": sum(path.stat().st_size for path in tars),
        "n_images": int(sum(n_images for _, _, n_images in totals)),
        "n_shards": len(tars),
        "by_status": by_status,
    }
    if job.where:  # whence it came this time, for people
        told |= {"location": job.where["location"].partition("?")[0]}
    dropped = {status: n for status, n in by_status.items() if status != "ok"}
    if (job.out / passes.LINK_ROT).is_file():
        told |= {"link_rot": passes.link_rot(pq.read_table(job.out / passes.LINK_ROT).to_pylist())}
    volatile = (FETCH, passes.LINK_ROT)
    return Result(sum(by_status.values()), by_status.get("ok", 0), dropped, stats | told, volatile)


def _locate(job: Job, source: str, spec: Acquire) -> Path:
    """The pinned data on this machine: at their path, or the copy of what is published."""
    revision = job.spec["revision"]
    want = location.of(source, revision, spec)
    if want.kind != "local":
        check_pinned(source, revision, source)
        return copies.fetch(want, job.root, job.progress)  # hashed as they came
    path = job.specs / spec.location
    if not path.exists():
        raise ValueError(
            f"{source}: location {path} does not exist; fetch the source there or correct acquire.location"
        )
    check_revision(source, path, revision)
    return path


def check_pinned(source: str, revision: str, what: object) -> None:
    """Refuse data that no revision names; `what` is what `solo revision` takes."""
    if revision == UNPINNED:
        raise ValueError(
            f"{source}: revision is unpinned, so a model could not say what it was trained on; "
            f"put the line of `solo revision {what}` into sources/{source}.yaml"
        )


def check_revision(source: str, path: Path, revision: str) -> None:
    """Refuse data that is not the pinned data; a commit hash cannot be checked from bytes and is only logged."""
    check_pinned(source, revision, path)
    if not revision.startswith("sha256:"):
        log.info("%s: revision %s is a commit; its bytes are taken as they are", source, revision)
        return
    found = f"sha256:{content_sha256(path)}"
    if found != revision:
        raise ValueError(
            f"{source}: {path} has {found} but revision is {revision}; "
            "fetch the pinned data again, or set revision to what it has now"
        )


def content_sha256(path: Path) -> str:
    """SHA-256 of a file, or of a folder's sorted lines `relative path NUL sha256 LF`."""
    if path.is_file():
        return file_sha256(path)
    return combined_sha256({p.relative_to(path).as_posix(): file_sha256(p) for p in path.rglob("*") if p.is_file()})
