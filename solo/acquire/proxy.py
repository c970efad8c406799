"""The proxy that the environment names, for downloads of archives: what curl and the hub's client use too.

In: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY. Out: a socket that leads to a target through it. Invariants: the proxy
is the user's choice and is not judged, a target is wherever this machine can; its password is in no message.
Cost: one request more for https.
"""

from __future__ import annotations

import base64
import socket
import time
from dataclasses import dataclass, replace
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from solo.isolated import http1
from solo.isolated.address import Target
from solo.isolated.rules import Failed, Rules


@dataclass(frozen=True)
class Proxy:
    """Where it listens, and what it wants to be told."""

    host: str
    port: int
    headers: dict[str, str]

    def connect(self, target: Target, rules: Rules, deadline: float) -> socket.socket:
        """A connection that leads to the target: a tunnel for https, the proxy itself for http."""
        wait_s = max(min(rules.timeout_s, deadline - time.monotonic()), 0.001)
        try:
            sock = socket.create_connection((self.host, self.port), wait_s)
        except TimeoutError:
            raise Failed("timeout", None, "the proxy does not answer in time") from None
        except OSError:
            raise Failed("connection", None, "the proxy cannot be reached") from None
        if target.scheme == "http":
            return sock
        place = f"{f'[{target.host}]' if ':' in target.host else target.host}:{target.port}"
        with http1.closing(sock, "the proxy broke the connection"):
            status = http1.connect(http1.Wire(sock, rules, deadline), place, self.headers)
            if status // 100 != 2:
                raise Failed("http_5xx" if status >= 500 else "http_4xx", status, f"the proxy answers HTTP {status}")
        return sock

    def asked(self, target: Target) -> Target:
        """What is asked for over the connection: of an http target its whole URL."""
        return replace(target, path=target.url) if target.scheme == "http" else target


def of(target: Target) -> Proxy | None:
    """The proxy for a target, if the environment names one and does not except its host."""
    named = getproxies()
    url = named.get(target.scheme) or named.get("all")
    if not url or proxy_bypass(target.host):
        return None
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme != "http" or not parts.hostname:
        raise Failed("refused_scheme", None, f"the proxy of the environment is {parts.scheme}://, not http://")
    headers = {}
    if parts.username is not None:
        both = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = "Basic " + base64.b64encode(both.encode()).decode()
    return Proxy(parts.hostname, parts.port or 80, headers)
