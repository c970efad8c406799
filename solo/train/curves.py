"""Curves: what a training did step by step, as small charts on one picture; of a running stage and of finished ones.

In: metric rows by stage, in the order of the stages. Out: one PNG and the line that says how the run stands. Invariant:
a figure that no row has gets no chart; steps of a later stage go on to the right of the one before, with a gap between
their lines. Cost: half a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from solo.report.charts import Curve, curves
from solo.report.markdown import escape, picture
from solo.train.watch import line

Row = dict[str, Any]
Metrics = Mapping[str, Sequence[Row]]
Pick = Callable[[Row], Mapping[str, float | None]]

N_LINES = 8  # sources drawn one by one; the page's table has all
NATS = "nats per loss token"


def page(stage: str, rows: Sequence[Row], more: Sequence[str] = ()) -> str:
    """A running stage: how it stands, its charts so far, and blocks of Markdown below them."""
    held = [row["held_out"] for row in rows if "held_out" in row]
    known = [f"{name} {loss:.3f}" for name, loss in _kinds(held[-1]).items() if loss is not None] if held else []
    says = [line(rows[-1]), *([f"Held-out loss, measured last: {', '.join(known)}."] if known else [])]
    chart = picture(picture_of({stage: rows}), f"loss, rates, speed and memory of {stage}")
    return "\n\n".join([f"# Stage {escape(stage)}", *says, chart, *more]) + "\n"


def picture_of(metrics: Metrics) -> bytes:
    """All charts of a training."""
    return curves("Training, step by step", _all(metrics), x="optimizer step")


def _all(metrics: Metrics) -> list[Curve]:
    many = len(metrics) > 1

    def own(pick: Callable[[Row], float | None]) -> dict[str, tuple[list[float], list[float]]]:
        """One line a stage."""
        return _series(metrics, lambda row: {row["stage"] if many else "": pick(row)})

    def plain(title: str, pick: Callable[[Row], float | None], y: str, *, from_zero: bool = True) -> Curve:
        return Curve(title, own(pick), y, legend=False, from_zero=from_zero)

    sources = _most(_series(metrics, lambda row: row.get("sources", {})))
    kinds = _series(metrics, lambda row: row.get("modalities", {}))
    rates = own(lambda row: row["lr"]) if many else _series(metrics, _rates)
    found = [
        Curve("Loss of each stage" if many else "Loss", own(lambda row: row["loss"]), NATS),
        Curve("Loss by source", sources, NATS),
        Curve("Loss of packs with pictures, and without", kinds, NATS),
        Curve("Held-out loss: of text, and with pictures", _held_out(metrics, _kinds), NATS),
        Curve("Held-out loss by source", _most(_held_out(metrics, lambda held: held["sources"])), NATS),
        Curve("Learning rate", rates, "per step", legend=not many),
        plain("Gradient norm, before clipping", lambda row: row.get("grad_norm"), "", from_zero=False),
        plain("Speed", lambda row: row["tokens_per_s"], "tokens per s"),
        plain("Share of the GPU's peak (MFU)", lambda row: _percent(row.get("mfu")), "%"),
        plain("Arithmetic of each rank", lambda row: row.get("tflops"), "TFLOP per s"),
        plain("Waiting for input", lambda row: _percent(_share(row)), "% of the step"),
        plain("Peak memory", lambda row: row.get("peak_gib", row.get("host_gib")), "GiB"),
    ]
    known = any(row.get("mfu") for rows in metrics.values() for row in rows)
    return [curve for curve in found if curve.series and not (known and curve.title.startswith("Arithmetic"))]


def _share(row: Row) -> float | None:
    return row["input_stall_s"] / row["step_s"] if row.get("step_s") else None


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _rates(row: Row) -> dict[str, float]:
    own: dict[str, float] = row.get("lr_groups", {})
    return {"stage" if own else "": row["lr"], **own}


def _kinds(held: Mapping[str, Any]) -> dict[str, float]:
    return {name: held[name] for name in ("image", "text") if name in held}


def _held_out(metrics: Metrics, pick: Pick) -> dict[str, tuple[list[float], list[float]]]:
    """Measured before the first step of a stage, and after some."""
    found: dict[str, list[Row]] = {}
    for stage, rows in metrics.items():
        before = [{**row["held_out_before"], "step": 0} for row in rows if "held_out_before" in row]
        found[stage] = before + [{**row["held_out"], "step": row["step"]} for row in rows if "held_out" in row]
    return _series(metrics, pick, found)


def _series(metrics: Metrics, pick: Pick, rows_of: Metrics | None = None) -> dict[str, tuple[list[float], list[float]]]:
    """Named lines over the steps of all stages; a step that lacks a name is no point of its line."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    start = 0
    for stage, rows in metrics.items():
        for xs, ys in found.values():  # no line from one stage to the next
            xs.append(start)
            ys.append(math.nan)
        for row in (rows_of or metrics)[stage]:
            for name, value in pick({**row, "stage": stage}).items():
                xs, ys = found.setdefault(name, ([], []))
                xs.append(start + row["step"])
                ys.append(math.nan if value is None else value)
        start += rows[-1]["n_steps"] if rows else 0
    return {name: (xs, ys) for name, (xs, ys) in found.items() if any(map(math.isfinite, ys))}


def _most(
    series: Mapping[str, tuple[list[float], list[float]]],
) -> dict[str, tuple[list[float], list[float]]]:
    """The lines with most points, by name."""
    ranked = sorted(series, key=lambda name: (-len(series[name][0]), name))[:N_LINES]
    return {name: series[name] for name in sorted(ranked)}
