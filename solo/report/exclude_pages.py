"""Blocks of the curate page: what a mix left out because another source or a benchmark holds it too.

In: an artifact of curate. Out: Markdown, nothing where the mix compares nothing. Invariant: counts come from the
manifest, single hits from the Parquet beside it; text is escaped. Cost: the first rows of a small file.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow.parquet as pq

from solo.artifact import Artifact
from solo.curate.exclude import HITS_FILE
from solo.report.markdown import table

N_HITS = 20


def blocks(a: Artifact) -> Iterator[str]:
    """Benchmarks compared with and their hits, then twins in other sources."""
    compared = a.manifest.stats.get("contamination", {})
    if compared:
        yield "### Held against benchmarks"
        yield table([{"benchmark": name} | {_words(k): n for k, n in c.items()} for name, c in _filled(compared)])
        hits = pq.read_table(a.path / HITS_FILE).slice(0, N_HITS)
        if hits.num_rows:
            yield table(hits.to_pylist())
    twins = [row for row in a.manifest.stats.get("excluded", []) if row["winner_source"] is not None]
    if twins:
        yield "### Twins across sources"
        yield table([{_words(k): v for k, v in row.items()} for row in twins])


def _filled(compared: dict[str, dict[str, int]]) -> list[tuple[str, dict[str, int]]]:
    """The same columns for every benchmark."""
    names = dict.fromkeys(name for counts in compared.values() for name in counts)
    return [(b, {name: counts.get(name, 0) for name in names}) for b, counts in compared.items()]


def _words(name: str) -> str:
    return name.replace("_", " ").replace("winner source", "kept in")
