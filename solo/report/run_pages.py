"""Pages and rows of the parts that use data: train, evaluate, report.

In: the artifacts of one part. Out: blocks of Markdown, the important ones first, or flat rows for the UI's table.
Invariant: losses come from `metrics.jsonl`, token counts from manifests; nothing is smoothed but what the chart's width
forces. Cost: one JSON line per optimizer step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq

from solo.artifact import Artifact
from solo.report import gallery
from solo.report.charts import grouped
from solo.report.data_pages import Inputs, Row
from solo.report.markdown import BAR, bar, escape, picture, table
from solo.train import curves, realised, sick, suspects, trained


def train_rows(artifacts: Sequence[Artifact]) -> Iterator[Row]:
    """One row per stage and source, the stage's own first."""
    for a in artifacts:
        s = a.manifest.stats
        yield {
            "stage": a.manifest.name,
            "source": "(all)",
            "packs": s["n_packs"],
            "steps": s["n_steps"],
            "tokens": s["n_tokens"],
            "loss tokens": s["n_loss_tokens"],
            "left out": s["left_out"]["documents"],
            "loss first": s["loss_first"],
            "loss last": s["loss_last"],
            "tokens/s": s.get("tokens_per_s"),
        }
        for source, own in s.get("sources", {}).items():
            counts = {"tokens": own["n_tokens"], "loss tokens": own["n_loss_tokens"], "loss last": own.get("loss_last")}
            names = ("packs", "steps", "tokens", "loss tokens", "left out", "loss first", "loss last", "tokens/s")
            yield {"stage": a.manifest.name, "source": source, **dict.fromkeys(names), **counts}


def train_page(artifacts: Sequence[Artifact], inputs: Inputs) -> Iterator[str]:
    """Loss, learning rate and speed over all stages, one after the other."""
    yield "# Train: the stages"
    rows = list(train_rows(artifacts))
    yield table([{k: v for k, v in row.items() if k != "source"} for row in rows if row["source"] == "(all)"])
    metrics = {a.manifest.name: _metrics(a) for a in artifacts}
    if metrics := {name: steps for name, steps in metrics.items() if steps}:
        yield picture(curves.picture_of(metrics), "loss, rates, speed and memory, step by step")
    yield from _held_out(artifacts)
    yield from realised.blocks(artifacts, inputs)
    yield from _left_out(artifacts)
    yield from _sick(artifacts)
    yield "## Tokens and last loss by source"
    names = ("stage", "source", "tokens", "loss tokens", "loss last")
    yield table([{k: row[k] for k in names} for row in rows if row["source"] != "(all)"])


def _held_out(artifacts: Sequence[Artifact]) -> Iterator[str]:
    """The loss on documents that no stage trains, before and after each stage; nothing where none is held out."""
    found: dict[str, dict[str, str]] = {}
    stages = [a.manifest.name for a in artifacts if "held_out" in a.manifest.stats]
    for a in (a for a in artifacts if a.manifest.name in stages):
        before, after = (_named(a.manifest.stats["held_out"][end]) for end in trained.ENDS)
        for name in after:
            ends = ("none" if loss is None else f"{loss:.3f}" for loss in (before.get(name), after[name]))
            found.setdefault(name, {})[a.manifest.name] = " to ".join(ends)
    if found:
        yield "## Held-out loss\n\nOf documents that no stage trains, in nats per loss token, before and after a stage."
        yield table([{"of": name, **{stage: own.get(stage) for stage in stages}} for name, own in found.items()])


def _named(held: Mapping[str, Any]) -> dict[str, float | None]:
    kinds = {"loss": "all documents", "text": "those without pictures", "image": "those with pictures"}
    losses: dict[str, float | None] = held["sources"]
    return {what: held[kind] for kind, what in kinds.items() if kind in held} | losses


def _left_out(artifacts: Sequence[Artifact]) -> Iterator[str]:
    """The planned documents that no stage could read, by name; nothing where all were read."""
    found = []
    for a in (a for a in artifacts if a.manifest.stats["left_out"]["documents"]):
        packs = pq.read_table(a.path / "trained.parquet", columns=["pack", "left_out"]).to_pylist()
        for pack in packs:
            names = ("source", "key", "exposure", "begin", "n_tokens", "reason")
            found += [
                {"stage": a.manifest.name, "pack": pack["pack"]} | {k: r[k] for k in names} for r in pack["left_out"]
            ]
    if found:
        yield "## Planned documents left out"
        yield table(found)


