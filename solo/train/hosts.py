"""Hosts: the other hosts of a stage, seen from the head, where its supervisor runs.

In: $SOLO_HOSTS and $SOLO_HEAD, or a hostfile; on each other host `solo join HEAD`, started by whoever places processes
(srun, a Kubernetes Job, ssh). Out: the ranks of every host in one rendezvous; what they say, in the head's `train.log`.
Invariants: the connection to a host is to it what the pipe to local ranks is to them, so a host whose head is gone
ends its ranks, and a host that is gone ends the stage with its name; hosts are numbered by name, not by arrival. No
scheduler: nothing here starts a process on another host. Cost: a read of each connection each 0.1 s.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import platform
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import psutil

from solo.artifact import CHECKOUT, CHUNK_BYTES, canonical, commit
from solo.train.hostfile import Client, Hostfile, start

DEFAULT_PORT = 29400
PACKAGES = ("torch", "deepspeed", "transformers", "numpy")
SETTINGS = ("SOLO_RECOMPUTE", "SOLO_TIMEOUT_S")  # of the head, for the ranks of every host
SAY_S = 10.0
HELLO_S = 5.0


@dataclass(frozen=True)
class Place:
    """What torchrun of one host must be told: which of the hosts it is, and where all of them meet."""

    index: int
    n_hosts: int
    master: str  # address of the head
    port: int
    address: str  # of this host

    def arguments(self) -> list[str]:
        """For torchrun's command line."""
        meet = ["--nnodes", str(self.n_hosts), "--node-rank", str(self.index)]
        meet += ["--master-addr", self.master, "--master-port", str(self.port)]
        return [*meet, "--local-addr", self.address]


def address_of(text: str, name: str) -> tuple[str, int]:
    """HOST or HOST:PORT as a pair."""
    host, _, port = text.rpartition(":") if ":" in text else (text, "", str(DEFAULT_PORT))
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(f"{name} is {text!r}; give the head's HOST or HOST:PORT, say node-0:{DEFAULT_PORT}")
    return host, int(port)


def count() -> int:
    """Those of $SOLO_HOSTFILE, else $SOLO_HOSTS, else 1."""
    if listed := Hostfile.from_env():
        return len(listed.names)
    asked = os.environ.get("SOLO_HOSTS", "1")
    if not (asked.isdigit() and int(asked) > 0):
        raise ValueError(f"SOLO_HOSTS is {asked!r}; give the number of hosts, 1 or more")
    if int(asked) > 1 and not os.environ.get("SOLO_HEAD"):
        raise ValueError(
            f"SOLO_HOSTS={asked} needs SOLO_HEAD=HOST:PORT, an address of this host at which the others `solo join` it"
        )
    return int(asked)


def code() -> dict[str, str]:
    """What must be the same on every host for their ranks to compute the same: our sources, packages, Python.

    Read anew for each stage, as ranks do: a `solo join` lives longer than a checkout stays as it is.
    """
    digest = hashlib.sha256()
    for path in sorted((CHECKOUT / "solo").rglob("*.py")):
        digest.update(path.relative_to(CHECKOUT / "solo").as_posix().encode() + b"\0" + path.read_bytes())
    found = {"sources": digest.hexdigest()[:12], "commit": commit(), "python": platform.python_version()}
    return found | {name: version(name) for name in PACKAGES}


def interface_of(address: str) -> str | None:
    """The network interface that has this address."""
    for name, own in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in own):
            return str(name)
    loopback = Path("/sys/class/net/lo").exists() and ipaddress.ip_address(address).is_loopback
    return "lo" if loopback else None  # which has all of 127.0.0.0/8 and lists one


