"""Pages and rows of the parts that make data: acquire, shard, pack; curate has solo/report/mix_pages.py.

In: the artifacts of one part. Out: blocks of Markdown, the important ones first, or flat rows for the UI's table.
Invariant: counts come from manifests, shapes of distributions from the Parquet files beside them. Cost: the columns a
histogram shows are read whole, 4 bytes a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from solo.artifact import Artifact
from solo.report import link_rot, pack_pages
from solo.report.charts import Panel, histograms, stacked
from solo.report.markdown import BAR, bar, picture, table
from solo.shard.counts import TEXT_COUNTS
from solo.shard.regrid import FORMS

Row = dict[str, Any]
Inputs = Mapping[str, Artifact]

N_SERIES = 7  # colours of a stacked chart; what is rarer is "other"
FORM_NAMES = {"as_came": "as they came", "bare": "without metadata", "jpeg": "as JPEG", "png": "as PNG"}


def acquire_rows(artifacts: Sequence[Artifact]) -> Iterator[Row]:
    """One row per source and status."""
    for a in artifacts:
        n_in = a.manifest.counts["in"]
        for status, n in _by_status(a).items():
            yield {"source": a.manifest.name, "status": status, "records": n, "share": share_of(n, n_in)}


def acquire_page(artifacts: Sequence[Artifact], inputs: Inputs) -> Iterator[str]:
    """What became of every record."""
    yield "# Acquire: from records to raw samples"
    yield table([flow_row(a) | {"bytes": a.manifest.stats.get("bytes")} for a in artifacts])
    lost = {a.manifest.name: {s: n for s, n in _by_status(a).items() if s != "ok"} for a in artifacts}
    if shown := top_series({name: counts for name, counts in lost.items() if counts}):
        yield picture(stacked("Records that gave no sample, by status", shown, unit="records"), "records by status")
    yield table([row | bar_of(row) for row in acquire_rows(artifacts)])
    yield from link_rot.blocks(artifacts)


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


def role_rows(artifacts: Sequence[Artifact]) -> Iterator[Row]:
    """One row per source: its text tokens by who says them, and how many of them are learnt."""
    for a in artifacts:
        s = a.manifest.stats
        by_role = {name.removeprefix("n_").removesuffix("_tokens"): s[name] for name in TEXT_COUNTS}
        share = share_of(s["n_loss_tokens"], s["n_text_tokens"])
        yield {"source": a.manifest.name, "text tokens": s["n_text_tokens"], **by_role, "with loss": share}


def grid_rows(artifacts: Sequence[Artifact]) -> Iterator[Row]:
    """One row per source whose pictures lie in the shards at their patch grid."""
    for a in artifacts:
        s, spec = a.manifest.stats, a.manifest.spec["shard"].get("grid_pictures")
        if spec:
            psnr = s["psnr_db"] or {"lowest": None, "median": None}
            yield {
                "source": a.manifest.name,
                "quality": spec["jpeg_quality"],
                "images": s["n_images"],
                **{FORM_NAMES[form]: s[f"n_images_{form}"] for form in FORMS},
                "bytes before": s["image_bytes_in"],
                "bytes": s["image_bytes"],
                "lowest PSNR, dB": psnr["lowest"],
                "median PSNR, dB": psnr["median"],
            }


def shard_page(artifacts: Sequence[Artifact], inputs: Inputs) -> Iterator[str]:
    """Tokens by source, modality and role; what became of pictures that were resized."""
    yield "# Shards: what the ledgers hold"
    yield table(list(shard_rows(artifacts)))
    yield f"## Text by role\n\n{table(list(role_rows(artifacts)))}"
    if resized := list(grid_rows(artifacts)):
        yield f"## Pictures at their patch grid\n\n{table(resized)}"
    yield picture(stacked("Tokens in shards", _modality(_stats(artifacts)), unit="tokens"), "tokens by modality")
    ledgers = [_columns(a, ("n_tokens", "n_patches")) for a in artifacts]
    tokens = {a.manifest.name: t["n_tokens"] for a, t in zip(artifacts, ledgers, strict=True)}
    patches = {a.manifest.name: t["n_patches"][t["n_patches"] > 0] for a, t in zip(artifacts, ledgers, strict=True)}
    panels = [Panel("tokens per sample", top_arrays(tokens), log=True)]
    panels.append(Panel("patches per sample with images", {name: patches[name] for name in panels[0].groups}, log=True))
    yield picture(histograms("Size of a sample", panels, unit="samples"), "histograms of sample sizes")
    dropped = [flow_row(a) for a in artifacts if a.manifest.counts["dropped"]]
    if dropped:
        yield "## Samples that could not be sharded"
        yield table(dropped)


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
    yield table([flow_row(a) | {"pack tokens": a.manifest.stats["pack_tokens"]} for a in artifacts])
    yield table(list(pack_rows(artifacts)))
    yield "## Fill: tokens over the room of all packs trained"
    yield table(list(pack_pages.fill(artifacts)))
    if balanced := list(pack_pages.balance(artifacts)):
        yield "## Attention of ranks: the dearest of a step over the mean"
        yield table(balanced)
    if apart := list(pack_pages.held_out(artifacts)):
        yield "## Held out: never trained, and their loss measured while a stage is"
        yield table(apart)
    if proven := list(pack_pages.proof(artifacts)):
        yield "## Proof: no document of a pack sees another, and its loss is that of the document alone"
        yield table(proven)
    panels, by_source = [], {}
    for a in artifacts:
        packs = pq.read_table(a.path / "packs.parquet", columns=["n_tokens", "source"])
        fill = packs["n_tokens"].to_numpy() / a.manifest.stats["pack_tokens"]
        if np.ptp(fill) > 0.001:  # packs that are all full make no picture
            panels.append(Panel(a.manifest.name, {"packs": fill}))
        counted = packs["source"].value_counts().to_pylist()
        by_source[a.manifest.name] = {c["values"]: c["counts"] for c in sorted(counted, key=lambda c: c["values"])}
    if panels:
        yield picture(histograms("Share of a pack that is filled", panels[:8], unit="packs"), "histograms of fill")
    yield picture(stacked("Packs by source", top_series(by_source), unit="packs"), "packs by source")


def _pack_row(s: Mapping[str, Any]) -> Row:
    names = {"packs": "n_packs", "documents": "n_documents", "tokens": "n_tokens", "patches": "n_patches"}
    return {label: s.get(name) for label, name in names.items()} | {"loss tokens": s.get("n_loss_tokens")}


def flow_row(a: Artifact) -> Row:
    """In, kept and dropped of one artifact."""
    counts = a.manifest.counts
    share = counts["kept"] / max(counts["in"], 1)
    row = {"name": a.manifest.name, "in": counts["in"], "kept": counts["kept"]}
    return row | {
        "dropped": sum(counts["dropped"].values()),
        "kept share": share_of(counts["kept"], counts["in"]),
        BAR: bar(share),
    }


def _by_status(a: Artifact) -> dict[str, int]:
    counts = a.manifest.stats.get("by_status") or {"ok": a.manifest.counts["kept"], **a.manifest.counts["dropped"]}
    return most_first({status: n for status, n in counts.items() if n})


def _columns(a: Artifact, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns of a whole ledger."""
    ledger = ds.dataset(sorted((a.path / "shards").glob("*.parquet"))).to_table(columns=list(names))
    return {name: ledger[name].to_numpy() for name in names}


def _stats(artifacts: Sequence[Artifact]) -> dict[str, Mapping[str, int]]:
    return {a.manifest.name: a.manifest.stats for a in artifacts}


def _modality(stats: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, float]]:
    return {name: {"text": s["n_text_tokens"], "image patches": s["n_patches"]} for name, s in stats.items()}


def most_first(counts: Mapping[str, int]) -> dict[str, int]:
    """What was kept, then the rest by number."""
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


def top_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The largest groups, as many as there are colours, by name; a page's table has all."""
    largest = sorted(arrays, key=lambda name: (-len(arrays[name]), name))[: N_SERIES + 1]
    return {name: arrays[name] for name in sorted(largest)}


def share_of(n: float, total: float) -> str:
    """A share in per cent."""
    return f"{n / max(total, 1):.1%}"


def bar_of(row: Row) -> Row:
    """The bar of a row's share."""
    return {BAR: bar(float(row["share"].rstrip("%")) / 100)}
