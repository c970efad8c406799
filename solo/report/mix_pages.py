"""Pages of curate: what each mix asked for and what it got.

In: curate's artifacts, and the ledgers they were drawn from where they are at hand. Out: blocks of Markdown, the
important ones first, or flat rows for the UI's table. Invariants: counts come from manifests, groups and lengths from
the lock; what was asked is before any limit, so a limit that bit shows as a difference. What a stage then really
trained stands on the page of train (solo/train/realised.py). Cost: one scan of each lock, and one join with the ledgers
of sources whose records have categories of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import duckdb
import numpy as np

from solo.artifact import Artifact
from solo.curate import categories
from solo.report import exclude_pages
from solo.report.charts import Panel, histograms, stacked
from solo.report.data_pages import most_first, share_of, top_arrays, top_series
from solo.report.markdown import escape, picture, table

Row = dict[str, Any]
Inputs = Mapping[str, Artifact]

GROUPS = """
SELECT source, IF(n_images > 0, 'image-text', 'text') AS modality, {category} AS category,
  count(*) AS samples, CAST(sum(n_repeats) AS BIGINT) AS exposures,
  CAST(sum(n_repeats * n_tokens::BIGINT) AS BIGINT) AS tokens
FROM read_parquet($lock) AS lock {joined}
GROUP BY ALL ORDER BY ALL
"""
LENGTHS = """
SELECT source, n_tokens, CAST(sum(n_repeats) AS BIGINT) AS exposures
FROM read_parquet($lock) GROUP BY ALL ORDER BY ALL
"""
MOST_VALUES = 200_000  # of a histogram's group; thinned beyond, which its shape does not show


def rows(artifacts: Sequence[Artifact]) -> Iterator[Row]:
    """One row per mix and source: what was asked, what was drawn."""
    for a in artifacts:
        asked = _asked_tokens(a)
        totals = max(1, sum(asked.values())), max(1, a.manifest.stats["n_tokens"])
        given = {s["source"]: s for s in a.manifest.spec.get("mix", {}).get("sources", [])}
        for source, s in a.manifest.stats["sources"].items():
            yield {
                "mix": a.manifest.name,
                "source": source,
                "category": given.get(source, {}).get("category") or "",
                "asked": _amount(given.get(source, {})),
                "share asked": share_of(asked[source], totals[0]),
                "share of tokens": share_of(s["n_tokens"], totals[1]),
                "tokens": s["n_tokens"],
                "samples": s["n_samples"],
                "exposures": s["n_exposures"],
                "epochs": round(s["epochs"], 3),
                "loss tokens": s["n_loss_tokens"],
                "short of asked": s.get("short_tokens", 0),
            }


def page(artifacts: Sequence[Artifact], inputs: Inputs) -> Iterator[str]:
    """Shares, lengths and repeats of each mix, the limits that bit, and what was left out."""
    yield "# Curate: the mix of each stage"
    found = list(rows(artifacts))
    shares = {
        a.manifest.name: {s: v["n_tokens"] for s, v in a.manifest.stats.get("sources", {}).items()} for a in artifacts
    }
    yield picture(stacked("Tokens by source", top_series(shares), unit="tokens, repeats counted"), "tokens by source")
    for a in artifacts:
        yield f"## {escape(a.manifest.name)}"
        own = [row for row in found if row["mix"] == a.manifest.name]
        idle = {"mix"} | {name for name in ("category", "short of asked") if not any(row[name] for row in own)}
        yield table([{k: v for k, v in row.items() if k not in idle} for row in own])
        yield "### By modality and category: asked and drawn"
        yield table(list(_group_rows(a, inputs)))
        yield picture(_lengths(a), "tokens per sample and times it is seen")
        yield "### Limits that bit"
        yield table(limits) if (limits := list(limit_rows(a))) else "None: each source gave what was asked of it."
        left_out = {reason: n for reason, n in most_first(a.manifest.counts["dropped"]).items() if n}
        if left_out:
            yield "### Left out, by reason"
            yield table([{"not in the mix because": reason, "samples": n} for reason, n in left_out.items()])
        yield from exclude_pages.blocks(a)


def limit_rows(a: Artifact) -> Iterator[Row]:
    """Each cap and quota that took something away, and how much."""
    stats, mix = a.manifest.stats, a.manifest.spec.get("mix", {})
    caps = {s["source"]: s.get("max_epochs") for s in mix.get("sources", [])}
    for source, s in stats["sources"].items():
        amount = s.get("amount") or {}
        if short := amount.get("short") or s.get("short_tokens"):
            unit = amount.get("unit", "tokens")
            limit = f"max_epochs {caps.get(source)}"
            yield {"limit": limit, "on": source, "asked": amount.get("asked"), "took away": short, "unit": unit}
    for category, q in stats.get("quotas", {}).items():
        if q["asked"] > q["most"]:
            limit = f"quota, {q['most']:,}"
            took = q["asked"] - q["most"]
            yield {"limit": limit, "on": f"category {category}", "asked": q["asked"], "took away": took} | {
                "unit": q["unit"]
            }
    for q in stats.get("class_quotas", []):
        if q["left_out"]:
            limit = f"quota {q['quota']}, {q['most']} of each {q['each']}"
            yield {"limit": limit, "on": q["source"], "asked": None, "took away": q["left_out"], "unit": "samples"}


def _group_rows(a: Artifact, inputs: Inputs) -> Iterator[Row]:
    """Shares by modality, then by category: asked (as much of each source's amount as it holds of the group), drawn."""
    asked, drawn = _asked_tokens(a), a.manifest.stats["sources"]
    found = _groups(a, inputs)
    for by in ("modality", "category"):
        names = sorted({r[by] for r in found})
        if names == [categories.NONE]:
            continue
        for name in names:
            own = [r for r in found if r[by] == name]
            wanted = sum(asked[r["source"]] * r["tokens"] / max(1, drawn[r["source"]]["n_tokens"]) for r in own)
            sums = {k: sum(r[k] for r in own) for k in ("samples", "exposures", "tokens")}
            yield {
                "by": by,
                "": name,
                "share asked": share_of(wanted, sum(asked.values())),
                "share drawn": share_of(sums["tokens"], a.manifest.stats["n_tokens"]),
                **sums,
            }


def _groups(a: Artifact, inputs: Inputs) -> list[Row]:
    ledgers = [inputs[i] for i in a.manifest.inputs if i.startswith("shard/") and i in inputs]
    with duckdb.connect() as con:
        records = categories.of_records(con, ledgers)
        joined = f"LEFT JOIN ({records}) AS records USING (source, key)" if "UNION ALL" in records else ""
        category = categories.named(categories.given(a), "records.category" if joined else "NULL")
        given = {"lock": str(a.path / "lock.parquet")}
        return list(con.sql(GROUPS.format(category=category, joined=joined), params=given).to_arrow_table().to_pylist())


def _lengths(a: Artifact) -> bytes:
    """Two histograms: tokens of a sample by source, over exposures; how often samples are seen, over samples."""
    with duckdb.connect() as con:
        given = {"lock": str(a.path / "lock.parquet")}
        found = con.sql(LENGTHS, params=given).to_arrow_table().to_pydict()
        seen = con.sql(
            "SELECT n_repeats, count(*) AS n FROM read_parquet($lock) GROUP BY ALL ORDER BY ALL", params=given
        )
        repeats = seen.to_arrow_table().to_pydict()
    sources = np.array(found["source"])
    of = {
        str(source): _repeated(
            np.array(found["n_tokens"])[sources == source], np.array(found["exposures"])[sources == source]
        )
        for source in np.unique(sources)
    }
    panels = [Panel("tokens per sample, over exposures", top_arrays(of), log=True)]
    panels.append(
        Panel("times a sample is seen", {"": _repeated(np.array(repeats["n_repeats"]), np.array(repeats["n"]))})
    )
    return histograms("Lengths and repeats", panels, unit="samples")


def _repeated(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Each value as often as it counts; all counts divided by one number where there are too many."""
    found: np.ndarray = np.repeat(values, np.maximum(1, counts // max(1, int(counts.sum()) // MOST_VALUES)))
    return found


def _asked_tokens(a: Artifact) -> dict[str, float]:
    """What each source was asked for before any limit, in tokens; samples count as many as those drawn on average."""
    found = {}
    for source, s in a.manifest.stats["sources"].items():
        amount = s.get("amount") or {}
        asked = amount.get("asked", s["n_tokens"] + s.get("short_tokens", 0))
        in_samples = amount.get("unit") == "samples"
        found[source] = asked * s["n_tokens"] / max(1, s["n_exposures"]) if in_samples else float(asked)
    return found


def _amount(source: Mapping[str, Any]) -> str:
    """The amount in the words of the mix's YAML."""
    given = ("weight", "epochs", "samples", "max_epochs")
    return ", ".join(f"{k} {source[k]:g}" for k in given if source.get(k)) or "by sql"
