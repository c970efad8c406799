"""FLOPs: the arithmetic of a training step, and the share of a GPU's peak that it is.

In: a model's shape, the lengths of a step's documents. Out: floating-point operations; model FLOPs utilisation (MFU).
Invariant, strict: 6 x matmul parameters x tokens + block-diagonal causal attention, forward and backward; recomputed
layers and padding do not count, the input embedding and the patch projection are no matmul parameters, and weights
that are frozen have no gradient to compute. Cost: none.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from solo.objective import GroupName
from solo.spec import ModelSpec
from solo.train.memory import n_parameters

PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}  # dense bf16, by a part of the GPU's name


def flops(model: ModelSpec, patch_px: int, lengths: Sequence[int], frozen: Collection[GroupName] = ()) -> float:
    """Of the forward and backward pass of documents with these lengths."""
    n = n_parameters(model, patch_px)
    head = n["head"] or n["embedding"]  # where they are one matrix
    passes = {name: 4.0 if name in frozen else 6.0 for name in ("embeddings", "backbone")}
    a_token = passes["embeddings"] * head + passes["backbone"] * (n["layers"] + n["norm"])
    size = (model.head_dim or model.hidden_size // model.num_attention_heads) * model.num_attention_heads
    attention = 2.0 * size * sum(length * length for length in lengths) * model.num_hidden_layers
    return a_token * sum(lengths) + 3.0 * attention


def peak(device: str) -> float | None:
    """FLOPs a second that a GPU of this name can do at most; None where it is not known, as for a CPU."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device), None)
