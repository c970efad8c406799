"""Gzipped: a gzip file read from any place, for tars that are published compressed.

In: a .gz or .tgz file, of one member or more. Out: bytes from any offset of what it unpacks to. Invariants: nothing is
unpacked to disk; a file that is cut short or damaged is `Damaged`, whose words name the place, and no byte behind it
is given; what unpacks to much is given in pieces. Cost: about 5 s for a GB unpacked; with `every_bytes` a state of 45
kB for so many bytes unpacked, from which a read behind them begins, else such a read begins anew.
"""

from __future__ import annotations

import tarfile
import zlib
from bisect import bisect_right
from pathlib import Path
from typing import Any

PIECE_BYTES = 256 << 10
BACK_BYTES = 64 << 10  # that are kept behind the place of reading: tarfile looks back at the padding of a member
GZIP = 16 + zlib.MAX_WBITS


class Damaged(tarfile.ReadError):
    """A gzip file that ends or breaks within its data."""


class Gzipped:
    """`read`, `seek` and `tell` of what a gzip file unpacks to, as tarfile needs them."""

    def __init__(self, path: Path, *, every_bytes: int = 0) -> None:
        self._file, self._every = path.open("rb"), every_bytes
        # Bytes unpacked, bytes of the file taken, how to go on.
        self._states: list[tuple[int, int, Any]] = [(0, 0, zlib.decompressobj(GZIP))]
        self._place = 0
        self._restart(*self._states[0])

    def __enter__(self) -> Gzipped:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._file.close()

    def tell(self) -> int:
        """The place of the next read."""
        return self._place

    def seek(self, place: int) -> int:
        """Read from there next; nothing is unpacked before."""
        self._place = place
        return place

    def read(self, n: int) -> bytes:
        """Up to `n` bytes, fewer at the end only."""
        near = self._states[bisect_right(self._states, self._place, key=lambda state: state[0]) - 1]
        if self._place < self._start or self._end < near[0]:
            self._restart(*near)
        while self._end <= self._place and self._unpack(BACK_BYTES):
            pass
        while self._end < self._place + n and self._unpack(self._end - self._place + BACK_BYTES):
            pass
        at = self._place - self._start
        found = bytes(memoryview(self._kept)[at : at + n]) if at >= 0 else b""
        self._place += len(found)
        return found

    @property
    def _end(self) -> int:
        return self._start + len(self._kept)

    def _restart(self, place: int, taken: int, state: Any) -> None:  # noqa: ANN401 - zlib's
        self._start, self._kept = place, bytearray()
        self._taken, self._packed = taken, b""
        self._state = state.copy()
        self._file.seek(taken)

    def _unpack(self, keep_bytes: int) -> bool:
        """Unpack one more piece, of what was kept keep so much; False at the end."""
        while True:
            if self._state.eof and not self._next_member():
                return False
            before = len(self._packed) or self._fetch()
            try:
                piece = self._state.decompress(self._packed, PIECE_BYTES)
            except zlib.error as error:
                raise Damaged(f"damaged before its byte {self._taken:,} ({error})") from None
            self._packed = self._state.unconsumed_tail or self._state.unused_data
            self._taken += before - len(self._packed)
            if piece:
                break
            if not before and not self._state.eof:
                raise Damaged(f"cut short after {self._taken:,} bytes, which unpack to {self._end:,}")
        drop = max(0, len(self._kept) - keep_bytes)
        del self._kept[:drop]
        self._start += drop
        self._kept += piece
        if self._every and self._end >= self._states[-1][0] + self._every and not self._state.eof:
            self._states.append((self._end, self._taken, self._state.copy()))
        return True

    def _fetch(self) -> int:
        self._packed = self._file.read(PIECE_BYTES)
        return len(self._packed)

    def _next_member(self) -> bool:
        """Whether more follows a member than zeros."""
        while not (rest := self._packed.lstrip(b"\0")):
            self._taken += len(self._packed)
            if not self._fetch():
                return False
        self._taken += len(self._packed) - len(rest)
        self._packed, self._state = rest, zlib.decompressobj(GZIP)
        return True