def _sick(artifacts: Sequence[Artifact]) -> Iterator[str]:
    """Steps whose update was skipped or whose loss was a spike; nothing where there was none."""
    found = [
        {"stage": a.manifest.name}
        | {name: event[name] for name in ("step", "kind", "done", "loss", "limit")}
        | {"packs": f"{event['packs'][0]} to {event['packs'][-1]}", "documents": len(event["documents"])}
        | {"sources": ", ".join(event["sources"])}
        for a in artifacts
        for event in sick.read(a.path)
    ]
    if found:
        yield "## Sick steps\n\n" + table(found)
        yield f"All documents of each are in `{sick.FILE}` of the stage's artifact."
        for a in artifacts:
            yield from suspects.blocks(a.path)


def evaluate_rows(artifacts: Sequence[Artifact]) -> Iterator[Row]:
    """One row per benchmark and category, the whole benchmark first."""
    for a in artifacts:
        s = a.manifest.stats
        for category, own in {"(all)": s, **s["by_category"]}.items():
            yield {
                "benchmark": a.manifest.name,
                "category": category,
                "questions": own["n_questions"],
                "score": own["score"],
                "blind": own["blind"],
                "chance": own.get("chance"),
            }


def evaluate_page(artifacts: Sequence[Artifact], inputs: Inputs) -> Iterator[str]:
    """Scores against guessing and against the same model without the picture."""
    yield "# Evaluate: scores against chance and blind"
    yield "`blind` is the same model asked the same questions with every picture replaced by a grey one of its size."
    scores = {a.manifest.name: {k: a.manifest.stats[k] for k in ("score", "blind", "chance")} for a in artifacts}
    yield picture(grouped("Share of questions answered right", scores, unit="share", top=1.0), "scores")
    yield table([row | {BAR: bar(row["score"])} for row in evaluate_rows(artifacts)])
    yield table([_bound(a) for a in artifacts])
    for a in artifacts:
        yield f"## Questions of {escape(a.manifest.name)}\n\n{gallery.answers(a)}"


def report_rows(artifacts: Sequence[Artifact]) -> Iterator[Row]:
    """One row per node: the closing table."""
    for a in artifacts:
        for p in _summary(a)["parts"]:
            dropped = ", ".join(f"{n:,} {reason}" for reason, n in p["dropped"].items() if n)
            row = {"part": p["part"], "name": p["name"], "in": p["in"], "kept": p["kept"], "dropped": dropped}
            yield row | {"tokens": p["tokens"], "seconds": p["seconds"]}


def report_page(artifacts: Sequence[Artifact], inputs: Inputs) -> Iterator[str]:
    """The closing table, the equations, and where the files lie."""
    for a in artifacts:
        summary = _summary(a)
        failed = [c for c in summary["checks"] if not c["ok"]]
        yield f"# Report: {escape(summary['title'] or summary['recipe'])}"
        yield f"{len(summary['checks']) - len(failed)} of {len(summary['checks'])} equations hold."
        if failed:
            yield "**The counts do not close:**\n\n" + table(failed)
        yield "## Scores\n\n" + table(
            [{k: s[k] for k in ("benchmark", "score", "chance", "blind")} for s in summary["scores"]]
        )
        yield "## Closing table\n\n" + table(list(report_rows([a])))
        yield "## Equations\n\n" + table([c | {"ok": "holds" if c["ok"] else "FAILS"} for c in summary["checks"]])
        where = gallery.folder(a).as_posix()
        yield f"`report.html`, `report.md` and `report.json` lie in `{where}/` of the data root."


def _bound(a: Artifact) -> Row:
    """What a score is bound to."""
    s, benchmark = a.manifest.stats, a.manifest.spec.get("benchmark", {})
    return {
        "benchmark": a.manifest.name,
        "checkpoint": s.get("asked_of", ""),
        "its content": str(s.get("checkpoint_digest", ""))[:12],
        "protocol": str(s.get("protocol", ""))[:12],
        "question set": str(benchmark.get("revision", ""))[:19],
        "licence": benchmark.get("licence", {}).get("id", ""),
    }


def _metrics(a: Artifact) -> list[Row]:
    path = a.path / "metrics.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []


def _summary(a: Artifact) -> Row:
    summary: Row = json.loads((a.path / "report.json").read_text(encoding="utf-8"))
    return summary
