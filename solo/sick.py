"""Sick: steps of a training that went wrong, what was in them, and what was done.

In: each step's loss over all ranks and whether its update was applied. Out: a verdict that every rank reaches alike,
and `sick.jsonl`, one line per sick step with its packs, documents and sources. Invariants: a pure function of the
losses, so a stage that was killed and goes on reaches the same verdicts; a checkpoint holds all that is needed for it.
Cost: the median of a window, once a step.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from solo.artifact import canonical, write_atomic
from solo.spec import Stage

FILE = "sick.jsonl"  # in the artifact
STATE = "sick.json"  # in a checkpoint
LEAST_MAD = 1e-3  # nats; a loss that hardly moves would call every step a spike
Verdict = Literal["skipped", "spike"]


class Health:
    """What a stage knows of its past steps."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.losses: list[float] = []  # of the last `spike_window` applied steps
        self.events: list[dict[str, Any]] = []
        self.quarantined: list[int] = []  # steps that are passed over
        self.last_limit = math.inf  # of the step judged last

    @property
    def n_skipped(self) -> int:
        """Updates that were not applied."""
        return sum(event["kind"] == "skipped" for event in self.events)

    def judge(self, loss: float, *, applied: bool) -> Verdict | None:
        """What is wrong with the step whose loss this is; takes the loss in where nothing is to be undone."""
        if not applied or not math.isfinite(loss):
            return "skipped"
        window, stage = self.losses, self.stage
        self.last_limit = self._limit()
        spike = loss > self.last_limit
        if not spike or stage.on_spike == "record":
            self.losses = [*window, loss][-stage.spike_window :]
        return "spike" if spike else None

    def _limit(self) -> float:
        """The highest loss that is no spike."""
        if self.stage.spike_mads is None or len(self.losses) < self.stage.spike_window:
            return math.inf
        median = statistics.median(self.losses)
        mad = statistics.median(abs(loss - median) for loss in self.losses)
        return median + self.stage.spike_mads * max(mad, LEAST_MAD)

    def record(
        self, kind: Verdict, step: int, sums: Mapping[str, Any], documents: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Remember a sick step; `documents`: the plan's rows of its packs."""
        self.events = [event for event in self.events if (event["step"], event["kind"]) != (step, kind)]
        names = ("pack", "source", "key", "exposure", "begin", "end")
        event = {
            "step": step,
            "kind": kind,
            "done": kind if kind == "skipped" else {"record": "recorded"}.get(self.stage.on_spike, "quarantined"),
            "loss": finite(sums["loss"]),
            "limit": finite(self.last_limit) if kind == "spike" else None,
            "loss_by_source": sums["sources"],
            "packs": sorted({d["pack"] for d in documents}),
            "sources": sorted({d["source"] for d in documents}),
            "documents": [{name: d[name] for name in names} for d in documents],
        }
        self.events.append(event)
        return event

    def state(self) -> bytes:
        """For a checkpoint, as `STATE`."""
        return canonical({"losses": self.losses, "events": self.events, "quarantined": self.quarantined})

    def load(self, folder: Path, *, rewind: bool = False) -> None:
        """From a checkpoint; `rewind` keeps what was learned of sick steps since."""
        state = json.loads((folder / STATE).read_bytes())
        self.losses = state["losses"]
        if not rewind:
            self.events, self.quarantined = state["events"], state["quarantined"]

    def write(self, out: Path) -> None:
        """`sick.jsonl` in the artifact, where there was anything."""
        if self.events:
            write_atomic(out / FILE, b"".join(canonical(event) + b"\n" for event in self.events))
        else:
            (out / FILE).unlink(missing_ok=True)


def finite(value: float) -> float | None:
    """A number as JSON has it: None for what JSON has no word for."""
    return value if math.isfinite(value) else None


def read(folder: Path) -> list[dict[str, Any]]:
    """The sick steps of an artifact."""
    path = folder / FILE
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []
