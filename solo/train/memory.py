"""Memory: what a stage needs of a GPU and of the host, and how many layers must be computed twice for it to fit.

In: the shape of a model, a pack's tokens, a DeepSpeed configuration, a machine. Out: bytes at the three moments that
can be the highest (end of forward, end of backward, update), and the least recomputing that fits: none, then what the
backward pass writes as it reads (`lean`), then as few layers as need be.
Invariant: arithmetic alone, so a plan needs no GPU; what it chooses changes no number that is trained. Cost: none.

Per parameter under bf16: 2 bytes of weight, 2 or 4 of summed gradient, 12 / ranks of fp32 master weight and AdamW
moments. Per token and layer what the compiled backward pass reads: see `kept`, which is what torch 2.11's partitioner
keeps of the graph. Against the measured rows of one H100
(8 layers of 4,096, one pack of 32,768) it is within 5 %: tests/test_memory.py has the table.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from solo.objective import GroupName
from solo.spec import ModelSpec, RecipeSpec, Stage

GIB = 2**30
Policy = Literal["none", "lean", "selective", "full"]

USABLE = 0.94  # of a GPU: what its allocator loses between blocks of a gigabyte
CONTEXT_BYTES = GIB  # CUDA, cuBLAS and NCCL before the first tensor
LOGIT_BYTES = {True: 4, False: 6}  # compiled: a bf16 logit and its gradient; else its fp32 copy; Hugging Face takes 10
HOST_BYTES = 16  # per parameter under offload: master weight, two moments, gradient, all fp32; not pinned
HOST_USABLE = 0.95  # pinned memory would be rounded up to powers of two: 134 GiB for 7B
PARTS_OF = {"projection": ("projection",), "embeddings": ("embedding", "head"), "backbone": ("layers", "norm")}


# GiB of a GPU as CUDA reports them; the H100 is measured, the others are its share of their data sheets.
KINDS = {"a100-40": 39.4, "a100": 79.1, "h100": 79.1, "h200": 139.8}
MACHINE = re.compile(r"(?:(\d+)x)?(\d+)x([a-z][a-z0-9-]*|[\d.]+)(?:\+([\d.]+))?", re.IGNORECASE)


@dataclass(frozen=True)
class Machine:
    """Where a stage would run: GPUs of one kind, shared by hosts of one kind."""

    gpu_bytes: int
    n_gpus: int = 1
    host_bytes: int | None = None  # of each host
    n_hosts: int = 1

    @property
    def budget(self) -> int:
        """What tensors may take of a GPU."""
        return int(USABLE * self.gpu_bytes) - CONTEXT_BYTES

    @classmethod
    def parse(cls, text: str) -> Machine:
        """`[HOSTSx]GPUSxGPU[+HOST_GIB]`: GPUS of each host, GPU a kind or its GiB, HOST_GIB the memory of each host."""
        found = MACHINE.fullmatch(text)
        gpu = found and (KINDS.get(found[3].lower()) or _number(found[3]))
        if not found or not gpu or not int(found[2]) or found[1] == "0":
            raise ValueError(
                f"machine is {text!r}; give [HOSTSx]GPUSxGPU[+GIB], GPU being GiB or one of {', '.join(KINDS)}: 8x80, "
                "8xh100, 2x8xh100+1024 (two hosts of 1,024 GiB with 8 GPUs each)"
            )
        hosts = int(found[1] or 1)
        host = _number(found[4]) if found[4] else None
        return cls(int(gpu * GIB), hosts * int(found[2]), int(host * GIB) if host else None, hosts)

    @classmethod
    def from_env(cls) -> Machine | None:
        """$SOLO_GPU_GIB, $SOLO_HOST_GIB, $SOLO_RANKS of each of $SOLO_HOSTS; None where no GPU's memory is told."""
        gpu, host = (os.environ.get(name) for name in ("SOLO_GPU_GIB", "SOLO_HOST_GIB"))
        if gpu is None:
            return None
        ranks, hosts = (int(os.environ.get(name, "1")) for name in ("SOLO_RANKS", "SOLO_HOSTS"))
        return cls(
            _gib("SOLO_GPU_GIB", gpu), ranks * hosts, None if host is None else _gib("SOLO_HOST_GIB", host), hosts
        )

    @classmethod
    def here(cls, n_gpus: int, n_hosts: int) -> Machine | None:
        """These GPUs, each as small as the smallest that `nvidia-smi` tells of; None where there is no such program."""
        command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        try:
            told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
            smallest = min(int(mib) for mib in told) * 2**20
        except (OSError, ValueError, subprocess.SubprocessError):
            return None
        return cls(smallest, n_gpus, host_bytes(), n_hosts)


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
    lean: bool  # whether the other layers keep only what is dear to compute
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
        """In GiB, for people; `recompute_layers` is a number of layers, `lean` yes or no."""
        whole = {"peak": self.peak, "forward": self.forward, **asdict(self)}
        return {name: n if name in ("recompute_layers", "lean") else round(n / GIB, 2) for name, n in whole.items()}


