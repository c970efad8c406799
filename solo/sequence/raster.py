"""Raster: the pictures of a pack as they were decoded, cut into patches on the device that reads them.

In: a `Room` for n patches, pictures decoded into its parts. Out: a `Raster`, which gives what a tensor (n_patches,
3 * patch_px**2) of uint8 gives where it is indexed, moved or copied: patches in raster order, index in a patch =
channel, y, x. Invariant: a picture's patches lie in its own part of the memory, so parts are filled apart. Cost:
nothing on the loader's side, where the cut was a fifth of a load; on a GPU it is one gather. A pixel is red, green,
blue and a spare byte: what libjpeg and the resize write fastest, for a third more bytes than patches.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from solo.sequence.upload import upload

BYTES = 4  # of a pixel
AT_ONCE = 512  # patches cut together on a CPU: 2 MB that stay in its cache, 22 ms a pack of 18,000 where all take 80


@dataclass(frozen=True, eq=False)
class Raster:
    """The n patches of a pack; a strip is one pixel row of one patch."""

    strips: Tensor  # (n * patch_px, BYTES * patch_px) uint8; each picture's in raster order
    first: Tensor  # (n,) int64: strip of the patch's uppermost pixels
    step: Tensor  # (n,) int64: strips to its next pixel row, the picture's columns

    @property
    def shape(self) -> tuple[int, int]:
        """That of the patches."""
        return len(self.first), 3 * (self.strips.shape[1] // BYTES) ** 2

    def __len__(self) -> int:
        """Number of patches."""
        return len(self.first)

    def __getitem__(self, which: Tensor) -> Tensor:
        """These patches, cut."""
        first, step = self.first[which], self.step[which]
        if first.device.type == "cpu":
            return torch.from_numpy(_cut(*(t.numpy() for t in (self.strips, first, step))))
        return self._gathered(first, step)

    def _gathered(self, first: Tensor, step: Tensor) -> Tensor:
        """The cut where one kernel does it all."""
        px = self.strips.shape[1] // BYTES
        pixels = self.strips[first[:, None] + step[:, None] * torch.arange(px, device=first.device)]
        return pixels.view(len(first), px * px, BYTES)[..., :3].transpose(1, 2).flatten(1)

    def to(self, device: torch.device | str) -> Raster:
        """The same on another device, the cut not yet done."""
        return Raster(*(upload(t, device) for t in (self.strips, self.first, self.step)))

    def pin_memory(self) -> Raster:
        """The same where a GPU reads it by itself."""
        return Raster(*(t.pin_memory() for t in (self.strips, self.first, self.step)))

    def clone(self) -> Tensor:
        """All patches, cut."""
        return self[torch.arange(len(self), device=self.first.device)]


@dataclass(frozen=True, slots=True, eq=False)
class Room:
    """Memory for patches begin <= i < end of a pack, to be filled picture by picture."""

    strips: np.ndarray  # of the whole pack, as are the two below; see `Raster`
    first: np.ndarray
    step: np.ndarray
    begin: int
    end: int

    @classmethod
    def of(cls, strips: np.ndarray, patch_px: int) -> Room:
        """Room for as many patches as (n * patch_px, BYTES * patch_px) uint8 hold."""
        n = len(strips) // patch_px
        return cls(strips, np.zeros(n, np.int64), np.zeros(n, np.int64), 0, n)

    def __len__(self) -> int:
        """Number of patches."""
        return self.end - self.begin

    def __getitem__(self, part: slice) -> Room:
        """A part of it."""
        begin, end, _ = part.indices(len(self))
        return Room(self.strips, self.first, self.step, self.begin + begin, self.begin + end)

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        """The patches that lie here, cut."""
        return self.raster().clone().numpy()

    def picture(self, rows: int, cols: int) -> np.ndarray:
        """(rows * patch_px, cols * patch_px) uint32 to be filled with the picture whose patches this part is."""
        assert rows * cols == len(self), f"{len(self)} patches are no {rows} x {cols}"
        px, mine = self.strips.shape[1] // BYTES, slice(self.begin, self.end)
        np.add(_first_strips(rows, cols, px), self.begin * px, out=self.first[mine])
        self.step[mine] = cols
        words: np.ndarray = self.strips[self.begin * px : self.end * px].view("<u4")
        return words.reshape(rows * px, cols * px)

    def raster(self) -> Raster:
        """What lies here, to be read; of the whole memory, as strips are counted from its beginning."""
        mine = slice(self.begin, self.end)
        return Raster(*(torch.from_numpy(a) for a in (self.strips, self.first[mine], self.step[mine])))


def _cut(strips: np.ndarray, first: np.ndarray, step: np.ndarray) -> np.ndarray:
    """The cut on a CPU, by numpy: torch's threads cost small packs ten times the work on busy cores."""
    px = strips.shape[1] // BYTES
    words, out = strips.view("<u4"), np.empty((len(first), 3, px * px), np.uint8)
    for at in range(0, len(first), AT_ONCE):
        part = slice(at, at + AT_ONCE)
        pixels = words.take((first[part, None] + step[part, None] * np.arange(px)).ravel(), axis=0)
        pixels = pixels.reshape(-1, px * px)
        for channel in range(3):  # shift and narrow: twice as fast as a transpose of bytes
            if channel:
                pixels >>= 8
            out[part, channel] = pixels
    return out.reshape(len(first), 3 * px * px)


@lru_cache(maxsize=4096)
def _first_strips(rows: int, cols: int, patch_px: int) -> np.ndarray:
    """(rows * cols,) the uppermost strip of each patch of a picture that begins at strip 0."""
    return (np.arange(rows)[:, None] * (patch_px * cols) + np.arange(cols)).ravel()


class Recycled:
    """Arrays whose memory serves again when nothing refers to them: fresh pages were a tenth of a load."""

    def __init__(self, n_bytes: int) -> None:
        """`n_bytes`: of the largest array; pages that were never written cost nothing."""
        self.n_bytes = n_bytes
        self._free: list[np.ndarray] = []

    def take(self, shape: Sequence[int]) -> np.ndarray:
        """An array of bytes with anything in it."""
        try:
            memory = self._free.pop()
        except IndexError:  # asked for and not counted first: threads share this
            memory = np.empty(self.n_bytes, np.uint8)
        # Not a slice of `memory`: numpy lets slices of a slice refer to `memory` alone, and this array would be gone.
        array = np.frombuffer(memory.data, np.uint8, math.prod(shape))
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array.reshape(shape)
