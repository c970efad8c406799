"""Mirror: checkpoints of a running stage in a store, so that another machine goes on where this one ends.

In: a train job with a store, its `.work/checkpoints`. Out: the same folders below the artifact's place in the store,
and the stage's log so far; on a machine that has none or older ones, the newest. Invariants: a checkpoint has its
manifest there last; as many stay as here ($SOLO_KEEP_LAST); a store that fails is said once and ends no training; the
ranks know nothing of it. Cost: each checkpoint's bytes once, read and sent by the supervisor while the ranks train.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path

from solo.acquire.patience import Stopped
from solo.artifact import MANIFEST, WORK, Job, write_atomic
from solo.estimate_text import size
from solo.store.folders import Damaged, Store, Unreachable
from solo.train import checkpoint

log = logging.getLogger(__name__)

POLL_S = 1.0
LEAVE_S = 30.0  # for the last checkpoint of a stage that was told to stop; Prefect kills a run after as long
LOG = "train.log"


def bring(job: Job) -> None:
    """The newest whole checkpoint of the store, where it is newer than those here."""
    if job.store is None:
        return
    root, place = job.work / "checkpoints", _place(job)
    here = checkpoint.newest(root)
    for step in reversed(_whole(job.store.listed(place))):
        if here is not None and step <= here.step:
            return
        folder = root / f"step-{step:06d}"
        try:
            n_bytes = job.store.get(f"{place}/{folder.name}", folder)
        except Damaged as error:
            log.warning("%s; not used, the checkpoint before it is tried", error)
            continue
        for half in root.glob(".step-*.coming"):
            shutil.rmtree(half)
        write_atomic(root / checkpoint.LATEST, f"{folder.name}\n".encode())
        if said := job.store.read(f"{place}/{LOG}"):  # the metrics of the steps before it
            write_atomic(job.out / LOG, said)
        job.progress(f"{job.part}/{job.name}: {folder.name}, {size(n_bytes)}, from {job.store.where(place)}")
        return


@contextmanager
def kept(job: Job) -> Iterator[None]:
    """While a stage runs, its checkpoints are put into the job's store; at its end none is half there by our doing."""
    if job.store is None:
        yield
        return
    mirror = Mirror(job, job.store)
    # In this context, by which Prefect knows whose lines a thread's are.
    thread = threading.Thread(target=copy_context().run, args=(mirror.run,), name="mirror", daemon=True)
    thread.start()
    try:
        yield
    finally:
        mirror.ended.set()
        if (job.out / "checkpoint").is_dir():  # the stage is done, and its artifact goes there
            mirror.stop.set()
            thread.join()
        else:
            thread.join(LEAVE_S)
            mirror.stop.set()


class Mirror:
    """Puts checkpoints as they come, the newest first."""

    def __init__(self, job: Job, store: Store) -> None:
        self.job, self.store, self.place = job, store, _place(job)
        self.keep = checkpoint.Keep.from_env()
        self.ended = threading.Event()  # the ranks have; what is here is put and that is all
        self.stop = threading.Event()
        self.done: set[int] = set()
        self.n_failed = 0

    def run(self) -> None:
        """Until the ranks have ended."""
        while not self.stop.is_set():
            ended = self.ended.is_set()
            try:
                self._put()
            except Stopped:
                return
            except Unreachable as error:
                self._failed(error)
            except Exception:  # a bug of ours must not go unsaid in a thread, nor end days of training
                log.exception("%s/%s: checkpoints are not put into the store", self.job.part, self.job.name)
                return
            if ended:
                return
            self.ended.wait(POLL_S)

    def _put(self) -> None:
        """Each checkpoint that is here to stay and not there; then what has had its time there goes."""
        folders = _here(self.job.work / "checkpoints")
        wanted = folders.keys() - set(self.keep.outdated(sorted(folders))) - self.done
        for step in sorted(wanted, reverse=True):
            place = f"{self.place}/{folders[step].name}"
            try:
                self.store.write(f"{self.place}/{LOG}", _lines(self.job.out / LOG))
                self.store.put(folders[step], place, stop=self.stop)
            except FileNotFoundError:  # here it has had its time meanwhile
                self.store.remove(place)
                continue
            self.done.add(step)
            log.info("%s/%s: %s is in the store", self.job.part, self.job.name, folders[step].name)
            if self.n_failed:
                log.info("checkpoints reach %s again; %d attempts did not", self.store.url, self.n_failed)
            self.n_failed = 0
            self._prune()

    def _prune(self) -> None:
        """Those that are outdated, and halves that a killed machine left."""
        names = self.store.listed(self.place)
        whole = _whole(names)
        steps = {int(m[1]) for name in names if (m := checkpoint.NAME.fullmatch(name.split("/")[0]))}
        for step in (steps - set(whole)) | set(self.keep.outdated(whole)):
            self.store.remove(f"{self.place}/step-{step:06d}")

    def _failed(self, error: Unreachable) -> None:
        if not self.n_failed:
            log.warning("%s; training goes on, its checkpoints are here alone", error)
        self.n_failed += 1


def _place(job: Job) -> str:
    return f"{job.out.relative_to(job.root).as_posix()}/{WORK}/checkpoints"


def _whole(names: Iterable[str]) -> list[int]:
    """Steps of the checkpoints there that have a manifest, in order."""
    named = (name.split("/") for name in names)
    return sorted(int(m[1]) for name, *rest in named if rest == [MANIFEST] and (m := checkpoint.NAME.fullmatch(name)))


def _here(root: Path) -> dict[int, Path]:
    found = root.iterdir() if root.is_dir() else ()
    return {int(m[1]): path for path in found if (m := checkpoint.NAME.fullmatch(path.name))}


def _lines(path: Path) -> bytes:
    """The whole lines of a log that is being written."""
    whole, newline, _ = path.read_bytes().rpartition(b"\n")
    return whole + newline
