"""Start: the weights a stage begins with.

In: a train job. Out: folders, as the ranks are told. Invariants: a stage begins with the checkpoint of the stage before
it, whole; what the recipe says of weights to start from holds for its first stage. Cost: a look at a folder.
"""

from __future__ import annotations

from pathlib import Path

from solo.artifact import Job


def of(job: Job) -> dict[str, str | None]:
    """`init` and `init_projection` of the model: `random`, `checkpoint`, None, or a folder that has weights."""
    before = list(job.of("train").values())
    if before:
        return {"init": str(before[0].path / "checkpoint"), "init_projection": None}
    found = {name: job.spec["model"].get(name) for name in ("init", "init_projection")}
    return {name: _folder(job, name, value) for name, value in found.items()}


def _folder(job: Job, field: str, value: str | None) -> str | None:
    if value in (None, "random", "checkpoint"):
        return value
    folder = job.specs / str(value)
    if not has_weights(folder):
        raise ValueError(
            f"train/{job.name}: model.{field} is {value!r}, but {folder} has no *.safetensors; put the weights there, "
            "or name another folder"
        )
    return str(folder)


def has_weights(folder: Path) -> bool:
    """Whether a folder could be a checkpoint."""
    return any(folder.glob("*.safetensors"))
