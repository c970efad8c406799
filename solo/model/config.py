"""Config: the shape of the decoder, as Hugging Face's config.json keeps it.

In: fields, or a checkpoint's config.json (SOLO-7B's own, or one that `solo.model.backbone` made from a Llama-like
model). Out: a `SoloConfig`. Invariant: the defaults are SOLO-7B's; ids from `n_text_ids` on are SOLO's (image marks,
boxes).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # "dynamic" and "longrope" change with the text's length


class SoloConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """Shape of the decoder.

    `n_text_ids`: the backbone's own vocabulary; the ids above it, up to `vocab_size`, are SOLO's and never generated.
    `sliding_window`: a token sees itself and this many before it, one more than Hugging Face's masks show it.
    `rope_parameters`: Hugging Face's form, {"rope_type", "rope_theta", ...}; `rope_theta` alone is understood too.
    """

    model_type = "solo"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 33_029
    n_text_ids: int = 32_000
    hidden_size: int = 4096
    intermediate_size: int = 14_336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None  # hidden_size / num_attention_heads where not given
    qkv_bias: bool = False  # Qwen2 has it
    qk_norm: bool = False  # Qwen3 has it
    rope_parameters: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = 4096
    max_position_embeddings: int = 32_768
    initializer_range: float = 0.02
    patch_px: int = 32
    max_side_px: int = 1024
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Check what no tensor shape would show."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config: num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}; make it one"
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"config: hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}; make it one, or give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.n_text_ids > self.vocab_size:
            raise ValueError(f"config: n_text_ids {self.n_text_ids} > vocab_size {self.vocab_size}; correct one")
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        kind = (self.rope_parameters or {})["rope_type"]
        if kind not in ROPE_TYPES:
            raise ValueError(f"config: rope_type {kind!r} is not supported; have {list(ROPE_TYPES)}")

    def rotary(self) -> tuple[Tensor, float]:
        """(head_dim / 2,) fp32 inverse frequencies on the CPU, and what cosines and sines are multiplied with."""
        rope: dict[str, Any] = self.rope_parameters or {}
        with torch.device("cpu"):  # also while a model is laid out without memory
            if rope["rope_type"] != "default":
                frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](self, torch.device("cpu"))
                return frequencies, float(scale)
            assert self.head_dim is not None
            steps = torch.arange(0, self.head_dim, 2, dtype=torch.float) / self.head_dim
            return 1.0 / rope["rope_theta"] ** steps, 1.0
