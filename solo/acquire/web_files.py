"""Files on web servers, by ranged requests under the same guard as URL lists.

In: an http(s) location and the names below it. Out: files with their sizes, and bytes from any place on. Invariants:
only http and https; every hop of a redirect, at most MAX_REDIRECTS, is resolved and checked anew and connects to the
checked address, or to the environment's proxy; a header with a secret goes to the origin it is for and to no other; no
message holds a query. Cost: a connection for each request.
"""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from urllib.parse import quote, urljoin

from solo.acquire import proxy
from solo.acquire.location import Asked
from solo.acquire.patience import ONCE_S, Busy, patiently, remedy
from solo.acquire.published import Answer, File, Opener
from solo.isolated import address, http1
from solo.isolated.address import Target
from solo.isolated.rules import Failed, Rules
from solo.isolated.web import MAX_REDIRECTS, REDIRECTS, answered, retry_after, secured

AGENT = "solo-recipe/1 (archive download)"
WAIT_S = 30.0  # for a connection, and for the next bytes of one
REQUEST_S = 3_600.0  # then a file goes on over another connection
LOOKS_AT_ONCE = 8
RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")


class Client:
    """Ranged GETs under one set of rules; threads may share it."""

    def __init__(self, rules: Rules, secret: Mapping[str, str] | None = None) -> None:
        """`secret`: headers for the first origin of a request alone."""
        self.rules, self.secret = rules, dict(secret or {})
        self._resolver = address.Resolver(rules)
        self._tls = ssl.create_default_context()

    def open(self, url: str, start: int, stamp: str | None, *, end: int | None = None) -> Answer:
        """The bytes of a URL from `start` on (to `end`, for a look at its headers), unless it changed since `stamp`."""
        headers = {"Range": f"bytes={start}-{'' if end is None else end}"}
        if stamp is not None and not stamp.startswith("W/"):
            headers["If-Range"] = stamp
        response = self._follow(url, headers)
        try:
            return self._answer(response, start)
        except BaseException:
            response.wire.sock.close()
            raise

    def _follow(self, url: str, headers: Mapping[str, str]) -> http1.Response:
        origin: tuple[str, str, int] | None = None
        status = None
        for _ in range(MAX_REDIRECTS + 1):
            target = address.split(url)
            here = (target.scheme, target.host, target.port)
            origin = origin or here
            response = self._ask(target, {**headers, **(self.secret if here == origin else {})})
            status, to = response.status, response.get("location")
            if status not in REDIRECTS or not to:
                return response
            response.wire.sock.close()
            url = urljoin(target.url, to.encode("latin-1", "replace").decode("utf-8", "replace"))
        raise Failed("http_3xx", status, f"over {MAX_REDIRECTS} redirects")

    def _ask(self, target: Target, headers: Mapping[str, str]) -> http1.Response:
        deadline = time.monotonic() + REQUEST_S
        sock, asked, more = self._connect(target, deadline)
        sock = secured(sock, target, self._tls, self.rules.timeout_s)
        with http1.closing(sock):
            return http1.ask(http1.Wire(sock, self.rules, deadline), asked, self.rules.user_agent, {**headers, **more})

    def _connect(self, target: Target, deadline: float) -> tuple[socket.socket, Target, dict[str, str]]:
        """A connection to the target or to the proxy before it, what to ask for over it, and headers for the proxy."""
        via = None if self.rules.where(target.host, target.port) else proxy.of(target)
        if via is None:
            return self._resolver.connect(target, deadline), target, {}
        try:
            self._resolver.find(target)  # an address that may not be visited is none behind a proxy either
        except Failed as failed:
            if failed.status != "dns":  # where only the proxy resolves names, only the proxy can judge
                raise
        more = via.headers if target.scheme == "http" else {}
        return via.connect(target, self.rules, deadline), via.asked(target), more

    def _answer(self, response: http1.Response, start: int) -> Answer:
        stamp = response.get("etag") or response.get("last-modified") or None
        length = response.get("content-length").strip()
        if response.status == 206:
            match = RANGE.fullmatch(response.get("content-range").strip())
            if match is None or int(match[1]) != start:
                raise Failed("http_4xx", 206, "the server sends another range than the one asked for")
            total = None if match[3] == "*" else int(match[3])
        elif response.status == 200:
            start, total = 0, int(length) if re.fullmatch(r"\d{1,18}", length) else None
        elif response.status == 416 and (end := re.fullmatch(r"bytes \*/(\d{1,18})", response.get("content-range"))):
            response.wire.sock.close()  # nothing from there on: an empty file, or one as long as what is here
            return Answer(start, int(end[1]), stamp, iter(()))
        else:
            failed = answered(response.status)
            busy = Busy(failed.status, failed.http_status, failed.detail)
            busy.wait_s = retry_after(response.get("retry-after"), time.time())
            raise busy
        return Answer(start, total, stamp, response.stream(), response.wire.sock.close)


def rules(**changes: object) -> Rules:
    """What a download of archives may do."""
    plain = Rules(user_agent=AGENT, log="", shared="", timeout_s=WAIT_S, deadline_s=REQUEST_S)
    return replace(plain, **changes)  # type: ignore[arg-type]


def _client(want: Asked, timeout_s: float = WAIT_S) -> Client:
    mapped = tuple((host.lower(), "127.0.0.1", port) for host, port in want.loopback_ports.items())
    return Client(rules(mapped=mapped, timeout_s=timeout_s))


def _url(want: Asked, name: str) -> str:
    base, _, query = want.location.partition("?")
    url = f"{base.rstrip('/')}/{quote(name)}" if name else base
    return f"{url}?{query}" if query else url


def listed(want: Asked, *, once: bool = False) -> list[File]:
    """The files named, each with the size its server tells; `once`: no more tries where it does not answer."""
    client = _client(want, ONCE_S if once else WAIT_S)

    def look(name: str) -> File:
        ask = partial(client.open, _url(want, name), 0, None, end=0)
        try:
            answer = ask() if once else patiently(ask)
        except Failed as failed:
            what = f"{name or want.name} at {want.location.partition('?')[0]}"
            raise ValueError(f"{want.source}: {what}: {failed.detail}; {remedy(failed)}") from None
        answer.close()
        return File(name, answer.total, want.sha256.get(name))

    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        return list(pool.map(look, sorted(want.files) or [""]))


def opener(want: Asked) -> Opener:
    """What opens these files."""
    client = _client(want)
    return lambda file, start, stamp: client.open(_url(want, file.name), start, stamp)
