"""Objective: what of a stage's model learns, at which rate, and what is set aside to be judged by.

In: fields of a stage or a recipe. Out: validated objects; `continues` holds stages against each other. Invariant: none
of these fields is in the identity of a spec that leaves it out. Cost: none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

from pydantic import Field, model_validator

from solo.strict import Spec, off

if TYPE_CHECKING:
    from solo.spec import Stage

GroupName = Literal["projection", "embeddings", "backbone"]
GROUPS: tuple[GroupName, ...] = get_args(GroupName)


class Group(Spec):
    """One part of the model that learns at a rate of its own, or not at all."""

    learning_rate: float | None = Field(
        default=None, gt=0, exclude_if=off, description="peak; its schedule is the stage's, scaled, minimum and all"
    )
    frozen: bool = Field(default=False, exclude_if=lambda value: not value, description="no gradient, no optimizer")

    @model_validator(mode="after")
    def _one(self) -> Group:
        if self.frozen == (self.learning_rate is not None):
            raise ValueError("give exactly one of learning_rate and frozen: true; leave the group out for the stage's")
        return self


class HeldOut(Spec):
    """Samples that no stage trains, and how often the loss on them is measured.

    They are chosen by a hash of key and recipe seed alone, so a sample is held out of every mix that has it.
    """

    one_in: int = Field(gt=1, description="samples of which one is held out")
    tokens_per_source: int = Field(gt=0, description="measured at most, of each source of a mix, in hash order")
    every_steps: int = Field(gt=0, description="and before the first step of a stage, and after its last")

    def of_pack(self) -> dict[str, int]:
        """What the part `pack` reads."""
        return {"one_in": self.one_in, "tokens_per_source": self.tokens_per_source}


def check_groups(groups: Mapping[GroupName, Group]) -> None:
    """Something must learn."""
    if all(name in groups and groups[name].frozen for name in GROUPS):
        raise ValueError(f"groups: {', '.join(GROUPS)} are all frozen, nothing would learn; leave one out")


def check_continued(stages: Sequence[Stage]) -> None:
    """Each rate that continues begins where the stage before left it."""
    for i, stage in enumerate(stages):
        if stage.schedule_start != "continue":
            continue
        if not i:
            raise ValueError("stages.0.schedule_start is continue, but no stage is before it; use restart")
        before = stages[i - 1]
        if stage.learning_rate != before.min_learning_rate:
            raise ValueError(
                f"stages.{i}.schedule_start is continue, but learning_rate is {stage.learning_rate:g} and stage "
                f"{before.name} ends at {before.min_learning_rate:g}; make them equal, or use restart"
            )
        if stage.warmup_steps:
            raise ValueError(
                f"stages.{i}.schedule_start is continue, but warmup_steps is {stage.warmup_steps}: a rate that goes on "
                "is not warmed up; give 0, or use restart"
            )
