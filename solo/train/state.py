"""State: what a training knows, number by number under the names of its parameters, whichever rank holds which of them.

In: DeepSpeed's engine at any ZeRO stage. Out: slices of parameters, each the fp32 weight and AdamW's two moments; one
safetensors file for some of them, with its sha256; an engine put back to what such files say. Invariants: nothing in a
file depends on the number of ranks or the ZeRO stage, so any of them goes on from any other's; each number is written
by one rank; no file is unpickled. Cost: 12 bytes a parameter, each rank writes its share and reads only what it holds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
FILES = "state-*.safetensors"
FILE_BYTES = 2**30  # of one file: several are copied, written and hashed at once
CHUNK_BYTES = 2**26
ALIGNMENT = 8  # of the tensors in a safetensors file
WRAPPED = "solo."  # what `engine.PackLoss` puts before the model's own names


@dataclass(frozen=True)
class Slice:
    """Numbers [begin, begin + n) of a parameter laid out in one row."""

    name: str
    begin: int
    values: Mapping[str, Tensor]  # weight, exp_avg, exp_avg_sq: (n,) fp32 each

    def __len__(self) -> int:
        """How many."""
        return len(self.values[WEIGHT])

    @property
    def end(self) -> int:
        """After its last number."""
        return self.begin + len(self)

    @property
    def n_bytes(self) -> int:
        """Of all three tensors."""
        return sum(t.nbytes for t in self.values.values())

    def part(self, begin: int, end: int) -> Slice:
        """The numbers [begin, end) of the parameter."""
        own = slice(begin - self.begin, end - self.begin)
        return Slice(self.name, begin, {kind: t[own] for kind, t in self.values.items()})

    def copied(self) -> Slice:
        """The same numbers in memory of their own, on the host."""
        return Slice(self.name, self.begin, {kind: on_host(t) for kind, t in self.values.items()})


def on_host(values: Tensor) -> Tensor:
    """Numbers in one row, copied to memory of their own on the host.

    From a GPU in pieces by way of pinned memory: into pageable memory the driver copies at 3 to 6 GB/s, whoever asks,
    and the 24 GB of 2 billion parameters would hold up the next update for longer than a step.
    """
    if not values.is_cuda:
        return values.to("cpu", copy=True)
    found = torch.empty(values.shape, dtype=values.dtype)
    pinned = torch.empty(min(len(values), CHUNK_BYTES // values.itemsize), dtype=values.dtype, pin_memory=True)
    for at in range(0, len(values), len(pinned)):
        piece = values[at : at + len(pinned)]
        pinned[: len(piece)].copy_(piece, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        found[at : at + len(piece)] = pinned[: len(piece)]
    return found


@dataclass(frozen=True)
class Row:
    """Parameters end to end in one tensor of this rank's optimizer."""

    parameter: Tensor  # what the optimizer calls a parameter
    places: list[tuple[str, int, int, int]]  # name, its first number here, where that lies, how many


def stage_of(engine: Any) -> int:  # noqa: ANN401
    """The ZeRO stage: what of a training is cut among the ranks."""
    return int(engine.zero_optimization_stage())


def held(engine: Any) -> list[Slice]:  # noqa: ANN401 - DeepSpeed is not typed
    """All that this rank holds, as views: what is written to them is the training's from then on."""
    found = []
    for row in _rows(engine):
        state = _moments(engine, row.parameter)
        flat = {WEIGHT: row.parameter.detach().view(-1)} | {kind: state[kind].view(-1) for kind in MOMENTS}
        found += [
            Slice(name, begin, {kind: t[at : at + n] for kind, t in flat.items()}) for name, begin, at, n in row.places
        ]
    return found


