"""evaluate: one benchmark, answered with and without its pictures.

In: the last stage's checkpoint and a pinned question set. Out: `answers.parquet` (one row per question, in the set's
order) and `gallery.parquet` (a few of them with a thumbnail). Invariants: every question is answered or counted as
dropped, and counts as wrong then; the reference answer is cut off before the prompt is tokenised; scores carry the
protocol they were made under, and `compare` refuses two different ones; a GPU that a stage holds is not used. Cost: two
passes over all prompts, `max_new_tokens` steps each; chunks that are done survive a kill.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from solo.artifact import Job, Result, canonical, write_atomic
from solo.evaluate.judge import Judge, Row, question_id
from solo.plugin import resolve
from solo.report.gallery import thumbnail
from solo.sample import Rejected, Sample
from solo.spec import BenchmarkSpec, Tokens
from solo.train import devices

VERSION = 2  # a cache of keys and values: sums in another order

CHUNK_QUESTIONS = 128  # answered and written together; about a second on two cores with the sample's model
N_GALLERY = 12
DECODING = "greedy, no ids of SOLO's own, stop at EOS"

ANSWERS = pa.schema(
    [
        ("question_id", pa.string()),
        ("category", pa.string()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("response", pa.string()),
        ("blind_response", pa.string()),
        ("correct", pa.bool_()),
        ("blind_correct", pa.bool_()),
        ("checkpoint_digest", pa.string()),
        ("protocol", pa.string()),
    ]
)
GALLERY = pa.schema(
    [(name, ANSWERS.field(name).type) for name in ("question_id", "category", "prompt", "answer", "response")]
    + [("correct", pa.bool_()), ("thumbnail", pa.binary())]
)


def run(job: Job) -> Result:
    """Answer every question of the benchmark twice and score both."""
    benchmark = BenchmarkSpec.model_validate(job.spec["benchmark"])
    location = _location(benchmark, job.specs)
    before = job.one("train")
    bound = {"checkpoint_digest": before.manifest.digest, "protocol": protocol_digest(protocol(benchmark))}
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    for answered in _answered(job, benchmark, location):
        dropped.update(answered["dropped"])
        rows += [row | bound for row in answered["rows"]]
        job.progress(
            f"evaluate/{job.name}: {len(rows)} answered, {_right(rows)} right, {sum(dropped.values())} dropped"
        )
    if not rows:
        raise ValueError(f"evaluate/{job.name}: no question of {benchmark.location} could be asked; {dict(dropped)}")
    _write(pa.Table.from_pylist(rows, ANSWERS), job.out / "answers.parquet")
    _write(_gallery(rows, benchmark, location), job.out / "gallery.parquet")
    n_in = len(rows) + sum(dropped.values())
    return Result(
        n_in, len(rows), dict(dropped), score(rows, n_in, benchmark) | bound | {"asked_of": before.manifest.id}
    )


def _answered(job: Job, benchmark: BenchmarkSpec, location: Path) -> Iterator[Row]:
    """Each chunk's rows and drops; from the first one not answered yet, a judge is loaded and GPUs are held."""
    judge: Judge | None = None
    with ExitStack() as held:
        for i, chunk in enumerate(_chunks(questions(benchmark, location), CHUNK_QUESTIONS)):
            done = job.work / f"{i:05d}.json"
            if not done.exists():
                if judge is None:
                    held.enter_context(gpus(job))
                    judge = Judge(benchmark, Tokens.model_validate(job.spec["tokens"]), job.one("train"))
                write_atomic(done, canonical(judge.answer(chunk)))
            yield json.loads(done.read_bytes())
        judge = None  # before the GPUs are let go


@contextmanager
def gpus(job: Job) -> Iterator[None]:
    """Hold what a stage would hold here; none without CUDA."""
    import torch

    names = devices.names() if torch.cuda.is_available() else []
    with devices.held(f"evaluate/{job.name}", names, job.progress):
        yield
        if names:
            torch.cuda.empty_cache()  # this process may live on, and the memory is the next holder's


def questions(benchmark: BenchmarkSpec, location: Path) -> Iterator[Sample | Rejected]:
    """The question set in its own order, as its adapter reads it."""
    read = resolve("adapters", benchmark.adapter)
    yield from read(location, source=benchmark.name, **benchmark.args)


