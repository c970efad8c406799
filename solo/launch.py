"""Launch: the ranks of a stage as a process group of its own, followed to their end.

In: a command and its environment. Out: its exit code. Invariants: a SIGTERM to this process reaches the ranks, which
answer it with a checkpoint; no process outlives this one, whatever ended it. Cost: a look at the log each 0.1 s.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Literal

from solo.watch import Watch

log = logging.getLogger(__name__)

Device = Literal["cpu", "cuda"]
REPOSITORY = Path(__file__).parents[1]
GRACE_S = 20.0  # Prefect kills a run 30 s after it asked, and the ranks' checkpoint must be on disk before that
POLL_S = 0.1


class Interrupted(RuntimeError):
    """The stage was told to stop, and did; run it again and it goes on from its newest checkpoint."""


def core_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def environment(ranks: int, device: Device) -> dict[str, str]:
    """What the ranks of one host run in."""
    path = os.pathsep.join(p for p in (str(REPOSITORY), os.environ.get("PYTHONPATH")) if p)
    env = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "SOLO_SUPERVISED": "1"}
    env["OMP_NUM_THREADS"] = str(max(1, core_count() // ranks))
    if device == "cpu":
        # Nothing is compiled on a CPU, yet DeepSpeed's optimizer check decorates Muon with torch.compile, which loads
        # inductor: 1.4 s of every start.
        env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
        if Path("/sys/class/net/lo").exists():
            env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo resolves the host name, which containers may lack
    return env


def follow(command: Sequence[str], env: dict[str, str], watch: Watch) -> int:
    """Exit code of the launcher, its log followed meanwhile."""
    with watch.log.open("ab") as out:
        # The ranks hold the other end of this pipe and exit when it closes, which the kernel does even after SIGKILL.
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
    try:
        while child.poll() is None:
            watch.read()
            time.sleep(POLL_S)
        watch.read()
        return child.returncode
    finally:
        _stop(child)
        watch.read(quiet=True)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the group, which its ranks answer with a checkpoint; SIGKILL to what is left after the grace."""
    assert child.stdin
    try:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGTERM)  # the launcher passes it on: each rank leads a session of its own
            child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        log.warning("the ranks did not end within %.0f s of SIGTERM; killed", GRACE_S)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        child.stdin.close()


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Turn a SIGTERM that would end this process on the spot into `Interrupted`; a handler set by others stays."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted("SIGTERM")

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