def keep_alive(connection: socket.socket) -> None:
    """Let the kernel find out within half a minute that the other end lost its power."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


@dataclass
class Other:
    """One other host: its name, its connection, what is read of a line, and its exit code once it ended."""

    name: str
    connection: socket.socket
    rest: bytes = b""
    code: int | None = None

    def send(self, message: dict[str, Any]) -> None:
        """One line of JSON; a host that is gone is found out by `read`."""
        with suppress(OSError):
            self.connection.setblocking(True)
            self.connection.sendall(canonical(message) + b"\n")

    def read(self) -> bytes:
        """The whole lines that came."""
        self.connection.setblocking(False)
        gone = False
        with suppress(BlockingIOError):
            while not gone:
                try:
                    chunk = self.connection.recv(CHUNK_BYTES)
                except (ConnectionError, TimeoutError):
                    chunk = b""
                self.rest += chunk
                gone = not chunk
        whole, newline, self.rest = self.rest.rpartition(b"\n")
        for line in whole.split(b"\n"):
            if line.startswith(b'{"event":"ended"'):
                self.code = int(json.loads(line)["code"])
        if gone and self.code is None:
            self.code = -1
            fault = "gone, the connection to it ended before its ranks did; is the host up, was `solo join` killed?"
            whole += newline + canonical({"event": "failed", "host": self.name, "rank": None, "error": fault})
            newline = b"\n"
        return whole + newline


@dataclass
class Gang:
    """All other hosts of one stage."""

    others: list[Other] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)

    def launch(self, job_file: Path, *, ranks: int, device: str, root: Path) -> Place:
        """Tell every host to start its ranks; the head's own place."""
        master = self.others[0].connection.getsockname()[0]
        with socket.socket() as probe:
            probe.bind((master, 0))
            port = probe.getsockname()[1]
        asked: dict[str, Any] = {
            "do": "launch",
            "job": str(job_file.resolve()),
            "sha256": hashlib.sha256(job_file.read_bytes()).hexdigest(),
            "root": str(root),
            "ranks": ranks,
            "device": device,
            "code": code(),
            "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        }
        meet = {"n_hosts": len(self.others) + 1, "master": master, "port": port}
        for index, other in enumerate(self.others, 1):
            other.send(asked | {"place": meet | {"index": index, "address": other.connection.getpeername()[0]}})
        return Place(index=0, address=master, **meet)

    def read(self, log: IO[bytes]) -> None:
        """Copy what the hosts said to the log."""
        for other in self.others:
            if other.code is None and (said := other.read()):
                log.write(said)
                log.flush()

    def drained(self, log: IO[bytes]) -> bool:
        """Read once more; whether the ranks of every host have ended."""
        self.read(log)
        return self.over

    @property
    def over(self) -> bool:
        """Whether the ranks of every host have ended."""
        return all(other.code is not None for other in self.others)

    @property
    def failed(self) -> bool:
        """Whether those of a host ended as they should not."""
        return any(other.code for other in self.others)

    def stop(self) -> None:
        """Ask every host for a checkpoint and an end."""
        for other in self.others:
            if other.code is None:
                other.send({"do": "stop"})

    def close(self) -> None:
        """Let go of every host, which ends what still runs there."""
        for other in self.others:
            other.connection.close()
        for client in self.clients:
            client.process.terminate()
            client.process.wait()


def gather(n_hosts: int, wait_s: float, say: Callable[[str], None]) -> Gang:
    """The other hosts, once all of them have joined."""
    listed = Hostfile.from_env()
    head = address_of(os.environ.get("SOLO_HEAD") or (listed.names[0] if listed else ""), "SOLO_HEAD")
    where = f"{head[0]}:{head[1]}"
    gang, deadline, said_at = Gang(), time.monotonic() + wait_s, 0.0
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((_listened(head[0]), head[1]))
        except OSError as error:
            raise ValueError(f"SOLO_HEAD: cannot listen on {where} ({error}); give an address of this host") from None
        listener.listen()
        try:
            gang.clients += start(listed.names[1:], where) if listed else ()
            while len(gang.others) < n_hosts - 1:
                now = time.monotonic()
                joined = ", ".join(other.name for other in gang.others) or "none"
                if now > deadline:
                    raise ValueError(
                        f"{len(gang.others)} of {n_hosts - 1} other hosts joined {where} within {wait_s:.0f} s "
                        f"({joined}); run `solo join {where}` on each, or lower SOLO_HOSTS"
                    )
                for client in gang.clients:
                    client.check()
                if now - said_at > SAY_S:
                    said_at = now
                    say(f"waits for {n_hosts - 1 - len(gang.others)} more hosts to `solo join {where}`; here: {joined}")
                if select.select([listener], [], [], 0.2)[0] and (other := _greet(listener.accept()[0])):
                    gang.others.append(other)
        except BaseException:
            gang.close()
            raise
    gang.others.sort(key=lambda other: other.name)
    return gang


def _listened(name: str) -> str:
    """Where to listen for those who connect to a host name: everywhere, if only here it means the loopback.

    Debian gives a host's own name 127.0.1.1, at which no other host reaches it.
    """
    with suppress(OSError):
        address = socket.gethostbyname(name)
        if address.startswith("127.") and name not in (address, "localhost"):
            return ""
    return name


def _greet(connection: socket.socket) -> Other | None:
    """The host that connected, or nothing where it was something else that did."""
    keep_alive(connection)
    connection.settimeout(HELLO_S)
    with suppress(OSError, ValueError, KeyError, TypeError), connection.makefile("rb") as file:
        return Other(str(json.loads(file.readline(4096))["host"]), connection)
    connection.close()
    return None
