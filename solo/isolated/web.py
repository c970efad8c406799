"""One URL, fetched as a guest should: robots.txt, budget, headers, then the body; with what was seen on the way.

In: a URL of a list. Out: a `Visit`: the body or the Failed that ended it, and the evidence. Invariants: every hop of a
redirect is split, resolved, checked against robots.txt and its headers anew, at most MAX_REDIRECTS of them; nothing
is read past the headers of an answer that opts out; no exception but Failed says what became of a URL.
"""

from __future__ import annotations

import hashlib
import random
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from urllib.parse import urljoin

from solo.isolated import address, consent, http1, probe
from solo.isolated.address import Target
from solo.isolated.budget import Budget
from solo.isolated.robots import FILE_BYTES, Cache
from solo.isolated.rules import Failed, Rules

MAX_REDIRECTS = 5
TRIES = 3  # of an answer 429 or 503
BACKOFF_S = 0.5
REDIRECTS = (301, 302, 303, 307, 308)
KEPT_HEADERS = frozenset(
    (
        *("content-type", "content-length", "content-encoding", "last-modified", "etag", "server", "retry-after"),
        *("x-robots-tag", "tdm-reservation", "tdm-policy", "content-usage"),
    )
)
HEADER_CHARS = 300


@dataclass
class Visit:
    """What was seen and decided for one URL."""

    url: str
    body: bytes | None = None
    failed: Failed | None = None
    http_status: int | None = None
    redirects: list[str] = field(default_factory=list)
    robots: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    n_tries: int = 0
    sha256: str | None = None
    seen: probe.Probe | None = None


