"""Pages and rows of the parts that make data: acquire, filter, shard, curate, pack.

In: the artifacts of one part. Out: blocks of Markdown, the important ones first, or flat rows for the UI's table.
Invariant: counts come from manifests, shapes of distributions from the Parquet files beside them. Cost: the columns a
histogram shows are read whole, 4 bytes a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from solo import gallery, link_rot
from solo.artifact import Artifact
from solo.charts import Panel, histograms, stacked
from solo.markdown import BAR, bar, escape, picture, table

Row = dict[str, Any]
Inputs = Mapping[str, Artifact]

N_SERIES = 7  # colours of a stacked chart; what is rarer is "other"
MEASURES = (  # column, title, log axis
    ("width_px", "width, px", True),
    ("aspect", "width / height", True),
    ("n_chars", "characters of text", True),
    ("language_score", "language score", False),
)
N_LANGUAGES = 12


def acquire_rows(artifacts: Sequence[Artifact]) -> Iterator[Row]:
    """One row per source and status."""
    for a in artifacts:
        n_in = a.manifest.counts["in"]
        for status, n in _by_status(a).items():
            yield {"source": a.manifest.name, "status": status, "records": n, "share": _share(n, n_in)}


def acquire_page(artifacts: Sequence[Artifact], inputs: Inputs) -> Iterator[str]:
    """What became of every record."""
    yield "# Acquire: from records to raw samples"
    yield table([_flow_row(a) | {"bytes": a.manifest.stats.get("bytes")} for a in artifacts])
    lost = {a.manifest.name: {s: n for s, n in _by_status(a).items() if s != "ok"} for a in artifacts}
    if shown := top_series({name: counts for name, counts in lost.items() if counts}):
        yield picture(stacked("Records that gave no sample, by status", shown, unit="records"), "records by status")
    yield table([row | _bar(row) for row in acquire_rows(artifacts)])
    yield from link_rot.blocks(artifacts)


def filter_rows(artifacts: Sequence[Artifact]) -> Iterator[Row]:
    """One row per source and verdict."""
    for a in artifacts:
        counts = a.manifest.counts
        for reason, n in {"kept": counts["kept"], **_most_first(counts["dropped"])}.items():
            yield {"source": a.manifest.name, "verdict": reason, "samples": n, "share": _share(n, counts["in"])}


def filter_page(artifacts: Sequence[Artifact], inputs: Inputs) -> Iterator[str]:
    """Verdicts, the distributions they cut, and samples on both sides of the cut."""
    yield "# Filter: which samples stay, and why the others do not"
    yield table([_flow_row(a) for a in artifacts])
    dropped = {a.manifest.name: {r: n for r, n in a.manifest.counts["dropped"].items() if n} for a in artifacts}
    if shown := top_series({name: counts for name, counts in dropped.items() if counts}):
        yield picture(stacked("Samples dropped, by reason", shown, unit="samples"), "samples dropped by reason")
    yield table(list(filter_rows(artifacts)))
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


def shard_rows(artifacts: Sequence[Artifact]) -> Iterator[Row]:
    """One row per source."""
    for a in artifacts:
        s = a.manifest.stats
        yield {
            "source": a.manifest.name,
            "samples": s["n_samples"],
            "images": s["n_images"],
            "shards": s["n_shards"],
            "tokens": s["n_tokens"],
            "text tokens": s["n_text_tokens"],
            "patches": s["n_patches"],
            "loss tokens": s["n_loss_tokens"],
            "tokens per sample": round(s["n_tokens"] / max(s["n_samples"], 1), 1),
            "bytes": s["bytes"],
        }


def shard_page(artifacts: Sequence[Artifact], inputs: Inputs) -> Iterator[str]:
    """Tokens by source and modality."""
    yield "# Shards: what the ledgers hold"
    yield table(list(shard_rows(artifacts)))
    yield picture(stacked("Tokens in shards", _modality(_stats(artifacts)), unit="tokens"), "tokens by modality")
    ledgers = [_columns(a, ("n_tokens", "n_patches")) for a in artifacts]
    tokens = {a.manifest.name: t["n_tokens"] for a, t in zip(artifacts, ledgers, strict=True)}
    patches = {a.manifest.name: t["n_patches"][t["n_patches"] > 0] for a, t in zip(artifacts, ledgers, strict=True)}
    panels = [Panel("tokens per sample", _top_arrays(tokens), log=True)]
    panels.append(Panel("patches per sample with images", {name: patches[name] for name in panels[0].groups}, log=True))
    yield picture(histograms("Size of a sample", panels, unit="samples"), "histograms of sample sizes")
    dropped = [_flow_row(a) for a in artifacts if a.manifest.counts["dropped"]]
    if dropped:
        yield "## Samples that could not be sharded"
        yield table(dropped)


def curate_rows(artifacts: Sequence[Artifact]) -> Iterator[Row]:
    """One row per mix and source: what was asked, what was drawn."""
    for a in artifacts:
        total = max(a.manifest.stats["n_tokens"], 1)
        asked = {s["source"]: s for s in a.manifest.spec.get("mix", {}).get("sources", [])}
        for source, s in a.manifest.stats["sources"].items():
            yield {
                "mix": a.manifest.name,
                "source": source,
                "asked": _asked(asked.get(source, {})),
                "share of tokens": _share(s["n_tokens"], total),
                "tokens": s["n_tokens"],
                "samples": s["n_samples"],
                "exposures": s["n_exposures"],
                "epochs": round(s["epochs"], 3),
                "loss tokens": s["n_loss_tokens"],
                "short of asked": s.get("short_tokens", 0),
            }


def curate_page(artifacts: Sequence[Artifact], inputs: Inputs) -> Iterator[str]:
    """What each mix asked for and what it got."""
    yield "# Curate: the mix of each stage"
    rows = list(curate_rows(artifacts))
    shares = {a.manifest.name: {s: v["n_tokens"] for s, v in _sources(a).items()} for a in artifacts}
    yield picture(stacked("Tokens by source", top_series(shares), unit="tokens, repeats counted"), "tokens by source")
    for a in artifacts:
        yield f"## {escape(a.manifest.name)}"
        hidden = {"mix"} if a.manifest.stats.get("short_tokens") else {"mix", "short of asked"}
        own = [row for row in rows if row["mix"] == a.manifest.name]
        yield table([{k: v for k, v in row.items() if k not in hidden} | _bar(row, "share of tokens") for row in own])
        left_out = {reason: n for reason, n in _most_first(a.manifest.counts["dropped"]).items() if n}
        if left_out:
            yield table([{"not in the mix because": reason, "samples": n} for reason, n in left_out.items()])


def pack_rows(artifacts: Sequence[Artifact]) -> Iterator[Row]:
    """One row per mix and source."""
    for a in artifacts:
        s = a.manifest.stats
        yield {"mix": a.manifest.name, "source": "(all)", **_pack_row(s), "fill": round(s["fill"], 4)}
        for source, own in s.get("sources", {}).items():
            yield {"mix": a.manifest.name, "source": source, **_pack_row(own), "fill": None}


def pack_page(artifacts: Sequence[Artifact], inputs: Inputs) -> Iterator[str]:
    """How full the training sequences are, and of what."""
    yield "# Pack: training sequences"
    yield table([_flow_row(a) | {"pack tokens": a.manifest.stats["pack_tokens"]} for a in artifacts])
    yield table(list(pack_rows(artifacts)))
    panels, by_source = [], {}
    for a in artifacts:
        packs = pq.read_table(a.path / "packs.parquet", columns=["n_tokens", "source"])
        fill = packs["n_tokens"].to_numpy() / a.manifest.stats["pack_tokens"]
        panels.append(Panel(a.manifest.name, {"packs": fill}))
        counted = packs["source"].value_counts().to_pylist()
        by_source[a.manifest.name] = {c["values"]: c["counts"] for c in sorted(counted, key=lambda c: c["values"])}
    yield picture(histograms("Share of a pack that is filled", panels[:8], unit="packs"), "histograms of fill")
    yield picture(stacked("Packs by source", top_series(by_source), unit="packs"), "packs by source")


def _pack_row(s: Mapping[str, Any]) -> Row:
    names = {"packs": "n_packs", "documents": "n_documents", "tokens": "n_tokens", "patches": "n_patches"}
    return {label: s.get(name) for label, name in names.items()} | {"loss tokens": s.get("n_loss_tokens")}


def _flow_row(a: Artifact) -> Row:
    counts = a.manifest.counts
    share = counts["kept"] / max(counts["in"], 1)
    row = {"name": a.manifest.name, "in": counts["in"], "kept": counts["kept"]}
    return row | {
        "dropped": sum(counts["dropped"].values()),
        "kept share": _share(counts["kept"], counts["in"]),
        BAR: bar(share),
    }


def _by_status(a: Artifact) -> dict[str, int]:
    counts = a.manifest.stats.get("by_status") or {"ok": a.manifest.counts["kept"], **a.manifest.counts["dropped"]}
    return _most_first({status: n for status, n in counts.items() if n})


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


def _columns(a: Artifact, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns of a whole ledger."""
    ledger = ds.dataset(sorted((a.path / "shards").glob("*.parquet"))).to_table(columns=list(names))
    return {name: ledger[name].to_numpy() for name in names}


