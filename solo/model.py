"""SOLO: one decoder for text tokens and image patches, in Hugging Face's clothes.

In: a `Pack`. Out: the cross entropy of each supervised token, or logits at chosen positions. The patch's linear
projection is ADDED to the embedding of its <vpatch> token; all else is Mistral (RMSNorm, SwiGLU, grouped
queries, RoPE, no biases, untied head). Invariant: packing changes no number: a document's losses are those of
the document alone. Cost: the head runs at supervised positions only.

Shapes: n tokens of a pack, d hidden_size, P patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from solo import weights
from solo.attention import Attention, Mask, lay_out, rotary_angles
from solo.loader import NO_TARGET, Pack, Piece, assemble
from solo.spec import ModelSpec, Tokens
from solo.tokenizer import SOLO

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class SoloConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """Shape of the decoder; the defaults are SOLO-7B's."""

    model_type = "solo"

    vocab_size: int = 33_029
    hidden_size: int = 4096
    intermediate_size: int = 14_336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = 4096
    max_position_embeddings: int = 32_768
    initializer_range: float = 0.02
    patch_px: int = 32
    max_side_px: int = 1024
    bos_token_id: int | None = SOLO.bos
    eos_token_id: int | None = SOLO.eos
    tie_word_embeddings: bool = False


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, config: SoloConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """(n, d) -> (n, d)."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: SoloConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, d) -> (n, d)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Pre-norm attention and MLP, each added to its input."""

    def __init__(self, config: SoloConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(
            hidden_size=config.hidden_size,
            n_heads=config.num_attention_heads,
            n_kv_heads=config.num_key_value_heads,
        )
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask) -> Tensor:
        """(n, d) -> (n, d)."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """Embeddings, layers, last norm: the tensors named `model.*`."""

    def __init__(self, config: SoloConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_vision_patch = nn.Linear(3 * config.patch_px**2, config.hidden_size, bias=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)


class SoloForCausalLM(PreTrainedModel):  # type: ignore[no-untyped-call]
    """The decoder and its untied head."""

    config_class = SoloConfig
    base_model_prefix = "model"

    def __init__(self, config: SoloConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.recompute_layers = 0  # how many layers keep no activations for the backward pass
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Left to `from_spec`, which draws each tensor from its name."""

    @classmethod
    def from_spec(cls, spec: ModelSpec, tokens: Tokens, seed: int) -> SoloForCausalLM:
        """A new model: each tensor drawn from H(seed, its name), so that a layer more moves no other tensor.

        Where `spec.init` is a checkpoint folder, its tensors take the place of the drawn ones; rows it lacks
        (SOLO's ids after Mistral's 32,000) and tensors it lacks (a text model's patch projection) stay drawn.
        """
        if spec.hidden_size % spec.num_attention_heads or spec.num_attention_heads % spec.num_key_value_heads:
            raise ValueError(
                f"model: hidden_size {spec.hidden_size}, num_attention_heads {spec.num_attention_heads}, "
                f"num_key_value_heads {spec.num_key_value_heads}: each must be a multiple of the next"
            )
        shape: dict[str, Any] = spec.model_dump(exclude={"init", "init_std"})
        shape |= {"patch_px": tokens.patch_px, "max_side_px": tokens.max_side_px}
        with torch.device("meta"):
            model = cls(SoloConfig(**shape, initializer_range=spec.init_std))
        model.to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                weights.draw(parameter, f"{seed}:{name}", spec.init_std)
        if spec.init != "random":
            weights.copy(dict(model.named_parameters()), Path(spec.init))
        return model

    def hidden(self, pack: Pack) -> Tensor:
        """(n, d) after the last norm."""
        device = self.lm_head.weight.device
        where = (pack.patch_index >= 0).nonzero()[:, 0]  # (P,) found on the host: no wait for the GPU
        pixels = pack.patches.to(device)[pack.patch_index[where].to(device)]
        mask = lay_out(pack.document_ids.to(device), self.config.sliding_window)
        return self._decode(pack.input_ids.to(device), pack.position_ids.to(device), pixels, where.to(device), mask)

    def _decode(self, input_ids: Tensor, position_ids: Tensor, pixels: Tensor, where: Tensor, mask: Mask) -> Tensor:
        """(n, d) from tensors on the model's device alone."""
        x: Tensor = self.model.embed_tokens(input_ids)
        # Also without patches: then the projection's gradient is zero instead of absent, on every rank alike.
        x = x.index_add(0, where, self.model.embed_vision_patch(_normalise(pixels, x.dtype)))
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        rotary = rotary_angles(position_ids, head_dim=head_dim, theta=self.config.rope_theta, dtype=x.dtype)
        for i, layer in enumerate(self.model.layers):
            if self.training and i < self.recompute_layers:
                x = checkpoint(layer, x, rotary, mask, use_reentrant=False)
            else:
                x = layer(x, rotary, mask)
        out: Tensor = self.model.norm(x)
        return out

    def pack_losses(self, pack: Pack) -> Tensor:
        """(n_supervised,) fp32 cross entropies, at the positions with a target in ascending order."""
        positions = (pack.targets != NO_TARGET).nonzero()[:, 0]
        targets = pack.targets[positions].to(self.lm_head.weight.device)
        return F.cross_entropy(self.logits(pack, positions), targets, reduction="none")

    def forward(self, pack: Pack) -> Tensor:
        """`pack_losses`, so that engines which wrap `forward` (DeepSpeed, DDP) train it."""
        return self.pack_losses(pack)

    def logits(self, pack: Pack, positions: Tensor) -> Tensor:
        """(n_positions, vocab_size) fp32: what follows each of these positions."""
        hidden = self.hidden(pack)
        logits: Tensor = self.lm_head(hidden[positions.to(hidden.device)])
        return logits.float()

    @torch.inference_mode()
    def complete(self, prompts: Sequence[Piece], *, max_new_tokens: int, batch_tokens: int = 2048) -> list[list[int]]:
        """Greedy completions, without the EOS that ends them; never an id of SOLO's own.

        Prompts lie end to end in packs of at most `batch_tokens`, and all is computed again for each new token: for
        answers of a few tokens that costs less than a cache would in code.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        open_ones = list(range(len(prompts)))
        for _ in range(max_new_tokens):
            still_open = []
            for batch in _batches(open_ones, [len(prompts[i].ids) + len(answers[i]) for i in open_ones], batch_tokens):
                pieces = [prompts[i].extended(answers[i]) for i in batch]
                total = sum(len(p.ids) for p in pieces)
                # On CUDA every new length compiles its own attention kernel, so there the length stays the same.
                pack_tokens = max(total, batch_tokens) if self.lm_head.weight.is_cuda else total
                pack = assemble(pieces, index=0, pack_tokens=pack_tokens)
                last = torch.tensor([len(p.ids) for p in pieces]).cumsum(0) - 1
                best = self.logits(pack, last)[:, : SOLO.n_text_ids].argmax(-1).tolist()
                for i, new in zip(batch, best, strict=True):
                    if new != SOLO.eos:
                        answers[i].append(new)
                        still_open.append(i)
            open_ones = still_open
        return answers


def _normalise(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """(P, 3 * patch_px**2) uint8 -> the same shape, ImageNet mean 0 and deviation 1 per channel."""
    mean, std = (torch.tensor(c, device=pixels.device)[:, None] for c in (IMAGENET_MEAN, IMAGENET_STD))
    channels = pixels.view(len(pixels), 3, pixels.shape[1] // 3).float() / 255
    return ((channels - mean) / std).flatten(1).to(dtype)


def _batches(items: Sequence[int], sizes: Sequence[int], most: int) -> list[list[int]]:
    """Items in order, cut where their sizes would sum to more than `most`; a larger item stands alone."""
    batches: list[list[int]] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if not batches or total + size > most:
            batches.append([])
            total = 0
        batches[-1].append(item)
        total += size
    return batches


AutoConfig.register("solo", SoloConfig, exist_ok=True)
AutoModelForCausalLM.register(SoloConfig, SoloForCausalLM, exist_ok=True)
