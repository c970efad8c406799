"""Track: a stage's figures to TensorBoard, Weights & Biases or MLflow too, each by its own library.

In: $SOLO_TRACK, `tensorboard:DIR`, `wandb` or `wandb:PROJECT`, `mlflow` or `mlflow:EXPERIMENT`, with commas between;
where their servers are is said in their own variables (WANDB_MODE, MLFLOW_TRACKING_URI, ...). Out: one run for each
artifact, gone on with when the stage is. Invariants: a machine's setting, nothing of it reaches a fingerprint; what is
asked and cannot be is an error before the stage starts; a tracker that fails later is said once and ends no training.
Cost: what the libraries need, in the supervisor and not in the ranks.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solo.artifact import Job, canonical

log = logging.getLogger(__name__)

ASKED = "SOLO_TRACK"
FORMS = "tensorboard:DIR, wandb[:PROJECT], mlflow[:EXPERIMENT]"
NAME = "solo"  # of a project or an experiment, where none is given
Values = Mapping[str, float]
Row = dict[str, Any]


@dataclass(frozen=True)
class Tracker:
    """Where figures go: `log(values, step)`, and `close()` at the end."""

    name: str
    log: Callable[[Values, int], None]
    close: Callable[[], None]


def asked() -> list[tuple[str, str]]:
    """(library, its argument) of each tracker that the machine is set to."""
    found = []
    for part in filter(None, (part.strip() for part in os.environ.get(ASKED, "").split(","))):
        name, _, given = part.partition(":")
        if name not in OPENED:
            raise ValueError(f"{ASKED}: {name!r} is not known; give {FORMS}")
        if name == "tensorboard" and not given:
            raise ValueError(f"{ASKED}: tensorboard needs a folder; give tensorboard:DIR")
        found.append((name, given))
    return found


@contextmanager
def follow(job: Job, tell: Callable[[Row], None] | None) -> Iterator[Callable[[Row], None]]:
    """What takes a step's metrics to `tell` and to all trackers."""
    trackers = [_open(job, *one) for one in asked()]

    def told(row: Row) -> None:
        if tell:
            tell(row)
        for tracker in list(trackers):
            if not all(_tried(tracker, tracker.log, values, step) for step, values in figures(row)):
                trackers.remove(tracker)

    try:
        yield told
    finally:
        for tracker in trackers:
            _tried(tracker, tracker.close)


def figures(row: Row) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, flat figures) of a row of metrics; what is held out was also measured before the first step."""
    if "held_out_before" in row:
        yield 0, dict(_flat("held_out", row["held_out_before"]))
    yield row["step"], {k: v for name, value in row.items() for k, v in _flat(name, value) if name not in NOT_SHOWN}


NOT_SHOWN = ("step", "n_steps", "held_out_before")


def _flat(name: str, value: Any) -> Iterator[tuple[str, float]]:  # noqa: ANN401 - JSON
    if isinstance(value, dict):
        for key, own in value.items():
            yield from _flat(f"{name}/{key}", own)
    elif isinstance(value, int | float):
        yield name, float(value)


def _open(job: Job, name: str, given: str) -> Tracker:
    try:
        return OPENED[name](job, given)
    except ImportError as error:
        raise ValueError(
            f"{ASKED} asks for {name}, which is not installed ({error}); pip install '.[{name}]'"
        ) from None


def _tried(tracker: Tracker, act: Callable[..., None], *args: object) -> bool:
    """Whether it went well; a dashboard that is gone is no reason to stop a training."""
    try:
        act(*args)
    except Exception as error:  # whatever a network or a disk may raise
        log.warning("%s: no more figures go there: %s: %s", tracker.name, type(error).__name__, error)
        return False
    return True


def _tensorboard(job: Job, given: str) -> Tracker:
    summary = importlib.import_module("tensorboard.summary")
    writer = summary.Writer(str(Path(given) / _run(job)))

    def write(values: Values, step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker("tensorboard", write, writer.close)


def _wandb(job: Job, given: str) -> Tracker:
    wandb = importlib.import_module("wandb")
    run = wandb.init(project=given or NAME, id=_run(job), name=_run(job), resume="allow", config=job.spec)
    return Tracker("wandb", lambda values, step: run.log(dict(values), step=step), run.finish)


def _mlflow(job: Job, given: str) -> Tracker:
    mlflow, entities = (importlib.import_module(name) for name in ("mlflow", "mlflow.entities"))
    client = mlflow.MlflowClient()
    known = client.get_experiment_by_name(given or NAME)
    experiment = known.experiment_id if known else client.create_experiment(given or NAME)
    before = client.search_runs([experiment], f"tags.solo_run = '{_run(job)}'", max_results=1)
    if before:
        run_id = before[0].info.run_id
    else:
        tags = {"solo_run": _run(job), "spec": canonical(job.spec).decode()[:5000]}  # a tag holds no more
        run_id = client.create_run(experiment, tags=tags, run_name=_run(job)).info.run_id
    client.update_run(run_id, status="RUNNING")

    def write(values: Values, step: int) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run_id, metrics=[entities.Metric(name, value, now, step) for name, value in values.items()])

    return Tracker("mlflow", write, lambda: client.set_terminated(run_id))


def _run(job: Job) -> str:
    return f"{job.name}-{job.fingerprint}"


OPENED: dict[str, Callable[[Job, str], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
