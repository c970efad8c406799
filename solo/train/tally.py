"""Tally: what the packs of one optimizer step add up to, over all ranks.

In: this rank's packs and the rows made of them. Out: one vector, to be summed over the ranks, and from that sum the
figures of the step. Invariant: as many numbers on every rank, whatever its packs hold. Cost: none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from solo.sequence.loader import Pack
from solo.spec import ModelSpec, Stage
from solo.train import memory
from solo.train.flops import flops

# Places of the vector; the losses of sources and their loss tokens come after these.
STOP, STALL_S, LOSS, TOKENS, LOSS_TOKENS, LEFT_OUT, FLOPS, IMAGE, TEXT, SAVE_S, FIRST = (*range(8), 9, 11, 12)


class Tally:
    """How a stage counts."""

    def __init__(self, sources: Sequence[str], stage: Stage, model: ModelSpec, patch_px: int) -> None:
        self.sources = list(sources)
        self.batch_packs = stage.batch_packs
        self.model, self.patch_px, self.frozen = model, patch_px, memory.frozen_groups(stage)

    def of(
        self, rows: Sequence[dict[str, Any]], packs: Sequence[Pack], scale: Callable[[int], float], **own: float
    ) -> np.ndarray:
        """One rank's vector; `scale`: what a pack's summed losses are multiplied with; `own`: stop, stall_s, save_s."""
        n = len(self.sources)
        found = np.zeros(FIRST + 2 * n)
        found[STOP], found[STALL_S], found[SAVE_S] = own["stop"], own["stall_s"], own["save_s"]
        for row, pack in zip(rows, packs, strict=True):
            loss, n_loss = _number(row), row["n_loss_tokens"]
            found[LOSS] += loss * n_loss * scale(n_loss) / self.batch_packs
            found[TOKENS : LEFT_OUT + 1] += row["n_tokens"], n_loss, len(row["left_out"])
            found[FLOPS] += flops(self.model, self.patch_px, pack.lengths(), self.frozen)
            if n_loss:
                kind = IMAGE if pack.has_image() else TEXT
                found[kind : kind + 2] += loss, 1
            for source in row["sources"]:
                i = FIRST + self.sources.index(source["source"])
                found[i] += _number(source) * source["n_loss_tokens"]
                found[i + n] += source["n_loss_tokens"]
        return found

    def sums(self, total: Sequence[float], n_ranks: int) -> dict[str, Any]:
        """The step's figures from the sum of all ranks' vectors."""
        n = len(self.sources)
        of_sources = zip(self.sources, total[FIRST : FIRST + n], total[FIRST + n :], strict=True)
        # Means over packs with and without a picture of each pack's mean: what upstream logs as img and txt lm loss.
        of_kinds = ((kind, total[i], total[i + 1]) for kind, i in (("image", IMAGE), ("text", TEXT)))
        return {
            "loss": total[LOSS],
            "tokens": int(total[TOKENS]),
            "loss_tokens": int(total[LOSS_TOKENS]),
            "left_out": int(total[LEFT_OUT]),
            "input_stall_s": round(total[STALL_S] / n_ranks, 4),
            "checkpoint_stall_s": round(total[SAVE_S] / n_ranks, 4),
            "sources": {
                source: round(loss / n_loss, 6) for source, loss, n_loss in of_sources if n_loss and math.isfinite(loss)
            },
            "modalities": {kind: round(loss / n, 6) for kind, loss, n in of_kinds if n and math.isfinite(loss)},
            "flops": total[FLOPS],
        }


def _number(row: dict[str, Any]) -> float:
    """A row's loss: 0 where nothing is supervised, NaN where it was not finite."""
    return row["loss"] if row["loss"] is not None else math.nan if row["n_loss_tokens"] else 0.0
