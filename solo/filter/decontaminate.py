"""Decontaminate: which samples of a source hold an item of a benchmark.

In: benchmarks (revision, location, adapter, args) and shard artifacts. Out: hits (benchmark, item, key, how,
evidence). A picture is a hit where its bytes are an item's, or its perceptual hash is within 3 of 64 bits and, where
the source measured `colours`, no cell differs by more than 16 levels (of several images, the sample's first). A text
is a hit where it has a run of 13 words of an item; an item of 8 to 12 words must be there whole, and only where it has
no picture, as the short questions of visual benchmarks are asked of other pictures too. Runs that more than 1 % of the
items (at least 10) share are the benchmark's wording. Items without a picture and with fewer words cannot be found and
are counted. Invariants: a benchmark is read once per revision, a source's text once per shard artifact and benchmark,
pixels never. Cost: 2.4 M words a second and core; ten joins over the hashes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from solo import pool
from solo.acquire.part import content_sha256
from solo.artifact import Artifact, Job, canonical
from solo.filter.measure import write_table
from solo.filter.pictures import Pictures
from solo.filter.words import words, words_of
from solo.plugin import resolve
from solo.sample import Rejected, read_messages
from solo.signals import image
from solo.spec import SpecError

VERSION = 1  # of signatures and scans, which are kept apart from any mix

RUN_WORDS, LEAST_WORDS = 13, 8
WORDING_SHARE, WORDING_ITEMS = 0.01, 10
BATCH_WORDS = 50_000
PRIME = np.uint64(0x9E3779B97F4A7C15)  # odd, so that a product loses nothing
EVIDENCE_CHARS = 200

SIGNATURE = pa.schema(
    [
        ("item", pa.string()),
        ("image_sha256", pa.list_(pa.string())),
        ("phash", pa.list_(pa.string())),
        ("colours", pa.list_(pa.string())),
        ("text", pa.string()),
    ]
)
FOUND = pa.schema([("key", pa.string()), ("item", pa.string()), ("evidence", pa.string())])
HITS = pa.schema([(name, pa.string()) for name in ("benchmark", "item", "source", "key", "how", "evidence")])


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's items as they are compared: the file of its signature."""

    name: str
    path: Path

    @property
    def id(self) -> str:
        """Name and what its signature was made of."""
        return f"{self.name}-{self.path.stem}"

    @cached_property
    def items(self) -> list[dict[str, Any]]:
        """Rows of the signature."""
        rows: list[dict[str, Any]] = pq.read_table(self.path).to_pylist()
        return rows

    @cached_property
    def runs(self) -> dict[tuple[str, ...], list[str]]:
        """Run of words -> the items that have it, without the benchmark's wording."""
        shares: dict[tuple[str, ...], list[str]] = {}
        for row in self.items:
            for run in dict.fromkeys(runs_of(row)):
                shares.setdefault(run, []).append(row["item"])
        most = max(WORDING_ITEMS, int(WORDING_SHARE * len(self.items)))
        return {run: items for run, items in shares.items() if len(items) <= most}

    @cached_property
    def counts(self) -> dict[str, int]:
        """Items, and how many of them can be found by picture and by text."""
        by_text = {item for items in self.runs.values() for item in items}
        by_image = {row["item"] for row in self.items if row["phash"]}
        n = len(self.items)
        return {"items": n, "by_image": len(by_image), "by_text": len(by_text), "neither": n - len(by_image | by_text)}


@dataclass(frozen=True)
class Unit:
    """One shard, and for each benchmark the file of what was found in its text."""

    tar: Path
    targets: dict[Benchmark, Path]


