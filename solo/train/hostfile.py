"""Hostfile: DeepSpeed's list of hosts, each of the others made to `solo join` this one by ssh.

In: $SOLO_HOSTFILE, lines `HOST slots=N`, this host first; $SOLO_SSH. Out: one client process for each other host, whose
end before its host joined is an error with its last words. Invariant: nothing but the start goes through ssh, so what
ssh does to signals, terminals and buffers does not matter. Cost: one client for each host, while a stage runs.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from solo.artifact import CHECKOUT

LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*")
SSH = "ssh -o BatchMode=yes"  # a question for a password would wait for ever


@dataclass(frozen=True)
class Hostfile:
    """Hosts by name, the head first, and the ranks that each has."""

    names: tuple[str, ...]
    slots: int

    @classmethod
    def from_env(cls) -> Hostfile | None:
        """That of $SOLO_HOSTFILE; every host has as many slots."""
        asked = os.environ.get("SOLO_HOSTFILE")
        if not asked:
            return None
        try:
            lines = Path(asked).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ValueError(f"SOLO_HOSTFILE: {asked} cannot be read ({error.strerror})") from None
        found: dict[str, int] = {}
        for number, line in enumerate(lines, 1):
            if not (told := line.partition("#")[0].strip()):
                continue
            match = LINE.fullmatch(told)
            if not match or not int(match[2]) or match[1] in found:
                raise ValueError(f"{asked}:{number}: {line!r} is not a line `HOST slots=N` with a host of its own")
            found[match[1]] = int(match[2])
        if len(set(found.values())) != 1:
            raise ValueError(f"{asked}: {found or 'no host'}; give every host as many slots, one host at least")
        return cls(tuple(found), next(iter(found.values())))


@dataclass(frozen=True)
class Client:
    """The ssh that makes a host join."""

    name: str
    process: subprocess.Popen[str]

    def check(self) -> None:
        """An error where it has ended."""
        code = self.process.poll()
        if code is not None:
            assert self.process.stderr
            last = self.process.stderr.read().strip().splitlines()[-1:] or ["it said nothing"]
            raise ValueError(f"host {self.name}: `solo join` could not be started by ssh, code {code}: {last[0]}")


def start(names: Sequence[str], head: str) -> list[Client]:
    """Make these hosts join the head for one stage, in a checkout and with a Python at the paths of this one."""
    remote = shlex.join([sys.executable, "-m", "solo.cli", "join", head, "--once"])
    command = shlex.split(os.environ.get("SOLO_SSH") or SSH)
    clients = []
    for name in names:
        given = [*command, name, f"cd {shlex.quote(str(CHECKOUT))} && exec {remote}"]
        process = subprocess.Popen(
            given,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        clients.append(Client(name, process))
    return clients
