"""URLs and addresses: what may be asked for, and where a host name may lead.

In: a URL as a list or a Location header spells it. Out: a `Target`, and a socket to an address that was checked.
Invariants: only http and https; a name is resolved once and the connection goes to one of the very addresses that were
checked, so a resolver that answers differently the second time changes nothing; how an address is spelled does not
matter (decimal, octal, hex, mapped into IPv6, full-width digits), since what it resolves to is judged.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from solo.isolated.rules import Failed, Rules

BAD_URL = "not a URL that can be asked for"
NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
HOST = re.compile(r"[a-z0-9_](?:[a-z0-9._-]*[a-z0-9_-])?")
PORTS = {"http": 80, "https": 443}
URL_CHARS = 8_192  # servers refuse more, with 414
MAX_ADDRESSES = 4  # of one host name that are tried
KEPT_S, MAX_KEPT = 60.0, 16_384


@dataclass(frozen=True, slots=True)
class Target:
    """One request: where to, and what for."""

    scheme: str
    host: str  # lower case ASCII, without the brackets of IPv6
    port: int
    path: str  # with the query, percent-encoded

    @property
    def authority(self) -> str:
        """As the Host header and a URL spell it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL that is asked for."""
        return f"{self.scheme}://{self.authority}{self.path}"


def split(url: str) -> Target:
    """The target of a URL, or Failed."""
    url = url.strip(" ")
    if CONTROL.search(url) or len(url) > URL_CHARS:
        raise Failed("bad_record", None, BAD_URL)
    scheme = SCHEME.match(url)
    if scheme is None:
        raise Failed("bad_record", None, BAD_URL)
    if scheme[1].lower() not in PORTS:
        raise Failed("refused_scheme", None, "only http and https are fetched", evidence=scheme[1].lower()[:20])
    try:
        parts = urlsplit(url)
        port = parts.port
        host = _host(parts.hostname or "")
        path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._") + (
            "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?") if parts.query else ""
        )
    except ValueError:  # also UnicodeError of a host that IDNA refuses
        raise Failed("bad_record", None, BAD_URL) from None
    if "@" in parts.netloc:
        raise Failed("refused_address", None, "the URL holds user information")
    if "\\" in parts.netloc or not parts.path.startswith(("/", "")) or port == 0:
        raise Failed("bad_record", None, BAD_URL)
    return Target(parts.scheme, host, port or PORTS[parts.scheme], path)


def _host(host: str) -> str:
    """A host name as DNS knows it, without the dot of the root; ValueError where it is none."""
    if ":" in host:
        host = host.partition("%")[0]  # a zone is this machine's own; what it names is not public anyway
        ipaddress.ip_address(host)
        return host
    ascii_host = host.encode("idna").decode("ascii").lower()
    ascii_host = ascii_host.removesuffix(".")
    if not HOST.fullmatch(ascii_host) or ".." in ascii_host or len(ascii_host) > 253:
        raise ValueError(host)
    return ascii_host


def is_public(address: str) -> bool:
    """Whether an IP address is reachable on the open internet, judged by the IPv4 address inside it if it holds one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if any(ip in network for network in NAT64):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
        if ip.teredo is not None or "%" in address:
            return False
        if inner is not None:
            ip = inner
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class Resolver:
    """Checked addresses of host names, kept a minute: a list's URLs share hosts, and resolvers are the first to choke.

    What is kept was checked, so nothing that the resolver says later can lead elsewhere.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._known: OrderedDict[tuple[str, int], tuple[float, list[tuple[str, int]]]] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, target: Target) -> list[tuple[str, int]]:
        """Addresses to connect to; Failed where the name does not resolve or none may be visited."""
        mapped = self.rules.where(target.host, target.port)
        if mapped is not None:
            return [mapped]
        place, now = (target.host, target.port), time.monotonic()
        with self._lock:
            until, found = self._known.get(place, (0.0, []))
        if until <= now:
            found = checked(target, judge=place not in self.rules.trusted)
            with self._lock:
                self._known[place] = (now + KEPT_S, found)
                while len(self._known) > MAX_KEPT:
                    self._known.popitem(last=False)
        return found

    def connect(self, target: Target, deadline: float) -> socket.socket:
        """A connection to the first address that takes one."""
        error: OSError = OSError("no address")
        for address in self.find(target):
            left = min(self.rules.timeout_s, deadline - time.monotonic())
            try:
                return socket.create_connection(address, max(left, 0.001))
            except OSError as failure:
                error = failure
        if isinstance(error, TimeoutError):
            raise Failed("timeout", None, "no answer in time")
        raise Failed("connection", None, "the connection failed")


def checked(target: Target, *, judge: bool = True) -> list[tuple[str, int]]:
    """The public addresses of a host name, or Failed; all of its addresses where they are not to be judged."""
    try:
        found = [str(info[4][0]) for info in socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)]
    except (socket.gaierror, UnicodeError):
        raise Failed("dns", None, "the host name does not resolve", evidence=target.host) from None
    public = [ip for ip in dict.fromkeys(found) if not judge or is_public(ip)]
    if not public:
        raise Failed(
            "refused_address", None, f"{target.host} is not at a public address", evidence=f"host {target.host}"
        )
    return [(ip, target.port) for ip in public[:MAX_ADDRESSES]]
