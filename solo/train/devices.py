"""Devices: one training or evaluation on a GPU at a time, host by host.

In: the GPUs a stage or a benchmark will use. Out: a kernel lock on each, for as long as the stage's launcher or its
supervisor lives, or the benchmark is answered.
Invariants: a lock ends with its last holder, also after SIGKILL; locks are taken in one order, so two stages that wait
never wait for each other; whoever is refused is told who holds the GPU. Cost: one file a GPU in $SOLO_LOCKS.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

WAIT_S = 2.0
SAY_S = 60.0


def names() -> list[str]:
    """The GPUs this process may use: CUDA_VISIBLE_DEVICES where set, else the numbers of the device files."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    return sorted(p.name.removeprefix("nvidia") for p in Path("/dev").glob("nvidia[0-9]*"))


def wait_s() -> float:
    """$SOLO_GPU_WAIT_S: how long a stage waits for GPUs that another has; 0, so not at all, if unset."""
    asked = os.environ.get("SOLO_GPU_WAIT_S", "0")
    if not asked.isdigit():
        raise ValueError(f"SOLO_GPU_WAIT_S is {asked!r}; give whole seconds, 0 or more")
    return float(asked)


@contextmanager
def held(what: str, gpus: Sequence[str], say: Callable[[str], None]) -> Iterator[tuple[int, ...]]:
    """Hold these GPUs for `what`; yields the locks' descriptors, which a child that is given them holds too."""
    deadline, said_at, limit_s = time.monotonic() + wait_s(), -SAY_S, wait_s()
    numbers = _numbers()
    with ExitStack() as stack:
        found: list[int] = []
        for gpu in sorted({numbers.get(name, name) for name in gpus}):
            handle = _open(gpu)
            stack.callback(os.close, handle)
            while not _locked(handle):
                holder = f"GPU {gpu} is held by {_holder(handle)}"
                now = time.monotonic()
                if now >= deadline:
                    raise ValueError(
                        f"{what}: {holder}; stop that, choose others with CUDA_VISIBLE_DEVICES, or wait for it with "
                        f"SOLO_GPU_WAIT_S (now {limit_s:.0f})"
                    )
                if now - said_at >= SAY_S:
                    said_at = now
                    say(f"{what}: waits, {holder}")
                time.sleep(min(WAIT_S, deadline - now))
            _write(handle, {"what": what, "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")})
            stack.callback(_write, handle, None)
            found.append(handle)
        yield tuple(found)


def _numbers() -> dict[str, str]:
    """UUID -> number of the device file, so that one GPU has one lock whatever it is called."""
    found = {}
    for path in Path("/proc/driver/nvidia/gpus").glob("*/information"):
        told = dict(re.findall(r"^(GPU UUID|Device Minor):\s*(\S+)", path.read_text(), re.MULTILINE))
        if len(told) == 2:
            found[told["GPU UUID"]] = told["Device Minor"]
    return found


def _open(gpu: str) -> int:
    """The lock file of a GPU, shared by all users of this host."""
    folder = Path(os.environ.get("SOLO_LOCKS") or Path(tempfile.gettempdir()) / "solo-locks")
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o1777)
    path = folder / f"gpu-{re.sub(r'[^A-Za-z0-9-]', '_', gpu)}"
    with suppress(FileExistsError):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        os.fchmod(handle, 0o666)  # whatever the umask: the next holder may be another user
        return handle
    return os.open(path, os.O_RDWR | os.O_NOFOLLOW)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write(handle: int, holder: dict[str, object] | None) -> None:
    os.ftruncate(handle, 0)
    if holder:
        os.pwrite(handle, json.dumps(holder).encode(), 0)


def _holder(handle: int) -> str:
    try:
        told = json.loads(os.pread(handle, 4096, 0))
        return f"{told['what']}, pid {told['pid']}, since {told['since']}"
    except (ValueError, KeyError, TypeError):
        return "one that has just begun or ended"
