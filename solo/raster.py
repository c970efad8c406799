"""Raster: the pictures of a pack as they were decoded, cut into patches on the device that reads them.

In: memory for n patches, pictures decoded into it one after the other. Out: what a tensor (n_patches, 3 * patch_px**2)
of uint8 gives where it is indexed, moved or copied: patches in raster order, index in a patch = channel, y, x.
Invariant: a picture's patches lie in its own part of the memory, so parts can be filled apart. Cost: nothing on the
loader's side; there the cut was a fifth of a load, on a GPU it is one gather. Red, green, blue and a spare byte a
pixel: that is what libjpeg and the resize write fastest, for a third more bytes than patches.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
import torch
from torch import Tensor

BYTES = 4  # of a pixel
AT_ONCE = 512  # patches cut together on a CPU: 2 MB that stay in its cache, 22 ms a pack of 18,000 where all take 80


@dataclass(frozen=True, eq=False)
class Raster:
    """Patches n; strip s of a picture of `cols` columns: pixel row s // cols, patch column s % cols."""

    strips: Tensor  # (n_strips, BYTES * patch_px) uint8; patch_px strips for each patch
    first: Tensor  # (n,) int64: strip of the patch's uppermost pixels
    step: Tensor  # (n,) int64: strips to its next pixel row
    begin: int = 0  # patches before this part, in the same memory

    @classmethod
    def of(cls, memory: np.ndarray, patch_px: int) -> Raster:
        """Room for as many patches as (n * patch_px, BYTES * patch_px) uint8 holds."""
        n = len(memory) // patch_px
        return cls(torch.from_numpy(memory), torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64))

    @property
    def patch_px(self) -> int:
        """Side of a patch."""
        return self.strips.shape[1] // BYTES

    @property
    def shape(self) -> tuple[int, int]:
        """That of the patches."""
        return len(self), 3 * self.patch_px**2

    def __len__(self) -> int:
        """Number of patches."""
        return len(self.first)

    @overload
    def __getitem__(self, which: slice) -> Raster: ...

    @overload
    def __getitem__(self, which: Tensor) -> Tensor: ...

    def __getitem__(self, which: slice | Tensor) -> Raster | Tensor:
        """A part to fill, for a slice; the patches themselves, for indices."""
        if isinstance(which, slice):
            begin = self.begin + which.indices(len(self))[0]
            return replace(self, first=self.first[which], step=self.step[which], begin=begin)
        first, step = self.first[which], self.step[which]
        on_cpu = first.device.type == "cpu"
        size = (len(first), 3 * self.patch_px**2)
        # numpy asks for huge pages where torch does not: 55 MB cost 5 ms instead of 60.
        out = torch.from_numpy(np.empty(size, np.uint8)) if on_cpu else first.new_empty(size, dtype=torch.uint8)
        at_once = AT_ONCE if on_cpu else max(len(first), 1)
        for at in range(0, len(first), at_once):
            part = slice(at, at + at_once)
            self._cut(first[part], step[part], out[part])
        return out

    def _cut(self, first: Tensor, step: Tensor, out: Tensor) -> None:
        strips = first[:, None] + step[:, None] * torch.arange(self.patch_px, device=first.device)
        pixels = self.strips.view(torch.int32).index_select(0, strips.flatten()).view(len(first), -1)
        planes = out.view(len(first), 3, -1)
        for channel in range(3):
            if channel:
                pixels >>= 8
            planes[:, channel] = pixels  # the low byte

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        """The patches, for numpy."""
        return self.clone().numpy()

    def to(self, device: torch.device | str) -> Raster:
        """The same on another device, the cut not yet done."""
        return replace(
            self,
            strips=self.strips.to(device, non_blocking=True),
            first=self.first.to(device, non_blocking=True),
            step=self.step.to(device, non_blocking=True),
        )

    def clone(self) -> Tensor:
        """All patches, cut."""
        return self[torch.arange(len(self), device=self.first.device)]

    def picture(self, rows: int, cols: int) -> np.ndarray:
        """(rows * patch_px, cols * patch_px) uint32 to be filled: the picture whose patches this part is."""
        px = self.patch_px
        assert rows * cols == len(self), f"{len(self)} patches are no {rows} x {cols}"
        at = self.begin * px
        self.first[:] = (at + torch.arange(rows)[:, None] * (px * cols) + torch.arange(cols)).flatten()
        self.step[:] = cols
        words: np.ndarray = self.strips[at : at + len(self) * px].numpy().view("<u4")
        return words.reshape(rows * px, cols * px)


class Recycled:
    """Arrays whose memory serves again when nothing refers to them: fresh pages were a tenth of a load."""

    def __init__(self, n_bytes: int) -> None:
        """`n_bytes`: of the largest array; pages that were never written cost nothing."""
        self.n_bytes = n_bytes
        self._free: list[np.ndarray] = []

    def take(self, shape: Sequence[int]) -> np.ndarray:
        """An array of bytes with anything in it."""
        memory = self._free.pop() if self._free else np.empty(self.n_bytes, np.uint8)
        # Not a slice of `memory`: numpy lets slices of a slice refer to `memory` alone, and this array would be gone.
        array = np.frombuffer(memory.data, np.uint8, math.prod(shape))
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array.reshape(shape)
