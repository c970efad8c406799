"""Realised mix: what a stage's loader delivered, by source, modality and category, beside what its mix asked for.

In: a train artifact, or `trained.parquet` and the plan. Out: flat rows. Invariant: by source, the tokens counted in the
tensors that were trained are those of the plan without the documents named as left out; any other difference is an
error that fails the stage. What lies between the lock and the plan (over-long documents, an incomplete batch) is shown,
and closes by source in pack. Cost: one scan of the plan, of the lock and of a few columns of the ledgers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb

from solo.artifact import Artifact, LedgerError
from solo.curate import categories
from solo.report.markdown import escape, table

Row = dict[str, Any]

COUNTS = ("n_tokens", "n_loss_tokens")

# Documents of the plan that were not named as left out; both say pack, source, key, exposure and where it was cut.
DELIVERED = """
CREATE TEMP TABLE delivered AS
SELECT * FROM read_parquet($plan) AS plan
ANTI JOIN (
  SELECT pack, unnest(left_out, recursive := TRUE) FROM read_parquet($trained)
) AS missing USING (pack, source, key, exposure, "begin")
"""
COUNTED = """
SELECT source, CAST(sum(n_tokens) AS BIGINT) AS n_tokens, CAST(sum(n_loss_tokens) AS BIGINT) AS n_loss_tokens
FROM (SELECT unnest(sources, recursive := TRUE) FROM read_parquet($trained))
GROUP BY source ORDER BY source
"""
SUMS = """
SELECT {group} AS name, count(*) AS n_documents, CAST(sum(n_tokens) AS BIGINT) AS n_tokens,
  CAST(sum(n_loss_tokens) AS BIGINT) AS n_loss_tokens, CAST(sum(n_patches) AS BIGINT) AS n_patches
FROM {rows} GROUP BY ALL ORDER BY name
"""
LOCK = """(
  SELECT source, key, n_repeats * n_tokens::BIGINT AS n_tokens, n_repeats * n_loss_tokens::BIGINT AS n_loss_tokens,
    n_repeats * n_patches::BIGINT AS n_patches
  FROM read_parquet($lock))"""


def check(what: str, trained: Path, plan: Path) -> None:
    """Raise LedgerError unless each source's tokens are those planned without the documents left out."""
    with duckdb.connect() as con:
        _deliver(con, trained, plan)
        expected = {r["name"]: r for r in _rows(con, SUMS.format(group="source", rows="delivered"))}
        counted = {r["source"]: r for r in _rows(con, COUNTED, trained=str(trained))}
    for source in sorted(expected | counted):
        for name in COUNTS:
            have, want = (side.get(source, {}).get(name, 0) for side in (counted, expected))
            if have != want:
                raise LedgerError(
                    f"{what}: {source}: {have} {name} delivered != {want} planned without those left out; "
                    f"the mix that was trained is not the one that was asked for; this is a bug, please report it"
                )


def _deliver(con: duckdb.DuckDBPyConnection, trained: Path, plan: Path) -> None:
    con.execute(DELIVERED, {"plan": str(plan), "trained": str(trained)})


def _rows(con: duckdb.DuckDBPyConnection, sql: str, **given: Any) -> list[Row]:
    found = con.execute(sql, given)
    names = [d[0] for d in found.description or ()]
    return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def by_source(stage: Artifact, pack: Artifact, lock: Artifact) -> list[Row]:
    """What each source was asked for, packed, and delivered."""
    asked = {s["source"]: s for s in lock.manifest.spec["mix"]["sources"]}
    drawn, planned, trained = (a.manifest.stats["sources"] for a in (lock, pack, stage))
    totals = [max(1, a.manifest.stats["n_tokens"]) for a in (lock, stage)]
    found = []
    for source, own in drawn.items():
        in_plan, out = planned.get(source, {}), trained.get(source, {})
        shares = [own["n_tokens"] / totals[0], out.get("n_tokens", 0) / totals[1]]
        found.append(
            {
                "source": source,
                "asked": ", ".join(f"{k} {asked[source][k]:g}" for k in _AMOUNTS if asked.get(source, {}).get(k)),
                "in the mix": own["n_tokens"],
                "not packed": own["n_tokens"] - in_plan.get("n_tokens", 0),
                "left out": in_plan.get("n_tokens", 0) - out.get("n_tokens", 0),
                "realised": out.get("n_tokens", 0),
                "label tokens": out.get("n_loss_tokens", 0),
                "share asked": f"{shares[0]:.2%}",
                "share realised": f"{shares[1]:.2%}",
            }
        )
    return found


_AMOUNTS = ("weight", "epochs", "samples", "max_epochs")


def by_kind(stage: Artifact, pack: Artifact, lock: Artifact, ledgers: Mapping[str, Artifact]) -> list[Row]:
    """Shares of the tokens by modality (text, patches) and by category where a ledger has it, asked and realised."""
    with duckdb.connect() as con:
        _deliver(con, stage.path / "trained.parquet", pack.path / "plan.parquet")
        con.execute(f"CREATE TEMP TABLE categories AS {categories.of_records(con, ledgers.values())}")
        found = []
        category = categories.named(categories.given(lock), "category")
        lock_path = str(lock.path / "lock.parquet")
        all_asked = _rows(con, SUMS.format(group="''", rows=LOCK), lock=lock_path)[0]
        all_done = next(iter(_rows(con, SUMS.format(group="''", rows="delivered"))), dict.fromkeys(all_asked, 0))
        for kind, sums in (("text tokens", _text), ("patches", lambda r: r["n_patches"])):
            found.append(_kind("modality", kind, sums(all_asked), sums(all_done), all_asked, all_done))
        joined = "{} LEFT JOIN categories USING (source, key)"
        asked = _rows(con, SUMS.format(group=category, rows=joined.format(f"{LOCK} AS lock")), lock=lock_path)
        done = {r["name"]: r for r in _rows(con, SUMS.format(group=category, rows=joined.format("delivered")))}
    if [r["name"] for r in asked] != [categories.NONE]:
        for r in asked:
            n = done.get(r["name"], {}).get("n_tokens", 0)
            found.append(_kind("category", r["name"], r["n_tokens"], n, all_asked, all_done))
    return found


def _text(r: Row) -> int:
    return int(r["n_tokens"] - r["n_patches"])


def _kind(of: str, name: str, asked: int, done: int, all_asked: Row, all_done: Row) -> Row:
    shares = [f"{n / max(1, total['n_tokens']):.2%}" for n, total in ((asked, all_asked), (done, all_done))]
    return {"by": of, "": name, "in the mix": asked, "realised": done} | dict(
        zip(("share asked", "share realised"), shares, strict=True)
    )


def blocks(stages: Sequence[Artifact], inputs: Mapping[str, Artifact]) -> Iterator[str]:
    """Asked beside realised, for the page of train; nothing for a stage whose mix is not among the inputs."""
    for stage in stages:
        pack = next((inputs[i] for i in stage.manifest.inputs if i.startswith("pack/") and i in inputs), None)
        lock = inputs.get(f"curate/{pack.manifest.name}") if pack else None
        if pack is None or lock is None:
            continue
        ledgers = {i: inputs[i] for i in lock.manifest.inputs if i.startswith("shard/") and i in inputs}
        yield f"## Mix of {escape(stage.manifest.name)}: asked and realised, in tokens"
        yield table(by_source(stage, pack, lock))
        yield table(by_kind(stage, pack, lock, ledgers))
