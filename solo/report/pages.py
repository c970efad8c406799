"""Pages of the UI: one per part over all its sources, mixes, stages or benchmarks, and one for the recipe.

In: artifacts (manifests and the files beside them). Out: Markdown under 256 kB with its charts inside, and flat rows
for table artifacts. report.html is made of the same pages. Invariant: text of the data is escaped
(solo/report/markdown.py), so opening a page fetches nothing. Cost: about a second per part of the sample recipe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from solo.artifact import Artifact
from solo.report import data_pages, filter_pages, mix_pages, run_pages
from solo.report.charts import grouped, stacked
from solo.report.markdown import BAR, bar, escape, join, picture
from solo.report.markdown import table as markdown_table

N_TABLE_ROWS = 900  # the UI's limit for a table artifact is 1,000

Row = dict[str, Any]

PAGES: dict[str, Callable[[Sequence[Artifact], Mapping[str, Artifact]], Iterator[str]]] = {
    "acquire": data_pages.acquire_page,
    "filter": filter_pages.page,
    "shard": data_pages.shard_page,
    "curate": mix_pages.page,
    "pack": data_pages.pack_page,
    "train": run_pages.train_page,
    "evaluate": run_pages.evaluate_page,
    "report": run_pages.report_page,
}
ROWS: dict[str, Callable[[Sequence[Artifact]], Iterator[Row]]] = {
    "acquire": data_pages.acquire_rows,
    "filter": filter_pages.rows,
    "shard": data_pages.shard_rows,
    "curate": mix_pages.rows,
    "pack": data_pages.pack_rows,
    "train": run_pages.train_rows,
    "evaluate": run_pages.evaluate_rows,
    "report": run_pages.report_rows,
}


def page(part: str, artifacts: Sequence[Artifact], inputs: Mapping[str, Artifact] | None = None) -> str:
    """The page of one part; `inputs` (node id -> artifact) adds the pictures that filter shows from acquire."""
    return join(list(PAGES[part](artifacts, inputs or {})))


def details(part: str, artifacts: Sequence[Artifact], inputs: Mapping[str, Artifact] | None = None) -> dict[str, str]:
    """Name -> page of each artifact, for the parts that have one page more for each."""
    if part != "filter":
        return {}
    return {a.manifest.name: join(list(filter_pages.source_page(a, inputs or {}))) for a in artifacts}


def table(part: str, artifacts: Sequence[Artifact]) -> list[Row]:
    """The statistics of one part as flat rows of strings and numbers; where there are too many a last row says so."""
    found = [{k: "" if v is None else v for k, v in row.items()} for row in ROWS[part](artifacts)]
    if len(found) <= N_TABLE_ROWS:
        return found
    first = next(iter(found[0]))
    return [*found[:N_TABLE_ROWS], {first: f"and {len(found) - N_TABLE_ROWS} more rows"}]


def overview(artifacts: Sequence[Artifact]) -> str:
    """The recipe on one page: from records to trained tokens, token shares, scores."""
    return join(list(_overview(artifacts)))


def _overview(artifacts: Sequence[Artifact]) -> Iterator[str]:
    recipe = next((a.manifest for a in artifacts if a.manifest.part == "report"), None)
    yield f"# {escape(recipe.spec.get('title') or recipe.name)}" if recipe else "# From records to scores"
    if recipe:
        closes = "Every count closes" if recipe.stats.get("closes") else "**The counts do not close**"
        yield f"{closes}: {recipe.stats.get('n_checks', 0):,} equations checked."
    yield markdown_table(list(_funnel(artifacts)))
    if fell := list(_reasons(artifacts)):
        yield "## Why the others fell"
        yield markdown_table(fell)
    stages = [a.manifest for a in artifacts if a.manifest.part == "train"]
    if stages:
        shares = {m.name: {s: v["n_tokens"] for s, v in m.stats.get("sources", {}).items()} for m in stages}
        yield picture(
            stacked("Tokens trained, by source", data_pages.top_series(shares), unit="tokens"), "tokens trained"
        )
        yield markdown_table([_stage_row(m.name, m.stats) for m in stages])
    scored = [a.manifest for a in artifacts if a.manifest.part == "evaluate"]
    if scored:
        scores = {m.name: {k: m.stats[k] for k in ("score", "blind", "chance")} for m in scored}
        yield picture(grouped("Score against blind and chance", scores, unit="share right", top=1.0), "scores")
        yield markdown_table([{"benchmark": name, **s} for name, s in scores.items()])


def _funnel(artifacts: Sequence[Artifact]) -> Iterator[Row]:
    """Samples, then tokens, each line a share of the first of its unit."""

    def total(part: str, *path: str) -> int | None:
        found = [a.manifest for a in artifacts if a.manifest.part == part]
        return sum(int(getattr(m, path[0])[path[1]]) for m in found) if found else None

    samples = {
        "records offered": total("acquire", "counts", "in"),
        "acquired": total("acquire", "counts", "kept"),
        "kept by filter": total("filter", "counts", "kept"),
        "in shards": total("shard", "counts", "kept"),
    }
    tokens = {
        "in shards": total("shard", "stats", "n_tokens"),
        "in mixes, with repeats": total("curate", "stats", "n_tokens"),
        "in packs": total("pack", "stats", "n_tokens"),
        "trained": total("train", "stats", "n_tokens"),
        "trained with loss": total("train", "stats", "n_loss_tokens"),
    }
    for unit, counts in (("samples", samples), ("tokens", tokens)):
        known = {name: n for name, n in counts.items() if n is not None}
        top = max(known.values(), default=0)
        for name, n in known.items():
            yield {"unit": unit, "": name, "count": n, BAR: bar(n / max(top, 1), width=24)}


def _reasons(artifacts: Sequence[Artifact], most: int = 12) -> Iterator[Row]:
    """Samples dropped on the way into the shards, by part and reason, the largest first."""
    counts: Counter[tuple[str, str]] = Counter()
    for m in (a.manifest for a in artifacts if a.manifest.part in ("acquire", "filter", "shard")):
        counts.update({(m.part, reason): n for reason, n in m.counts["dropped"].items() if n})
    ranked = counts.most_common()
    for (part, reason), n in ranked[:most]:
        yield {"part": part, "reason": reason, "samples": n}
    if rest := sum(n for _, n in ranked[most:]):
        yield {"part": "", "reason": f"{len(ranked) - most} more reasons", "samples": rest}


def _stage_row(name: str, stats: Mapping[str, Any]) -> Row:
    names = ("n_packs", "n_steps", "n_tokens", "n_loss_tokens", "loss_first", "loss_last")
    return {"stage": name} | {k.removeprefix("n_").replace("_", " "): stats[k] for k in names}
