"""Attention inside a pack: each document alone, causal, with SOLO's sliding window.

In: the document of each token (-1 = padding) and the hidden states. Out: what each token gathers. Invariant: a
token sees itself and the `window` tokens before it in its own document (`q - k <= window`, one more than
transformers' mask lets it see); padding sees only itself. Who sees whom is found once per pack, for all layers.
Cost: on CPU the pairs inside each document, one SDPA call a document; on CUDA only blocks that hold a visible pair,
through flex_attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


@dataclass(frozen=True)
class Documents:
    """Documents that lie end to end, then padding: what a CPU needs to know of a pack."""

    lengths: list[int]
    window: int | None


Mask = Documents | Tensor | BlockMask


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


def lay_out(document_ids: Tensor, window: int | None) -> Mask:
    """What `attend` does least work with, for documents that lie end to end: their lengths, or CUDA's block mask."""
    if document_ids.is_cuda:
        return build_mask(document_ids, window)
    return Documents(torch.bincount(document_ids[document_ids >= 0]).tolist(), window)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """(heads, n, head_dim) queries over (kv_heads, n, head_dim) keys and values -> (heads, n, head_dim)."""
    if isinstance(mask, Documents):
        return _attend_each(q, k, v, mask)
    q, k, v = q[None], k[None], v[None]
    if isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).squeeze(0)
    flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    out: Tensor = flex(q, k, v, block_mask=mask, enable_gqa=True)
    return out.squeeze(0)


def _attend_each(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """One document after the other: 2.1 ms instead of 8.2 for 21 documents in 512 tokens, forward and backward."""
    total, window = sum(documents.lengths), documents.window
    outs = []
    parts = (torch.split(t[:, :total], documents.lengths, 1) for t in (q, k, v))
    for a, b, c in zip(*parts, strict=True):
        n = a.shape[1]
        if window is None or n <= window + 1:
            out = F.scaled_dot_product_attention(a[None], b[None], c[None], is_causal=True, enable_gqa=True)
        else:
            out = attend(a, b, c, build_mask(torch.zeros(n, dtype=torch.int32), window))[None]
        outs.append(out.squeeze(0))
    outs.append(v[:, total:].repeat_interleave(len(q) // len(v), 0))  # padding sees itself alone
    return torch.cat(outs, 1)


@cache
def _compiled_flex() -> Callable[..., Any]:
    """Uncompiled, flex_attention writes out all n**2 scores: 137 GB per layer of a 32K pack."""
    return torch.compile(flex_attention, dynamic=False)
