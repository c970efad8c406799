"""evaluate: a flow of its own, one run per benchmark; started like `train` where $SOLO_EVALUATE_DEPLOYMENT is set."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.part import Made, build


@flow(name="evaluate", flow_run_name="evaluate-{node[name]}", log_prints=False)
def evaluate(node: dict[str, Any], inputs: dict[str, Made], force: bool = False) -> Made | State:
    """Score one benchmark, or find it scored."""
    made = build(node, inputs, force)
    if isinstance(made, State) or made["ran"]:
        return made
    return Completed(name="Cached", data=made)
