"""evaluate: a flow of its own, one run per benchmark; started like `train` where $SOLO_EVALUATE_DEPLOYMENT is set.

It holds a slot as a stage does, so that on a machine of one slot neither finds the GPU taken.
"""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Failed

from flows.elsewhere import gpu_slot
from flows.part import Made, build, through_flow


@flow(name="evaluate", flow_run_name="evaluate-{node[name]}", log_prints=False)
def evaluate_flow(node: dict[str, Any], inputs: dict[str, Made], force: bool = False) -> Made | State:
    """Score one benchmark."""
    try:
        with gpu_slot():
            return build(node, inputs, force)
    except ValueError as error:
        return Failed(message=str(error))


evaluate = through_flow("evaluate", evaluate_flow)
