"""Hugging Face: the same function by transformers' own Mistral, the reference that training is measured against.

In: a SOLO. Out: a module that maps a pack to the cross entropies of its supervised tokens, on the same weights.
Invariant: documents no longer than the sliding window give SOLO's losses. Cost: that of MistralForCausalLM with sdpa,
documents told by position ids alone (which makes a mask of all pairs), and every layer computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

from solo.model.causal_lm import SoloForCausalLM
from solo.model.decoder import normalised
from solo.sequence.loader import NO_TARGET, Pack
from solo.sequence.upload import upload

SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
)


class PackedMistral(nn.Module):
    """MistralForCausalLM over packs; it takes the SOLO's tensors, which are then in two modules."""

    def __init__(self, solo: SoloForCausalLM) -> None:
        super().__init__()
        shape: dict[str, Any] = {name: getattr(solo.config, name) for name in SHAPE}
        shape |= {"sliding_window": None, "attn_implementation": "sdpa", "tie_word_embeddings": False}
        config = MistralConfig(**shape)
        with torch.device("meta"):
            self.mistral: Any = MistralForCausalLM(config)
        named = {name: p for name, p in solo.named_parameters() if "embed_vision_patch" not in name}
        self.mistral.load_state_dict(named, assign=True, strict=True)
        self.mistral.model.rotary_emb = MistralRotaryEmbedding(config)
        self._frequencies = self.mistral.model.rotary_emb.inv_freq.clone()  # no buffer: see `forward`
        self.project = solo.model.embed_vision_patch
        self.mistral.train()
        self.mistral.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]

    def forward(self, pack: Pack) -> Tensor:
        """(n_supervised,) cross entropies."""
        device = self.mistral.lm_head.weight.device
        # DeepSpeed casts buffers to bf16 as it does weights, and position 32,767 times a rounded frequency is noise.
        self._frequencies = self._frequencies.to(device)
        self.mistral.model.rotary_emb.inv_freq = self._frequencies
        where = (pack.patch_index >= 0).nonzero()[:, 0]
        supervised = (pack.targets != NO_TARGET).nonzero()[:, 0]  # found on the host, as SOLO's are: no wait for a GPU
        pixels = pack.patches.to(device)[upload(pack.patch_index[where], device)]
        x = self.mistral.model.embed_tokens(upload(pack.input_ids, device))
        x = x.index_add(0, upload(where, device), self.project(normalised(pixels, x.dtype)))
        positions = upload(pack.position_ids, device)
        logits = self.mistral(inputs_embeds=x[None], position_ids=positions[None], use_cache=False).logits[0]
        losses = F.cross_entropy(logits.float(), upload(pack.targets, device), ignore_index=NO_TARGET, reduction="none")
        return losses[upload(supervised, device)]
