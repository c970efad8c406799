"""SOLO: one decoder for text tokens and image patches, in Hugging Face's clothes.

In: a `Pack` (training: `pack_losses`), or a batch of padded rows (`forward`, `generate`). Out: the cross entropy of
each supervised token, or logits. Invariant: neither packing nor padding changes a number: a document's losses and
logits are those of the document alone. Cost: in a pack the head runs at supervised positions only; on CUDA the whole
loss is one compiled graph.

Shapes: n tokens, d hidden_size, P patches.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from solo.model import weights
from solo.model.attention import Mask, batch_mask, lay_out
from solo.model.config import SoloConfig
from solo.model.decoder import Decoder, Head
from solo.model.processor import SoloProcessor
from solo.sequence.loader import NO_TARGET, Pack
from solo.sequence.tokenizer import Tokenizer
from solo.sequence.upload import upload
from solo.spec import ModelSpec, Tokens


class SoloForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """The decoder and its head."""

    config_class = SoloConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' own form)
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = False

    def __init__(self, config: SoloConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self._compiled: Any = None
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Left to `from_spec` and `from_backbone`, which draw each tensor from its name."""

    @classmethod
    def from_spec(cls, spec: ModelSpec, tokens: Tokens, seed: int) -> SoloForCausalLM:
        """A new model: each tensor drawn from H(seed, its name), so that a layer more moves no other tensor.

        Where `spec.init` is a checkpoint folder, its tensors take the place of the drawn ones; rows it lacks
        (SOLO's ids after a text model's) and the patch projection, if it lacks that, stay drawn. `spec.init_projection`
        says where the projection is from, whatever that folder has.
        """
        shape = spec.model_dump(exclude={"init", "init_std", "rope_theta", "rope_scaling", "init_projection"})
        shape["rope_parameters"] = (
            {"rope_type": "default"} | (spec.rope_scaling or {}) | {"rope_theta": spec.rope_theta}
        )
        vocabulary = Tokenizer(tokens).vocabulary
        shape |= {"patch_px": tokens.patch_px, "max_side_px": tokens.max_side_px}
        shape |= {"bos_token_id": vocabulary.bos, "eos_token_id": vocabulary.eos}
        model = cls.drawn(SoloConfig(**shape, initializer_range=spec.init_std), seed)
        projection = model.model.embed_vision_patch.weight
        drawn = projection.clone() if spec.init_projection == "random" else None
        if spec.init != "random":
            weights.copy(dict(model.named_parameters()), Path(spec.init))
        if drawn is not None:
            projection.data.copy_(drawn)
        elif spec.init_projection:
            weights.copy_projection(
                projection, Path(spec.init if spec.init_projection == "checkpoint" else spec.init_projection)
            )
        return model

    @classmethod
    def drawn(cls, config: SoloConfig, seed: int) -> SoloForCausalLM:
        """A model on the CPU, each tensor drawn from its name."""
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device="cpu")
        model.tie_weights()
        for name, parameter in model.named_parameters():
            weights.draw(parameter, f"{seed}:{name}", config.initializer_range)
        return model

    @classmethod
    def from_backbone(cls, folder: str | Path, **options: Any) -> SoloForCausalLM:
        """A text model with SOLO's ids and patch projection added: see `solo.model.backbone.convert`."""
        from solo.model.backbone import convert

        return convert(folder, **options)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | Path, *args: Any, **kwargs: Any
    ) -> SoloForCausalLM:
        """A checkpoint's model, as transformers loads it; a missing, unknown or misshapen tensor is an error.

        Transformers logs those and goes on with random numbers.
        """
        weights.check_files(Path(folder))
        kwargs["ignore_mismatched_sizes"] = True  # then they are listed, with all else that is wrong
        loaded: Any = super().from_pretrained(folder, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        weights.check_loaded(str(folder), info)
        return cast(SoloForCausalLM, model)

    def hidden(self, pack: Pack) -> Tensor:
        """(n, d) after the last norm."""
        return self._decode(*self._on_device(pack))

    def logits(self, pack: Pack, positions: Tensor) -> Tensor:
        """(n_positions, vocab_size) fp32: what follows each of these positions."""
        hidden = self.hidden(pack)
        logits: Tensor = self.lm_head(hidden[positions.to(hidden.device)])
        return logits.float()

    def pack_losses(self, pack: Pack) -> Tensor:
        """(n_supervised,) fp32 cross entropies, at the positions with a target in ascending order."""
        at = (pack.targets != NO_TARGET).nonzero()[:, 0]
        aimed = [upload(t, self.lm_head.weight.device) for t in (at, pack.targets)]
        inputs = self._on_device(pack)
        # Weights that ranks hold in parts (ZeRO 3) are gathered module by module, which one graph would not do.
        if not self.lm_head.weight.is_cuda or hasattr(self.lm_head.weight, "ds_id"):
            return self._losses(*aimed, *inputs)
        if self._compiled is None:
            self._compiled = torch.compile(self._losses)
        let_lengths_vary(aimed[0], *inputs[2:4])
        # The partitioner would keep whatever a matrix product of the backward pass reads; read where it compiles.
        with torch._functorch.config.patch(ban_recompute_materialized_backward=not self.model.lean):
            losses: Tensor = self._compiled(*aimed, *inputs)
        return losses

    def _on_device(self, pack: Pack) -> tuple[Tensor, Tensor, Tensor, Tensor, Mask]:
        """Ids, positions, pixels, their places, and who sees whom."""
        device = self.lm_head.weight.device
        where = (pack.patch_index >= 0).nonzero()[:, 0]  # (P,) found on the host: no wait for the GPU
        patches = pack.patches
        patches = upload(patches, device) if isinstance(patches, Tensor) else patches.to(device)
        pixels = patches[upload(pack.patch_index[where], device)]
        mask = lay_out(upload(pack.document_ids, device), self.config.sliding_window)
        ids, positions, where = (upload(t, device) for t in (pack.input_ids, pack.position_ids, where))
        return ids, positions, pixels, where, mask

    def _decode(self, input_ids: Tensor, position_ids: Tensor, pixels: Tensor, where: Tensor, mask: Mask) -> Tensor:
        """(n, d) from tensors on the model's device alone."""
        out: Tensor = self.model(self.model.embed(input_ids, pixels, where), position_ids, mask)
        return out

    def _losses(self, at: Tensor, targets: Tensor, *inputs: Any) -> Tensor:
        """What is compiled: from ids and pixels to losses, of the (n,) targets those `at` these places.

        They are chosen here, as the hidden states are: of two lengths no graph could know that they are one.
        """
        return F.cross_entropy(self.lm_head(self._decode(*inputs)[at]).float(), targets[at], reduction="none")

    def forward(  # noqa: PLR0913 (Hugging Face's signature)
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        vision_patches: Tensor | None = None,
        vision_patch_indices: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, n, vocab_size) of padded rows, and the mean shifted cross entropy where `labels` are given.

        input_ids: (batch, n). attention_mask: (batch, n + cached), 1 = token, 0 = padding, on whichever side.
        vision_patches: (P, 3 * patch_px**2), flat over the batch; uint8, or floating and then normalised already.
        vision_patch_indices: (batch, n), -1 or the row of vision_patches that belongs to this token.
        labels: (batch, n), -100 = none. Rows are one document each; documents end to end are a `Pack`, for
        `pack_losses`.
        """
        use_cache = use_cache if use_cache is not None else self.config.use_cache and not self.training
        cache = (past_key_values if past_key_values is not None else DynamicCache()) if use_cache else None
        n_before = cache.get_seq_length() if cache is not None else 0
        batch, n = input_ids.shape
        if attention_mask is None:
            attention_mask = input_ids.new_ones(batch, n_before + n)
        if attention_mask.shape != (batch, n_before + n):
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}, but {batch} rows have {n_before} cached and {n} new "
                "tokens; give one number for each"
            )
        real = attention_mask.to(input_ids.device).bool()
        if position_ids is None:
            position_ids = (real.cumsum(1) - 1).clamp(min=0)[:, n_before:]
        x = self._embedded(input_ids, vision_patches, vision_patch_indices)
        hidden = self.model(x, position_ids, batch_mask(real, n, self.config.sliding_window), cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None if labels is None else _shifted_loss(logits, labels, num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def _embedded(self, input_ids: Tensor, patches: Tensor | None, indices: Tensor | None) -> Tensor:
        """(batch, n, d), after a check that each patch has a place to be and the other way round."""
        device = input_ids.device
        where = torch.zeros(0, dtype=torch.int64, device=device)
        if patches is None:
            patches = torch.zeros(0, 3 * self.config.patch_px**2, dtype=torch.uint8)
        if indices is not None:
            if indices.shape != input_ids.shape:
                raise ValueError(
                    f"vision_patch_indices is {tuple(indices.shape)} and input_ids {tuple(input_ids.shape)}; give -1 "
                    "for a token without a patch"
                )
            flat = indices.flatten()
            where = (flat >= 0).nonzero()[:, 0]
            if len(where) and int(flat.max()) >= len(patches):
                raise ValueError(
                    f"vision_patch_indices names patch {int(flat.max())}, vision_patches has {len(patches)}; the "
                    "numbering is flat over the batch"
                )
            patches = patches[flat[where].to(patches.device)]
        elif len(patches):
            raise ValueError(f"{len(patches)} vision_patches but no vision_patch_indices; give both")
        x: Tensor = self.model.embed(input_ids.flatten(), patches.to(device), where)
        return x.view(*input_ids.shape, -1)

    def generate(self, *args: Any, **kwargs: Any) -> Tensor | ModelOutput:  # type: ignore[override]
        """Transformers' `generate`; SOLO's own ids are suppressed and padding is EOS unless told otherwise."""
        own = kwargs.get("generation_config") or self.generation_config
        if own.suppress_tokens is None:
            kwargs.setdefault("suppress_tokens", list(range(self.config.n_text_ids, self.config.vocab_size)))
        if own.pad_token_id is None:
            eos = own.eos_token_id if own.eos_token_id is not None else self.config.eos_token_id
            kwargs.setdefault("pad_token_id", eos[0] if isinstance(eos, list) else eos)
        return cast(Tensor | ModelOutput, super().generate(*args, **kwargs))  # type: ignore[misc]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: transformers' own for a sliding window keeps one token less than SOLO sees; `forward` makes it."""
        return False

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, **kwargs: Any
    ) -> dict[str, Any]:
        """Of a row only what is not cached yet; patches belong to the prompt."""
        cache = kwargs.get("past_key_values")
        n_before = cache.get_seq_length() if cache is not None else 0
        indices = kwargs.get("vision_patch_indices")
        if indices is not None:
            added = input_ids.shape[1] - indices.shape[1]
            indices = F.pad(indices, (0, added), value=-1)[:, n_before:]
        patches = kwargs.get("vision_patches")
        if indices is not None and n_before and not bool((indices >= 0).any()):
            indices = patches = None
        return {
            "input_ids": input_ids[:, n_before:],
            "attention_mask": kwargs.get("attention_mask"),
            "vision_patches": patches,
            "vision_patch_indices": indices,
            "past_key_values": cache,
            "use_cache": kwargs.get("use_cache"),
            "logits_to_keep": kwargs.get("logits_to_keep", 1),
        }

    def _expand_inputs_for_generation(  # type: ignore[override]
        self, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Rows are repeated for beams and samples; patches are not rows, and the repeated rows still name them."""
        patches = kwargs.pop("vision_patches", None)
        input_ids, expanded = super()._expand_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        return input_ids, expanded | ({} if patches is None else {"vision_patches": patches})

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Compute every layer again in the backward pass."""
        self.model.recompute_layers = self.config.num_hidden_layers

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations."""
        self.model.recompute_layers = 0


def let_lengths_vary(*tensors: Tensor) -> None:
    """Tell the compiler that these lengths differ from call to call, 0 and 1 among them: one graph for all packs.

    Merely dynamic lengths would still cost a graph for a pack without patches and one with a single target.
    """
    for tensor in tensors:
        torch._dynamo.decorators.mark_unbacked(tensor, 0)


def _shifted_loss(logits: Tensor, labels: Tensor, n_items: Tensor | int | None) -> Tensor:
    """Mean over supervised tokens, or their sum over `n_items` where a trainer accumulates."""
    measure = partial(F.cross_entropy, logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
    if n_items is None:
        return measure(ignore_index=NO_TARGET)
    return measure(ignore_index=NO_TARGET, reduction="sum") / n_items


AutoConfig.register("solo", SoloConfig, exist_ok=True)
AutoModelForCausalLM.register(SoloConfig, SoloForCausalLM, exist_ok=True)
AutoProcessor.register(SoloConfig, SoloProcessor, exist_ok=True)  # type: ignore[no-untyped-call]
