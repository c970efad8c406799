"""What a download may do, handed to the isolated environment as one JSON text; and how one URL's attempt ends.

In: SOLO_GUARD, or the text itself. Out: a frozen `Rules`. Invariant: without rules nothing is fetched.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

VARIABLE = "SOLO_GUARD"
FORMATS = ("jpeg", "png", "webp", "gif")


class Failed(Exception):
    """One URL's end; the text carries a status of solo.acquire.STATUSES and nothing that changes between runs."""

    def __init__(self, status: str, http_status: int | None, detail: str, evidence: str | None = None) -> None:
        super().__init__(f"solo:{status}:{http_status or ''}:{detail}")
        self.status, self.http_status, self.detail, self.evidence = status, http_status, detail, evidence


@dataclass(frozen=True)
class Rules:
    """Limits and manners of one URL list; `mapped` lets single host names lead to a loopback origin, on port 80."""

    user_agent: str
    log: str  # folder of one JSON line per URL
    shared: str  # folder that all workers of this machine share: robots.txt files, host budget
    mapped: tuple[tuple[str, str, int], ...] = ()  # (host, address, port)
    trusted: tuple[tuple[str, int], ...] = ()  # (host, port) that the user's own environment names, wherever it leads
    timeout_s: float = 10.0  # of one socket operation, and the grace before the rate is judged
    deadline_s: float = 60.0  # of one URL with its redirects
    min_bytes_per_s: int = 1_024
    max_bytes: int = 32 << 20
    max_pixels: int = 100_000_000  # a decoded picture above this would take 0.3 GB
    max_side_px: int = 1_024
    formats: tuple[str, ...] = FORMATS
    host_concurrency: int | None = None  # None: as many as there are threads
    host_requests_per_s: float | None = None
    retry_after_s: float = 5.0  # a longer wait is left to a later pass
    n_machines: int = 1  # which keep their budgets apart; the two above are one machine's part

    @property
    def token(self) -> str:
        """The product token that robots.txt and X-Robots-Tag may name."""
        return self.user_agent.partition("/")[0].strip().lower()

    def where(self, host: str, port: int) -> tuple[str, int] | None:
        """The address a host is mapped to, if it is."""
        return next(((ip, to) for name, ip, to in self.mapped if (name, 80) == (host, port)), None)

    def dump(self) -> str:
        """As text for the environment variable."""
        return json.dumps(asdict(self))


def parse(text: str) -> Rules:
    """What `dump` wrote."""
    raw = json.loads(text)
    raw["mapped"] = tuple((host.lower(), ip, int(port)) for host, ip, port in raw["mapped"])
    raw["trusted"] = tuple((host.lower(), int(port)) for host, port in raw["trusted"])
    return Rules(**raw | {"formats": tuple(raw["formats"])})


def from_env() -> Rules:
    """The rules of this process."""
    return parse(os.environ[VARIABLE])
