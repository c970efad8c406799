"""Join: the ranks of one of several hosts, started and ended by the head of the stage.

In: the head's address; the data root, at the same path as on the head. Out: this host's ranks, what they print sent
to the head. Invariants: no rank starts unless code, packages, job and plan are the head's, each difference being an
error that names both sides; ranks end with the connection; SIGTERM here stops every host with a checkpoint. It serves
stage after stage until it is ended itself. Cost: a second's wait between two stages.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from solo import artifact
from solo.artifact import canonical
from solo.train import devices, hosts, launch

log = logging.getLogger(__name__)

RETRY_S = 1.0
SHARED_S = 10.0  # a network file system may show a new file this late
ONCE_S = 30.0
Say = Callable[[str], None]


class Refused(ValueError):
    """This host cannot run the head's job."""


def serve(head: str, address: str | None, *, once: bool = False, say: Say = log.info) -> None:
    """Serve the head's stages until SIGTERM; `once`: one stage, of a head that listens by now."""
    where = hosts.address_of(head, "HEAD")
    told = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        told.set()

    signal.signal(signal.SIGTERM, stop)
    say(f"waits for a stage of {where[0]}:{where[1]}")
    deadline = time.monotonic() + ONCE_S
    while not told.is_set():
        connection = _connect(where, address)
        if connection is None:
            if once and time.monotonic() > deadline:
                raise ValueError(f"nothing listens at {where[0]}:{where[1]} as seen from this host; look at SOLO_HEAD")
            told.wait(RETRY_S)
            continue
        with connection:
            _one_stage(connection, told, say)
        if once:
            return


def _connect(where: tuple[str, int], address: str | None) -> socket.socket | None:
    try:
        connection = socket.create_connection(where, timeout=RETRY_S, source_address=(address, 0) if address else None)
    except OSError:
        return None
    hosts.keep_alive(connection)
    connection.settimeout(None)
    return connection


def _one_stage(connection: socket.socket, told: threading.Event, say: Say) -> None:
    name = f"{socket.gethostname()} ({connection.getsockname()[0]})"
    with suppress(OSError), connection.makefile("rb") as messages:
        connection.sendall(canonical({"host": name}) + b"\n")
        while not select.select([messages], [], [], RETRY_S)[0]:
            if told.is_set():
                return
        line = messages.readline()
        if not line:
            return
        asked = json.loads(line)
        place = asked["place"]
        try:
            check(asked)
            say(f"{asked['ranks']} ranks of {asked['job']}, host {place['index'] + 1} of {place['n_hosts']}")
            what = json.loads(Path(asked["job"]).read_bytes())["stage"]["name"]
            with devices.held(f"train/{what}", devices.names() if asked["device"] == "cuda" else (), say) as locks:
                code = _run(connection, asked, told, locks)
            say(f"ranks of {asked['job']} ended with code {code}")
        except ValueError as error:
            connection.sendall(canonical({"event": "failed", "host": name, "rank": None, "error": str(error)}) + b"\n")
            connection.sendall(canonical({"event": "ended", "host": name, "code": 2}) + b"\n")
            if isinstance(error, Refused):
                raise
            say(f"error: {error}")


def check(asked: dict[str, Any]) -> None:
    """Refuse what would not train the head's numbers, or would write beside it."""
    own, theirs = hosts.code(), asked["code"]
    if own["sources"] != theirs["sources"]:
        raise Refused(
            f"its code is not the head's: commit {own['commit']} (sources {own['sources']}) != {theirs['commit']} "
            f"(sources {theirs['sources']}); check out one commit on every host"
        )
    for package in ("python", *hosts.PACKAGES):
        if own[package] != theirs[package]:
            raise Refused(f"{package} is {own[package]}, on the head {theirs[package]}; install one of them on both")
    job, shared = Path(asked["job"]), f"the data root {asked['root']} must be one shared folder, at the same path"
    deadline = time.monotonic() + SHARED_S
    while not job.is_file():
        if time.monotonic() > deadline:
            raise Refused(f"{job} is not there; {shared}")
        time.sleep(0.1)
    raw = job.read_bytes()
    if hashlib.sha256(raw).hexdigest() != asked["sha256"]:
        raise Refused(f"{job} is not the head's; {shared}")
    task = json.loads(raw)
    plan = artifact.read_manifest(Path(task["plan"]))
    digest, fault = plan.digest if plan else "none", artifact.damage(Path(task["plan"]))
    if digest != task["plan_digest"] or fault:
        why = fault or f"its digest is {digest[:12]}, on the head {task['plan_digest'][:12]}"
        raise Refused(f"{task['plan']}: the pack plan is not the head's, {why}; {shared}")
    n_gpus = len(devices.names())
    if asked["device"] == "cuda" and n_gpus < asked["ranks"]:
        raise Refused(f"{n_gpus} GPUs are visible, the head has {asked['ranks']} ranks a host; set SOLO_RANKS there")


def _run(connection: socket.socket, asked: dict[str, Any], told: threading.Event, locks: Sequence[int]) -> int:
    """Exit code of this host's ranks, sent to the head after all they said."""
    place = hosts.Place(**asked["place"])
    env = launch.environment(asked["ranks"], asked["device"], place) | asked["settings"]
    child = launch.start(launch.command(Path(asked["job"]), asked["ranks"], place), env, subprocess.PIPE, locks)
    assert child.stdin and child.stdout
    sender = threading.Thread(target=_pass_on, args=(child, connection, env["SOLO_HOST"]), daemon=True)
    sender.start()
    try:
        asked_to_stop = False
        while sender.is_alive():
            if told.is_set() and not asked_to_stop:
                asked_to_stop = True
                _signal(child, signal.SIGTERM)
            if select.select([connection], [], [], launch.POLL_S)[0]:
                said = connection.recv(4096)
                if not said:
                    log.error("the head is gone; its ranks here are ended")
                    break
                _signal(child, signal.SIGTERM)  # the head says one thing only, to stop
    finally:
        _signal(child, signal.SIGKILL)  # its ranks follow, for their launcher and their pipe are gone
        child.stdin.close()
        code = child.wait()
        sender.join()
    return code


def _signal(child: launch.Ranks, number: signal.Signals) -> None:
    if child.poll() is None:
        os.killpg(child.pid, number)


def _pass_on(child: launch.Ranks, connection: socket.socket, name: str) -> None:
    """Every line of the ranks to the head, and then their exit code."""
    assert child.stdout
    for line in child.stdout:
        with suppress(OSError):  # the head is gone: read on, so that no rank waits for us
            connection.sendall(line if line.endswith(b"\n") else line + b"\n")
    with suppress(OSError):
        connection.sendall(canonical({"event": "ended", "host": name, "code": child.wait()}) + b"\n")


def main(head: str, address: str | None, *, once: bool) -> None:
    """`solo join`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        serve(head, address, once=once)
    except KeyboardInterrupt:
        sys.exit(130)
