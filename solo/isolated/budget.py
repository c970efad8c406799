"""How many requests a host gets at once and per second, over all workers of a machine.

In: a host. Out: a `with` block in which one request may be made. Invariants: requests of a host start at least
1 / rate apart and are at most `concurrency` at once, whichever thread or process makes them; a host that asked for a
pause (Retry-After) gets it from all. Hosts share SLOTS entries of a mapped file, so memory does not grow with the
list; two hosts in one entry wait for each other, which is only politer. Cost: two file locks a request.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SLOTS = 1 << 16
ENTRY = struct.Struct("<dq")  # wall time of the next start, requests under way
POLL_S = 0.02
MAX_PAUSE_S = 120.0


class Budget:
    """The budget of all hosts, in one file that the workers share."""

    def __init__(self, folder: str, concurrency: int | None, requests_per_s: float | None) -> None:
        self.concurrency = concurrency
        self.gap_s = 1 / requests_per_s if requests_per_s else 0.0
        self._file = os.open(Path(folder, f"hosts-{socket.gethostname()}"), os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self._file, SLOTS * ENTRY.size)
        self._map = mmap.mmap(self._file, SLOTS * ENTRY.size)
        self._threads = [threading.Lock() for _ in range(64)]  # file locks do not hold between threads

    @contextmanager
    def request(self, host: str, delay_s: float = 0.0) -> Iterator[None]:
        """Wait for the host's turn, then hold one of its places."""
        slot, gap_s = zlib.crc32(host.encode()) % SLOTS, max(self.gap_s, delay_s)
        if self.concurrency is None and not gap_s:
            self._wait_for_pause(slot)
            yield
            return
        while (wait_s := self._start(slot, gap_s)) is not None:
            time.sleep(wait_s)
        try:
            yield
        finally:
            with self._entry(slot) as (next_at, n_now):
                self._write(slot, next_at, max(n_now - 1, 0))

    def pause(self, host: str, seconds: float) -> None:
        """No request to this host starts before `seconds` from now."""
        slot = zlib.crc32(host.encode()) % SLOTS
        with self._entry(slot) as (next_at, n_now):
            self._write(slot, max(next_at, time.time() + min(seconds, MAX_PAUSE_S)), n_now)

    def _wait_for_pause(self, slot: int) -> None:
        next_at = ENTRY.unpack_from(self._map, slot * ENTRY.size)[0]
        if (left := next_at - time.time()) > 0:
            time.sleep(min(left, MAX_PAUSE_S))

    def _start(self, slot: int, gap_s: float) -> float | None:
        """None where the request may start now, else how long to wait before asking again."""
        with self._entry(slot) as (next_at, n_now):
            now = time.time()
            if next_at > now:
                return min(next_at - now, MAX_PAUSE_S) * random.uniform(1, 1.05)
            if self.concurrency is not None and n_now >= self.concurrency:
                return POLL_S * random.uniform(0.5, 1.5)
            self._write(slot, now + gap_s, n_now + 1)
            return None

    @contextmanager
    def _entry(self, slot: int) -> Iterator[tuple[float, int]]:
        with self._threads[slot % len(self._threads)]:
            at = slot * ENTRY.size
            fcntl.lockf(self._file, fcntl.LOCK_EX, ENTRY.size, at)
            try:
                yield ENTRY.unpack_from(self._map, at)
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN, ENTRY.size, at)

    def _write(self, slot: int, next_at: float, n_now: int) -> None:
        ENTRY.pack_into(self._map, slot * ENTRY.size, next_at, n_now)
