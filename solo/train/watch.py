"""Watch: what the ranks of a stage say, followed while they run.

In: `train.log`, which the ranks write. Out: `metrics.jsonl`, one line per step that counts; each line told on; why a
rank failed. Invariant: a step that was trained again has the later line alone. Cost: the new bytes of the log.
"""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from solo.artifact import Job, canonical, write_atomic

Metrics = dict[str, Any]

PROGRESS_S = 10.0
LAST_WORDS_S = 5.0
GONE = "another rank is gone"


class Watch:
    """Follows `train.log`: keeps `metrics.jsonl`, tells the metrics on, remembers why a rank failed."""

    def __init__(
        self,
        job: Job,
        n_steps: int,
        tell: Callable[[Metrics], None] | None,
        *,
        first_step: int,
        tell_sick: Callable[[], None] | None = None,
        stop_asked: Callable[[], bool] = bool,
    ) -> None:
        """`tell` takes each step's metrics, `tell_sick` is called when `sick.jsonl` has one step more."""
        self.what = f"{job.part}/{job.name}"
        self.log = job.out / "train.log"
        self.metrics = job.out / "metrics.jsonl"
        self.tell, self.tell_sick, self.stop_asked = tell, tell_sick, stop_asked
        self.progress = job.progress
        self.n_steps = n_steps
        self.failure: str | None = None
        self.failed_at = 0.0
        self.interrupted = False
        self.rank = "?"  # of which the launcher's summary tells
        self.said_at = time.monotonic()
        self.log.touch()
        # The log is written by the ranks themselves, so it has also the steps that a killed supervisor never copied.
        self._keep(first_step)
        self.offset = self.log.stat().st_size

    def read(self, *, quiet: bool = False) -> None:
        """Take in the whole lines that came since the last call; `quiet` tells nobody."""
        with self.log.open("rb") as file:
            file.seek(self.offset)
            whole = file.read().rpartition(b"\n")[0]
        if not whole:
            return
        self.offset += len(whole) + 1
        for line in whole.split(b"\n"):
            row = _parse(line)
            if "loss" in row:  # an event may name a step too
                with self.metrics.open("ab") as out:
                    out.write(canonical(row) + b"\n")
                if not quiet:
                    self._say(row)
            elif row.get("event") == "failed":
                self._fail(row)
            elif row.get("event") == "ended" and row["code"]:
                self._fail({"host": row["host"], "error": f"its ranks ended with code {row['code']}"})
            elif row.get("event") == "restarted":
                self._keep(row["step"])
            elif row.get("event") == "sick" and self.tell_sick and not quiet:
                self.tell_sick()
            elif row.get("event") == "interrupted":
                self.interrupted = True
            elif killed := re.match(rb"\s*exitcode\s*:\s*-(\d+)", line):
                name = signal.Signals(int(killed[1])).name
                hint = {"SIGKILL": " (out of memory?)", "SIGABRT": " (a collective that another rank did not reach?)"}
                self._fail({"error": f"rank {self.rank} was killed by {name}{hint.get(name, '')}"})
            elif named := re.match(rb"\s*rank\s*:\s*(\d+) ", line):  # of the launcher's summary
                self.rank = named[1].decode()

    @property
    def overdue(self) -> bool:
        """Whether the launcher had its time to end after a rank failed; it waits 30 s for one that stands still."""
        return self.failure is not None and time.monotonic() - self.failed_at > LAST_WORDS_S

    def _fail(self, row: dict[str, Any]) -> None:
        """Keep the first reason, but not one that is only the echo of another rank's end."""
        where = [f"{name} {row[name]}" for name in ("host", "rank") if row.get(name) is not None]
        reason = ": ".join(filter(None, (", ".join(where), row["error"])))
        if self.failure is None or (GONE in self.failure and GONE not in reason):
            self.failed_at = self.failed_at or time.monotonic()
            self.failure = reason

    def _keep(self, last_step: int) -> None:
        """Metrics of the steps up to this one; those after it are trained again."""
        rows: dict[int, Metrics] = {}
        for row in map(_parse, self.log.read_bytes().splitlines()):
            if row.get("event") == "restarted":
                rows = {step: known for step, known in rows.items() if step <= row["step"]}
            elif "loss" in row and row["step"] <= last_step:
                rows[row["step"]] = row
        write_atomic(self.metrics, b"".join(canonical(rows[step]) + b"\n" for step in sorted(rows)))

    def _say(self, row: Metrics) -> None:
        if self.tell:
            self.tell(row)
        now = time.monotonic()
        if now - self.said_at >= PROGRESS_S or row["step"] == self.n_steps:
            self.said_at = now
            self.progress(line(row))


def line(m: Metrics) -> str:
    """`step 12/40, loss 3.210, 5,120 tokens/s, 41.2 % MFU, lr 1.0e-03, 31 s left`."""
    loss = "not finite" if m["loss"] is None else f"{m['loss']:.3f}"
    used = f"{100 * m['mfu']:.1f} % MFU, " if m.get("mfu") else ""
    return (
        f"step {m['step']:,}/{m['n_steps']:,}, loss {loss}, {m['tokens_per_s']:,.0f} tokens/s, "
        f"{used}lr {m['lr']:.1e}, {duration(m['eta_s'])} left"
    )


def duration(seconds: float) -> str:
    """`31 s`, `12 min` or `3 h 05 min`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _parse(line: bytes) -> dict[str, Any]:
    """The metrics or event of a line, or nothing where it is an ordinary one."""
    if line.startswith(b"{"):
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and ("event" in row or {"step", "n_steps", "loss"} <= row.keys()):
                return row
    return {}
