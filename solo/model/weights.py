"""Weights: drawn from the name of each tensor, or copied from a published checkpoint.

In: parameters by name; a seed, or a folder with safetensors. Out: the parameters, filled in place. Invariants: a tensor
depends on seed, name, shape and deviation alone, so adding one moves no other; nothing in a checkpoint is left out, and
only what a text model cannot have may be missing from it. Cost: one thread draws 100 million normals a second; a copy
reads each file once.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
OPTIONAL = "model.embed_vision_patch.weight"  # absent from a text model's checkpoint, then drawn
GROWS = ("model.embed_tokens.weight", "lm_head.weight")  # their rows are ids: a text model has fewer
N_NAMED = 5  # tensors that an error lists


@torch.no_grad()
def draw(parameter: Tensor, name: str, std: float) -> None:
    """Norm scales and biases (1-D) become 1 and 0, all else normal with deviation `std`, seeded by `name`."""
    if parameter.ndim == 1:
        parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
        return
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1  # torch takes 63 bits
    parameter.normal_(0.0, std, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def copy(parameters: Mapping[str, Tensor], folder: Path) -> None:
    """Copy a checkpoint's tensors over the drawn ones.

    The patch projection, and rows of ids beyond the checkpoint's, may be missing: they stay drawn and are logged. Any
    other tensor that is missing, unknown or does not fit is an error.
    """
    missing = set(parameters)
    for file, name, value in _tensors(folder):
        own = parameters.get(name)
        fits = own is not None and value.shape[1:] == own.shape[1:]
        if own is None or not fits or (len(value) != len(own) and (name not in GROWS or len(value) > len(own))):
            have = "no such tensor" if own is None else list(own.shape)
            raise ValueError(f"{file}: {name} is {list(value.shape)}, the model has {have}; fix the spec")
        own[: len(value)] = value.to(own.dtype)
        missing.discard(name)
        if len(value) < len(own):
            log.info("%s: %s has %d of %d rows, the rest are new", folder, name, len(value), len(own))
    if missing - {OPTIONAL}:
        raise ValueError(
            f"{folder}: {_some(missing - {OPTIONAL})} missing; the checkpoint or the spec's shape is wrong"
        )
    if missing:
        log.info("%s: no %s there, so it is newly drawn", folder, OPTIONAL)


@torch.no_grad()
def copy_projection(projection: Tensor, folder: Path) -> None:
    """Copy the patch projection alone from a folder that has it, whatever else is there."""
    for file, name, value in _tensors(folder):
        if name.removeprefix("model.") == OPTIONAL.removeprefix("model."):
            if value.shape != projection.shape:
                raise ValueError(
                    f"{file}: {name} is {list(value.shape)}, the model's {list(projection.shape)}; fix init_projection"
                )
            projection.copy_(value.to(projection.dtype))
            return
    raise ValueError(f"{folder}: no {OPTIONAL} there; give another folder as init_projection, or random")


def check_loaded(where: str, info: Mapping[str, Any]) -> None:
    """What transformers says of a load; anything but a complete one is an error."""
    unexpected = sorted(info.get("unexpected_keys", ()))
    missing = sorted(info.get("missing_keys", ()))
    misshapen = sorted(str(entry[0]) for entry in info.get("mismatched_keys", ()))
    wrong = [
        f"{_some(names)} {what}"
        for names, what in ((missing, "missing"), (unexpected, "unknown to SOLO"), (misshapen, "of another shape"))
        if names
    ]
    if wrong:
        raise ValueError(f"{where}: {'; '.join(wrong)}; this is no SOLO checkpoint, or its config.json is another's")


def check_files(folder: Path) -> list[Path]:
    """The safetensors of a checkpoint folder, whole and all that its index names; none where it is a hub's id."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / INDEX
    if index.is_file():
        placed: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        files = [folder / name for name in sorted(set(placed.values()))]
        lost = [f.name for f in files if not f.is_file()]
        if lost:
            raise ValueError(f"{folder}: {INDEX} names {_some(lost)}, not there; fetch the checkpoint again")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file}: {error}; fetch the file again") from error
    return files


def _tensors(folder: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """All tensors of a checkpoint."""
    files = check_files(folder)
    if not files:
        raise ValueError(f"{folder}: no *.safetensors there; give a Hugging Face checkpoint folder or `random`")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                yield file, name, tensors.get_tensor(name)


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    rest = f" and {len(ordered) - N_NAMED} more" if len(ordered) > N_NAMED else ""
    return ", ".join(ordered[:N_NAMED]) + rest
