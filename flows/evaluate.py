"""evaluate: a flow of its own, one run per benchmark; started like `train` where $SOLO_EVALUATE_DEPLOYMENT is set."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.part import Made, build, through_flow


@flow(name="evaluate", flow_run_name="evaluate-{node[name]}", log_prints=False)
def evaluate_flow(node: dict[str, Any], inputs: dict[str, Made], force: bool = False) -> Made | State:
    """Score one benchmark."""
    return build(node, inputs, force)


evaluate = through_flow("evaluate", evaluate_flow)
