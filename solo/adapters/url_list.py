"""URL lists with captions (CapsFusion, CC12M, LAION): .parquet, .csv or .jsonl, fetched by img2dataset.

Sample: one assistant turn, image then caption. Key: URL and caption. A row that is not fetched is a Fetched item with a
status. Stored JPEG bytes are the served ones unless the long side is over `max_side_px` (see solo/acquire/download.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from solo.acquire.download import fetch
from solo.acquire.part import Fetched
from solo.acquire.url_rows import UrlList
from solo.artifact import Job
from solo.isolated.probe import OTHER
from solo.isolated.rules import FORMATS, Rules

CONTACT = re.compile(r"[A-Za-z][A-Za-z0-9._-]*(/\S+)? .*(https?://\S+|\S+@\S+\.\S+).*")
LOOPBACK_AGENT = "solo-recipe/1 (loopback only; +http://localhost/)"
HOST_CONCURRENCY, HOST_REQUESTS_PER_S = 4, 10.0  # of a host on the open web, unless the spec says otherwise
KNOWN = (*FORMATS, *OTHER, "avif", "heif")


def download(  # noqa: PLR0913 - one argument for each field of the spec
    location: Path,
    *,
    source: str,
    job: Job,
    url_column: str,
    caption_column: str,
    timeout_s: float,
    max_side_px: int,
    user_agent: str | None = None,
    extra_columns: Sequence[str] = (),
    hash_column: str | None = None,
    deadline_s: float = 60.0,
    min_bytes_per_s: int = 1_024,
    max_bytes: int = 32 << 20,
    max_pixels: int = 100_000_000,
    formats: Sequence[str] = FORMATS,
    host_concurrency: int | None = None,
    host_requests_per_s: float | None = None,
    retry_after_s: float = 5.0,
    origin: str | None = None,
    origin_host: str | None = None,
    loopback_ports: Mapping[str, int] | None = None,
) -> Iterator[Fetched]:
    """One item for each row; `origin` (a folder below the specs) is served on loopback as `origin_host` for the run.

    `loopback_ports` are the only other ways to this machine: host name -> port of 127.0.0.1 (a local mirror).
    """
    if (origin is None) != (origin_host is None):
        raise ValueError(f"{source}: origin is {origin!r}, origin_host is {origin_host!r}; give both or neither")
    if unknown := sorted(set(formats) - set(KNOWN)):
        raise ValueError(f"{source}: acquire.args.formats: {unknown} is not known; choose from {', '.join(KNOWN)}")
    if origin is None:
        host_concurrency = host_concurrency or HOST_CONCURRENCY
        host_requests_per_s = host_requests_per_s or HOST_REQUESTS_PER_S
    rules = Rules(
        user_agent=_agent(source, user_agent, origin),
        log="",
        shared="",
        mapped=tuple((host.lower(), "127.0.0.1", port) for host, port in (loopback_ports or {}).items()),
        timeout_s=timeout_s,
        deadline_s=deadline_s,
        min_bytes_per_s=min_bytes_per_s,
        max_bytes=max_bytes,
        max_pixels=max_pixels,
        max_side_px=max_side_px,
        formats=tuple(formats),
        host_concurrency=host_concurrency,
        host_requests_per_s=host_requests_per_s,
        retry_after_s=retry_after_s,
    )
    urls = UrlList(
        source=source,
        location=location,
        url_column=url_column,
        caption_column=caption_column,
        rules=rules,
        extra_columns=tuple(extra_columns),
        hash_column=hash_column,
        origin=job.specs / origin if origin is not None else None,
        origin_host=origin_host,
    )
    yield from fetch(urls, job)


def _agent(source: str, user_agent: str | None, origin: str | None) -> str:
    """The user agent: on the open web one with a name and a contact, so that a host's owner can object."""
    if user_agent is None and origin is not None:
        return LOOPBACK_AGENT
    if user_agent is None or not (CONTACT.fullmatch(user_agent) and user_agent.isascii() and user_agent.isprintable()):
        raise ValueError(
            f"{source}: acquire.args.user_agent is {user_agent!r}; give a robot's name and a contact, such as "
            "'examplebot/1.0 (+https://example.org/bot; crawl@example.org)'"
        )
    return user_agent
