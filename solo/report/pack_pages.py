"""Tables of the pack page: how full, how balanced, how proven.

In: the manifests of pack artifacts. Out: flat rows. Invariant: a figure is shown beside what limits it: fill beside
the fill that no packing exceeds, balance beside arrival order and the bound, differences beside their tolerance.
Cost: none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from solo.artifact import Artifact
from solo.pack.balance import LIMIT

Row = dict[str, Any]


def fill(artifacts: Sequence[Artifact]) -> Iterator[Row]:
    """One row per mix: tokens over the room of all packs that are trained."""
    for a in artifacts:
        s = a.manifest.stats
        yield {
            "mix": a.manifest.name,
            "packs": s["n_packs"],
            "fill": _share(s["fill"]),
            "without the emptiest": _share(s["fill_without_last"]),
            "no packing exceeds": _share(s["fill_limit"]),
            "packs shared by ends of sources": s["n_shared_packs"] or 0,
            "tokens left over": s["dropped_tokens"]["incomplete_batch"],
        }


def balance(artifacts: Sequence[Artifact]) -> Iterator[Row]:
    """One row per mix and number of ranks: the dearest rank of a step over the mean rank, mean (worst) of all steps."""
    for a in artifacts:
        for ranks, s in a.manifest.stats["attention_imbalance"].items():
            yield {
                "mix": a.manifest.name,
                "ranks": int(ranks.removesuffix("_ranks")),
                "ordered, mean (worst)": _range(s["ordered"]),
                "as they arrived": _range(s["arrival"]),
                "no order is below": _range(s["bound"]),
                f"steps over {LIMIT}": s["n_over_limit"],
                "of them above the bound": s["n_over_bound"],
            }


def held_out(artifacts: Sequence[Artifact]) -> Iterator[Row]:
    """One row per mix and source of which something is held out."""
    for a in artifacts:
        for source, own in a.manifest.stats.get("held_out", {}).get("sources", {}).items():
            counts = {"documents measured": own["n_documents"], "tokens": own["n_tokens"]}
            yield {"mix": a.manifest.name, "source": source, **counts, "loss tokens": own["n_loss_tokens"]}


def proof(artifacts: Sequence[Artifact]) -> Iterator[Row]:
    """One row per mix that was proven; a proof that fails leaves no artifact."""
    for a in artifacts:
        if p := a.manifest.stats.get("proof"):
            yield {
                "mix": a.manifest.name,
                "verdict": "holds",
                "packs": p["n_packs"],
                "documents": p["n_documents"],
                "tokens": p["n_tokens"],
                "changes tried": p["n_changes"],
                "logit moved": f"{p['max_logit_difference']:g} of 0 allowed",
                "loss differed": f"{p['max_loss_difference']:g} of {p['tolerance']:g} nats allowed",
            }


def _share(share: float | None) -> str | None:
    return None if share is None else f"{share:.3%}"


def _range(ratio: dict[str, float]) -> str:
    return f"{ratio['mean']:.3f} ({ratio['max']:.3f})"
