"""Sick: steps of a training that went wrong, what was in them, and what was done.

In: each step's loss over all ranks and whether its update was applied. Out: a verdict that every rank reaches alike,
and `sick.jsonl`, one line per sick step with its packs, sources and documents, and which of these had the highest loss.
Invariants: a pure function of the losses, so a stage that was killed and goes on reaches the same verdicts; a
checkpoint holds all that is needed for it. Cost: the median of a window, once a step; a collective once a sick step.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from solo.artifact import canonical, write_atomic
from solo.spec import Stage

if TYPE_CHECKING:
    from solo.sequence.loader import Pack

FILE = "sick.jsonl"  # in the artifact
STATE = "sick.json"  # in a checkpoint
LEAST_MAD = 1e-3  # nats; a loss that hardly moves would call every step a spike
N_WORST = 8  # documents of a sick step that are told apart
Verdict = Literal["skipped", "spike"]


@dataclass(frozen=True)
class Loss:
    """The loss of one document, or of the piece of one that lies in a pack."""

    pack: int
    slot: int  # in the plan's rows of the pack
    mean: float  # nats over its supervised tokens


def losses(pack: Pack, of_tokens: np.ndarray) -> list[Loss]:
    """Of each document of a pack that has targets; `of_tokens`: (n_supervised,)."""
    gone = {row["slot"] for row in pack.left_out}
    slots = [slot for slot in range(len(pack.segments) + len(gone)) if slot not in gone]
    ranges = zip(slots, pack.loss_ranges(), strict=True)
    return [Loss(pack.index, slot, float(of_tokens[a:b].mean())) for slot, (_, _, a, b) in ranges if a < b]


def worst(
    own: Iterable[Loss], sum_up: Callable[[np.ndarray], Sequence[float]], *, rank: int, n_ranks: int
) -> list[Loss]:
    """The highest losses of all ranks, each of which gives its own: a collective; `sum_up` adds them over the ranks."""
    table = np.zeros((n_ranks, N_WORST, 3))  # pack + 1, slot, loss
    for i, loss in enumerate(sorted(own, key=_rising)[:N_WORST]):
        table[rank, i] = loss.pack + 1, loss.slot, loss.mean
    rows = np.reshape(sum_up(table.ravel()), (-1, 3))
    return sorted((Loss(int(pack) - 1, int(slot), loss) for pack, slot, loss in rows if pack), key=_rising)[:N_WORST]


def _rising(loss: Loss) -> tuple[float, int, int]:
    """Not finite first, then the highest."""
    return (-loss.mean if math.isfinite(loss.mean) else -math.inf, loss.pack, loss.slot)


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
        self,
        kind: Verdict,
        step: int,
        sums: Mapping[str, Any],
        packs: Mapping[int, Sequence[Mapping[str, Any]]],
        worst: Sequence[Loss],
    ) -> dict[str, Any]:
        """Remember a sick step; `packs`: the plan's rows of each, `worst`: its documents of the highest loss."""
        self.events = [event for event in self.events if (event["step"], event["kind"]) != (step, kind)]
        documents = [row for rows in packs.values() for row in rows]
        event = {
            "step": step,
            "kind": kind,
            "done": kind if kind == "skipped" else {"record": "recorded"}.get(self.stage.on_spike, "quarantined"),
            "loss": finite(sums["loss"]),
            "limit": finite(self.last_limit) if kind == "spike" else None,
            "loss_by_source": sums["sources"],
            "packs": sorted(packs),
            "sources": sorted({d["source"] for d in documents}),
            "worst": [{**_named(packs[w.pack][w.slot]), "loss": finite(w.mean)} for w in worst],
            "documents": [_named(row) for row in documents],
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


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
    """What names a document, or the piece of one that lies in a pack."""
    return {name: row[name] for name in ("pack", "source", "key", "exposure", "begin", "end")}


def finite(value: float) -> float | None:
    """A number as JSON has it: None for what JSON has no word for."""
    return value if math.isfinite(value) else None


def read(folder: Path) -> list[dict[str, Any]]:
    """The sick steps of an artifact."""
    path = folder / FILE
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []
