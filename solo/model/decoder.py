"""Decoder: embeddings, layers and head, the tensors of a checkpoint under their released names.

In: ids, pixels and who sees whom. Out: hidden states, logits. Invariant: the patch's linear projection is ADDED to the
embedding of its <vpatch> token; all else is a Llama-like decoder (RMSNorm, SwiGLU, grouped queries, RoPE).
Cost: the model's.

Shapes: n tokens, d hidden_size, P patches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from solo.model.attention import Attention, Mask, RMSNorm, rotary_angles
from solo.model.config import SoloConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HEAD_MULTIPLE = 128  # an H100 runs a head of 33,031 columns at 112 TFLOP/s and one of 33,152 at 690
HEAD_ROWS = 64  # fewer than these are a matrix times a few vectors, where columns do not matter and the copy would


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: SoloConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Pre-norm attention and MLP, each added to its input."""

    def __init__(self, config: SoloConfig, number: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, number)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask, cache: Cache | None = None) -> Tensor:
        """(..., n, d) -> (..., n, d)."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """Embeddings, layers, last norm: the tensors named `model.*`."""

    def __init__(self, config: SoloConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_vision_patch = nn.Linear(3 * config.patch_px**2, config.hidden_size, bias=False)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary, self.rotary_scale = config.rotary()  # no buffer: a cast of the model must not round it
        self.recompute_layers = 0  # how many layers keep no activations for the backward pass
        self.lean = False  # whether the others, compiled, keep only what is dear to compute: see `memory.kept`

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        """Moved with the weights, though not cast: else each forward pass waits for the GPU to fetch it."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.norm.weight.device.type != "meta":
            self.rotary = self.rotary.to(self.norm.weight.device)
        return self

    def embed(self, input_ids: Tensor, pixels: Tensor, where: Tensor) -> Tensor:
        """(n,) ids, (P, 3 * patch_px**2) pixels and the (P,) places they belong to -> (n, d)."""
        x: Tensor = self.embed_tokens(input_ids)
        # Also without patches: then the projection's gradient is zero instead of absent, on every rank alike.
        return x.index_add(0, where, self.embed_vision_patch(normalised(pixels, x.dtype)))

    def forward(self, x: Tensor, position_ids: Tensor, mask: Mask, cache: Cache | None = None) -> Tensor:
        """(..., n, d) embeddings -> (..., n, d) after the last norm."""
        frequencies = self.rotary.to(x.device)
        rotary = rotary_angles(position_ids, frequencies=frequencies, scale=self.rotary_scale, dtype=x.dtype)
        for i, layer in enumerate(self.layers):
            if self.training and i < self.recompute_layers:
                x = checkpoint(layer, x, rotary, mask, use_reentrant=False)
            else:
                x = layer(x, rotary, mask, cache)
        out: Tensor = self.norm(x)
        return out


class Head(nn.Linear):
    """Logits; a GPU's product is padded to whole HEAD_MULTIPLEs of columns, which never leave this function."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., vocab_size)."""
        # Compiled, as for a GPU alone, it must not ask for the number of rows: that would cut the graph in two here.
        if torch.compiler.is_compiling() or (self.weight.is_cuda and x.numel() >= HEAD_ROWS * self.in_features):
            return padded_linear(x, self.weight, HEAD_MULTIPLE)
        return F.linear(x, self.weight)


def padded_linear(x: Tensor, weight: Tensor, multiple: int) -> Tensor:
    """`F.linear` through a product whose number of columns is a multiple; the added ones are cut off again.

    Inductor pads by itself only where it knows the number of rows, and that of a pack's targets it must not know. The
    weight stays as the checkpoint has it: a copy costs 0.2 ms for 4,096 x 33,029.
    """
    n_rows = len(weight)
    wide = F.linear(x, F.pad(weight, (0, 0, 0, -n_rows % multiple)))
    return wide[..., :n_rows]


def normalised(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """(P, 3 * patch_px**2) uint8 -> the same shape, ImageNet mean 0 and deviation 1 per channel.

    Floating pixels are taken to be normalised already, the form in which SOLO's own code has them.
    """
    if pixels.is_floating_point():
        return pixels.to(dtype)
    mean, std = (_column(c, pixels.device) for c in (IMAGENET_MEAN, IMAGENET_STD))
    channels = pixels.view(len(pixels), 3, pixels.shape[1] // 3).float() / 255
    return ((channels - mean) / std).flatten(1).to(dtype)


def _column(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(n, 1), made where it is used: from the host it would be a copy that waits for the GPU, and in every graph."""
    return torch.cat([torch.full((1, 1), value, device=device) for value in values])
