"""robots.txt by RFC 9309: groups by product token, the longest rule wins, `*` and `$`, and what its absence means.

In: the text of a robots.txt, or the status that stood for it. Out: the rule that forbids a path, or None. Invariants:
no file (4xx) allows all, a file that cannot be had (5xx, 429, network) forbids all and is asked for again later; allow
wins a tie; matching is linear in the path for any pattern. Cost: one file per host and day, shared by the workers of a
machine through a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

from solo.isolated.address import Target
from solo.isolated.rules import Failed

FILE_BYTES = 512 << 10  # RFC 9309: at least 500 KiB are read
MAX_RULES = 20_000
MAX_DELAY_S = 10.0
KEPT_S = 24 * 3600
RETRIED_S = 300  # a file that could not be had is asked for again after this
HOSTS_IN_MEMORY = 4_096
LINE = re.compile(r"\s*([A-Za-z-]+)\s*:\s*(.*?)\s*(?:#.*)?$")
CHARS = "/:@!$&'()*+,;=~-._?[]"


@dataclass(frozen=True)
class Robots:
    """What one host's robots.txt says to us."""

    said: str  # `rules`, `none (404)`, `unreachable (http_5xx)`: the evidence that is stored
    rules: tuple[tuple[str, bool], ...] = ()  # (pattern, allow)
    delay_s: float = 0.0
    fetched_at: float = 0.0

    def forbids(self, path: str) -> str | None:
        """The rule that forbids this path, as the file spells it."""
        path = _normal(path)
        best: tuple[int, bool, str] = (-1, True, "")
        for pattern, allow in self.rules:
            if matches(pattern, path):
                best = max(best, (len(pattern), allow, pattern))
        return None if best[1] else f"robots.txt: Disallow: {best[2][:200]}"


def parse(text: str, token: str, now: float = 0.0) -> Robots:
    """The rules of the groups that name `token`, else of those for `*`."""
    groups: dict[str, list[tuple[str, bool]]] = {}
    delays: dict[str, float] = {}
    names: list[str] = []
    in_names = False
    n_rules = 0
    for line in text.splitlines():
        found = LINE.match(line)
        if found is None:
            continue
        field, value = found[1].lower(), found[2]
        if field == "user-agent":
            if not in_names:
                names = []
            name = value.lower().partition("/")[0].strip()
            names.append(name)
            groups.setdefault(name, [])
            in_names = True
            continue
        if field in ("allow", "disallow"):
            in_names, n_rules = False, n_rules + 1
            if value and n_rules <= MAX_RULES:
                for name in names:
                    groups[name].append((_normal(value), field == "allow"))
        elif field == "crawl-delay":
            with suppress(ValueError):
                seconds = float(value)
                delays.update(dict.fromkeys(names, min(seconds, MAX_DELAY_S) if seconds > 0 else 0.0))
    who = token if token in groups else "*"
    return Robots("rules", tuple(groups.get(who, ())), delays.get(who, 0.0), now)


def _normal(path: str) -> str:
    """Percent-encoding spelled one way, so that rule and path compare."""
    return quote(unquote_to_bytes(path), safe=CHARS)


def matches(pattern: str, path: str) -> bool:
    """Whether a rule's pattern matches a path from its start; each piece between stars is sought once."""
    anchored = pattern.endswith("$")
    pieces = (pattern[:-1] if anchored else pattern).split("*")
    if not path.startswith(pieces[0]):
        return False
    at = len(pieces[0])
    for piece in pieces[1:-1]:
        found = path.find(piece, at)
        if found < 0:
            return False
        at = found + len(piece)
    if len(pieces) == 1:
        return not anchored or at == len(path)
    last = pieces[-1]
    if anchored:
        return len(path) - len(last) >= at and path.endswith(last)
    return path.find(last, at) >= 0


class Cache:
    """robots.txt of each host: in memory, on disk for the other workers, from the host once."""

    def __init__(self, folder: str, token: str, get: Callable[[Target], bytes]) -> None:
        self.folder, self.token, self._get = Path(folder, "robots"), token, get
        self._known: OrderedDict[str, Robots] = OrderedDict()
        self._locks = [threading.Lock() for _ in range(64)]
        self._lock = threading.Lock()

    def of(self, target: Target) -> Robots:
        """The robots.txt that holds for a target."""
        place = f"{target.scheme}://{target.authority}"
        with self._locks[hash(place) % len(self._locks)]:
            with self._lock:
                robots = self._known.get(place)
            if robots is None or _stale(robots):
                robots = self._load(place) or self._fetch(place, target)
            with self._lock:
                self._known[place] = robots
                self._known.move_to_end(place)
                while len(self._known) > HOSTS_IN_MEMORY:
                    self._known.popitem(last=False)
        return robots

    def _path(self, place: str) -> Path:
        name = hashlib.sha256(place.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.json"

    def _load(self, place: str) -> Robots | None:
        try:
            raw = json.loads(self._path(place).read_bytes())
            robots = Robots(**raw | {"rules": tuple((str(p), bool(a)) for p, a in raw["rules"])})
        except (OSError, ValueError, TypeError):
            return None
        return None if _stale(robots) else robots

    def _fetch(self, place: str, target: Target) -> Robots:
        now = time.time()
        try:
            body = self._get(Target(target.scheme, target.host, target.port, "/robots.txt"))
        except Failed as failed:
            # 4xx and endless redirects are "unavailable": all may be read. The rest is "unreachable": nothing may.
            answered = failed.status in ("http_404", "http_4xx", "http_3xx", "refused_scheme")
            kind = "none" if answered else "unreachable"
            robots = Robots(f"{kind} ({failed.http_status or failed.status})", fetched_at=now)
        else:
            robots = parse(body.decode("utf-8-sig", "replace"), self.token, now)
        path = self._path(place)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
        aside.write_text(json.dumps(asdict(robots)))
        aside.replace(path)
        return robots


def _stale(robots: Robots) -> bool:
    age = time.time() - robots.fetched_at
    return age > (RETRIED_S if robots.said.startswith("unreachable") else KEPT_S)
