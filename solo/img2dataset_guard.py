"""Run img2dataset with a guarded urllib; executed by the isolated environment's own python (standard library only).

In: img2dataset's command line; SOLO_GUARD_MAP ("host=127.0.0.1:port,..."), SOLO_GUARD_LOG (folder for one JSON line
per URL), SOLO_GUARD_PARENT (pid). Out: img2dataset's shards, whose error messages begin `solo:STATUS:HTTP_STATUS:`.
Invariant: only http and https; each hop of a redirect resolves anew and connects to an address that was checked to be
public (or to the mapped one); a body is at most BODY_BYTES and BODY_S. It holds in spawned workers too, since they
import this file again. Without it img2dataset reads file: URLs and private addresses.
"""

# ruff: noqa: ANN401 - the signatures are those of urllib and http.client
from __future__ import annotations

import ctypes
import http.client
import ipaddress
import json
import os
import signal
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from typing import Any

BODY_BYTES = 32 << 20
BODY_S = 60.0  # a body that drips in one byte per time-out is cut off here
CHUNK_BYTES = 1 << 16
MAX_REDIRECTS = 5
NAT64 = ipaddress.ip_network("64:ff9b::/96")
PR_SET_PDEATHSIG = 1
IMAGE_MAGIC = (
    *(b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\x00", b"MM\x00*", b"#?", b"Pf", b"PF"),
    *(b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"\x00\x00\x00\x0cjP", b"\xff\x4f\xff\x51", b"\x76\x2f\x31\x01"),
)


class Failed(Exception):
    """One URL's end; the text carries a status of solo.acquire.STATUSES and nothing that changes between runs."""

    def __init__(self, status: str, http_status: int | None, detail: str) -> None:
        super().__init__(f"solo:{status}:{http_status or ''}:{detail}")
        self.status, self.http_status, self.detail = status, http_status, detail


def is_public(address: str) -> bool:
    """Whether an IP address is reachable on the open internet, judged by the IPv4 address inside it if it holds one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
        if inner is not None:
            ip = inner
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def parse_map(text: str) -> dict[str, tuple[str, int]]:
    """`host=address:port,...` as a dict."""
    pairs = (entry.partition("=") for entry in text.split(",") if entry)
    return {host.lower(): (to.rpartition(":")[0], int(to.rpartition(":")[2])) for host, _, to in pairs}


def connect_checked(address: tuple[str, int], timeout: Any = None, source: Any = None) -> socket.socket:
    """Stand-in for socket.create_connection: resolve, keep public addresses, connect to one of those very addresses."""
    host, port = address
    if host.lower() in MAPPED:
        return socket.create_connection(MAPPED[host.lower()], timeout, source)
    found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    public = [ip for ip in found if is_public(ip)]
    if not public:
        raise Failed("refused_address", None, f"{host} is not at a public address")
    for ip in public[:-1]:
        try:
            return socket.create_connection((ip, port), timeout, source)
        except OSError:
            continue
    return socket.create_connection((public[-1], port), timeout, source)


class Response(http.client.HTTPResponse):
    """A response whose body is bounded in bytes and in time, and begins like an image when the answer was 2xx."""

    def read(self, amt: int | None = None) -> bytes:
        """The whole body, or Failed."""
        if amt is not None:
            return super().read(amt)
        try:
            body = self._bounded()
        except Failed:
            raise
        except Exception as error:  # img2dataset keeps only the text of it, which must name one status
            raise classify(error) from None
        if self.status // 100 == 2:
            if not body:
                raise Failed("empty", self.status, "the body has 0 bytes")
            riff = body[:4] == b"RIFF" and body[8:12] == b"WEBP"
            if not (body.startswith(IMAGE_MAGIC) or body[4:8] == b"ftyp" or riff):
                raise Failed("not_image", self.status, "the body begins with no known image signature")
        return body

    def _bounded(self) -> bytes:
        expected, deadline = self.length, time.monotonic() + BODY_S
        if expected is not None and expected > BODY_BYTES:
            raise Failed("too_large", self.status, f"the body is over {BODY_BYTES} bytes")
        parts, n = [], 0
        while expected is None or n < expected:
            part = self.read1(CHUNK_BYTES if expected is None else min(CHUNK_BYTES, expected - n))
            if not part:
                break
            parts.append(part)
            n += len(part)
            if n > BODY_BYTES:
                raise Failed("too_large", self.status, f"the body is over {BODY_BYTES} bytes")
            if time.monotonic() > deadline:
                raise Failed("timeout", self.status, f"the body took over {BODY_S:.0f} s")
        if expected is not None and n < expected:
            raise Failed("connection", self.status, "the body ended before its declared length")
        return b"".join(parts)


class Plain(http.client.HTTPConnection):
    """HTTP to a checked address."""

    response_class = Response

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._create_connection = connect_checked


class Secure(http.client.HTTPSConnection):
    """HTTPS to a checked address; the certificate is judged against the host name as usual."""

    response_class = Response

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._create_connection = connect_checked


class PlainHandler(urllib.request.HTTPHandler):
    """http: through Plain."""

    def http_open(self, req: urllib.request.Request) -> Any:
        """Open one hop."""
        return self.do_open(Plain, req)


class SecureHandler(urllib.request.HTTPSHandler):
    """https: through Secure."""

    def https_open(self, req: urllib.request.Request) -> Any:
        """Open one hop."""
        return self.do_open(Secure, req, context=self._context)  # type: ignore[attr-defined]


class Redirects(urllib.request.HTTPRedirectHandler):
    """At most MAX_REDIRECTS hops; each goes through the opener, hence the checks, again."""

    max_redirections = MAX_REDIRECTS

    def redirect_request(self, *args: Any) -> urllib.request.Request | None:
        """The next hop, marked as such so that one URL gives one log line."""
        request = super().redirect_request(*args)
        if request is not None:
            request.solo_hop = True  # type: ignore[attr-defined]
        return request


def classify(error: BaseException) -> Failed:
    """The status of any exception of urllib, http.client, ssl or socket."""
    if isinstance(error, urllib.error.HTTPError):
        return _answered(error)
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        error = error.reason
    if isinstance(error, Failed):
        return error
    if isinstance(error, urllib.error.URLError) and "unknown url type" in str(error.reason):
        return Failed("refused_scheme", None, "only http and https are fetched")
    for kind, status, detail in KINDS:
        if isinstance(error, kind):
            return Failed(status, None, detail)
    return Failed("connection", None, "the connection failed")


def _answered(error: urllib.error.HTTPError) -> Failed:
    if "is not allowed" in str(error.msg):
        return Failed("refused_scheme", error.code, "a redirect to a scheme other than http and https")
    status = "http_404" if error.code == 404 else f"http_{error.code // 100}xx"
    known = status if status in ("http_404", "http_3xx", "http_4xx", "http_5xx") else "connection"
    return Failed(known, error.code, f"HTTP {error.code}")


BAD_URL = "not a URL that can be asked for"
KINDS: tuple[tuple[Any, str, str], ...] = (
    (TimeoutError, "timeout", "no answer in time"),
    (socket.gaierror, "dns", "the host name does not resolve"),
    ((http.client.InvalidURL, urllib.error.URLError), "bad_record", BAD_URL),
    (ssl.SSLError, "connection", "TLS failed"),  # before ValueError, which a certificate error also is
    (ValueError, "bad_record", BAD_URL),
)


class Opener(urllib.request.OpenerDirector):
    """urllib's opener with these handlers only (no proxies, file:, ftp:, data:), one log line per URL."""

    def open(self, fullurl: Any, data: Any = None, timeout: Any = None) -> Any:
        """Open a URL, following redirects; every error leaves as Failed."""
        began, response, failure = time.time(), None, None
        try:
            response = super().open(fullurl, data, timeout)
            return response
        except Exception as error:  # the same: sockets, TLS and HTTP raise a dozen unrelated types
            failure = error
            raise classify(error) from None
        finally:
            if LOG_FOLDER and not hasattr(fullurl, "solo_hop"):
                self._log(fullurl, began, response, failure)

    def _log(self, request: Any, began: float, response: Any, failure: Exception | None) -> None:
        headers = response.headers if response is not None else {}
        failed = classify(failure) if failure is not None else None
        line = {
            "url": getattr(request, "full_url", request),
            "fetched_at": began,
            "seconds": round(time.time() - began, 4),
            "http_status": failed.http_status if failed else response.status,
            "redirects": list(getattr(request, "redirect_dict", {})),
            "x_robots_tag": headers.get("X-Robots-Tag"),
            "content_type": headers.get("Content-Type"),
            "error": f"{failed.status}: {failure!r}" if failed else None,
        }
        data = json.dumps(line, ensure_ascii=True).encode() + b"\n"
        log = os.open(f"{LOG_FOLDER}/{os.getpid()}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(log, data)
        os.close(log)


def install() -> None:
    """Make the guarded opener urllib's own, for every thread of this process."""
    opener = Opener()
    for handler in (
        PlainHandler,
        SecureHandler,
        Redirects,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    urllib.request.install_opener(opener)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the one that started it is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


MAPPED = parse_map(os.environ.get("SOLO_GUARD_MAP", ""))
LOG_FOLDER = os.environ.get("SOLO_GUARD_LOG", "")

if __name__ in ("__main__", "__mp_main__"):
    die_with_parent()
    install()

if __name__ == "__main__":
    if os.environ.get("SOLO_GUARD_PARENT", str(os.getppid())) != str(os.getppid()):
        sys.exit("the process that asked for this download is gone")
    from img2dataset.main import main

    main()