def runs_of(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The runs of words that give an item away."""
    split = row["text"].split(" ")
    n = min(len(split), RUN_WORDS)
    if n < (RUN_WORDS if row["image_sha256"] else LEAST_WORDS):
        return []
    return [tuple(split[i : i + n]) for i in range(len(split) - n + 1)]


def benchmarks(job: Job, wanted: Mapping[str, Mapping[str, Any]]) -> list[Benchmark]:
    """The signatures of these benchmarks, made where they are not there yet."""
    found = []
    for name, fields in wanted.items():
        looks = [image.VERSIONS[signal] for signal in ("hashes", "colours")]
        identity = [VERSION, looks, *(fields[k] for k in ("revision", "adapter", "args"))]
        digest = hashlib.sha256(canonical(identity)).hexdigest()[:8]
        path = job.root / "benchmarks" / name / f"{digest}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                rows = list(_signature(name, fields, job.specs))
                write_table(path, pa.Table.from_pylist(rows, SIGNATURE))
                job.progress(f"{job.part}/{job.name}: {len(rows)} items of benchmark {name}")
        found.append(Benchmark(name, path))
    return found


def _signature(name: str, fields: Mapping[str, Any], specs: Path) -> Iterator[dict[str, Any]]:
    location = specs / fields["location"]
    if not location.exists():
        raise SpecError(f"benchmarks/{name}.yaml: location {location} does not exist; put the data there")
    pin = f"sha256:{content_sha256(location)}"
    if fields["revision"].startswith("sha256:") and pin != fields["revision"]:
        raise SpecError(
            f"benchmarks/{name}.yaml: {location} is {pin}, not revision {fields['revision']}; set one right"
        )
    for sample in resolve("adapters", fields["adapter"])(location, source=name, **fields["args"]):
        if isinstance(sample, Rejected):
            continue  # evaluate counts it; what nobody can ask gives nothing away
        row: dict[str, Any] = {"image_sha256": [], "phash": [], "colours": []}
        for data in sample.images:
            pictures = Pictures([data])
            row["image_sha256"].append(hashlib.sha256(data).hexdigest())
            row["phash"] += [h for h in [image.hashes(sample, pictures)["phash"]] if h is not None]
            row["colours"] += [c for c in [image.colours(sample, pictures)["colours"]] if c is not None]
        yield row | {"item": str(sample.meta.get("id", sample.key)), "text": " ".join(words_of(sample))}


def text_hits(job: Job, source: str, shards: Artifact, wanted: Sequence[Benchmark]) -> Iterator[dict[str, str]]:
    """Hits by text in one source; its text is read where a benchmark has not met it yet."""
    readable = [b for b in wanted if b.runs]
    home = job.root / "contamination" / source / shards.manifest.digest[:8]
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / ".lock"):
        units = []
        for tar in sorted((shards.path / "shards").glob("*.tar")):
            targets = {b: home / b.id / f"{tar.stem}.parquet" for b in readable}
            missing = {b: path for b, path in targets.items() if not path.exists()}
            if missing:
                units.append(Unit(tar, {Benchmark(b.name, b.path): path for b, path in missing.items()}))
        for n_words in pool.each(scan, units, job.workers):
            job.progress(f"{job.part}/{job.name}: {source}: {n_words} words against {len(readable)} benchmarks")
    for b in readable:
        for path in sorted((home / b.id).glob("*.parquet")):
            yield from (
                {"benchmark": b.name, "source": source, "how": "text"} | r for r in pq.read_table(path).to_pylist()
            )


def scan(unit: Unit) -> int:
    """Look for the runs of all benchmarks in one shard's text; returns its words."""
    found: dict[Benchmark, list[dict[str, str]]] = {b: [] for b in unit.targets}
    n_words = 0
    for keys, split in _batches(_texts(unit.tar)):
        n_words += len(split)
        for b in found:
            found[b] += _find(_index(b), keys, split)
    for b, path in unit.targets.items():
        write_table(path, pa.Table.from_pylist(found[b], FOUND))
    return n_words


def _texts(tar: Path) -> Iterator[tuple[str, list[str]]]:
    """Key and words of each sample; pictures are skipped, not read."""
    ledger = pq.read_table(tar.with_suffix(".parquet"), columns=["key", "offset"])
    with tar.open("rb") as file:
        for key, offset in zip(ledger["key"].to_pylist(), ledger["offset"].to_pylist(), strict=True):
            messages = read_messages(file, offset)
            texts = (item["text"] for message in messages for item in message["content"] if "text" in item)
            yield key, [word for text in texts for word in words(text)]


def _batches(samples: Iterable[tuple[str, list[str]]]) -> Iterator[tuple[list[tuple[int, str]], list[str]]]:
    """Samples side by side: (first word, key) of each, and all words; "" is no word, so it parts them."""
    starts: list[tuple[int, str]] = []
    split: list[str] = []
    for key, own in samples:
        starts.append((len(split), key))
        split += own
        split.append("")
        if len(split) > BATCH_WORDS:
            yield starts, split
            starts, split = [], []
    yield starts, split


class _Index:
    """Runs of one benchmark by length: their hashes in order; equal hashes are compared word by word."""

    def __init__(self, runs: Mapping[tuple[str, ...], list[str]]) -> None:
        self.runs = runs
        by_length: dict[int, list[tuple[str, ...]]] = {}
        for run in runs:
            by_length.setdefault(len(run), []).append(run)
        self.hashes = {n: np.unique(np.concatenate([_rolling(r, {n})[n] for r in own])) for n, own in by_length.items()}


@cache
def _index(benchmark: Benchmark) -> _Index:
    return _Index(benchmark.runs)


def _rolling(split: Sequence[str], lengths: Iterable[int]) -> dict[int, np.ndarray]:
    """For each length the hash of every run, by its first word."""
    ids = np.fromiter(map(hash, split), np.int64, len(split)).astype(np.uint64)
    found, rolled = {}, ids
    for n in range(1, max(lengths, default=0) + 1):
        if n > 1:
            rolled = rolled[: max(len(split) - n + 1, 0)] * PRIME + ids[n - 1 :]
        if n in set(lengths):
            found[n] = rolled
    return found


def _find(index: _Index, starts: list[tuple[int, str]], split: list[str]) -> list[dict[str, str]]:
    """One row per sample and item: the first run that they share."""
    first: dict[tuple[str, str], str] = {}
    begins = np.array([at for at, _ in starts])
    for n, rolled in _rolling(split, index.hashes).items():
        known = index.hashes[n]
        at = np.minimum(np.searchsorted(known, rolled), len(known) - 1)
        for i in np.flatnonzero(known[at] == rolled).tolist():
            run = tuple(split[i : i + n])
            key = starts[int(np.searchsorted(begins, i, side="right")) - 1][1]
            for item in index.runs.get(run, ()):
                first.setdefault((key, item), " ".join(run)[:EVIDENCE_CHARS])
    return [{"key": key, "item": item, "evidence": evidence} for (key, item), evidence in first.items()]


def summary(wanted: Sequence[Benchmark], hits: pa.Table) -> dict[str, dict[str, int]]:
    """For each benchmark its items, how they could be found, and what was."""
    rows = hits.select(["benchmark", "item", "key", "how"]).to_pylist()
    found: dict[str, dict[str, int]] = {}
    for b in wanted:
        own = [row for row in rows if row["benchmark"] == b.name]
        by_how = Counter(how for how, _ in {(row["how"], row["key"]) for row in own})
        seen = {"items_hit": len({r["item"] for r in own}), "samples": len({r["key"] for r in own})}
        found[b.name] = b.counts | seen | {f"samples_by_{how}": n for how, n in sorted(by_how.items())}
    return found
