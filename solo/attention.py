"""Attention inside a pack: each document alone, causal, with SOLO's sliding window.

In: the document of each token (-1 = padding) and the hidden states. Out: what each token gathers. Invariant: a
token sees itself and the `window` tokens before it in its own document (`q - k <= window`, one more than
transformers' mask lets it see); padding sees only itself. The mask is built once per pack and serves all layers.
Cost: on CPU all n**2 pairs through SDPA; on CUDA only blocks that hold a visible pair, through flex_attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Mask = Tensor | BlockMask


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, no biases."""

    def __init__(self, *, hidden_size: int, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        self.head_dim = hidden_size // n_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask) -> Tensor:
        """(n, hidden_size) -> (n, hidden_size)."""
        q, k, v = (p(x).view(len(x), -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (t.transpose(0, 1) for t in (_rotate(q, rotary), _rotate(k, rotary), v))
        out: Tensor = self.o_proj(attend(q, k, v, mask).transpose(0, 1).flatten(1))
        return out


def rotary_angles(position_ids: Tensor, *, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(n, 1, head_dim / 2) cosines and sines; computed in fp32, where 32,767 is still exact."""
    steps = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    angle = position_ids.float()[:, None, None] * theta**-steps
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions on (n, heads, head_dim); the halves are the pairs, as in Hugging Face's checkpoints."""
    (a, b), (cos, sin) = x.chunk(2, -1), rotary
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def visible(document_ids: Tensor, window: int | None) -> Callable[..., Tensor]:
    """The rule as a function of (batch, head, query, key) indices, the form that flex_attention asks for."""
    reach = len(document_ids) if window is None else window

    def rule(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        together = (document_ids[q] == document_ids[k]) & (document_ids[q] >= 0)
        return (together & (q >= k) & (q - k <= reach)) | (q == k)

    return rule


def build_mask(document_ids: Tensor, window: int | None) -> Mask:
    """Who sees whom, from (n,) document ids: a boolean (n, n) mask on CPU, a block mask on CUDA."""
    n = len(document_ids)
    rule = visible(document_ids, window)
    if document_ids.is_cuda:
        return create_block_mask(rule, None, None, n, n, device=document_ids.device, _compile=True)
    at = torch.arange(n)
    return rule(at, at, at[:, None], at[None, :])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """(heads, n, head_dim) queries over (kv_heads, n, head_dim) keys and values -> (heads, n, head_dim)."""
    q, k, v = q[None], k[None], v[None]
    if isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).squeeze(0)
    flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    out: Tensor = flex(q, k, v, block_mask=mask, enable_gqa=True)
    return out.squeeze(0)


@cache
def _compiled_flex() -> Callable[..., Any]:
    """Uncompiled, flex_attention writes out all n**2 scores: 137 GB per layer of a 32K pack."""
    return torch.compile(flex_attention, dynamic=False)
