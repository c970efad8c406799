"""Memory: what a stage needs of a GPU and of the host, and how many layers must be computed twice for it to fit.

In: the shape of a model, a pack's tokens, a DeepSpeed configuration, a machine. Out: bytes at the three moments that
can be the highest (end of forward, end of backward, update), and the smallest number of recomputed layers that fits.
Invariant: arithmetic alone, so a plan needs no GPU; what it chooses changes no number that is trained. Cost: none.

Per parameter under bf16: 2 bytes of weight, 2 or 4 of summed gradient, 12 / ranks of fp32 master weight and AdamW
moments. Per token and layer what the compiled backward pass reads: see `kept`. Against the measured rows of one H100
(8 layers of 4,096, one pack of 32,768) it is within 5 %: tests/test_memory.py has the table.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from solo.objective import GroupName
from solo.spec import ModelSpec, RecipeSpec, Stage

GIB = 2**30
Policy = Literal["none", "selective", "full"]

USABLE = 0.94  # of a GPU: what its allocator loses between blocks of a gigabyte
CONTEXT_BYTES = GIB  # CUDA, cuBLAS and NCCL before the first tensor
LOGIT_BYTES = 6  # a bf16 logit and its fp32 copy; eager Hugging Face takes 10
HOST_BYTES = 16  # per parameter under offload: master weight, two moments, gradient, all fp32; not pinned
HOST_USABLE = 0.95  # pinned memory would be rounded up to powers of two: 134 GiB for 7B
PARTS_OF = {"projection": ("projection",), "embeddings": ("embedding", "head"), "backbone": ("layers", "norm")}


@dataclass(frozen=True)
class Machine:
    """Where a stage would run."""

    gpu_bytes: int
    n_gpus: int = 1
    host_bytes: int | None = None

    @property
    def budget(self) -> int:
        """What tensors may take of a GPU."""
        return int(USABLE * self.gpu_bytes) - CONTEXT_BYTES

    @classmethod
    def from_env(cls) -> Machine | None:
        """$SOLO_GPU_GIB, $SOLO_RANKS and $SOLO_HOST_GIB; None where no GPU's memory is told."""
        gpu, host = (os.environ.get(name) for name in ("SOLO_GPU_GIB", "SOLO_HOST_GIB"))
        if gpu is None:
            return None
        ranks = int(os.environ.get("SOLO_RANKS", "1"))
        return cls(_gib("SOLO_GPU_GIB", gpu), ranks, None if host is None else _gib("SOLO_HOST_GIB", host))


@dataclass(frozen=True)
class Use:
    """Bytes of one GPU, and of the host for each rank."""

    weights: int
    gradients: int
    states: int
    buckets: int
    activations: int
    head: int
    backward: int  # the whole at the end of the backward pass
    update: int  # the whole in the optimizer's step
    recompute_layers: int
    host: int

    @property
    def forward(self) -> int:
        """The whole at the end of the forward pass, where activations are the most."""
        return self.weights + self.gradients + self.states + self.buckets + self.activations + self.head

    @property
    def peak(self) -> int:
        """The highest of the three moments."""
        return max(self.forward, self.backward, self.update)

    def gib(self) -> dict[str, float]:
        """In GiB, for people; `recompute_layers` is a number of layers."""
        whole = {"peak": self.peak, "forward": self.forward, **asdict(self)}
        return {name: round(n / GIB, 2) if name != "recompute_layers" else n for name, n in whole.items()}


def policy() -> Policy:
    """$SOLO_RECOMPUTE: which layers keep no activations; a setting of the machine, as the numbers are the same."""
    asked = os.environ.get("SOLO_RECOMPUTE", "selective")
    for known in get_args(Policy):
        if asked == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(f"SOLO_RECOMPUTE: {asked!r} is not known; choose one of {', '.join(get_args(Policy))}")


def n_parameters(model: ModelSpec, patch_px: int) -> dict[str, int]:
    """Parameters by the part of the model they are in; `layers` is all layers together."""
    d, wide, narrow = _widths(model)
    attention = d * (wide + 2 * narrow) + wide * d
    attention += (wide + 2 * narrow) * model.qkv_bias + 2 * _head_dim(model) * model.qk_norm
    layer = attention + 3 * d * model.intermediate_size + 2 * d
    head = 0 if model.tie_word_embeddings else model.vocab_size * d
    return {
        "embedding": model.vocab_size * d,
        "projection": 3 * patch_px**2 * d,
        "layers": model.num_hidden_layers * layer,
        "head": head,
        "norm": d,
    }


def frozen_groups(stage: Stage) -> frozenset[GroupName]:
    """The groups that a stage does not train."""
    return frozenset(name for name, group in (stage.groups or {}).items() if group.frozen)


def kept(model: ModelSpec, *, compiled: bool) -> int:
    """Numbers that one layer keeps of one token for its backward pass.

    Compiled: gate, up and their product; queries, keys, values and what attention gathers; the two sums and one norm.
    Eager code keeps the activated gate and the transposed copy of what attention gathered as well, and both norms.
    """
    d, wide, narrow = _widths(model)
    if compiled:
        return 3 * model.intermediate_size + 2 * wide + 2 * narrow + 3 * d
    return 4 * model.intermediate_size + 3 * wide + 2 * narrow + 4 * d


