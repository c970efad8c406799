"""Held out: the samples of a mix that no stage trains, and the packs in which their loss is measured.

In: a mix lock, the recipe's `held_out` (one sample in so many). Out: `held_out/plan.parquet` and `packs.parquet`, in
the form of a pack plan, and what was set aside. Invariants: a hash of key and recipe seed alone decides, so a sample is
held out of all stages or of none, whatever else a mix holds and on any machine; all repeats of a sample go together and
are counted; what is measured is the first `tokens_per_source` in hash order, each once. Cost: two scans of the lock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from solo.artifact import Job, Result
from solo.pack import bestfit
from solo.pack.plan_files import COUNTED, Pieces, Planned, write_packs, write_plan
from solo.spec import SpecError

HELD_OUT = "held_out"  # the reason, and the folder of the measured packs in a pack artifact

# The same rule, turned round, chooses what is trained: EXPOSURES of solo/pack/part.py.
SET_ASIDE = """
CREATE TEMP TABLE set_aside AS
SELECT *, md5(key || $seed) AS place
FROM read_parquet($lock)
WHERE md5_number_lower(key || ':held_out:' || $seed) % CAST($one_in AS UBIGINT) = 0
"""
SUMS = """
SELECT source, CAST(sum(n_repeats) AS BIGINT) AS n_exposures, CAST(sum(n_repeats * n_tokens::BIGINT) AS BIGINT) AS
  n_tokens, CAST(sum(n_repeats * n_patches::BIGINT) AS BIGINT) AS n_patches,
  CAST(sum(n_repeats * n_loss_tokens::BIGINT) AS BIGINT) AS n_loss_tokens
FROM set_aside
GROUP BY source
ORDER BY source
"""
MEASURED = """
SELECT key, CAST(0 AS INTEGER) AS exposure, source, shard, "offset", length, template,
  n_images, n_patches, n_loss_tokens, n_tokens
FROM set_aside
WINDOW own AS (PARTITION BY source ORDER BY place, key, shard, "offset")
QUALIFY sum(n_tokens) OVER own <= $most OR row_number() OVER own = 1
ORDER BY source, place, key, shard, "offset"
"""


@dataclass(frozen=True)
class Apart:
    """What a mix sets aside: sums by source over all repeats, and the samples to be measured."""

    sums: Mapping[str, dict[str, int]]
    measured: pa.Table

    @property
    def lost(self) -> dict[str, dict[str, dict[str, int]]]:
        """Tokens of the lock that are not trained for this reason, by source and column."""
        return {HELD_OUT: {source: {k: own[k] for k in COUNTED} for source, own in self.sums.items()}}


def one_in(job: Job) -> int | None:
    """Samples of which one is held out; None where none is."""
    asked: dict[str, int] | None = job.spec.get(HELD_OUT)
    return asked["one_in"] if asked else None


def set_aside(con: duckdb.DuckDBPyConnection, lock: Path, job: Job) -> Apart:
    """The samples held out of a lock; SpecError where there is none."""
    asked = job.spec[HELD_OUT]
    con.execute(SET_ASIDE, {"lock": str(lock), "seed": str(job.spec["seed"]), "one_in": asked["one_in"]})
    sums = {row.pop("source"): row for row in con.sql(SUMS).to_arrow_table().to_pylist()}
    if not sums:
        raise SpecError(
            f"pack/{job.name}: held_out.one_in is {asked['one_in']}, and no sample of the mix is held out; lower it"
        )
    found = con.sql(MEASURED, params={"most": asked["tokens_per_source"]}).to_arrow_table()
    return Apart(sums, found.combine_chunks())


def write(out: Path, pieces: Pieces, pack_tokens: int) -> dict[str, Any]:
    """The measured packs, sources mixed, as few as they fit in; what they hold, by source."""
    if not len(pieces.row):
        raise SpecError(f"held_out: every sample held out is longer than a pack of {pack_tokens}; lower one_in")
    packs = bestfit.pack(pieces.counts["n_tokens"], pack_tokens)
    plan = Planned(packs.order, np.repeat(np.arange(len(packs.first) - 1), np.diff(packs.first)))
    folder = out / HELD_OUT
    folder.mkdir(exist_ok=True)
    write_plan(folder, pieces, plan)
    write_packs(folder, pieces, plan, by_source=False)
    sums = {name: np.bincount(pieces.source, weights=pieces.counts[name]) for name in ("n_tokens", "n_loss_tokens")}
    documents = np.bincount(pieces.source)
    sources = {
        source: {"n_documents": int(documents[i]), **{name: int(own[i]) for name, own in sums.items()}}
        for i, source in enumerate(pieces.sources)
        if i < len(documents)
    }
    return {"n_packs": len(packs.first) - 1, "sources": dict(sorted(sources.items()))}


def counted(made: Result, apart: Apart, measured: Mapping[str, Any]) -> Result:
    """A result of pack with the samples set aside among those it was given."""
    n = sum(own["n_exposures"] for own in apart.sums.values())
    stats = made.stats | {HELD_OUT: {"n_exposures": n, **measured}}
    return replace(made, n_in=made.n_in + n, dropped=made.dropped | {HELD_OUT: n}, stats=stats)
