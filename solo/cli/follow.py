"""A run's process, followed: its lines go to standard error, on a terminal above one bar that counts artifacts.

In: a command and the ids of the artifacts it will make. Out: its exit code. Invariants: standard output stays free for
JSON; a stop that was asked for (Ctrl-C, SIGTERM) reaches the run, and it is waited for, because it may be writing a
checkpoint. Cost: one pipe on a terminal, nothing in a log.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

STOPPED = 130


def follow(command: Sequence[str], cwd: Path, node_ids: Sequence[str] = ()) -> int:
    """Exit code of a command whose output we pass on; 130 where the user stopped it."""
    if node_ids and sys.stderr.isatty():
        with _started(command, cwd, subprocess.PIPE) as child, _told_on(child) as stopped:
            _show(child, node_ids)
            code = child.wait()
    else:
        sys.stderr.flush()
        with _started(command, cwd, sys.stderr.fileno()) as child, _told_on(child) as stopped:
            code = child.wait()
    return STOPPED if stopped else code


def _started(command: Sequence[str], cwd: Path, out: int) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, cwd=cwd, env=env, stdout=out, stderr=subprocess.STDOUT, text=True, errors="replace"
    )


@contextmanager
def _told_on(child: subprocess.Popen[str]) -> Iterator[list[int]]:
    """Pass SIGTERM on; a Ctrl-C reaches the child by itself, being in our foreground group, and we wait for it."""
    asked: list[int] = []

    def tell(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if number == signal.SIGTERM or not any(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
            child.send_signal(number)

    before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(child: subprocess.Popen[str], node_ids: Sequence[str]) -> None:
    """Lines above, the bar below; a line `TIME part/name ran` or `... reused` moves it."""
    assert child.stdout
    left = set(node_ids)
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True, highlight=False), transient=True) as bar:
        task = bar.add_task(node_ids[0], total=len(node_ids))
        for line in child.stdout:
            bar.console.print(Text(line.rstrip("\n")), soft_wrap=True)
            words = line.split()
            if len(words) > 2 and words[1] in left and words[2] in ("ran", "reused"):
                left.discard(words[1])
                waiting = next((i for i in node_ids if i in left), "")
                bar.update(task, completed=len(node_ids) - len(left), description=waiting)
