"""A cancel of a sub-flow-run, noticed: it has no process of its own that a worker could end.

In: the flow run this is called in. Out: an event that is set when somebody, or an automation, asks that run to end.
Invariant: a server that is away asks for nothing. Cost: one request each POLL_S.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx
from prefect import runtime
from prefect.client.orchestration import get_client

POLL_S = 5.0


@contextmanager
def noticed() -> Iterator[threading.Event]:
    """Watch the state of this flow run while the block runs."""
    run_id, asked, over = runtime.flow_run.id, threading.Event(), threading.Event()

    def look() -> None:
        with get_client(sync_client=True) as client:
            while not over.wait(POLL_S):
                with suppress(httpx.HTTPError):
                    state = client.read_flow_run(run_id).state
                    if state and state.is_cancelling():
                        asked.set()
                        return

    thread = threading.Thread(target=look, name="cancel", daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        over.set()
        thread.join(POLL_S)
