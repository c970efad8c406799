"""One GET of HTTP/1.1 over a socket, every part of the answer bounded in bytes and in time.

In: a connected socket. Out: status, headers, then the body when it is asked for. Invariants: headers are at most
HEAD_BYTES and MAX_HEADERS; no read outlasts the deadline, however slowly bytes drip; a body is at most what the caller
allows, also after its gzip or deflate coding; what two readers could understand differently is refused.
Cost: a fifth of http.client's time, most of which goes to its e-mail parser.
"""

from __future__ import annotations

import re
import socket
import ssl
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from solo.isolated.address import Target
from solo.isolated.rules import Failed, Rules

HEAD_BYTES = 1 << 16
MAX_HEADERS = 128
CHUNK_BYTES = 1 << 16
MAX_INTERIM = 5  # answers of status 1xx before the real one
STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5]\d\d)(?: [^\r\n]*)?")
FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?")
T = TypeVar("T")
NOT_HTTP = "the answer is not HTTP/1.1"


class Closed(Exception):
    """The other side closed before the first byte: what a connection that idled too long does."""


class Wire:
    """Bytes of a socket, buffered, each wait bounded by the time-out and by the deadline."""

    def __init__(self, sock: socket.socket, rules: Rules, deadline: float) -> None:
        self.sock, self.rules, self.deadline = sock, rules, deadline
        self.buffer = b""
        self.n_read = 0

    def send(self, data: bytes) -> None:
        """Send all of it."""
        self._bound()
        self._try(lambda: self.sock.sendall(data))

    def more(self) -> bytes:
        """The next bytes; empty at the end."""
        self._bound()
        data: bytes = self._try(lambda: self.sock.recv(CHUNK_BYTES))
        self.n_read += len(data)
        return data

    def line(self, limit: int) -> bytes:
        """Up to a line feed, which goes."""
        while (at := self.buffer.find(b"\n")) < 0:
            data = self.more()
            if not data or len(self.buffer) > limit:
                raise Failed("connection", None, NOT_HTTP)
            self.buffer += data
        found, self.buffer = self.buffer[:at], self.buffer[at + 1 :]
        return found.removesuffix(b"\r")

    def _bound(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise Failed("timeout", None, f"it took over {self.rules.deadline_s:g} s")
        self.sock.settimeout(min(self.rules.timeout_s, left))

    def _try(self, act: Callable[[], T]) -> T:
        try:
            return act()
        except TimeoutError:
            raise Failed("timeout", None, "no answer in time") from None
        except ssl.SSLError:
            raise Failed("connection", None, "TLS failed") from None
        except OSError:
            raise Failed("connection", None, "the connection broke") from None


class Response:
    """An answer whose body has not been read yet."""

    def __init__(self, wire: Wire, status: int, headers: list[tuple[str, str]], target: Target, keeps: bool) -> None:
        self.wire, self.status, self.headers = wire, status, headers
        self.place = (target.scheme, target.host, target.port)
        self.reusable = False
        self._keeps = keeps and "close" not in self.get("connection").lower()

    def get(self, name: str) -> str:
        """A header's values, joined by commas; empty where it is absent."""
        return ", ".join(value for key, value in self.headers if key == name)

    def body(self, limit: int, *, cut: bool = False) -> bytes:
        """The whole body, decoded; Failed where it is over `limit`, or its first `limit` bytes where it may be cut."""
        coding = self.get("content-encoding").strip().lower()
        if coding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise Failed("refused_encoding", self.status, "Content-Encoding is neither gzip nor deflate", coding[:40])
        gathered = bytearray()  # not a list: a body in chunks of one byte would take 50 times its size
        began, rules = time.monotonic(), self.wire.rules
        for part in self._parts(limit, cut):
            gathered += part
            if len(gathered) > limit and not cut:
                raise self._too_large(limit)
            if len(gathered) > limit:
                break
            now = time.monotonic()
            if now - began > rules.timeout_s and len(gathered) < (now - began) * rules.min_bytes_per_s:
                raise Failed("timeout", self.status, f"the body came at under {rules.min_bytes_per_s} bytes per s")
            if now > self.wire.deadline:
                raise Failed("timeout", self.status, f"it took over {rules.deadline_s:g} s")
        data = bytes(gathered)
        if coding not in ("", "identity"):
            data = self._inflate(data, limit, cut)
        return data[:limit]

    def stream(self) -> Iterator[bytes]:
        """The body as it comes, of any length and as it is stored: ranges are of stored bytes."""
        coding = self.get("content-encoding").strip().lower()
        if coding not in ("", "identity"):
            raise Failed("refused_encoding", self.status, "the body has a Content-Encoding", coding[:40])
        return self._parts(sys.maxsize, cut=False)

    def _too_large(self, limit: int) -> Failed:
        return Failed("too_large", self.status, f"the body is over {limit} bytes")

    def _inflate(self, data: bytes, limit: int, cut: bool) -> bytes:
        for window in (47, -15):  # gzip or zlib by its header; some servers' deflate has none
            unpack = zlib.decompressobj(window)
            try:
                out = unpack.decompress(data, limit + 1)
            except zlib.error:
                continue
            if len(out) > limit and not cut:
                raise self._too_large(limit)
            if unpack.eof or cut:
                return out
        raise Failed("refused_encoding", self.status, "the body is not in the coding it declares")

    def _parts(self, limit: int, cut: bool) -> Iterator[bytes]:
        if self.status in (204, 304):
            return
        transfer = self.get("transfer-encoding").strip().lower()
        lengths = {value.strip() for value in self.get("content-length").split(",")} - {""}
        if transfer == "chunked":
            yield from self._chunks()
        elif transfer:
            raise Failed("refused_encoding", self.status, "Transfer-Encoding is not chunked", transfer[:40])
        elif lengths:
            if len(lengths) > 1 or not re.fullmatch(r"[0-9]{1,18}", next(iter(lengths))):
                raise Failed("connection", self.status, "Content-Length is not one number")
            n_bytes = int(next(iter(lengths)))
            if n_bytes > limit and not cut:
                raise self._too_large(limit)
            yield from self._exactly(n_bytes)
        else:
            yield self._taken(len(self.wire.buffer))
            while data := self.wire.more():
                yield data
            return
        self.reusable = self._keeps and not self.wire.buffer

    def _taken(self, n: int) -> bytes:
        found, self.wire.buffer = self.wire.buffer[:n], self.wire.buffer[n:]
        return found

    def _exactly(self, n: int) -> Iterator[bytes]:
        while n > 0:
            if not self.wire.buffer:
                self.wire.buffer = self.wire.more()
                if not self.wire.buffer:
                    raise Failed("connection", self.status, "the body ended before its declared length")
            part = self._taken(n)
            n -= len(part)
            yield part

    def _chunks(self) -> Iterator[bytes]:
        while True:
            size = CHUNK_SIZE.fullmatch(self.wire.line(HEAD_BYTES))
            if size is None:
                raise Failed("connection", self.status, "a chunk has no size")
            n = int(size[1], 16)
            yield from self._exactly(n)
            if n == 0:
                break
            if self.wire.line(2):
                raise Failed("connection", self.status, "a chunk is longer than its size")
        n_trailing = 0
        while line := self.wire.line(HEAD_BYTES):
            n_trailing += len(line)
            if n_trailing > HEAD_BYTES:
                raise Failed("too_large", self.status, f"the headers are over {HEAD_BYTES} bytes")


@contextmanager
def closing(sock: socket.socket, who: str = "the connection broke") -> Iterator[None]:
    """What is said over a connection is to succeed; where it does not, the socket is closed, and `who` says who did."""
    try:
        yield
    except Closed:
        sock.close()
        raise Failed("connection", None, who) from None
    except BaseException:
        sock.close()
        raise


def ask(wire: Wire, target: Target, user_agent: str, more: Mapping[str, str] | None = None) -> Response:
    """Send a GET, with `more` headers; the answer up to the end of its headers."""
    given = "".join(f"{name}: {value}\r\n" for name, value in (more or {}).items())
    request = (
        f"GET {target.path} HTTP/1.1\r\nHost: {target.authority}\r\nUser-Agent: {user_agent}\r\n"
        f"Accept: image/*,*/*;q=0.5\r\nAccept-Encoding: identity\r\n{given}\r\n"
    )
    wire.send(request.encode("latin-1", "replace"))
    for _ in range(MAX_INTERIM + 1):
        status, headers, version = _head(wire)
        if status >= 200:
            return Response(wire, status, headers, target, version == b"1")
        if status == 101:
            break
    raise Failed("connection", None, NOT_HTTP)


def connect(wire: Wire, place: str, more: Mapping[str, str]) -> int:
    """Ask a proxy for a tunnel to `host:port`; the status of its answer."""
    given = "".join(f"{name}: {value}\r\n" for name, value in more.items())
    wire.send(f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n{given}\r\n".encode("latin-1", "replace"))
    status, _, _ = _head(wire)
    if wire.buffer:
        raise Failed("connection", status, "the proxy speaks before it is spoken to")
    return status


def _head(wire: Wire) -> tuple[int, list[tuple[str, str]], bytes]:
    raw, first = _head_bytes(wire), True
    headers: list[tuple[str, str]] = []
    match = None
    for line in raw.replace(b"\r\n", b"\n").split(b"\n"):
        if first:
            match, first = STATUS_LINE.fullmatch(line), False
            if match is None:
                raise Failed("connection", None, NOT_HTTP)
            continue
        text = line.decode("latin-1")
        if text[:1] in (" ", "\t") and headers:  # a folded line belongs to the header before it
            headers[-1] = (headers[-1][0], f"{headers[-1][1]} {text.strip()}")
            continue
        name, colon, value = text.partition(":")
        if colon and FIELD_NAME.fullmatch(name.strip()):
            headers.append((name.strip().lower(), value.strip()))
    assert match is not None
    if len(headers) > MAX_HEADERS:
        raise Failed("too_large", int(match[1]), f"there are over {MAX_HEADERS} headers")
    return int(match[1]), headers, raw[7:8]


def _head_bytes(wire: Wire) -> bytes:
    while True:
        ends = [(at, n) for mark, n in ((b"\r\n\r\n", 4), (b"\n\n", 2)) if (at := wire.buffer.find(mark)) >= 0]
        if ends:
            at, n = min(ends)
            head, wire.buffer = wire.buffer[:at], wire.buffer[at + n :]
            return head
        if len(wire.buffer) > HEAD_BYTES:
            raise Failed("too_large", None, f"the headers are over {HEAD_BYTES} bytes")
        data = wire.more()
        if not data and not wire.n_read:
            raise Closed
        if not data:
            raise Failed("connection", None, NOT_HTTP)
        wire.buffer += data
