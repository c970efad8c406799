"""Backbone: a published text model becomes a SOLO to train.

In: a Mistral, Llama (SmolLM2 is one), Qwen2 or Qwen3 checkpoint, as safetensors or GGUF. Out: a `SoloForCausalLM` with
SOLO's ids after the text model's own and a patch projection. Invariant: for a text no longer than the window its logits
are the text model's, over the text model's ids. Cost: the text model's weights once in memory; rows of ids are copied.

The number of the sliding window is kept, and SOLO counts it one token wider than transformers does, as SOLO-7B did.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils.logging import disable_progress_bar

from solo.model import weights
from solo.model.causal_lm import SoloForCausalLM
from solo.model.config import SoloConfig
from solo.model.processor import TOKENIZER_FILES, SoloProcessor
from solo.sequence.tokenizer import N_OWN_IDS
from solo.spec import ModelSpec

MODEL_TYPES = ("mistral", "llama", "qwen2", "qwen3")
SAME = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)
MEAN_NOISE = 0.01  # of the drawn deviation: new rows near the mean, but no two alike
NewRows = Literal["normal", "mean"]


def convert(
    folder: str | Path,
    *,
    gguf_file: str | None = None,
    new_rows: NewRows = "normal",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    untie: bool = False,
) -> SoloForCausalLM:
    """The text model in `folder` (or of this name on the hub) as a SOLO.

    `new_rows` says how the rows of SOLO's ids, in embedding and head, begin. normal: drawn with the config's
    initializer_range, as SOLO-7B's were. mean: the mean of the text model's rows plus a hundredth of such a draw, so
    that no new id is likelier at first than an average one. The patch projection is drawn (normal) either way, each
    tensor from `seed` and its name. `untie` gives a tied head weights of its own.
    """
    if new_rows not in ("normal", "mean"):
        raise ValueError(f"from_backbone: new_rows is {new_rows!r}; have 'normal', 'mean'")
    where = {"gguf_file": gguf_file} if gguf_file else {}
    shape = AutoConfig.from_pretrained(folder, **where)
    config = solo_config(shape, str(folder))
    text = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", **where)
    tensors = dict(text.state_dict())
    del text
    if untie and config.tie_word_embeddings:
        config.tie_word_embeddings = False
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    with torch.device("meta"):
        model = SoloForCausalLM(config)
    kept = next(iter(tensors.values())).dtype
    model.load_state_dict(_grown(tensors, model, new_rows, seed, kept), assign=True)
    model.tie_weights()
    model.eval()  # type: ignore[no-untyped-call]
    return model


def write(
    folder: Path, out: Path, *, gguf_file: str | None = None, bos: str | None = None, **how: Any
) -> dict[str, Any]:
    """Convert, and save a folder to train from or to talk to; returns the `tokens` and `model` blocks of its recipe.

    `bos`: the token that begins a document, where the text model has none (Qwen: "<|endoftext|>").
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: not empty; give a new folder")
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; fetch the text model there")
    disable_progress_bar()  # type: ignore[no-untyped-call]
    model = convert(folder, gguf_file=gguf_file, **how)
    model.save_pretrained(out)
    _save_tokenizer(folder, out, gguf_file, bos)
    processor = SoloProcessor.from_pretrained(out)
    processor.save_pretrained(out)
    vocabulary = processor.tokenizer.vocabulary
    tokens = processor.tokenizer.tokens.model_dump(mode="json", exclude_none=True)
    config = model.config.to_dict() | {"init": str(out.resolve()), "init_std": model.config.initializer_range}
    rope = dict(config["rope_parameters"])
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if rope["rope_type"] != "default" else None}
    fields = ModelSpec.model_validate({k: config[k] for k in ModelSpec.model_fields if k in config})
    assert vocabulary.size == model.config.vocab_size, (vocabulary, model.config.vocab_size)
    return {
        "tokens": tokens | {"tokenizer": str((out / processor.tokenizer.file_name).resolve())},
        "model": fields.model_dump(mode="json", exclude_defaults=True),
    }


def _save_tokenizer(folder: Path, out: Path, gguf_file: str | None, bos: str | None) -> None:
    """The text model's tokenizer file beside the weights, and what says which tokens begin and end a text."""
    if gguf_file:
        AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file).save_pretrained(out)
    for name in (*TOKENIZER_FILES, "tokenizer_config.json"):
        if not gguf_file and (folder / name).is_file():
            shutil.copy(folder / name, out / name)
    if (out / "tokenizer.json").is_file() and (out / "tokenizer.model").is_file():
        (out / "tokenizer.json").unlink()  # made from the other, which SOLO's own code reads faster
    if bos is not None:
        beside = out / "tokenizer_config.json"
        known = json.loads(beside.read_bytes()) if beside.is_file() else {}
        beside.write_text(json.dumps(known | {"bos_token": bos}, indent=2) + "\n")


def solo_config(text: PretrainedConfig, name: str) -> SoloConfig:
    """The SOLO shape of a text model's config; what SOLO's decoder does not compute is an error that names it."""
    if text.model_type not in MODEL_TYPES:
        raise ValueError(f"{name}: model_type is {text.model_type!r}; SOLO starts from one of {list(MODEL_TYPES)}")
    wrong = []
    if getattr(text, "hidden_act", "silu") not in ("silu", "swish"):
        wrong.append(f"hidden_act {text.hidden_act!r}")
    if text.model_type != "qwen2" and getattr(text, "attention_bias", False):
        wrong.append("attention_bias true")
    if getattr(text, "mlp_bias", False):
        wrong.append("mlp_bias true")
    kinds = set(getattr(text, "layer_types", None) or ())
    if len(kinds) > 1:
        wrong.append(f"layer_types {sorted(kinds)} in one model")
    if wrong:
        raise ValueError(f"{name}: {', '.join(wrong)}: SOLO's decoder has no such thing; take another backbone")
    window = getattr(text, "sliding_window", None)
    if kinds == {"full_attention"} or getattr(text, "use_sliding_window", True) is False:
        window = None
    return SoloConfig(
        **{field: getattr(text, field) for field in SAME},
        vocab_size=text.vocab_size + N_OWN_IDS,
        n_text_ids=text.vocab_size,
        head_dim=getattr(text, "head_dim", None),
        qkv_bias=text.model_type == "qwen2",
        qk_norm=text.model_type == "qwen3",
        rope_parameters=dict(text.rope_parameters),
        sliding_window=window,
        initializer_range=getattr(text, "initializer_range", 0.02),
    )


def _grown(
    tensors: dict[str, Tensor], model: SoloForCausalLM, new_rows: NewRows, seed: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The model's whole state: the text model's tensors, with SOLO's rows and projection added."""
    std = model.config.initializer_range
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        own = tensors.pop(name, None)
        if own is not None and own.shape == parameter.shape:
            state[name] = own
            continue
        n_own = 0 if own is None else len(own)
        if name not in (weights.GROWS if own is not None else (weights.OPTIONAL,)):
            raise ValueError(f"{name}: the text model has {'none' if own is None else list(own.shape)}")
        new = torch.empty(len(parameter) - n_own, *parameter.shape[1:])
        weights.draw(new, f"{seed}:{name}", std)
        if own is not None and new_rows == "mean":
            new = own.float().mean(0) + MEAN_NOISE * new
        state[name] = new.to(dtype) if own is None else torch.cat([own, new.to(own)])
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    left: dict[str, Any] = {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if left:
        raise ValueError(f"tensors SOLO has no place for: {', '.join(sorted(left)[:5])}; take another backbone")
    return state