def _stats(artifacts: Sequence[Artifact]) -> dict[str, Mapping[str, int]]:
    return {a.manifest.name: a.manifest.stats for a in artifacts}


def _sources(a: Artifact) -> dict[str, Row]:
    return dict(a.manifest.stats.get("sources", {}))


def _modality(stats: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, float]]:
    return {name: {"text": s["n_text_tokens"], "image patches": s["n_patches"]} for name, s in stats.items()}


def _asked(source: Mapping[str, Any]) -> str:
    """The amount in the words of the mix's YAML."""
    return ", ".join(f"{k} {source[k]:g}" for k in ("weight", "epochs", "samples", "max_epochs") if source.get(k))


def _most_first(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda kv: (kv[0] not in ("ok", "kept"), -kv[1], kv[0])))


def top_series(rows: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Rows with at most N_SERIES series, the rest summed as "other".

    Series come by name, so that a source has one colour on all charts that show the same sources.
    """
    totals: dict[str, float] = {}
    for parts in rows.values():
        for name, n in parts.items():
            totals[name] = totals.get(name, 0) + n
    named = sorted(totals, key=lambda name: (-totals[name], name))
    named = sorted(named if len(named) <= N_SERIES + 1 else named[:N_SERIES])
    out = {}
    for label, parts in rows.items():
        rest = sum(n for name, n in parts.items() if name not in named)
        out[label] = {name: parts.get(name, 0) for name in named} | ({"other": rest} if rest else {})
    return out


def _top_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The largest groups, as many as there are colours, by name; a page's table has all."""
    largest = sorted(arrays, key=lambda name: (-len(arrays[name]), name))[: N_SERIES + 1]
    return {name: arrays[name] for name in sorted(largest)}


def _share(n: float, total: float) -> str:
    return f"{n / max(total, 1):.1%}"


def _bar(row: Row, share: str = "share") -> Row:
    return {BAR: bar(float(row[share].rstrip("%")) / 100)}
