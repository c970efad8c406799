"""First weights: drawn from the name of each tensor, or copied from a published checkpoint.

In: parameters by name; a seed, or a folder with safetensors. Out: the parameters, filled in place. Invariants: a tensor
depends on seed, name, shape and deviation alone, so adding one moves no other; nothing in a checkpoint is left out.
Cost: one thread draws 100 million normals a second; a copy reads each file once.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

log = logging.getLogger(__name__)


@torch.no_grad()
def draw(parameter: Tensor, name: str, std: float) -> None:
    """Norm scales (1-D) become 1, all else normal with deviation `std` from a generator seeded by `name`."""
    if parameter.ndim == 1:
        parameter.fill_(1.0)
        return
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1  # torch takes 63 bits
    parameter.normal_(0.0, std, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def copy(parameters: Mapping[str, Tensor], folder: Path) -> None:
    """Copy a checkpoint's tensors over the drawn ones.

    Tensors and trailing rows that the checkpoint lacks stay drawn and are logged; a tensor that does not fit is an
    error.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no *.safetensors there; give a Hugging Face checkpoint folder or `random`")
    missing = set(parameters)
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                value, own = tensors.get_tensor(name), parameters.get(name)
                if own is None or value.shape[1:] != own.shape[1:] or len(value) > len(own):
                    have = "no such tensor" if own is None else list(own.shape)
                    raise ValueError(f"{file}: {name} is {list(value.shape)}, the model has {have}; fix the spec")
                own[: len(value)] = value.to(own.dtype)
                missing.discard(name)
                if len(value) < len(own):
                    log.info("%s: %s has %d of %d rows, the rest are new", folder, name, len(value), len(own))
    if missing:
        log.info("%s: not there, so newly drawn: %s", folder, sorted(missing))
