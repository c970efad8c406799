"""One published file to disk: from where it was, checked while it is written, under its name only when it is right.

In: a file, what opens it from any byte on, a path. Out: the file at that path, and its SHA-256. Invariants: killed at
any byte, the next call goes on from there (what lies on disk is hashed again first); a file that changed at its
publisher is an error that names it; a transient cause is tried again TRIES times, with growing random pauses, from the
last byte that came, a terminal one never. Cost: one pass; memory holds one block.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from solo.acquire.patience import TRANSIENT, TRIES, Stopped, pause, remedy
from solo.acquire.published import Answer, File, Opener
from solo.artifact import CHUNK_BYTES, write_atomic
from solo.estimate_text import size
from solo.isolated.rules import Failed

GAIN_BYTES = 1 << 20  # that an attempt must bring not to count as one that failed
RATE_S, RATE_BYTES = 30.0, 30 << 10  # a connection that brings less in this time is given up for another
SPARE_BYTES = 256 << 20  # of the disk, that stay free
ROOM_EVERY_BYTES = 64 << 20
ALTERED = ("http_404", "hash_mismatch")


class Broken(ValueError):
    """A file cannot be had as it is pinned; the text says why, and what to do."""


class Later(Broken):
    """It cannot be had now; nothing that is known of it is wrong."""


class Half:
    """What is there of a file, its hash so far, and what its publisher said of it."""

    def __init__(self, path: Path, file: File) -> None:
        self.path, self.file = path.with_name(path.name + ".part"), file
        self.said = path.with_name(path.name + ".part.json")
        self.n = 0
        self.total: int | None = None
        self.stamp: str | None = None
        self.kept = False  # whether bytes of an earlier connection are in it
        self._fresh()
        try:
            said = json.loads(self.said.read_text())
            self.total, self.stamp = said["total"], said["stamp"]
            with self.path.open("rb") as part:
                while chunk := part.read(CHUNK_BYTES):
                    self._hash(chunk)
        except (OSError, ValueError, KeyError, TypeError):
            self.restart()
        self.kept = self.n > 0

    def _fresh(self) -> None:
        self._sha256 = hashlib.sha256()
        self._git = hashlib.sha1(f"blob {self.file.size}\0".encode(), usedforsecurity=False)

    def _hash(self, data: bytes) -> None:
        self._sha256.update(data)
        if self.file.git:
            self._git.update(data)
        self.n += len(data)

    def restart(self) -> None:
        """Forget all of it."""
        self.n, self.total, self.stamp, self.kept = 0, None, None, False
        self._fresh()
        self.path.unlink(missing_ok=True)
        self.said.unlink(missing_ok=True)

    def begin(self, answer: Answer) -> None:
        """Keep what the publisher says, before the first byte."""
        if (self.total, self.stamp) != (answer.total, answer.stamp) or not self.said.exists():
            self.total, self.stamp = answer.total, answer.stamp
            write_atomic(self.said, json.dumps({"total": self.total, "stamp": self.stamp}).encode())

    def add(self, out: IO[bytes], data: bytes) -> None:
        """The next bytes."""
        out.write(data)
        self._hash(data)

    @property
    def sha256(self) -> str:
        """Of what is there."""
        return self._sha256.hexdigest()

    def wrong(self) -> str | None:
        """How what is there differs from what is pinned."""
        file = self.file
        if file.size is not None and self.n != file.size:
            return f"it has {self.n} bytes, {file.size} are listed"
        if file.sha256 and self.sha256 != file.sha256:
            return f"it has sha256 {self.sha256}, {file.sha256} is pinned"
        if file.git and self._git.hexdigest() != file.git:
            return f"it has the git id {self._git.hexdigest()}, {file.git} is pinned"
        return None

    def finish(self, path: Path) -> None:
        """Give it its name."""
        with self.path.open("ab") as out:
            os.fsync(out.fileno())
        self.path.replace(path)
        self.said.unlink(missing_ok=True)


def fetch(
    file: File, opened: Opener, path: Path, *, what: str, stop: threading.Event, told: Callable[[int], None]
) -> str:
    """The file at `path`, and its SHA-256; `what` names it in errors, `told` is called with the bytes gained."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = Half(path, file)
    told(half.n)
    failures, anew = 0, False
    while True:
        before = half.n
        try:
            _go_on(half, opened, what, stop, told)
        except Failed as failed:
            if failed.status not in TRANSIENT:
                if failed.status == "hash_mismatch":
                    half.restart()
                mend = file.amiss if file.amiss and failed.status in ALTERED else remedy(failed)
                raise Broken(f"{what}: {failed.detail}; {mend}") from None
            failures = 1 if half.n - before >= GAIN_BYTES else failures + 1
            if failures >= TRIES:
                here = f"run again, it goes on from {size(half.n)}"
                raise Later(f"{what}: {failed.detail}, {TRIES} times in a row; {here}") from None
            pause(failed, failures, stop)
            continue
        wrong = half.wrong()
        if wrong is None:
            half.finish(path)
            return half.sha256
        joined = half.kept and not anew
        told(-half.n)
        half.restart()
        anew = True  # what was put together of several connections gets one try more, in one piece if that can be
        if not joined:
            mend = file.amiss or "fetch it from where the pinned bytes are, or correct the pin"
            raise Broken(f"{what}: {wrong}; {mend}")


