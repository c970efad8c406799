"""Saver: a stage's state to disk and back, while it trains on.

In: an engine, the rows of packs trained, what is known of sick steps. Out: checkpoints (`solo.train.checkpoint`) that
any number of ranks goes on from, the same number bit for bit. Invariants: at most one is being written; no rank waits
for another but to begin the next; a save that fails leaves the checkpoints before it as they were, is counted, said
once, and ends no training. Cost: a thread copies what the next update would change (that update waits for it), then
writes and hashes; where the host has no room for a copy it writes at once, and the update waits longer.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from solo.artifact import commit
from solo.train import checkpoint, state
from solo.train.sick import STATE, Health
from solo.train.trained import ROW

log = logging.getLogger(__name__)

THREADS = 4  # that copy and write
ROOM = 0.8  # of the free memory of a host that copies on all its ranks may take
POLL_S = 0.02
EXPECTED = (OSError, RuntimeError, MemoryError)  # torch and pyarrow raise these where nothing can be written

_saves = itertools.count()  # of this process; every rank counts alike


class Saver:
    """Where one rank's checkpoints go."""

    def __init__(self, engine: Any, root: Path, stage: str) -> None:  # noqa: ANN401 - DeepSpeed is not typed
        self.engine, self.root, self.stage = engine, root, stage
        self.keep = checkpoint.Keep.from_env()
        self.rank, self.n_ranks = dist.get_rank(), dist.get_world_size()
        self.n_failed = 0  # saves since the last one that succeeded; rank 0 counts
        self.stall_s = 0.0  # that training waited for checkpoints, since `take_stall_s`
        self.bug: Exception | None = None  # of the thread
        self._thread: threading.Thread | None = None
        self._released = threading.Event()  # the engine's state may change

    def save(self, loader: dict[str, Any], rows: list[dict[str, Any]], health: Health) -> None:
        """Begin a checkpoint of `loader["step"]`, once the one before is complete; a collective call."""
        self.drain()
        with self._stalled():
            ready = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
            files, updates = state.in_files(state.share(self.engine)), state.n_updates(self.engine)
            done = list(rows), health.state()
            key = f"checkpoint {next(_saves)} of rank "
            self._released.clear()

            def work() -> None:
                try:
                    told = fault or self._write(int(loader["step"]), files, updates, ready, *done)
                    _store().set(key + str(self.rank), json.dumps(told))
                    if self.rank == 0:
                        self._complete(loader, self._told(key))
                except Exception as error:  # raised again at the next step's end; the other ranks wait for an answer
                    self.bug = error
                    _store().set(key + str(self.rank), json.dumps({"fault": _line(error)}))
                finally:
                    self._released.set()

            fault = self._begin(int(loader["step"])) if self.rank == 0 else {}
            dist.barrier()
            self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
            self._thread.start()

    def release(self) -> None:
        """Wait until the engine's state may change."""
        if self.bug:
            raise self.bug
        if self._thread:
            with self._stalled():
                self._released.wait()

    def drain(self) -> None:
        """Wait until what is being written is a checkpoint, or has failed; a collective call."""
        if self._thread:
            with self._stalled():
                self._thread.join()
                self._thread = None
                dist.barrier()  # rank 0 is the last; no rank may end before
        if self.bug:
            raise self.bug

    def leave(self, within_s: float) -> None:
        """Let the thread come to its end, for so long; for a rank that fails while the others may not."""
        if self._thread:
            self._thread.join(within_s)

    def load(self, folder: Path) -> list[dict[str, Any]]:
        """Put the engine back to this checkpoint; this rank's rows until then."""
        state.restore(self.engine, folder)
        paths = sorted(folder.glob("rows-*.parquet"))[self.rank :: dist.get_world_size()]
        return [row for path in paths for row in pq.read_table(path).to_pylist()]

    def newest(self) -> checkpoint.Checkpoint | None:
        """The newest whole checkpoint, one for all ranks."""
        self.drain()
        found: list[checkpoint.Checkpoint | None] = [checkpoint.newest(self.root) if self.rank == 0 else None]
        dist.broadcast_object_list(found)
        return found[0]

    def take_stall_s(self) -> float:
        """Seconds that training waited for checkpoints since this was asked last."""
        taken, self.stall_s = self.stall_s, 0.0
        return taken

    def _begin(self, step: int) -> dict[str, Any]:
        """Make the folder for all ranks; what is to be told where that failed."""
        try:
            checkpoint.begin(self.root, step)
        except OSError as error:
            return {"fault": _line(error)}
        return {}

    def _write(
        self,
        step: int,
        files: list[list[state.Slice]],
        updates: int,
        ready: Any,  # noqa: ANN401
        rows: list[dict[str, Any]],
        health: bytes,
    ) -> dict[str, Any]:
        """This rank's part, in a thread; the sha256 of its files, or why they cannot be written."""
        aside = checkpoint.aside_of(self.root, step)
        names = [f"state-{self.rank:05d}-{i:05d}.safetensors" for i in range(len(files))]

        def copy(file: list[state.Slice]) -> list[state.Slice]:
            with _after(ready):
                return [part.copied() for part in file]

        def write(name: str, file: list[state.Slice]) -> str:
            with _after(ready):
                return state.write(aside / name, file, updates)

        try:
            with ThreadPoolExecutor(THREADS) as pool:
                if _room_for(sum(part.n_bytes for file in files for part in file)):
                    files = list(pool.map(copy, files))
                    self._released.set()
                digests = dict(zip(names, pool.map(write, names, files), strict=True))
            pq.write_table(pa.Table.from_pylist(rows, ROW), aside / f"rows-{self.rank:05d}.parquet")
            if self.rank == 0:
                (aside / STATE).write_bytes(health)
        except EXPECTED as error:
            return {"fault": _line(error)}
        return {"digests": digests}

    def _told(self, key: str) -> list[dict[str, Any]]:
        """What each rank's thread says of its part; it may take as long as it takes."""
        store, told = _store(), []
        for rank in range(self.n_ranks):
            while not store.check([key + str(rank)]):
                time.sleep(POLL_S)
            told.append(json.loads(store.get(key + str(rank))))
        return told

    def _complete(self, loader: dict[str, Any], told: list[dict[str, Any]]) -> None:
        """Make it a checkpoint that counts; rank 0 does, in its thread."""
        step = int(loader["step"])
        aside = checkpoint.aside_of(self.root, step)
        fault = next((f"rank {rank}: {one['fault']}" for rank, one in enumerate(told) if "fault" in one), None)
        if fault is None:
            digests = {name: digest for one in told for name, digest in one["digests"].items()}
            facts = {"stage": self.stage, "commit": commit()}
            try:
                sealed = checkpoint.seal(
                    aside, loader=loader, world_size=self.n_ranks, facts=facts, keep=self.keep, digests=digests
                )
            except EXPECTED as error:
                fault = _line(error)
        if fault is not None:
            if not self.n_failed:
                log.warning(
                    "%s: no checkpoint of step %d, training goes on with those before it: %s; free some space in %s",
                    *(self.stage, step, fault, self.root),
                )
            shutil.rmtree(aside, ignore_errors=True)
            self.n_failed += 1
            return
        log.info("checkpoint %s", sealed.path)
        if self.n_failed:
            log.info("checkpoints are written again, from step %d on; %d were not", step, self.n_failed)
        self.n_failed = 0

    @contextmanager
    def _stalled(self) -> Iterator[None]:
        """Count what this takes."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.stall_s += time.monotonic() - began


def _room_for(n_bytes: int) -> bool:
    """Whether this host's ranks may each copy as much."""
    n_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return bool(n_bytes * n_ranks < ROOM * psutil.virtual_memory().available)


@contextmanager
def _after(ready: Any) -> Iterator[None]:  # noqa: ANN401
    """On a GPU, work beside the training once that has come to this event."""
    if ready is None:
        yield
        return
    with torch.cuda.device(ready.device), torch.cuda.stream(torch.cuda.Stream(ready.device)):  # type: ignore[no-untyped-call]
        torch.cuda.current_stream().wait_event(ready)
        yield


def _store() -> Any:  # noqa: ANN401
    """What the ranks met at: unlike a collective, a thread may use it beside the training."""
    return dist.distributed_c10d._get_default_store()


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
