"""Units of work over processes: spawned, so that no lock or thread of the parent is inherited.

In: a module-level function and its units. Out: its results in the order of the units, whatever the workers.
Invariants: one unit or one worker runs inline, in this process; a worker ends with its parent, even a killed one.
Cost: about a second a worker to start.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

U = TypeVar("U")
R = TypeVar("R")


def each(function: Callable[[U], R], units: Sequence[U], workers: int) -> Iterator[R]:
    """`map(function, units)` on up to `workers` processes."""
    n_workers = min(workers, len(units))
    if n_workers <= 1:
        yield from map(function, units)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_workers, mp_context=context, initializer=_follow_parent) as pool:
        yield from pool.map(function, units)


def _follow_parent() -> None:
    """Without this, workers of a SIGKILLed run wait for work for ever: each holds the queue's other end open."""
    threading.Thread(target=_exit_after, args=(multiprocessing.parent_process(),), daemon=True).start()


def _exit_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
