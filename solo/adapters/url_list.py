"""URL lists with captions (CapsFusion, CC12M, LAION): .parquet, .csv or .jsonl, fetched by img2dataset.

Sample: one assistant turn, image then caption. Key: URL and caption. A row that is not fetched is a Fetched item with
a status. Stored JPEG bytes are the served ones unless the long side is over `max_side_px` (see solo/download.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from solo.acquire import Fetched
from solo.artifact import Job
from solo.download import fetch
from solo.url_rows import UrlList


def download(  # noqa: PLR0913 - one argument for each field of the spec
    location: Path,
    *,
    source: str,
    job: Job,
    url_column: str,
    caption_column: str,
    timeout_s: int,
    max_side_px: int,
    extra_columns: Sequence[str] = (),
    origin: str | None = None,
    origin_host: str | None = None,
) -> Iterator[Fetched]:
    """One item for each row; `origin` (a folder below the specs) is served on loopback as `origin_host` for the run."""
    if (origin is None) != (origin_host is None):
        raise ValueError(f"{source}: origin is {origin!r}, origin_host is {origin_host!r}; give both or neither")
    urls = UrlList(
        source=source,
        location=location,
        url_column=url_column,
        caption_column=caption_column,
        extra_columns=tuple(extra_columns),
        timeout_s=timeout_s,
        max_side_px=max_side_px,
        origin=job.specs / origin if origin is not None else None,
        origin_host=origin_host,
    )
    yield from fetch(urls, job)
