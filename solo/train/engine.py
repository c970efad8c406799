"""Engine: a model under DeepSpeed as one rank drives it, the same for a stage and for its bench.

In: a module that maps a pack to the cross entropies of its supervised tokens, a stage, a DeepSpeed configuration. Out:
DeepSpeed's engine; the rate of each step. Invariant: nothing here knows where packs come from or where weights go.
Cost: DeepSpeed's start, two seconds.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from torch import Tensor, nn

from solo.model.causal_lm import SoloForCausalLM
from solo.sequence.loader import Pack
from solo.spec import Stage
from solo.train import groups, launch, roll_call
from solo.train.watch import GONE

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h


class PackLoss(nn.Module):
    """What DeepSpeed wraps: engines call `forward`, and the model's own is Hugging Face's."""

    def __init__(self, solo: SoloForCausalLM) -> None:
        super().__init__()
        self.solo = solo

    def forward(self, pack: Pack) -> Tensor:
        """(n_supervised,) cross entropies."""
        return self.solo.pack_losses(pack)


def start(module: nn.Module, stage: Stage, config: dict[str, Any]) -> Any:  # noqa: ANN401 - DeepSpeed is not typed
    """DeepSpeed's engine around a module; a collective call."""
    adam = optimizer(module, stage)
    if not config["zero_optimization"]["stage"]:
        own_norm(adam, stage.clip_norm)
    gc.freeze()  # DeepSpeed collects garbage six times here, each time through all that was imported: 1.3 s
    made = deepspeed.initialize(model=module, optimizer=adam, config=config, dist_init_required=False)
    gc.unfreeze()
    _share_host_memory(made[0].optimizer)
    _sum_at_once(made[0].optimizer)
    return made[0]


def own_norm(adam: Any, clip_norm: float) -> None:  # noqa: ANN401
    """Without ZeRO, let the optimizer clip, know its gradient's norm, and skip an update that is not finite.

    DeepSpeed does the three elsewhere; here it clips alone. It reads both attributes after a step.
    """
    update = adam.step
    parameters = [p for group in adam.param_groups for p in group["params"]]

    def step(*args: Any) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        # In fp64: a sum of a million squares in fp32 loses 1e-4 on a CPU.
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        adam._global_grad_norm, adam.overflow = norm, not math.isfinite(norm)
        if adam.overflow:
            return
        if clip_norm and norm > clip_norm:
            torch._foreach_mul_(gradients, clip_norm / (norm + 1e-6))
        update(*args)

    adam.step = step


def _share_host_memory(zero: Any) -> None:  # noqa: ANN401
    """Under offload, let the new bf16 weights lie where the gradients were, which nobody reads after the update.

    DeepSpeed keeps 18 bytes a parameter on the host, 122 GiB for 7B where machines with one GPU have 128; so it is 16.
    """
    buffers = getattr(zero, "param_buffer_of_bit16_for_cpu_offload_groups", [])
    for i, buffer in enumerate(buffers):
        gradient = zero.single_partition_of_fp32_groups[i].grad
        buffers[i] = gradient.view(buffer.dtype)[: buffer.numel()]


def _sum_at_once(zero: Any) -> None:  # noqa: ANN401
    """Where DeepSpeed sums bf16 gradients in fp32, let one kernel add each, and give it back at once; the same bits.

    Its own way keeps them, as zeros, through the next pack's forward pass (2 bytes a parameter, 3.8 GiB of the 8-layer
    slice when its activations need them), adds the next pack's to those, widens the sum into new memory and adds that:
    26 bytes a parameter are moved where 10 do, 17 ms a pack of 2.03 G parameters on an H100 instead of 7. The sum is
    cleared twice a step, where the first pack's gradient may lie over what was there: 24 bytes, 8 ms a step.
    """
    if not hasattr(zero, "_update_hp_grad"):
        return
    update, filled = zero.step, zero.fp32_groups_has_gradients

    def add(parameter: Tensor, group: int, place: int, clear_lp_grads: bool) -> None:
        if parameter.grad is None:
            return
        total = zero.fp32_groups_gradients[group][place]
        vars(parameter)["_hp_grad"] = total
        put = total.add_ if filled[group][place] else total.copy_
        put(parameter.grad.view(total.shape))
        filled[group][place] = True
        parameter.grad = None

    def step(*args: Any) -> None:
        for totals, have in zip(zero.fp32_groups_gradients, filled, strict=True):
            for total, has in zip(totals, have, strict=True):
                if not has:
                    total.zero_()
        update(*args)

    def clear() -> None:
        filled[:] = [[False] * len(have) for have in filled]

    zero._update_hp_grad, zero.step, zero.clear_hp_grads = add, step, clear