def share(engine: Any) -> list[Slice]:  # noqa: ANN401
    """What of it this rank writes: all ranks together write each number once."""
    if stage_of(engine):
        return held(engine)
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    parts = (s.part(len(s) * rank // n_ranks, len(s) * (rank + 1) // n_ranks) for s in held(engine))
    return [s for s in parts if len(s)]


def n_updates(engine: Any) -> int:  # noqa: ANN401
    """Updates of the weights so far, by which AdamW corrects its moments."""
    counts = {int(_moments(engine, row.parameter)["step"].item()) for row in _rows(engine)}
    assert len(counts) <= 1, f"parameters were updated {sorted(counts)} times"
    return counts.pop() if counts else 0


def in_files(slices: Iterable[Slice], most_bytes: int = FILE_BYTES) -> list[list[Slice]]:
    """Slices in order, as many together as make a file."""
    files: list[list[Slice]] = [[]]
    size = 0
    for part in slices:
        if size and size + part.n_bytes > most_bytes:
            files.append([])
            size = 0
        files[-1].append(part)
        size += part.n_bytes
    return files


def write(path: Path, slices: Iterable[Slice], updates: int) -> str:
    """A safetensors file of these slices, on disk when this returns; its sha256, taken on the way."""
    named = {f"{kind}/{s.name}@{s.begin}": t for s in slices for kind, t in s.values.items()}
    head: dict[str, Any] = {"__metadata__": {"updates": str(updates)}}
    at = 0
    for name, tensor in named.items():
        assert tensor.dtype == torch.float32, f"{name} is {tensor.dtype}"
        head[name] = {"dtype": "F32", "shape": [len(tensor)], "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in _chunks(len(text).to_bytes(8, "little") + text, named.values()):
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _chunks(head: bytes, tensors: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    yield head
    for tensor in tensors:
        raw = memoryview(tensor.cpu().numpy().data).cast("B")
        for at in range(0, len(raw), CHUNK_BYTES):
            yield raw[at : at + CHUNK_BYTES]


@torch.no_grad()
def restore(engine: Any, folder: Path) -> None:  # noqa: ANN401
    """Put the engine to what the files of a checkpoint say; a collective call."""
    stored: dict[str, list[tuple[int, int, Any]]] = {}  # name -> first number, the one after the last, file
    updates = set()
    for path in sorted(folder.glob(FILES)):
        # No `with`: a handle is a map of the file, and goes when nothing names it.
        file: Any = safe_open(path, framework="pt")
        updates.add(int(file.metadata()["updates"]))
        for key in file.keys():  # noqa: SIM118 (no mapping)
            kind, _, place = key.partition("/")
            if kind == WEIGHT:
                name, _, begin = place.rpartition("@")
                n = file.get_slice(key).get_shape()[0]
                stored.setdefault(name, []).append((int(begin), int(begin) + n, file))
    if len(updates) != 1:
        raise ValueError(f"{folder}: {len(updates)} states in {FILES}, not 1; delete it to go on from the one before")
    for own in held(engine):
        if _fill(own, stored.get(own.name, [])) != len(own):
            raise ValueError(f"{folder}: {own.name} [{own.begin}:{own.end}] is not all there; delete it to go on")
    for row in _rows(engine):
        _moments(engine, row.parameter)["step"].fill_(updates.copy().pop())
    _take_over(engine)


def _fill(own: Slice, stored: list[tuple[int, int, Any]]) -> int:
    """Copy what there is of a slice; how many numbers that is."""
    n_found = 0
    for first, last, file in stored:
        begin, end = max(first, own.begin), min(last, own.end)
        if begin < end:
            for kind, values in own.part(begin, end).values.items():
                values.copy_(file.get_slice(f"{kind}/{own.name}@{first}")[begin - first : end - first])
            n_found += end - begin
    return n_found


def whole_weights(engine: Any, module: nn.Module) -> dict[str, Tensor] | None:  # noqa: ANN401
    """Under ZeRO 3 a model's weights on the host of rank 0, gathered one by one (a collective); else None."""
    if stage_of(engine) < 3:
        return None
    found = {}
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if dist.get_rank() == 0:
                found[name] = parameter.detach().to("cpu", copy=True)
    return found


def _rows(engine: Any) -> list[Row]:  # noqa: ANN401
    """How DeepSpeed laid the optimized parameters out: as they are, group by group, or each one cut."""
    names = {p: name.removeprefix(WRAPPED) for name, p in engine.module.named_parameters()}
    zero, rank = engine.optimizer, dist.get_rank()
    stage = stage_of(engine)
    if not stage:
        return [Row(p, [(names[p], 0, 0, p.numel())]) for group in zero.param_groups for p in group["params"]]
    rows = []
    if stage == 3:
        for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            places = []
            for p in group:
                _, at, n_part = zero.grad_position[zero.get_param_id(p)]
                n = min(n_part, p.ds_numel - rank * n_part)  # the last part is padded, one after it padding alone
                if n > 0:
                    places.append((names[p], rank * n_part, at, n))
            rows.append(Row(flat, places))
        return rows
    # Under bf16 and ZeRO 1 DeepSpeed has a class of its own, with other names.
    flats, groups = ("single_partition_of_fp32_groups", "bit16_groups")
    if hasattr(zero, "fp32_groups_flat_partition"):
        flats, groups = ("fp32_groups_flat_partition", "bf16_groups")
    for flat, group in zip(getattr(zero, flats), getattr(zero, groups), strict=True):
        parts = [(names[p], p._hp_mapping) for p in group if p._hp_mapping is not None]
        rows.append(Row(flat, [(name, *_place(part)) for name, part in parts]))
    return rows


def _place(part: Any) -> tuple[int, int, int]:  # noqa: ANN401
    """The first number of a parameter that this rank's part has, where that lies, how many there are."""
    own, flat = part.lp_fragment_address, part.hp_fragment_address
    return own.start, flat.start, flat.numel


def _moments(engine: Any, parameter: Tensor) -> dict[str, Tensor]:  # noqa: ANN401
    """AdamW's state of what it calls a parameter; before its first update, what that update would begin with."""
    adam = engine.optimizer.optimizer if stage_of(engine) else engine.optimizer
    state: dict[str, Tensor] = adam.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(parameter, requires_grad=False)
    return state


def _take_over(engine: Any) -> None:  # noqa: ANN401
    """Make the weights that the model computes with those of the optimizer, on every rank."""
    stage, zero = stage_of(engine), engine.optimizer
    if stage == 3:
        zero._partition_all_parameters()
        for i in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(i)
        if zero.persistent_parameters:  # small ones, of which each rank keeps the whole
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
    elif stage:
        zero.update_lp_params()
