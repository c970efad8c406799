"""Pages of the filter: one over all sources, and one for each source.

In: artifacts of filter, and those of acquire for the pictures. Out: blocks of Markdown, the important ones first, and
flat rows for the UI's table. A source's page: the funnel in the order of its spec, the distributions that its
thresholds cut (each drawn in), kept and dropped samples by reason, clusters of duplicates, languages, resolution.
Invariants: counts come from manifests; captions are escaped; the number of pictures is bounded. Cost: the columns a
histogram shows are read whole, 8 bytes a value; a handful of samples is read from raw/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from solo import predicate
from solo.artifact import Artifact
from solo.filter import duplicates
from solo.report import gallery, host_pages
from solo.report.charts import Panel, histograms, stacked
from solo.report.data_pages import Inputs, Row, flow_row, most_first, share_of, top_series
from solo.report.markdown import BAR, bar, escape, picture, table
from solo.spec import Filter, SpecError

MEASURES = (  # column, title, log axis
    ("width_px", "width, px", True),
    ("aspect", "width / height", True),
    ("n_chars", "characters of text", True),
    ("language_score", "language score", False),
)
N_LANGUAGES = 12
N_PANELS = 8
N_EACH = 6  # samples of one verdict on a source's page
CUT = re.compile(r"^\s*(.+?)\s*(>=|<=|>|<)\s*(-?\d+(?:\.\d+)?)\s*$", re.DOTALL)
JUDGED = "SELECT * FROM read_parquet($signals) AS s JOIN read_parquet($verdicts) AS v USING (key)"
RESOLUTION = """
SELECT greatest(width_px, height_px) AS long_px, keep, count(*) AS n FROM judged WHERE width_px IS NOT NULL GROUP BY ALL
"""
FORMATS = "SELECT image_format, count(*), count(*) FILTER (keep) FROM judged GROUP BY ALL ORDER BY 2 DESC, 1"
LONG_SIDES = (64, 256, 512, 1024, 2048)


def rows(artifacts: Sequence[Artifact]) -> Iterator[Row]:
    """One row per source and verdict."""
    for a in artifacts:
        counts = a.manifest.counts
        for reason, n in {"kept": counts["kept"], **most_first(counts["dropped"])}.items():
            yield {"source": a.manifest.name, "verdict": reason, "samples": n, "share": share_of(n, counts["in"])}


def page(artifacts: Sequence[Artifact], inputs: Inputs) -> Iterator[str]:
    """Verdicts, the distributions they cut, and samples on both sides of the cut."""
    yield "# Filter: which samples stay, and why the others do not"
    yield table([flow_row(a) for a in artifacts])
    dropped = {a.manifest.name: {r: n for r, n in a.manifest.counts["dropped"].items() if n} for a in artifacts}
    if shown := top_series({name: counts for name, counts in dropped.items() if counts}):
        yield picture(stacked("Samples dropped, by reason", shown, unit="samples"), "samples dropped by reason")
    yield table(list(rows(artifacts)))
    panels = [panel for column in MEASURES if (panel := _panel(artifacts, *column))]
    if panels:
        yield picture(histograms("Kept and dropped, all sources", panels, unit="samples"), "histograms of signals")
    if languages := list(_languages(artifacts)):
        yield "## Languages"
        yield table(languages)
    for a in artifacts:
        acquired = inputs.get(f"acquire/{a.manifest.name}")
        if acquired:
            yield f"## Samples of {escape(a.manifest.name)}\n\n{gallery.verdicts(a, acquired)}"


def source_page(a: Artifact, inputs: Inputs) -> Iterator[str]:
    """All of one source."""
    name, counts = a.manifest.name, a.manifest.counts
    yield f"# Filter: {escape(name)}"
    acquired = inputs.get(f"acquire/{name}")
    records = f"Of {acquired.manifest.counts['in']:,} records {counts['in']:,} became samples; " if acquired else ""
    yield f"{records}{counts['kept']:,} of {counts['in']:,} stay ({share_of(counts['kept'], counts['in'])})."
    yield table(list(funnel(a)))
    files = {"signals": str(a.path / "signals.parquet"), "verdicts": str(a.path / "verdicts.parquet")}
    with duckdb.connect() as con:
        con.sql(JUDGED, params=files).create_view("judged")
        panels = list(_cuts(con, _spec(a)))
        shown = {panel.title for panel in panels}
        panels += [p for column in MEASURES if column[0] not in shown and (p := _panel([a], *column))]
        if panels:
            title = "Distributions; a dashed line is a threshold"
            yield picture(histograms(title, panels[:N_PANELS], unit="samples"), "histograms of signals")
        if acquired:
            yield f"## Kept and dropped\n\n{gallery.verdicts(a, acquired, n_each=N_EACH, n_reasons=20)}"
            if clusters := gallery.clusters(a, acquired):
                yield f"## Duplicates: what stays, and what went for it\n\n{clusters}"
        if languages := list(_languages([a])):
            yield f"## Languages\n\n{table(languages)}"
        if sizes := list(_resolution(con)):
            yield f"## Resolution\n\n{table(sizes)}"
            yield f"## Formats\n\n{table(list(_formats(con)))}"
    if acquired:
        yield from host_pages.blocks(acquired, a)


def funnel(a: Artifact) -> Iterator[Row]:
    """What each rule of the spec took from what the rules before it had left."""
    spec, counts = _spec(a), a.manifest.counts
    rules = dict(spec.keep)
    rules |= {f"duplicate_{'_'.join(duplicates.parts(e))}": f"{e} of a smaller key" for e in spec.unique}
    limits = {"near_image": ("image", "colour"), "near_text": ("text",)}
    for reason in duplicates.reasons((), spec.near):
        given = {field: getattr(spec.near, field) for field in limits[reason]}
        rules[reason] = ", ".join(f"{field} {value}" for field, value in given.items() if value is not None)
    left = counts["in"]
    yield {"rule": "(all samples)", "condition": "", "dropped": 0, "left": left, BAR: bar(1.0)}
    for reason, condition in rules.items():
        n = counts["dropped"].get(reason, 0)
        left -= n
        share = left / max(counts["in"], 1)
        yield {"rule": reason, "condition": condition, "dropped": n, "left": left, BAR: bar(share)}


def _spec(a: Artifact) -> Filter:
    return Filter.model_validate(a.manifest.spec["filter"])


def _cuts(con: duckdb.DuckDBPyConnection, spec: Filter) -> Iterator[Panel]:
    """A histogram for each comparison with a number in the predicates, over what it compares."""
    for condition in spec.keep.values():
        for part in re.split(r"\b(?:AND|OR)\b", condition, flags=re.IGNORECASE):
            found = CUT.match(part)
            if found is None:
                continue
            try:
                # The whole was checked when it was run; a part of it may be half a bracket, or what a string quotes.
                predicate.check(con, con.table("judged"), {"": part}, "")
                values = con.sql(f"SELECT CAST({found[1]} AS DOUBLE) AS value, keep FROM judged").to_arrow_table()
            except (SpecError, duckdb.Error):
                continue  # the funnel shows it in words
            yield _split(values["value"], values["keep"], " ".join(found[1].split()), limit=float(found[3]))


def _split(values: pa.ChunkedArray, keep: pa.ChunkedArray, title: str, *, limit: float | None = None) -> Panel:
    numbers = values.to_numpy(zero_copy_only=False).astype(float)
    kept = keep.to_numpy(zero_copy_only=False).astype(bool)
    seen = numbers[np.isfinite(numbers)]
    log = len(seen) > 0 and seen.min() >= 0 and seen.max() > 10 * max(float(np.median(seen)), 1e-9)
    log = log or (len(seen) > 0 and seen.min() > 0 and seen.max() > 30 * seen.min())
    return Panel(title[:60], {"kept": numbers[kept], "dropped": numbers[~kept]}, log=log, limit=limit)


def _resolution(con: duckdb.DuckDBPyConnection) -> Iterator[Row]:
    """Samples by the longest side of their first picture."""
    names = [name for name, *_ in con.execute("DESCRIBE judged").fetchall()]
    if "width_px" not in names:
        return
    bounds = [0, *LONG_SIDES, 1 << 40]
    n_in, n_kept = [0] * (len(bounds) - 1), [0] * (len(bounds) - 1)
    for long_px, keep, n in con.execute(RESOLUTION).fetchall():
        i = sum(long_px >= b for b in LONG_SIDES)
        n_in[i] += n
        n_kept[i] += n * keep
    total = max(sum(n_in), 1)
    for i, n in enumerate(n_in):
        label = f"{bounds[i]} px and more" if i == len(LONG_SIDES) else f"{bounds[i]} to {bounds[i + 1] - 1} px"
        if n:
            yield {"longest side": label, "samples": n, "kept": n_kept[i], BAR: bar(n / total)}


def _formats(con: duckdb.DuckDBPyConnection) -> Iterator[Row]:
    """Samples by the true format of their first picture."""
    found = con.execute(FORMATS).fetchall()
    total = sum(n for _, n, _ in found)
    for image_format, n, kept in found:
        yield {"format": image_format or "(none that decodes)", "samples": n, "kept": kept, BAR: bar(n / total)}


def _languages(artifacts: Sequence[Artifact]) -> Iterator[Row]:
    """Samples and kept samples per language, over the sources that measured it."""
    n_in: dict[str, int] = {}
    n_kept: dict[str, int] = {}
    for a in artifacts:
        signals = _signals(a, "language")
        if signals is None:
            continue
        grouped = signals.group_by(["language", "keep"]).aggregate([([], "count_all")]).to_pylist()
        for row in grouped:
            name = row["language"] or "(none)"
            n_in[name] = n_in.get(name, 0) + row["count_all"]
            n_kept[name] = n_kept.get(name, 0) + (row["count_all"] if row["keep"] else 0)
    most = sorted(n_in, key=lambda name: (-n_in[name], name))
    total = sum(n_in.values())
    for name in most[:N_LANGUAGES]:
        yield {"language": name, "samples": n_in[name], "kept": n_kept[name], BAR: bar(n_in[name] / total)}
    if rest := most[N_LANGUAGES:]:
        yield {
            "language": f"{len(rest)} others",
            "samples": sum(n_in[r] for r in rest),
            "kept": sum(n_kept[r] for r in rest),
        }


def _panel(artifacts: Sequence[Artifact], column: str, title: str, log: bool) -> Panel | None:
    kept, dropped = [np.zeros(0)], [np.zeros(0)]
    for a in artifacts:
        signals = _signals(a, column)
        if signals is None:
            continue
        values = signals[column].cast(pa.float64()).to_numpy(zero_copy_only=False)
        keep = signals["keep"].to_numpy(zero_copy_only=False).astype(bool)
        kept.append(values[keep])
        dropped.append(values[~keep])
    groups = {"kept": np.concatenate(kept), "dropped": np.concatenate(dropped)}
    return Panel(title, groups, log) if any(np.isfinite(g).any() for g in groups.values()) else None


def _signals(a: Artifact, column: str) -> pa.Table | None:
    """One signal beside the verdict; both files are sorted by key. None where the source does not measure it."""
    path = a.path / "signals.parquet"
    if column not in pq.read_schema(path).names:
        return None
    table = pq.read_table(path, columns=[column])
    keep = pq.read_table(a.path / "verdicts.parquet", columns=["keep"])["keep"]
    assert len(keep) == len(table), f"{path}: {len(table)} signals but {len(keep)} verdicts"
    return table.append_column("keep", keep)
