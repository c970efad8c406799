"""Estimates as people and machines read them: rows of a table, sentences, JSON.

In: `StageEstimate`s. Out: text. Cost: none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from solo import estimate
from solo.estimate import StageEstimate

HEADING = ("stage", "packs", "steps", "text tokens", "vision tokens", "download", "disk", "CPU h", "GPU h", "cost")
RATES = (
    "A100_MFU",
    "A100_DOLLARS",
    "H100_MFU",
    "H100_DOLLARS",
    "CPU_DOLLARS",
    "IMAGES_PER_CORE_S",
    "CPU_S_OF_A_PATCH",
    "CPU_S_OF_A_RECORD",
    "TOKENS_PER_CPU_S",
    "BYTES_OF_A_PATCH",
    "BYTES_OF_A_TOKEN",
    "FILL",
)


def as_json(stages: Sequence[StageEstimate]) -> dict[str, Any]:
    """Every field of every stage, and the rates behind them."""
    return {"stages": [asdict(one) for one in stages], "rates": {name: getattr(estimate, name) for name in RATES}}


def rows(stages: Sequence[StageEstimate]) -> list[tuple[str, ...]]:
    """One row a stage and, for several, the totals."""
    known = [one for one in stages if one.basis != "unknown"]
    table = [_row(one) for one in stages]
    if len(known) > 1:
        total = StageEstimate("total", "total")
        for name in ("packs", "steps", "text_tokens", "vision_tokens", "download_bytes", "disk_bytes"):
            setattr(total, name, sum(getattr(one, name) or 0 for one in known))
        for name in ("cpu_hours", "gpu_hours", "gpu_hours_h100", "dollars"):
            setattr(total, name, sum(getattr(one, name) or 0.0 for one in known))
        table.append(_row(total))
    return table


def lines(stages: Sequence[StageEstimate]) -> list[str]:
    """The table as text, numbers to the right."""
    table = [HEADING, *rows(stages)]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEADING))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    ]


def sentences(stages: Sequence[StageEstimate], unpinned: Sequence[str]) -> list[str]:
    """What differs from the paper, what is assumed, what the rates are, what cannot be acquired."""
    said = [note for one in stages for note in one.notes]
    if any(one.basis == "made" for one in stages):
        said.append("counts are those of the packs made last")
    h100 = sum(one.gpu_hours_h100 or 0.0 for one in stages)
    if h100:
        said.append(
            f"GPU h: A100 80 GB at {estimate.A100_MFU:.0%} of peak, {estimate.A100_DOLLARS} $/h (assumed); "
            f"on H100 at {estimate.H100_MFU:.0%} {h100:,.4g} h, {h100 * estimate.H100_DOLLARS:,.0f} $; "
            f"CPU core {estimate.CPU_DOLLARS} $/h; rates and their origins are in solo/estimate.py"
        )
    if unpinned:
        said.append(
            f"unpinned, acquire will refuse: {', '.join(unpinned)}; "
            f"put the line of `solo revision PATH` (where their location is fetched: their name) into their specs"
        )
    return said


def _row(one: StageEstimate) -> tuple[str, ...]:
    counts = (one.packs, one.steps, one.text_tokens, one.vision_tokens)
    sizes = (one.download_bytes, one.disk_bytes)
    hours = (one.cpu_hours, one.gpu_hours)
    return (
        one.name,
        *("?" if n is None else f"{n:,}" for n in counts),
        *("" if n is None else size(n) for n in sizes),
        *("" if h is None else f"{h:,.0f}" if h >= 10 else f"{h:.2g}" for h in hours),
        "" if one.dollars is None else f"{one.dollars:,.0f} $",
    )


def size(n_bytes: int) -> str:
    """Bytes with a unit, two digits or three."""
    amount = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"
