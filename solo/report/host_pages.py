"""Hosts of one source, for its page: what each was asked for, what came, what stays, and what it lost most to.

In: the artifacts of acquire and filter. Out: blocks of Markdown; nothing where no record has a URL. Invariant: hosts
are escaped and at most N_HOSTS, the others are one row. Cost: one scan of the outcomes, joined with the verdicts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import duckdb

from solo.acquire.raw import OUTCOMES
from solo.artifact import Artifact
from solo.report.link_rot import blocks as link_rot
from solo.report.markdown import BAR, bar, table

N_HOSTS = 12
HOSTS = """
WITH asked AS (
  SELECT lower(regexp_extract(url, '^[a-zA-Z]+://([^/?#]*)', 1)) AS host, status, status = 'ok' AS came,
         came AND coalesce(keep, FALSE) AS stays
  FROM read_parquet($outcomes) LEFT JOIN read_parquet($verdicts) USING (key) WHERE url IS NOT NULL
),
ranked AS (SELECT host, row_number() OVER (ORDER BY count(*) DESC, host) AS nth FROM asked GROUP BY host)
SELECT CASE WHEN nth <= $n_hosts THEN host END AS name, count(DISTINCT host), count(*) AS urls, count_if(came),
       count_if(stays), histogram(status)
FROM asked JOIN ranked USING (host) GROUP BY name ORDER BY name IS NULL, urls DESC, name
"""


def blocks(acquired: Artifact, filtered: Artifact) -> Iterator[str]:
    """The hosts, then link rot where the list was crawled again."""
    files = {"outcomes": str(acquired.path / OUTCOMES), "verdicts": str(filtered.path / "verdicts.parquet")}
    with duckdb.connect() as con:
        hosts = con.execute(HOSTS, {**files, "n_hosts": N_HOSTS}).fetchall()
    if hosts:
        yield "## Hosts"
        yield table([_row(*host) for host in hosts])
    yield from link_rot([acquired])


def _row(host: str | None, n_hosts: int, urls: int, came: int, stay: int, ends: dict[str, int]) -> dict[str, Any]:
    name = f"{n_hosts:,} others" if host is None else host or "(no host)"
    n, status = max(((n, status) for status, n in ends.items() if status != "ok"), default=(0, ""))
    return {
        "host": name,
        "URLs": urls,
        "came": came,
        "stay": stay,
        "most often lost to": f"{status} ({n:,})" if n else "",
        BAR: bar(stay / urls),
    }