def host_bytes() -> int:
    """Memory of this host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def policy() -> Policy:
    """$SOLO_RECOMPUTE: what is computed twice; a setting of the machine, as the numbers are the same."""
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


def kept(model: ModelSpec, *, compiled: bool, lean: bool = False) -> int:
    """Numbers that one layer keeps of one token for its backward pass.

    Compiled: gate, up and their product; queries, keys, values and what attention gathers; the two sums and two norms.
    Lean, the product and the norms are made again by kernels that read what they are made of anyway: at 4,096 wide 1.4
    of 4.25 GiB for a pack of 32,768, for 1.5 GB more written (half a millisecond of an H100, where the layer takes 75).
    Eager code keeps the activated gate and the transposed copy of what attention gathered as well.
    """
    d, wide, narrow = _widths(model)
    if compiled:
        return (2 if lean else 3) * model.intermediate_size + 2 * wide + 2 * narrow + (2 if lean else 4) * d
    return 4 * model.intermediate_size + 3 * wide + 2 * narrow + 4 * d


def is_compiled(config: Mapping[str, Any]) -> bool:
    """Whether a GPU runs the loss as one compiled graph whose activations `kept` counts."""
    return bool(config.get("bf16", {}).get("enabled")) and int(config["zero_optimization"]["stage"]) < 3


def predict(  # noqa: PLR0913 (the pack's numbers)
    model: ModelSpec,
    config: Mapping[str, Any],
    *,
    patch_px: int,
    n_tokens: int,
    n_targets: int | None = None,
    recompute_layers: int = 0,
    lean: bool = False,
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
    stage = int(zero["stage"])
    weights, gradients = width * n, summed * learns // (n_gpus if stage > 1 else 1)
    if stage == 3:  # a share of its own, and what is gathered of the others' while it is used
        weights = width * (n // n_gpus + min(n, int(zero.get("stage3_max_live_parameters", 1e9))))
    # Without ZeRO the fp32 weights themselves are updated, so there are the moments alone.
    states = 0 if offload else 12 * learns // n_gpus if stage else 8 * learns
    buckets = 4 * int(zero.get("reduce_bucket_size", 5e8)) * (2 if zero.get("overlap_comm") else 1)
    buckets = min(buckets, 8 * learns)
    layer = width * kept(model, compiled=is_compiled(config), lean=lean) * n_tokens
    n_kept = model.num_hidden_layers - recompute_layers
    activations = n_kept * layer + recompute_layers * width * model.hidden_size * n_tokens
    fixed = weights + gradients + states
    return Use(
        weights=weights,
        gradients=gradients,
        states=states,
        buckets=buckets,
        activations=activations + (3 * patch_px**2 + 2 * model.hidden_size) * width * n_tokens,  # pixels, last norm
        head=LOGIT_BYTES[is_compiled(config)]
        * model.vocab_size
        * (n_tokens if n_targets is None else n_targets)
        * width
        // 2,
        backward=fixed + buckets + layer + (width * learns if summed != width else 0),
        update=fixed + (0 if offload else (summed + 4) * learns // n_gpus),
        recompute_layers=recompute_layers,
        lean=lean,
        host=HOST_BYTES * learns // n_gpus if offload else 0,
    )


def choose(
    what: str, model: ModelSpec, config: Mapping[str, Any], machine: Machine, *, asked: Policy, **pack: Any
) -> Use:
    """The use with the least recomputed that fits, or the policy's; an error where none does."""
    layers, lean = model.num_hidden_layers, is_compiled(config)
    tried = {"none": [(0, False)], "lean": [(0, lean)], "full": [(layers, False)]}.get(asked)
    tried = tried or [(0, False), *((n, lean) for n in range(0 if lean else 1, layers + 1))]
    uses = [predict(model, config, recompute_layers=n, lean=k, n_gpus=machine.n_gpus, **pack) for n, k in tried]
    use = next((use for use in uses if use.peak <= machine.budget), uses[-1])
    if use.peak > machine.budget:
        fixed = use.weights + use.gradients + use.states + use.buckets
        raise ValueError(
            f"{what}: peak memory of a GPU is predicted as {use.peak / GIB:.1f} GiB (weights, gradients and optimizer "
            f"{fixed / GIB:.1f}, activations {use.activations / GIB:.1f}, head {use.head / GIB:.1f}) with "
            f"{use.recompute_layers} of {layers} layers recomputed > {machine.budget / GIB:.1f} usable of "
            f"{machine.gpu_bytes / GIB:.1f} on each of {machine.n_gpus}; {_remedy(asked, config, machine)}"
        )
    of_host = use.host * machine.n_gpus // machine.n_hosts
    if machine.host_bytes is not None and of_host > (usable := HOST_USABLE * machine.host_bytes):
        raise ValueError(
            f"{what}: the optimizer's {of_host / GIB:.1f} GiB > {usable / GIB:.1f} usable of "
            f"the host's {machine.host_bytes / GIB:.1f}; use more memory or a DeepSpeed file without offload_optimizer"
        )
    return use


