"""FP8: the layers' matrix products in 8-bit floats, by torchao; weights, norms, attention and head stay bf16.

In: a model on its way into a stage of `precision: fp8`. Out: the same model with other linear layers, under the same
names. Invariants: off unless the recipe asks, as it changes the result; a machine that cannot is told before it starts.
Cost: each product scales its inputs by their largest value (dynamic, one scale a tensor).

The projection of patches and the head have as many rows as a pack has patches and labels; an FP8 product wants whole
sixteens, so those two are left as they are.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from solo.spec import Stage

if TYPE_CHECKING:
    from torch import nn

    from solo.model.causal_lm import SoloForCausalLM

LEAST = (8, 9)  # compute capability of the first GPUs with FP8 products
WHOLE = 16  # what the sizes of a product's matrices must be multiples of


def check_machine(stage: Stage, n_gpus: int) -> None:
    """Refuse what is clear without loading torch."""
    if stage.precision != "fp8":
        return
    if not n_gpus:
        raise ValueError(f"{stage.name}: precision is fp8, which needs a GPU and none is visible; use bf16 or fp32")
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(f"{stage.name}: precision is fp8, which needs torchao; pip install '.[fp8]', or use bf16")


def check_gpu(stage: str) -> None:
    """Refuse a GPU without FP8 products."""
    import torch

    have = torch.cuda.get_device_capability()
    if have < LEAST:
        raise ValueError(
            f"{stage}: precision is fp8, which needs compute capability {LEAST[0]}.{LEAST[1]} (H100, H200, L40S, ...); "
            f"{torch.cuda.get_device_name()} has {have[0]}.{have[1]}; use bf16"
        )


def convert(model: SoloForCausalLM, *, emulate: bool = False) -> None:
    """Make the layers' linear ones FP8, in place; `emulate` rounds as FP8 does where the hardware has none."""
    from torch.nn import Linear
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    odd = {
        f"{name} {tuple(module.weight.shape)}"
        for name, module in model.model.layers.named_modules()
        if isinstance(module, Linear) and any(n % WHOLE for n in module.weight.shape)
    }
    if odd:
        raise ValueError(f"precision is fp8, which needs sizes in multiples of {WHOLE}: {sorted(odd)[0]}; use bf16")

    def is_linear(module: nn.Module, name: str) -> bool:
        return isinstance(module, Linear)

    convert_to_float8_training(
        model.model.layers, config=Float8LinearConfig(emulate=emulate), module_filter_fn=is_linear
    )