class Guest:
    """Fetches URLs under one set of rules; threads share it."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.resolver = address.Resolver(rules)
        self.budget = Budget(rules.shared, rules.host_concurrency, rules.host_requests_per_s)
        self.robots = Cache(rules.shared, rules.token, self._robots_file)
        self._idle = threading.local()  # the connection that this thread used last
        self._tls = ssl.create_default_context()

    def visit(self, url: str, expected: str = "") -> Visit:
        """Fetch a URL; `expected` is the hex digest that its body must have, by its length MD5, SHA-1 or SHA-256."""
        visit = Visit(url)
        try:
            body = self._follow(url, visit)
            visit.sha256 = hashlib.sha256(body).hexdigest()
            self._check(body, expected)
            visit.seen = probe.probe(body, self.rules)
            visit.body = body
        except Failed as failed:
            visit.failed = failed
        except Exception as error:  # a URL's end must have a status, whatever a server made our code do
            visit.failed = Failed("connection", None, f"the attempt raised {type(error).__name__}", str(error)[:200])
        return visit

    def _check(self, body: bytes, expected: str) -> None:
        if not body:
            raise Failed("empty", 200, "the body has 0 bytes")
        kind = {32: hashlib.md5, 40: hashlib.sha1, 64: hashlib.sha256}.get(len(expected))
        if kind is not None and kind(body, usedforsecurity=False).hexdigest() != expected.lower():
            raise Failed("hash_mismatch", 200, "the body is not what the list's hash names", f"expected {expected}")

    def _follow(self, url: str, visit: Visit) -> bytes:
        deadline = time.monotonic() + self.rules.deadline_s
        status = None
        for _ in range(MAX_REDIRECTS + 1):
            try:
                target = address.split(url)
            except Failed as failed:
                if failed.status == "refused_scheme" and status:
                    raise Failed(
                        "refused_scheme", status, "a redirect to a scheme other than http and https", failed.evidence
                    ) from None
                raise
            self._consult(target, visit)
            answer = self._politely(target, visit, deadline)
            if isinstance(answer, bytes):
                return answer
            status, location = answer
            url = urljoin(target.url, location)
            visit.redirects.append(url[:2_000])
        raise Failed("http_3xx", status, f"over {MAX_REDIRECTS} redirects")

    def _consult(self, target: Target, visit: Visit) -> None:
        """robots.txt of the host; an address that may not be visited is said first."""
        self.resolver.find(target)
        robots = self.robots.of(target)
        visit.robots = robots.said
        if robots.said.startswith("unreachable"):
            raise Failed("robots_unreachable", None, "robots.txt cannot be had, which forbids all", robots.said)
        rule = robots.forbids(target.path)
        if rule is not None:
            visit.robots = rule
            raise Failed("disallowed", None, "robots.txt forbids it", rule)

    def _politely(self, target: Target, visit: Visit, deadline: float) -> bytes | tuple[int, str]:
        """The body, or the status and the location of a redirect; a busy host is asked again after its pause."""
        delay_s = self.robots.of(target).delay_s * self.rules.n_machines
        for attempt in range(TRIES):
            began = time.monotonic()
            with self.budget.request(target.host, delay_s):
                deadline += time.monotonic() - began  # our own politeness is not the server's slowness
                visit.n_tries += 1
                response = self._ask(target, deadline)
                visit.http_status = response.status
                visit.headers |= {k: v[:HEADER_CHARS] for k, v in response.headers if k in KEPT_HEADERS}
                refused = consent.refusal(response.headers, self.rules.token)
                if refused is not None:
                    response.wire.sock.close()
                    raise Failed("disallowed", response.status, "a header refuses use", refused)
                if response.status not in (429, 503):
                    return self._read(response)
                response.wire.sock.close()
            pause_s = retry_after(response.get("retry-after"), time.time())
            if pause_s is not None:
                self.budget.pause(target.host, pause_s)
            wait_s = pause_s if pause_s is not None else BACKOFF_S * 2**attempt
            if attempt == TRIES - 1 or wait_s > self.rules.retry_after_s:
                break
            time.sleep(wait_s * random.uniform(1, 1.5))
            deadline += wait_s * 1.5
        raise answered(response.status)

    def _read(self, response: http1.Response) -> bytes | tuple[int, str]:
        location = response.get("location")
        if response.status in REDIRECTS and location:
            response.wire.sock.close()
            return response.status, location.encode("latin-1", "replace").decode("utf-8", "replace")
        if response.status // 100 != 2:
            response.wire.sock.close()
            raise answered(response.status)
        try:
            body = response.body(self.rules.max_bytes)
        except Failed:
            response.wire.sock.close()
            raise
        self._keep(response)
        return body

    def _robots_file(self, target: Target) -> bytes:
        """A robots.txt by the same guard; its own redirects are followed, its own opt-outs mean nothing."""
        deadline = time.monotonic() + min(self.rules.deadline_s, 4 * self.rules.timeout_s)
        status = None
        for _ in range(MAX_REDIRECTS + 1):
            with self.budget.request(target.host):
                response = self._ask(target, deadline)
                status = response.status
                if status // 100 == 2:
                    try:
                        body = response.body(FILE_BYTES, cut=True)
                    except Failed:
                        response.wire.sock.close()
                        raise
                    self._keep(response)
                    return body
                response.wire.sock.close()
            if status not in REDIRECTS or not response.get("location"):
                raise answered(status)
            target = address.split(urljoin(target.url, response.get("location")))
        raise answered(status or 302)

    def _ask(self, target: Target, deadline: float) -> http1.Response:
        """Send the request over the connection this thread has to that host, else over a new one."""
        place = (target.scheme, target.host, target.port)
        kept = getattr(self._idle, "kept", None)
        self._idle.kept = None
        if kept is not None and kept[0] == place:
            try:
                return http1.ask(http1.Wire(kept[1], self.rules, deadline), target, self.rules.user_agent)
            except (http1.Closed, Failed) as error:
                kept[1].close()
                if isinstance(error, Failed) and error.status == "timeout":
                    raise
        elif kept is not None:
            kept[1].close()
        sock = secured(self.resolver.connect(target, deadline), target, self._tls, self.rules.timeout_s)
        with http1.closing(sock):
            return http1.ask(http1.Wire(sock, self.rules, deadline), target, self.rules.user_agent)

    def _keep(self, response: http1.Response) -> None:
        if response.reusable:
            self._idle.kept = (response.place, response.wire.sock)
        else:
            response.wire.sock.close()


def secured(sock: socket.socket, target: Target, tls: ssl.SSLContext, timeout_s: float) -> socket.socket:
    """The socket, for https under TLS, its certificate checked against the host that was asked for."""
    if target.scheme != "https":
        return sock
    sock.settimeout(timeout_s)
    with http1.closing(sock):
        try:
            return tls.wrap_socket(sock, server_hostname=target.host)
        except TimeoutError:
            raise Failed("timeout", None, "no answer in time") from None
        except (OSError, ValueError):  # ssl.SSLError is an OSError
            raise Failed("connection", None, "TLS failed") from None


def answered(status: int) -> Failed:
    """What an HTTP status that is no success means."""
    known = {404: "http_404", 429: "http_429"}.get(status, f"http_{status // 100}xx")
    return Failed(known if status >= 300 else "connection", status, f"HTTP {status}")


def retry_after(value: str, now: float) -> float | None:
    """Seconds of a Retry-After header, given as seconds or as a date."""
    if not value:
        return None
    try:
        return max(float(int(value[:12])), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(value).timestamp() - now, 0.0)
    except (TypeError, ValueError, IndexError):
        return None