def predict(  # noqa: PLR0913 (the pack's numbers)
    model: ModelSpec,
    config: Mapping[str, Any],
    *,
    patch_px: int,
    n_tokens: int,
    n_targets: int | None = None,
    recompute_layers: int = 0,
    n_gpus: int = 1,
    frozen: Collection[str] = (),
) -> Use:
    """What one pack of `n_tokens`, `n_targets` of them supervised (all if not told), takes of each GPU."""
    counts = n_parameters(model, patch_px)
    n = sum(counts.values())
    learns = n - sum(counts[part] for group in frozen for part in PARTS_OF[group])  # has gradients and states
    bf16 = bool(config.get("bf16", {}).get("enabled"))
    width = 2 if bf16 else 4
    summed = 4 if config.get("data_types", {}).get("grad_accum_dtype") == "fp32" else width
    zero = config["zero_optimization"]
    offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    share = n_gpus if zero["stage"] == 2 else 1
    weights, gradients = width * n, summed * learns // share
    states = 0 if offload else 12 * learns // n_gpus
    buckets = 4 * int(zero.get("reduce_bucket_size", 5e8)) * (2 if zero.get("overlap_comm") else 1)
    buckets = min(buckets, 8 * learns)
    layer = width * kept(model, compiled=bf16) * n_tokens
    n_kept = model.num_hidden_layers - recompute_layers
    activations = n_kept * layer + recompute_layers * width * model.hidden_size * n_tokens
    fixed = weights + gradients + states
    return Use(
        weights=weights,
        gradients=gradients,
        states=states,
        buckets=buckets,
        activations=activations + (3 * patch_px**2 + 2 * model.hidden_size) * width * n_tokens,  # pixels, last norm
        head=LOGIT_BYTES * model.vocab_size * (n_tokens if n_targets is None else n_targets) * width // 2,
        backward=fixed + buckets + layer + (width * learns if summed != width else 0),
        update=fixed + (0 if offload else (summed + 4) * learns // n_gpus),
        recompute_layers=recompute_layers,
        host=HOST_BYTES * learns // n_gpus if offload else 0,
    )


def choose(
    what: str, model: ModelSpec, config: Mapping[str, Any], machine: Machine, *, asked: Policy, **pack: Any
) -> Use:
    """The use with the fewest recomputed layers that fits, or the policy's; an error where none does."""
    layers = model.num_hidden_layers
    tried = {"none": [0], "full": [layers], "selective": range(layers + 1)}[asked]
    uses = [predict(model, config, recompute_layers=n, n_gpus=machine.n_gpus, **pack) for n in tried]
    use = next((use for use in uses if use.peak <= machine.budget), uses[-1])
    if use.peak > machine.budget:
        fixed = use.weights + use.gradients + use.states + use.buckets
        raise ValueError(
            f"{what}: peak memory of a GPU is predicted as {use.peak / GIB:.1f} GiB (weights, gradients and optimizer "
            f"{fixed / GIB:.1f}, activations {use.activations / GIB:.1f}, head {use.head / GIB:.1f}) with "
            f"{use.recompute_layers} of {layers} layers recomputed > {machine.budget / GIB:.1f} usable of "
            f"{machine.gpu_bytes / GIB:.1f}; {_remedy(asked, config)}"
        )
    if machine.host_bytes is not None and use.host * machine.n_gpus > (usable := HOST_USABLE * machine.host_bytes):
        raise ValueError(
            f"{what}: the optimizer's {use.host * machine.n_gpus / GIB:.1f} GiB > {usable / GIB:.1f} usable of "
            f"the host's {machine.host_bytes / GIB:.1f}; use more memory or a DeepSpeed file without offload_optimizer"
        )
    return use


def of_recipe(recipe: RecipeSpec, machine: Machine) -> dict[str, Use]:
    """What each stage would take of this machine, every token of a pack supervised; an error where one cannot fit."""
    from solo import train

    path = train.deepspeed_file("cuda")
    pack = {"patch_px": recipe.tokens.patch_px, "n_targets": None}
    return {
        s.name: choose(
            f"train/{s.name}",
            recipe.model,
            train.deepspeed_config(path, s, machine.n_gpus),
            machine,
            asked=policy(),
            n_tokens=s.pack_tokens,
            frozen=frozen_groups(s),
            **pack,
        )
        for s in recipe.stages
    }


def lines(uses: Mapping[str, Use], machine: Machine) -> list[str]:
    """One line for each stage."""
    names = ("weights", "gradients", "states", "activations", "head")
    return [
        f"train/{name}: {use.peak / GIB:.2f} of {machine.budget / GIB:.1f} GiB of each GPU ("
        + ", ".join(f"{part} {getattr(use, part) / GIB:.2f}" for part in names)
        + f"), {use.recompute_layers} layers recomputed"
        + (f", {use.host * machine.n_gpus / GIB:.1f} GiB of the host" if use.host else "")
        for name, use in uses.items()
    ]


def _remedy(asked: Policy, config: Mapping[str, Any]) -> str:
    if asked == "none":
        return "unset SOLO_RECOMPUTE, so that layers may be recomputed"
    if "offload_optimizer" in config["zero_optimization"]:
        return "use more GPUs or a smaller pack_tokens"
    return "use more GPUs, a smaller pack_tokens, or SOLO_DEEPSPEED=infra/deepspeed/offload.json"


def _head_dim(model: ModelSpec) -> int:
    return model.head_dim or model.hidden_size // model.num_attention_heads


def _widths(model: ModelSpec) -> tuple[int, int, int]:
    """Of the residual stream, the queries, the keys."""
    size = _head_dim(model)
    return model.hidden_size, model.num_attention_heads * size, model.num_key_value_heads * size


def _gib(name: str, value: str) -> int:
    try:
        found = float(value)
    except ValueError:
        found = 0.0
    if not found > 0:
        raise ValueError(f"{name} is {value!r}; give a number of GiB above 0")
    return int(found * GIB)
