"""A web server on the loopback that serves files as the web does: with ranges or without, cut, slow, lying, changing.

Also a stand-in for the Hugging Face hub: the listing, the resolve address and its redirect to a store, as the real
client asks for them.
"""

from __future__ import annotations

import hashlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PIECE = 16 << 10


@dataclass
class How:
    """How one path is served."""

    ranges: bool = True
    etag: str | None = ""  # "": of the content; None: none, and no date
    statuses: list[tuple[int, dict[str, str]]] = field(default_factory=list)  # before the first good answer
    redirect: str | None = None
    cuts: list[int] = field(default_factory=list)  # bytes of a body, then its connection breaks; one for each answer
    length: int | None = None  # what Content-Length says instead of the truth; -1: nothing
    total: int | None = None  # what Content-Range says is the length of all
    encoding: str | None = None
    hold: threading.Event | None = None  # after half of the body, until it is set
    bytes_per_s: float | None = None
    shift: int = 0  # the range sent begins so many bytes later than the one asked for


class Site:
    """Files by path, how each is served, and what was asked."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.how: dict[str, How] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.sent: dict[str, int] = {}  # body bytes by path
        self.port = 0
        self.hub: Hub | None = None
        self.tunnels: dict[str, int] = {}  # `host:port` -> port of this machine, where the site is a proxy

    def ranges(self, path: str) -> list[str | None]:
        return [headers.get("range") for asked, headers in self.asked if asked == path]


@dataclass
class Hub:
    """Repositories: name -> commit -> path -> bytes; files of `lfs` suffixes lie in a store of their own."""

    repositories: dict[str, dict[str, dict[str, bytes]]]
    lfs: tuple[str, ...] = (".parquet", ".tar")
    token: str | None = None  # that is wanted
    page: int = 2  # files of a page of the listing
    store: str = ""  # URL the store is redirected to

    def tree(self, repository: str, commit: str, folder: str, cursor: int) -> tuple[list[dict[str, Any]], bool] | None:
        files = self.repositories[repository].get(commit)
        if files is None:
            return None
        names = [n for n in sorted(files) if not folder or n.startswith(folder + "/")]
        entries = [self._entry(name, files[name]) for name in names[cursor : cursor + self.page]]
        if not cursor:
            entries.insert(0, {"type": "directory", "path": folder or "x", "oid": "0" * 40, "size": 0})
        return entries, cursor + self.page < len(names)

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": name, "oid": oid, "size": len(data)}
        if name.endswith(self.lfs):
            sha256 = hashlib.sha256(data).hexdigest()
            entry |= {"oid": "1" * 40, "lfs": {"oid": sha256, "size": len(data), "pointerSize": 130}}
        return entry


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        self.site.asked.append((path, {name.lower(): value for name, value in self.headers.items()}))
        if self.site.hub and path.startswith(("/api/", "/datasets/")):
            return self._hub(path, parse_qs(parts.query))
        how = self.site.how.get(path, How())
        if how.statuses:
            return self._empty(*how.statuses.pop(0))
        if how.redirect:
            return self._empty(302, {"Location": how.redirect})
        if path not in self.site.files:
            return self._empty(404, {})
        self._send(path, self.site.files[path], how)

    def do_CONNECT(self) -> None:
        """A tunnel to wherever the test says that host is, as a proxy makes it."""
        self.site.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        to = self.site.tunnels.get(self.path)
        if to is None:
            return self._empty(403, {})
        self.send_response(200)
        self.end_headers()
        with socket.create_connection(("127.0.0.1", to)) as there:
            forth = threading.Thread(target=_pump, args=(self.connection, there), daemon=True)
            forth.start()
            _pump(there, self.connection)
        self.close_connection = True

    def _empty(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send(self, path: str, data: bytes, how: How) -> None:
        etag = f'"{hashlib.sha256(data).hexdigest()[:12]}"' if how.etag == "" else how.etag
        start, status, end = 0, 200, len(data)
        asked = self.headers.get("Range", "")
        if how.ranges and asked and self.headers.get("If-Range", etag) == etag:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first) + how.shift, min(int(last) + 1 if last else len(data), len(data))
            status = 206 if start < len(data) else 416
        total = len(data) if how.total is None else how.total
        if status == 416:
            return self._empty(416, {"Content-Range": f"bytes */{total}"})
        body = data[start:end]
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{total}")
        if etag is not None:
            self.send_header("ETag", etag)
        if how.encoding:
            self.send_header("Content-Encoding", how.encoding)
        if how.length != -1:
            self.send_header("Content-Length", str(len(body) if how.length is None else how.length))
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        self._body(path, body, how)

    def _body(self, path: str, body: bytes, how: How) -> None:
        one_byte = self.headers.get("Range") == "bytes=0-0"  # a look at the headers is no download
        limit = min(how.cuts.pop(0), len(body)) if how.cuts and not one_byte else len(body)
        for at in range(0, limit, PIECE):
            if how.hold is not None and at >= len(body) // 2:
                how.hold.wait(30)
            piece = body[at : min(at + PIECE, limit)]
            try:
                self.wfile.write(piece)
            except OSError:
                return
            self.site.sent[path] = self.site.sent.get(path, 0) + len(piece)
            if how.bytes_per_s:
                time.sleep(len(piece) / how.bytes_per_s)
        if limit < len(body):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _hub(self, path: str, query: dict[str, list[str]]) -> None:
        hub = self.site.hub
        assert hub is not None
        parts = path.strip("/").split("/")
        repository = "/".join(parts[2:4] if parts[0] == "api" else parts[1:3])
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._empty(401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        elif repository not in hub.repositories:
            self._empty(404, {"X-Error-Code": "RepoNotFound"})
        elif parts[0] != "api":
            self._resolve(hub.repositories[repository][parts[4]], "/".join(parts[5:]))
        elif len(parts) == 4:
            self._json({"id": repository, "sha": list(hub.repositories[repository])[-1]})
        elif parts[4] == "revision" and parts[5] in hub.repositories[repository]:
            self._json({"id": repository, "sha": parts[5]})
        elif parts[4] == "revision":
            self._empty(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            self._tree(repository, parts[5], "/".join(parts[6:]), int(query.get("cursor", ["0"])[0]))

    def _tree(self, repository: str, commit: str, folder: str, cursor: int) -> None:
        assert self.site.hub is not None
        found = self.site.hub.tree(repository, commit, folder, cursor)
        if found is None:
            return self._empty(404, {"X-Error-Code": "RevisionNotFound"})
        entries, more = found
        if len(entries) <= 1 and not cursor:
            return self._empty(404, {"X-Error-Code": "EntryNotFound"})
        here = f"http://127.0.0.1:{self.site.port}{urlsplit(self.path).path}"
        after = f"{here}?recursive=true&cursor={cursor + self.site.hub.page}"
        self._json(entries, {"Link": f'<{after}>; rel="next"'} if more else {})

    def _resolve(self, files: dict[str, bytes], name: str) -> None:
        assert self.site.hub is not None
        data = files.get(name)
        if data is None:
            self._empty(404, {"X-Error-Code": "EntryNotFound"})
        elif name.endswith(self.site.hub.lfs):
            to = f"/store/{hashlib.sha256(data).hexdigest()}"
            self.site.files.setdefault(to, data)
            self._empty(302, {"Location": f"{self.site.hub.store}{to}?Signature=signed-secret"})
        else:
            self._send(f"/{name}", data, self.site.how.get(f"/{name}", How()))

    def _json(self, value: object, headers: dict[str, str] | None = None) -> None:
        self._empty(200, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode())


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(PIECE):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


@contextmanager
def serving(site: Site, certificate: Path | None = None) -> Iterator[Site]:
    """The site on a port of 127.0.0.1; https where there is a certificate with its key."""
    handler = type("Served", (Handler,), {"site": site})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    site.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
