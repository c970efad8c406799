"""Held-out loss: what the model has learnt of documents that no stage trains, measured while a stage runs.

In: the held-out packs of a pack artifact, a model as it is. Out: the mean loss a supervised token, in all, of documents
with pictures and without, and by source. Invariants: nothing of the training changes; every rank makes the same calls;
each document's sum comes from one rank and is added to zeros of the others, so the figures of the same weights are the
same for every number of ranks. Cost: a forward pass over the packs, each loaded anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solo.pack.held_out import HELD_OUT
from solo.sequence.loader import Pack, PackLoader
from solo.sequence.shards import Shards
from solo.spec import Stage, Tokens
from solo.train.sick import finite

Sum = Callable[[np.ndarray], Sequence[float]]  # of one rank's numbers, over all ranks: a collective


class HeldLoss:
    """The held-out packs of a stage, and when they are measured."""

    def __init__(self, plan: Path, shards: Shards, tokens: Tokens, stage: Stage, *, every_steps: int) -> None:
        self.loader = PackLoader(
            plan / HELD_OUT, shards, tokens, stage.pack_tokens, decode=stage.decode, max_damaged=stage.max_damaged
        )
        self.loader.pin = torch.cuda.is_available()
        self.every_steps = every_steps
        documents = [row for i in range(len(self.loader)) for row in self.loader.rows(i)]
        self.first = np.cumsum([0, *(len(self.loader.rows(i)) for i in range(len(self.loader)))])
        self.sources = np.array([row["source"] for row in documents])
        self.has_image = np.array([row["n_patches"] > 0 for row in documents])

    def is_due(self, step: int, n_steps: int) -> bool:
        """Whether the loss is measured after this step."""
        return step % self.every_steps == 0 or step == n_steps

    def measure(self, model: Callable[[Pack], Tensor], total: Sum, *, rank: int, n_ranks: int) -> dict[str, Any]:
        """The losses now; `model` gives a pack's losses and is in the state that they are measured in."""
        began, n = time.monotonic(), len(self.loader)
        self.loader.n_left_out = 0  # a document that cannot be read is left out each time anew
        sums, counts = np.zeros((2, int(self.first[-1])))
        # As many packs for each rank, since a forward pass may be a collective call; one too many is not counted.
        own = [*range(rank, n, n_ranks), *([n - 1] if rank >= n % n_ranks > 0 else [])]
        with torch.no_grad():
            for turn, pack in enumerate(self.loader.ahead(own, workers=1)):
                losses = model(pack).double().cpu().numpy()
                if turn * n_ranks + rank >= n:
                    continue
                read = [i for i, row in enumerate(self.loader.rows(pack.index)) if row not in pack.left_out]
                for i, (_, _, a, b) in zip(read, pack.loss_ranges(), strict=True):
                    sums[self.first[pack.index] + i] = losses[a:b].sum()
                    counts[self.first[pack.index] + i] = b - a
        sums, counts = np.split(np.asarray(total(np.concatenate([sums, counts]))), 2)

        def mean(of: np.ndarray) -> float | None:
            found = finite(float(sums[of].sum() / counts[of].sum())) if counts[of].any() else None
            return None if found is None else round(found, 6)

        by_kind = {"text": mean(~self.has_image), "image": mean(self.has_image)}
        return {
            "loss": mean(np.ones(len(sums), dtype=bool)),
            **{kind: loss for kind, loss in by_kind.items() if loss is not None},
            "sources": {source: mean(self.sources == source) for source in np.unique(self.sources).tolist()},
            "seconds": round(time.monotonic() - began, 3),
        }