def _go_on(half: Half, opened: Opener, what: str, stop: threading.Event, told: Callable[[int], None]) -> None:
    """One connection: bytes from where the file is to its end, or Failed."""
    if half.total is not None and half.n == half.total:
        return  # killed between the last byte and the name
    answer = opened(half.file, half.n, half.stamp)
    try:
        _check(half, answer, what, told)
        half.kept = half.kept or half.n > 0
        half.begin(answer)
        room(half.path.parent, max((answer.total or 0) - half.n, 0), what)
        began, gained, n_room = time.monotonic(), 0, 0
        with half.path.open("ab") as out:
            for data in answer.parts:
                if stop.is_set():
                    raise Stopped
                half.add(out, data)
                told(len(data))
                gained, n_room = gained + len(data), n_room + len(data)
                if answer.total is not None and half.n > answer.total:
                    raise _dropped(half, told, f"{what}: more bytes come than the {answer.total} that were announced")
                if n_room > ROOM_EVERY_BYTES:
                    n_room = 0
                    room(half.path.parent, 0, what)
                if (now := time.monotonic()) - began > RATE_S:
                    if gained < RATE_BYTES:
                        raise Failed("timeout", None, f"it comes at under {RATE_BYTES / RATE_S:.0f} bytes per s")
                    began, gained = now, 0
    finally:
        answer.close()
    if answer.total is not None and half.n < answer.total:
        raise Failed("connection", None, f"the body ended at byte {half.n} of {answer.total}")


def _check(half: Half, answer: Answer, what: str, told: Callable[[int], None]) -> None:
    """Refuse an answer about another file than the one that is half there; start again where it has no ranges."""
    again = "run again to fetch it as it is now, and see whether its pin still holds"
    for name, was, now in (("length", half.total, answer.total), ("ETag or date", half.stamp, answer.stamp)):
        if half.n and was is not None and now is not None and was != now:
            raise _dropped(
                half, told, f"{what}: it changed at its publisher, its {name} was {was} and is {now}; {again}"
            )
    listed = half.file.size
    if listed is not None and answer.total is not None and answer.total != listed:
        mend = half.file.amiss or "correct the pin"
        raise _dropped(half, told, f"{what}: its server announces {answer.total} bytes, {listed} are listed; {mend}")
    if answer.start != half.n:
        told(-half.n)
        half.restart()


def _dropped(half: Half, told: Callable[[int], None], text: str) -> Broken:
    told(-half.n)
    half.restart()
    return Broken(text)


def room(folder: Path, n_bytes: int, what: str) -> None:
    """Raise where the disk cannot take so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes + SPARE_BYTES:
        raise Later(
            f"{what}: {size(n_bytes)} are to come, and {size(SPARE_BYTES)} stay free; {folder} has {size(free)}; "
            "make room, or set SOLO_ROOT to a larger disk"
        )
