"""A running stage for people: one line of figures, one page of charts. In: metric rows; out: text and markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from solo.charts import lines
from solo.markdown import escape, picture


def metrics_line(m: dict[str, Any]) -> str:
    """`step 12/40, loss 3.210, 5,120 tokens/s, lr 1.0e-03, 31 s left`."""
    loss = "not finite" if m["loss"] is None else f"{m['loss']:.3f}"
    return (
        f"step {m['step']}/{m['n_steps']}, loss {loss}, {m['tokens_per_s']:,.0f} tokens/s, "
        f"lr {m['lr']:.1e}, {m['eta_s']:.0f} s left"
    )


def loss_page(stage: str, rows: Sequence[dict[str, Any]]) -> str:
    """Loss in all and by source, and speed, of a stage so far."""
    by_source: dict[str, tuple[list[int], list[float]]] = {"all": ([], [])}
    for row in rows:
        for name, loss in (("all", row["loss"]), *row["sources"].items()):
            steps, losses = by_source.setdefault(name, ([], []))
            steps.append(row["step"])
            losses.append(math.nan if loss is None else loss)
    speed = {"tokens per s": ([row["step"] for row in rows], [row["tokens_per_s"] for row in rows])}
    charts = [
        picture(lines("Loss", by_source, x="optimizer step", y="nats per loss token"), "loss"),
        picture(lines("Speed", speed, x="optimizer step", y="tokens per s", height_in=1.9), "speed"),
    ]
    return "\n\n".join([f"# Stage {escape(stage)}", metrics_line(rows[-1]), *charts]) + "\n"
