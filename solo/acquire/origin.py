"""A loopback static server that misbehaves as the open web does: for sample URL lists and for tests.

In: a folder of files, with an optional `routes.json` that gives single paths a behaviour. Out: an address to map a
host name to. Routes: {"status": 404} | {"redirect": "/path or URL"} | {"hang_s": 30} | {"content_type", "body"} |
{"file", "truncate_bytes"?, "headers"?}; every other path is a plain file below the folder, or 404.
Invariant: nothing outside the folder is served, and nothing listens on an address other than loopback.
"""

from __future__ import annotations

import json
import mimetypes
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit


class Origin:
    """A server on 127.0.0.1, on a free port, in a daemon thread, for as long as the `with` block lasts."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"origin {folder}: no such folder; give the folder that holds the files to serve")
        routes = folder / "routes.json"
        self.folder = folder.resolve()
        self.routes: dict[str, dict[str, Any]] = json.loads(routes.read_text("utf-8")) if routes.exists() else {}
        self.stopping = threading.Event()
        self._server: _Server | None = None

    @property
    def address(self) -> str:
        """`127.0.0.1:port` while the server runs."""
        assert self._server is not None, "the origin serves only inside its `with` block"
        return f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Origin:
        """Start serving."""
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.origin = self
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True, name="origin").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop serving; paths that hang let go."""
        assert self._server is not None
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256  # a full backlog costs a client one second, which reads as a time-out
    origin: Origin

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is what a hanging path is for."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        """Answer by route, else by file."""
        path = urlsplit(self.path).path
        origin = self.server.origin
        route = origin.routes.get(unquote(path), {})
        if "hang_s" in route:
            origin.stopping.wait(float(route["hang_s"]))
            self.close_connection = True
        elif "status" in route:
            self._send(int(route["status"]), b"", {})
        elif "redirect" in route:
            self._send(302, b"", {"Location": route["redirect"]})
        elif "body" in route:
            self._send(200, route["body"].encode(), {"Content-Type": route["content_type"]})
        else:
            self._file(route.get("file", unquote(path).lstrip("/")), route)

    def _file(self, name: str, route: Mapping[str, Any]) -> None:
        root = self.server.origin.folder
        path = (root / name).resolve()
        if not path.is_relative_to(root) or not path.is_file():
            self._send(404, b"", {})
            return
        body = path.read_bytes()[: route.get("truncate_bytes")]
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        self._send(200, body, {"Content-Type": kind, **route.get("headers", {})})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the fetch table says what was asked for."""
