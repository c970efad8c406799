"""Upload: what a GPU is sent, without a wait for what it still computes.

In: tensors of the host. Out: the same on a device. Invariant: the values, whatever the device. Cost: for a GPU one copy
into pinned memory, which the loader's threads make of a pack before it is asked for (`Pack.pinned`). A copy from other
memory is made while the host waits for all that the GPU was given before: 20 ms without work for each pack.
"""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device; torch keeps the pinned memory until the copy is made."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