def score(rows: Sequence[Row], n_questions: int, benchmark: BenchmarkSpec) -> Row:
    """The score record: a dropped question counts as wrong."""
    share = _right(rows) / n_questions
    categories: dict[str, Row] = {}
    for category in sorted({row["category"] for row in rows}):
        own = [row for row in rows if row["category"] == category]
        categories[category] = {
            "n_questions": len(own),
            "score": round(_right(own) / len(own), 6),
            "blind": round(_right(own, "blind_correct") / len(own), 6),
        }
    return {
        "score": round(share, 6),
        "chance": benchmark.chance,
        "blind": round(_right(rows, "blind_correct") / n_questions, 6),
        "standard_error": round(math.sqrt(share * (1 - share) / n_questions), 6),
        "n_questions": n_questions,
        "by_category": categories,
        "protocol_fields": protocol(benchmark),
    }


def protocol(benchmark: BenchmarkSpec) -> Row:
    """All that two scores must share to be comparable; a title, a licence and a place on disk do not matter."""
    module, _, _ = benchmark.scorer.rpartition(".")
    version = getattr(importlib.import_module(f"solo.benchmarks.{module}"), "VERSION", 1)
    fields = benchmark.model_dump(mode="json", exclude={"title", "licence", "location"})
    return fields | {"decoding": DECODING, "scorer": f"{benchmark.scorer} v{version}", "evaluate": VERSION}


def protocol_digest(fields: Mapping[str, Any]) -> str:
    """One SHA-256 per protocol."""
    return hashlib.sha256(canonical(dict(fields))).hexdigest()


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> Row:
    """The difference of two score records (`manifest.stats` of evaluate), b - a; refused across protocols."""
    left, right = a["protocol_fields"], b["protocol_fields"]
    differing = [f"{k}: {left.get(k)!r} and {right.get(k)!r}" for k in {**left, **right} if left.get(k) != right.get(k)]
    if differing:
        raise ValueError(
            f"scores of {left['name']!r} and {right['name']!r} were made under different protocols "
            f"({'; '.join(differing)}); evaluate both checkpoints with one benchmark spec"
        )
    error = math.hypot(a["standard_error"], b["standard_error"])
    return {
        "benchmark": left["name"],
        "scores": [a["score"], b["score"]],
        "difference": round(b["score"] - a["score"], 6),
        "standard_error": round(error, 6),
        "checkpoints": [a["checkpoint_digest"], b["checkpoint_digest"]],
    }


def _gallery(rows: Sequence[Row], benchmark: BenchmarkSpec, location: Path) -> pa.Table:
    """A few answered questions, chosen by hash, with their first picture made small."""
    chosen = sorted(rows, key=lambda r: hashlib.md5(r["question_id"].encode()).hexdigest())[:N_GALLERY]
    wanted = {row["question_id"] for row in chosen}
    small: dict[str, bytes | None] = {}
    for sample in questions(benchmark, location):
        if isinstance(sample, Sample) and question_id(sample) in wanted and sample.images:
            small[question_id(sample)] = thumbnail(sample.images[0])
    shown = [{**row, "thumbnail": small.get(row["question_id"])} for row in chosen]
    return pa.Table.from_pylist([{k: row[k] for k in GALLERY.names} for row in shown], GALLERY)


def _location(benchmark: BenchmarkSpec, specs: Path) -> Path:
    """Where the question set lies, after its bytes were found to be the pinned ones."""
    location = specs / benchmark.location
    if not location.exists():
        raise ValueError(f"benchmarks/{benchmark.name}.yaml: location {location} does not exist; put the data there")
    if benchmark.revision.startswith("sha256:"):
        from solo.acquire.part import content_sha256

        found = content_sha256(location)
        if f"sha256:{found.removeprefix('sha256:')}" != benchmark.revision:
            raise ValueError(
                f"benchmarks/{benchmark.name}.yaml: revision is {benchmark.revision} but {location} has sha256:"
                f"{found.removeprefix('sha256:')}; restore the data, or pin the new revision"
            )
    return location


def _right(rows: Sequence[Row], column: str = "correct") -> int:
    return sum(bool(row[column]) for row in rows)


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(islice(items, size)):
        yield chunk


def _write(table: pa.Table, path: Path) -> None:
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    write_atomic(path, out.getvalue())
