"""A part that runs on another work pool: its flow run there is followed, cancelled with ours, and holds its slot.

In: the name of a deployment and its parameters. Out: the state its run ended in. Invariants: a cancel of the run that
asked reaches the run it asked for, whose ranks then end with a checkpoint; a server that is away for a while ends
nothing. Cost: one request each POLL_S.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, cast

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import State
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling, Failed

from solo.train.launch import GRACE_S

POLL_S = 2.0
LEASE_S = 60.0  # a slot whose holder is gone is free after this


def run(deployment: str, parameters: dict[str, Any]) -> State:
    """The final state of a new run of a deployment."""
    try:
        asked = cast(Any, run_deployment(deployment, parameters=parameters, timeout=0))
    except ObjectNotFound:
        return Failed(message=f"{deployment}: the server has no such deployment; the top of infra/gpu.yaml makes it")
    with get_client(sync_client=True) as client:
        try:
            return _final(client, asked.id)
        except BaseException:  # a signal above all: Prefect cancels no run that was started as a deployment
            client.set_flow_run_state(asked.id, Cancelling())
            _final(client, asked.id, within_s=GRACE_S)
            raise


def _final(client: SyncPrefectClient, run_id: Any, within_s: float = float("inf")) -> State:  # noqa: ANN401
    """The state a run ends in, or the one it is in when the time is over."""
    deadline, name = time.monotonic() + within_s, ""
    while True:
        with suppress(httpx.TransportError):
            run = client.read_flow_run(run_id)
            state = run.state
            if state and state.name != name:  # Late: no worker of the pool takes it
                name = state.name or ""
                get_run_logger().info("%s on work pool %s: %s", run.name, run.work_pool_name, name)
            if state and (state.is_final() or time.monotonic() > deadline):
                return state
        time.sleep(POLL_S)


@contextmanager
def gpu_slot() -> Iterator[None]:
    """Hold a slot of the global concurrency limit $SOLO_GPU_LIMIT, if it is set; one that does not exist is an error.

    A lease that cannot be renewed, say while the server restarts, must not end days of training.
    """
    limit = os.environ.get("SOLO_GPU_LIMIT")
    if not limit:
        yield
        return
    slot = concurrency(limit, occupy=1, lease_duration=LEASE_S, strict=True, raise_on_lease_renewal_failure=False)
    with ExitStack() as stack:
        try:
            stack.enter_context(slot)
        except ConcurrencySlotAcquisitionError as error:
            raise ValueError(f"SOLO_GPU_LIMIT: {error}; `prefect gcl create {limit} --limit 1` makes it") from None
        yield
