"""Saver: a stage's state to disk and back, by all ranks together.

In: an engine, the rows of packs trained, what is known of sick steps. Out: checkpoints (`solo.checkpoint`) that the
same number of ranks goes on from bit for bit. Invariants: every rank makes the same collective calls also where one
cannot write; a save that fails leaves the checkpoints before it as they were, is said once, and ends no training.
Cost: one write of weights and optimizer, then a hash pass; all ranks wait for both.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from solo import checkpoint
from solo.artifact import commit
from solo.sick import Health
from solo.trained import ROW

log = logging.getLogger(__name__)


class Saver:
    """Where one rank's checkpoints go."""

    def __init__(self, engine: Any, root: Path, stage: str) -> None:  # noqa: ANN401 - DeepSpeed is not typed
        self.engine, self.root, self.stage = engine, root, stage
        self.keep = checkpoint.Keep.from_env()
        self.rank = dist.get_rank()
        self.failing = False  # the last save did not succeed

    def save(self, state: dict[str, Any], rows: list[dict[str, Any]], health: Health) -> bool:
        """A checkpoint of `state["step"]`; False where it could not be written, for lack of space or otherwise."""
        step, faults = int(state["step"]), list[Exception]()
        aside = checkpoint.aside_of(self.root, step)
        if self.rank == 0:
            with _kept(faults):
                checkpoint.begin(self.root, step)
        dist.barrier()
        with _writes_kept(self.engine, faults):  # DeepSpeed's own collectives come in between
            self.engine.save_checkpoint(str(aside), tag=f"global_step{step}", save_latest=False)
        with _kept(faults):
            pq.write_table(pa.Table.from_pylist(rows, ROW), aside / f"rows-{self.rank:05d}.parquet")
        written = self._all(not faults)
        if self.rank == 0 and written:
            with _kept(faults):
                health.save(aside)
                facts = {"stage": self.stage, "commit": commit()}
                sealed = checkpoint.seal(
                    aside, loader=state, world_size=dist.get_world_size(), facts=facts, keep=self.keep
                )
                log.info("checkpoint %s", sealed.path)
        written = self._all(written and not faults)  # also a wait: a rank told to stop must not leave before the seal
        self._say(step, faults, written=written)
        return written

    def load(self, folder: Path, step: int) -> list[dict[str, Any]]:
        """Put the engine back to this checkpoint; this rank's rows until then."""
        self.engine.load_checkpoint(str(folder), tag=f"global_step{step}")
        rows: list[dict[str, Any]] = pq.read_table(folder / f"rows-{self.rank:05d}.parquet").to_pylist()
        return rows

    def newest(self) -> checkpoint.Checkpoint | None:
        """The newest whole checkpoint, one for all ranks."""
        found: list[checkpoint.Checkpoint | None] = [checkpoint.newest(self.root) if self.rank == 0 else None]
        dist.broadcast_object_list(found)
        return found[0]

    def _all(self, fine: bool) -> bool:
        vote = torch.tensor([not fine], dtype=torch.int64, device=self.engine.device)
        dist.all_reduce(vote)
        return not vote.item()

    def _say(self, step: int, faults: list[Exception], *, written: bool) -> None:
        if faults and not self.failing:
            log.warning(
                "%s: no checkpoint of step %d, training goes on with those before it: %s: %s; free some space in %s",
                *(self.stage, step, type(faults[0]).__name__, " ".join(str(faults[0]).split()), self.root),
            )
        if written and self.failing and self.rank == 0:
            log.info("checkpoints are written again, from step %d on", step)
        if self.rank == 0 and not written:
            shutil.rmtree(checkpoint.aside_of(self.root, step), ignore_errors=True)
        self.failing = not written


@contextmanager
def _kept(faults: list[Exception]) -> Iterator[None]:
    """Remember a failed write instead of raising it: torch and pyarrow raise either of these."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        faults.append(error)


@contextmanager
def _writes_kept(engine: Any, faults: list[Exception]) -> Iterator[None]:  # noqa: ANN401
    """`_kept` for each file that DeepSpeed writes, so that this rank still reaches DeepSpeed's barriers."""
    files = engine.checkpoint_engine
    write = files.save

    def save(*args: Any, **kwargs: Any) -> None:
        with _kept(faults):
            write(*args, **kwargs)

    files.save = save
    try:
        yield
    finally:
        with suppress(AttributeError):
            del files.save
