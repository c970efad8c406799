"""Trained: one row per pack that a stage trained, and their sum against the plan.

In: a pack as it was loaded, its losses; at the end all rows and the plan's. Out: `trained.parquet`, the stage's counts
and statistics. Invariants: a row counts what was in the tensors that were trained; pack by pack trained + left out =
planned, in documents, tokens and loss tokens, and every document left out is named. Cost: one row a pack. No torch
here: the supervisor sums up, and the ranks load it anyway.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from solo.artifact import LedgerError

if TYPE_CHECKING:
    from solo.sequence.loader import Pack

DAMAGED = "damaged"  # the reason of a document that could not be read and that the stage's max_damaged leaves out
QUARANTINED = "quarantined"  # of one whose step was passed over after a spike

ENDS = ("before", "after")  # of a stage

SOURCE = pa.struct(
    [("source", pa.string()), ("n_tokens", pa.int64()), ("n_loss_tokens", pa.int64()), ("loss", pa.float64())]
)
LEFT_OUT = pa.struct(
    [
        ("key", pa.string()),
        ("exposure", pa.int32()),
        ("source", pa.string()),
        ("begin", pa.int32()),
        ("n_tokens", pa.int64()),
        ("n_loss_tokens", pa.int64()),
        ("reason", pa.string()),
    ]
)
ROW = pa.schema(
    [
        ("pack", pa.int64()),
        ("step", pa.int64()),
        ("loss", pa.float64()),  # mean over the pack's supervised tokens; null where it has none or is not finite
        ("n_documents", pa.int64()),  # a piece of a cut text is one
        ("n_tokens", pa.int64()),
        ("n_loss_tokens", pa.int64()),
        ("sources", pa.list_(SOURCE)),
        ("left_out", pa.list_(LEFT_OUT)),
    ]
)
PLANNED = {"n_documents": "n_rows", "n_tokens": "n_tokens", "n_loss_tokens": "n_loss_tokens"}  # column of packs.parquet


def row(pack: Pack, losses: np.ndarray, step: int) -> dict[str, Any]:
    """What a pack was and cost, counted from the tensors that were trained."""
    sources: dict[str, list[Any]] = {}
    for (source, _, first, last), (_, _, a, b) in zip(pack.segments, pack.loss_ranges(), strict=True):
        sums = sources.setdefault(source, [0, 0, 0.0])
        sums[0] += last - first
        sums[1] += b - a
        sums[2] += float(losses[a:b].sum())
    return {
        "pack": pack.index,
        "step": step,
        "loss": _finite(losses.mean()) if len(losses) else None,
        "n_documents": len(pack.segments),
        "n_tokens": int((pack.document_ids >= 0).sum()),
        "n_loss_tokens": pack.n_loss_tokens,
        "sources": [
            {"source": s, "n_tokens": n, "n_loss_tokens": n_loss, "loss": _finite(total / n_loss) if n_loss else None}
            for s, (n, n_loss, total) in sorted(sources.items())
        ],
        "left_out": _left_out(pack.left_out, DAMAGED),
    }


def passed_over(index: int, step: int, planned: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The row of a pack that was not trained, from the plan's rows."""
    none: dict[str, Any] = {"loss": None, "n_documents": 0, "n_tokens": 0, "n_loss_tokens": 0, "sources": []}
    return {"pack": index, "step": step, **none, "left_out": _left_out(planned, QUARANTINED)}


def _left_out(planned: Sequence[Mapping[str, Any]], reason: str) -> list[dict[str, Any]]:
    names = [field.name for field in LEFT_OUT if field.name != "reason"]
    return [{name: row[name] for name in names} | {"reason": reason} for row in planned]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def check(what: str, trained: pa.Table, plan: pa.Table) -> None:
    """Raise LedgerError unless every pack of the plan was trained, with all its documents or the missing ones named."""
    packs = trained["pack"].to_numpy()
    if not np.array_equal(packs, plan["pack"].to_numpy()):
        raise LedgerError(f"{what}: trained {len(packs)} packs != planned {plan.num_rows} packs, or in another order")
    lists = trained["left_out"].combine_chunks()
    of_pack, rows = pc.list_parent_indices(lists).to_numpy(), pc.list_flatten(lists)
    for column, planned in PLANNED.items():
        n_out = pc.struct_field(rows, column).to_numpy() if column != "n_documents" else np.ones(len(rows), np.int64)
        left_out = np.bincount(of_pack, weights=n_out, minlength=len(packs)).astype(np.int64)
        wrong = np.flatnonzero(trained[column].to_numpy() + left_out != plan[planned].to_numpy())
        if len(wrong):
            i = int(wrong[0])
            raise LedgerError(
                f"{what}: pack {i}: {trained[column][i]} {column} trained + {left_out[i]} left out != "
                f"{plan[planned][i]} planned, and {len(wrong) - 1} packs more; this is a bug, please report it"
            )


def left_out(trained: pa.Table) -> dict[str, Any]:
    """Documents, and tokens of theirs in all and by source, that were planned and not trained."""
    rows = [r for rows in trained["left_out"].to_pylist() for r in rows]  # those of max_damaged and max_quarantined
    return {
        "documents": len({(r["source"], r["key"], r["exposure"]) for r in rows}),
        "tokens": sum(r["n_tokens"] for r in rows),
        "loss_tokens": sum(r["n_loss_tokens"] for r in rows),
        "sources": {
            source: {k: sum(r[k] for r in rows if r["source"] == source) for k in ("n_tokens", "n_loss_tokens")}
            for source in sorted({r["source"] for r in rows})
        },
    }


def dropped(trained: pa.Table) -> dict[str, int]:
    """Documents left out, by the reason of their first piece; the stage's counts."""
    reasons: dict[tuple[str, str, int], str] = {}
    for row in (r for rows in trained["left_out"].to_pylist() for r in rows):
        reasons.setdefault((row["source"], row["key"], row["exposure"]), row["reason"])
    counted = {reason: list(reasons.values()).count(reason) for reason in (DAMAGED, QUARANTINED)}
    return {reason: n for reason, n in counted.items() if n or reason == DAMAGED}


def by_source(trained: pa.Table, metrics: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tokens of each source, and its loss in the last step that saw it."""
    rows = pc.list_flatten(trained["sources"]).combine_chunks()
    table = pa.table({name: rows.field(name) for name in ("source", "n_tokens", "n_loss_tokens")})
    sums = table.group_by("source").aggregate([("n_tokens", "sum"), ("n_loss_tokens", "sum")]).sort_by("source")
    last = {source: loss for m in metrics for source, loss in m["sources"].items()}
    return {
        row["source"]: {
            "n_tokens": row["n_tokens_sum"],
            "n_loss_tokens": row["n_loss_tokens_sum"],
            "loss_last": last.get(row["source"]),
        }
        for row in sums.to_pylist()
    }


def held_out(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The loss on what is held out, first and last; nothing where it was not measured."""
    found = [m[name] for m in metrics for name in ("held_out_before", "held_out") if name in m]
    if not found:
        return {}
    ends = {
        name: {k: v for k, v in row.items() if k != "seconds"}
        for name, row in zip(ENDS, (found[0], found[-1]), strict=True)
    }
    return {"held_out": ends | {"seconds": round(sum(row["seconds"] for row in found), 2)}}