@contextmanager
def accumulation(made: Any, n_packs: int) -> Iterator[tuple[float, Callable[[], None]]]:  # noqa: ANN401
    """One optimizer step of `n_packs`: what a loss is multiplied with before `backward`, what is called after it.

    An engine that was told of fewer micro-steps than packs sums their gradients where they arise and reduces once, at
    the end: under offload its own way would fetch and return 4 bytes a parameter for each pack, 58 GB for 7B.
    """
    n_told = made.gradient_accumulation_steps()
    if n_told == n_packs:
        yield 1.0, made.step
        return
    assert n_told == 1
    with made.coalesce_grad_reduction():
        yield 1.0 / n_packs, lambda: None
    made.step()


def optimizer(module: nn.Module, stage: Stage) -> torch.optim.AdamW:
    """AdamW over what the stage trains."""
    given = groups.of_optimizer(module, stage)
    # Fused: one pass over the weights instead of ten, 3 ms instead of 12 for a step of the smallest model on a CPU.
    return torch.optim.AdamW(given, lr=stage.learning_rate, betas=stage.betas, eps=stage.eps, fused=True)


def learning_rate(step: int, stage: Stage, n_steps: int) -> float:
    """Rate of optimizer step 1 ... n_steps: linear warm-up to the peak, then cosine or linear to the minimum.

    The peak is reached at step `warmup_steps` and the minimum at the last step, so no step has rate 0 by warm-up.
    """
    assert 1 <= step <= n_steps
    if step <= stage.warmup_steps:
        return stage.learning_rate * step / stage.warmup_steps
    done = (step - stage.warmup_steps) / (n_steps - stage.warmup_steps)
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if stage.schedule == "cosine" else 1.0 - done
    return stage.min_learning_rate + (stage.learning_rate - stage.min_learning_rate) * left


def set_rate(made: Any, step: int, stage: Stage, n_steps: int) -> None:  # noqa: ANN401
    """The rate of a step, in each group its share of it."""
    for group in made.optimizer.param_groups:
        group["lr"] = learning_rate(step, stage, n_steps) * group.get(groups.SHARE, 1.0)


def connect(device: str) -> None:
    """Join the other ranks; a collective that they do not all reach within $SOLO_TIMEOUT_S is an error."""
    limit = timedelta(seconds=launch.timeout_s())
    # DeepSpeed trains in a group of its own, made without a limit: torch would give it 10 or 30 minutes.
    vars(dist.distributed_c10d).update(default_pg_timeout=limit, default_pg_nccl_timeout=limit)
    if device == "cpu":
        _keep_memory()
        # DeepSpeed would build a shared-memory all-reduce with g++ here. That takes 25 s and a compiler, and a SIGKILL
        # during the build leaves a lock file behind for which every later run waits for ever. Gloo gives the same sums.
        vars(deepspeed.ops)["__compatible_ops__"] = {"deepspeed_shm_comm": False}
        deepspeed.init_distributed("gloo", timeout=limit, verbose=False)
        return
    if not torch.cuda.is_available():
        raise RuntimeError("this torch sees no GPU although the machine has one; set CUDA_VISIBLE_DEVICES= for CPU")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed("nccl", timeout=limit, verbose=False)


def explained(error: Exception) -> str:
    """An error of a rank in one line; one of a collective says what it means."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, RuntimeError):
        if "imed out" in line or "timeout" in line.lower():
            absent = roll_call.absent(roll_call.PATIENCE_S["stuck"])
            who = roll_call.named(absent) if absent else "one"
            limit = f"a collective was not reached by every rank within {launch.timeout_s():.0f} s"
            return f"{limit}, {who} {'are' if len(absent) > 1 else 'is'} stuck ({line})"
        if "onnection closed by peer" in line or "onnection reset by peer" in line:
            absent = roll_call.absent(roll_call.PATIENCE_S["gone"])
            return f"{GONE}{': ' + roll_call.named(absent) if absent else ''} ({line})"
    return line


def _keep_memory() -> None:
    """Let glibc keep what is freed: it gave tensors of 32 MB back to the kernel, which cleared them for each step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # absent from other C libraries
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**28)
