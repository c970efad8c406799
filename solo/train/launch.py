"""Launch: the ranks of a stage as a process group of its own, followed to their end.

In: a job file, the ranks of each host. Out: the launcher's exit code. Invariants: a SIGTERM to this process reaches the
ranks of every host, which answer it with a checkpoint; none outlives this process, whatever ended it; where the ranks
of one host end, those of the others do within SETTLE_S twice. Cost: a look at the log each 0.1 s.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Literal

from solo.artifact import CHECKOUT
from solo.train import devices, hosts
from solo.train.hosts import Gang, Place
from solo.train.watch import Watch

log = logging.getLogger(__name__)

Device = Literal["cpu", "cuda"]
Ranks = subprocess.Popen[bytes]
GRACE_S = 20.0  # Prefect kills a run 30 s after it asked, and the ranks' checkpoint must be on disk before that
SETTLE_S = 5.0  # for the ranks of one host to end, and to say why, once those of another have
POLL_S = 0.1


class Interrupted(RuntimeError):
    """The stage was told to stop, and did; run it again and it goes on from its newest checkpoint."""


def core_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def timeout_s() -> float:
    """$SOLO_TIMEOUT_S, else what DeepSpeed waits."""
    asked = os.environ.get("SOLO_TIMEOUT_S", "1800")
    if not (asked.isdigit() and int(asked) > 0):
        raise ValueError(f"SOLO_TIMEOUT_S is {asked!r}; give whole seconds, 1 or more")
    return float(asked)


def environment(ranks: int, device: Device, place: Place | None = None) -> dict[str, str]:
    """What the ranks of one host run in."""
    path = os.pathsep.join(p for p in (str(CHECKOUT), os.environ.get("PYTHONPATH")) if p)
    env = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "SOLO_SUPERVISED": "1"}
    env["OMP_NUM_THREADS"] = str(max(1, core_count() // ranks))
    if device == "cpu":
        # Nothing is compiled on a CPU, yet DeepSpeed's optimizer check decorates Muon with torch.compile, which loads
        # inductor: 1.4 s of every start.
        env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
        # Else gloo resolves the host name, which containers may lack.
        if interface := hosts.interface_of(place.address if place else "127.0.0.1"):
            env.setdefault("GLOO_SOCKET_IFNAME", interface)
    elif "PYTORCH_CUDA_ALLOC_CONF" not in env:
        # Activations of a gigabyte come and go by the pack; between segments of fixed size they leave gaps as large.
        env.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if place:
        env["SOLO_HOST"] = f"{socket.gethostname()} ({place.address})"
    return env


def command(job_file: Path, ranks: int, place: Place | None = None) -> list[str]:
    """What starts the ranks of one host: torchrun, alone or in a rendezvous with other hosts."""
    where = place.arguments() if place else ["--standalone", "--local-addr", "127.0.0.1"]
    start = [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", str(ranks)]
    return [*start, "-m", "solo.train.rank", str(job_file)]


def run(job_file: Path, watch: Watch, *, ranks: int, device: Device, n_hosts: int, root: Path) -> int:
    """Exit code of the launcher on this host, `ranks` being those of each host."""
    with devices.held(watch.what, devices.names() if device == "cuda" else (), watch.progress) as locks:
        gang = hosts.gather(n_hosts, timeout_s(), watch.progress) if n_hosts > 1 else Gang()
        try:
            place = gang.launch(job_file, ranks=ranks, device=device, root=root) if n_hosts > 1 else None
            with watch.log.open("ab") as out:
                child = start(command(job_file, ranks, place), environment(ranks, device, place), out, locks)
                return _follow(child, watch, gang, out)
        finally:
            gang.close()


def start(command: Sequence[str], env: dict[str, str], out: IO[bytes] | int, locks: Sequence[int]) -> Ranks:
    """The launcher of this host's ranks, leader of a group, which holds the locks of their GPUs as we do.

    The ranks hold the other end of its input and exit when that closes, which the kernel does even after SIGKILL.
    """
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    return subprocess.Popen(
        command, stdin=pipe, stdout=out, stderr=both, env=env, start_new_session=True, pass_fds=locks
    )


def _follow(child: Ranks, watch: Watch, gang: Gang, out: IO[bytes]) -> int:
    """Exit code of the launcher, 1 where another host failed; the log of all hosts followed meanwhile."""
    grace_s = GRACE_S

    def look() -> bool:
        gang.read(out)
        watch.read()
        return child.poll() is None and not gang.failed and not watch.overdue

    try:
        while look():
            if watch.stop_asked():
                raise Interrupted("asked to stop")
            time.sleep(POLL_S)
        grace_s = SETTLE_S  # a checkpoint needs the ranks of every host
        _wait(lambda: look() or child.poll() is None or not gang.over, SETTLE_S)
        return child.returncode or int(gang.failed or watch.overdue)
    finally:
        gang.stop()
        _stop(child, grace_s, lambda: gang.read(out))
        _wait(lambda: not gang.drained(out), SETTLE_S)
        watch.read(quiet=True)


def _wait(pending: Callable[[], bool], limit_s: float) -> None:
    """Until nothing is pending any more, or the limit."""
    deadline = time.monotonic() + limit_s
    while pending() and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _stop(child: Ranks, grace_s: float, meanwhile: Callable[[], None]) -> None:
    """SIGTERM to the group, which its ranks answer with a checkpoint; SIGKILL to what is left after the grace."""
    assert child.stdin

    def alive() -> bool:
        meanwhile()
        return child.poll() is None

    try:
        if alive():
            os.killpg(child.pid, signal.SIGTERM)  # the launcher passes it on: each rank leads a session of its own
            _wait(alive, grace_s)
            if child.poll() is None:
                log.warning("the ranks did not end within %.0f s of SIGTERM; killed", grace_s)
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
