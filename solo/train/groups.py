"""Groups: the parts of the model that learn at rates of their own, or not at all.

In: named parameters, a stage. Out: the optimizer's groups. Invariants: what is frozen is in no group, so it has
neither a gradient nor an optimizer state; a stage without `groups` gets the two groups it always had. Cost: none.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from solo.objective import GroupName
from solo.spec import Stage

SHARE = "rate_share"  # of a group's rate in the stage's, in each of the optimizer's groups


def group_of(name: str) -> GroupName:
    """The group of a parameter by its name in a checkpoint; the head's rows are ids, as the embedding's are."""
    if "embed_vision_patch" in name:
        return "projection"
    return "embeddings" if "embed_tokens" in name or "lm_head" in name else "backbone"


def freeze(module: nn.Module, stage: Stage) -> None:
    """Take the gradient from what the stage does not train; before an engine is made."""
    for name, parameter in module.named_parameters():
        own = (stage.groups or {}).get(group_of(name))
        parameter.requires_grad_(not (own and own.frozen))


def of_optimizer(module: nn.Module, stage: Stage) -> list[dict[str, Any]]:
    """What AdamW is given: matrices decay, norms (1-D) do not, as upstream; each with its share of the rate."""
    found: dict[tuple[bool, float], list[nn.Parameter]] = {}
    if not stage.groups:
        found = {(True, 1.0): [], (False, 1.0): []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            own = (stage.groups or {}).get(group_of(name))
            share = own.learning_rate / stage.learning_rate if own and own.learning_rate else 1.0
            found.setdefault((parameter.ndim > 1, share), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": stage.weight_decay if decays else 0.0, SHARE: share}
        for (decays, share), parameters in found.items()
    ]


def rates(rate: float, stage: Stage) -> dict[str, float]:
    """The rate of each group that has one of its own, where the stage's is `rate`."""
    own = (stage.groups or {}).items()
    return {name: rate * g.learning_rate / stage.learning_rate if g.learning_rate else 0.0 for name, g in own}