def of_recipe(recipe: RecipeSpec, machine: Machine) -> dict[str, Use]:
    """What each stage would take of this machine, every token of a pack supervised; an error where one cannot fit."""
    return {s.name: of_stage(s, recipe.model, machine, patch_px=recipe.tokens.patch_px) for s in recipe.stages}


def of_stage(stage: Stage, model: ModelSpec, machine: Machine, *, patch_px: int, n_targets: int | None = None) -> Use:
    """What one stage would take, `n_targets` being the most that a pack supervises; an error where it cannot fit."""
    from solo.train import part as train

    config = train.deepspeed_config(train.deepspeed_file("cuda"), stage, machine.n_gpus)
    pack = {"patch_px": patch_px, "n_tokens": stage.pack_tokens, "n_targets": n_targets}
    what, frozen = f"train/{stage.name}", frozen_groups(stage)
    return choose(what, model, config, machine, asked=policy(), frozen=frozen, **pack)


def lines(uses: Mapping[str, Use], machine: Machine) -> list[str]:
    """One line for each stage."""
    names = ("weights", "gradients", "states", "activations", "head")
    return [
        f"train/{name}: {use.peak / GIB:.2f} of {machine.budget / GIB:.1f} GiB of each GPU ("
        + ", ".join(f"{part} {getattr(use, part) / GIB:.2f}" for part in names)
        + f"), {use.recompute_layers} layers recomputed"
        + (", lean" if use.lean else "")
        + (f", {use.host * machine.n_gpus / machine.n_hosts / GIB:.1f} GiB of each host" if use.host else "")
        for name, use in uses.items()
    ]


def _remedy(asked: Policy, config: Mapping[str, Any], machine: Machine) -> str:
    """What is left to try, the cheapest first."""
    zero = config["zero_optimization"]
    if asked in ("none", "lean"):
        return "unset SOLO_RECOMPUTE, so that layers may be recomputed"
    left = ["use more GPUs", "a smaller pack_tokens"]
    if "offload_optimizer" not in zero:
        if machine.n_gpus > 1 and zero["stage"] < 3:
            left.insert(0, "set SOLO_DEEPSPEED=infra/deepspeed/zero3.json")
        left.append("SOLO_DEEPSPEED=infra/deepspeed/offload.json")
    return ", ".join(left[:-1]) + f" or {left[-1]}"


def _head_dim(model: ModelSpec) -> int:
    return model.head_dim or model.hidden_size // model.num_attention_heads


def _widths(model: ModelSpec) -> tuple[int, int, int]:
    """Of the residual stream, the queries, the keys."""
    size = _head_dim(model)
    return model.hidden_size, model.num_attention_heads * size, model.num_key_value_heads * size


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _gib(name: str, value: str) -> int:
    found = _number(value)
    if not found > 0:
        raise ValueError(f"{name} is {value!r}; give a number of GiB above 0")
    return int(found * GIB)
