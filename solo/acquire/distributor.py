"""Where img2dataset's workers run and where they write: settings of a machine, in no spec and in no fingerprint.

In: SOLO_DISTRIBUTOR, SOLO_MACHINES and SOLO_IMAGES. Out: a `Crew`, and `Images`, img2dataset's output folder, which
lies below the artifact or at an fsspec URL. Invariants: images stay where an artifact's first attempt put them, so a
changed setting loses none; what lies at a URL is removed when the artifact's own files are there.
Cost: at a URL, one listing every POLL_S, and each img2dataset shard is fetched once.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fsspec

from solo.artifact import Job
from solo.isolated.rules import Rules
from solo.sequence.shards import check_protocol, is_url

DISTRIBUTORS = ("multiprocessing", "ray", "pyspark")
POLL_S = {True: 2.0, False: 0.1}  # by whether images are at a URL


@dataclass(frozen=True)
class Crew:
    """Who fetches: the distributor of img2dataset, and over how many machines it spreads."""

    distributor: str = "multiprocessing"
    n_machines: int = 1

    def share(self, rules: Rules) -> Rules:
        """One machine's part of a host's budget, which machines keep apart from each other."""
        if self.n_machines == 1:
            return rules
        at_once, rate = rules.host_concurrency, rules.host_requests_per_s
        return dataclasses.replace(
            rules,
            n_machines=self.n_machines,
            host_concurrency=at_once and max(at_once // self.n_machines, 1),
            host_requests_per_s=rate and rate / self.n_machines,
        )


def crew() -> Crew:
    """What the machine's settings say."""
    distributor = os.environ.get("SOLO_DISTRIBUTOR") or DISTRIBUTORS[0]
    if distributor not in DISTRIBUTORS:
        raise ValueError(f"SOLO_DISTRIBUTOR is {distributor!r}; choose one of {', '.join(DISTRIBUTORS)}")
    machines = os.environ.get("SOLO_MACHINES") or "1"
    if not machines.isdecimal() or int(machines) < 1:
        raise ValueError(f"SOLO_MACHINES is {machines!r}; give the number of machines of the cluster, 1 or more")
    if int(machines) > 1 and distributor == DISTRIBUTORS[0]:
        raise ValueError(
            f"SOLO_MACHINES is {machines}, but SOLO_DISTRIBUTOR is {distributor}, which is one machine; "
            "set SOLO_DISTRIBUTOR to ray or pyspark, or leave SOLO_MACHINES out"
        )
    return Crew(distributor, int(machines))


class Images:
    """img2dataset's output folder of one job."""

    def __init__(self, job: Job) -> None:
        self._job, chosen = job, job.work / "images.url"
        if not chosen.exists():
            chosen.write_text(_chosen(job))
        self.url = chosen.read_text()
        self.remote = is_url(self.url)
        if self.remote:
            check_protocol(self.url)
        self._files, self._path = fsspec.core.url_to_fs(self.url)
        self._files.makedirs(self._path, exist_ok=True)
        self.poll_s = POLL_S[self.remote]

    def stats(self) -> list[str]:
        """Names of the stats files that are there: of finished shards."""
        self._files.invalidate_cache(self._path)
        return sorted(Path(path).name for path in self._files.glob(f"{self._path}/*_stats.json"))

    def drop(self, name: str) -> None:
        """Forget one shard, so that it is fetched again."""
        self._files.rm(f"{self._path}/{name}")

    @contextmanager
    def shard(self, number: int) -> Iterator[tuple[Path, Path]]:
        """The table and the tar of one finished shard, as local files."""
        names = [f"{number:05d}.{kind}" for kind in ("parquet", "tar")]
        paths = [(self._job.work if self.remote else Path(self.url)) / name for name in names]
        if self.remote:
            for name, path in zip(names, paths, strict=True):
                self._files.get_file(f"{self._path}/{name}", str(path))
        yield paths[0], paths[1]
        for path in paths if self.remote else ():
            path.unlink()


def _chosen(job: Job) -> str:
    """Where the images of a job that begins now will lie."""
    url = os.environ.get("SOLO_IMAGES")
    if not url:
        return str(job.work / "images")
    if not is_url(url):
        raise ValueError(f"SOLO_IMAGES is {url!r}; give an fsspec URL, such as s3://bucket/images, or leave it out")
    return f"{url.rstrip('/')}/{job.part}-{job.name}-{job.fingerprint}"


def remove_images(job: Job) -> None:
    """Remove what a job's img2dataset left at a URL; what lies below the artifact goes with its scratch."""
    chosen = job.work / "images.url"
    if chosen.exists() and is_url(url := chosen.read_text()):
        files, path = fsspec.core.url_to_fs(url)
        if files.exists(path):
            files.rm(path, recursive=True)
