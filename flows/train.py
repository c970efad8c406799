"""train: a flow of its own, one run per stage, so that hours of training have a page, a state and a cancel button.

A sick step is an event for automations (infra/automations.yaml), `solo.train.loss_spike` or `solo.train.step_skipped`.
Inside `solo` it is a tracked sub-flow-run; with $SOLO_TRAIN_DEPLOYMENT (say `train/gpu`) it is started as that
deployment on a GPU work pool, the data root being shared storage. Either can be cancelled alone: its ranks end with a
checkpoint, and the recipe's run fails with a line that says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.states import Cancelled, Failed

from flows import cancel
from flows.elsewhere import gpu_slot
from flows.part import Made, build, through_flow
from solo.train import curves, suspects, watch
from solo.train.launch import Interrupted

PROGRESS_S = 2.0
PAGE_S, PAGE_MOST_S = 15.0, 300.0
PAGE_AGE = 0.02  # of a stage's age lies between two pages: the older, the less one step changes
PAGE_SHARE = 0.03  # of the time, at most, goes into drawing: on a CPU the ranks wait for those cores


EVENTS = {"spike": "solo.train.loss_spike", "skipped": "solo.train.step_skipped"}


class Live:
    """Metrics of a running stage as one progress bar and one page of charts, both updated in place."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.rows: list[dict[str, Any]] = []
        self.sick: list[str] = []  # blocks of the page
        self.bar: Any = None
        self.page: Any = None
        self.began = time.monotonic()
        self.bar_at = self.page_due = 0.0

    def __call__(self, metrics: dict[str, Any]) -> None:
        """Take one optimizer step's metrics."""
        self.rows.append(metrics)
        with _server_may_be_away():
            self._show(metrics, last=metrics["step"] >= metrics["n_steps"])

    def tell_sick(self, event: dict[str, Any], folder: Path) -> None:
        """Take a sick step: an event, and its documents on the page."""
        with _server_may_be_away():
            names = ("step", "kind", "done", "loss", "limit", "loss_by_source", "sources", "worst")
            counts = {"first_pack": event["packs"][0], "last_pack": event["packs"][-1]}
            emit_event(
                EVENTS[event["kind"]],
                resource={"prefect.resource.id": f"solo.stage.{self.stage}", "prefect.resource.name": self.stage},
                payload={name: event[name] for name in names} | counts | {"n_documents": len(event["documents"])},
            )
        self.sick = ["## Sick steps", *suspects.blocks(folder)]
        self.page_due = 0.0

    def _show(self, metrics: dict[str, Any], *, last: bool) -> None:
        now = time.monotonic()
        if now - self.bar_at >= PROGRESS_S or last:
            self.bar_at = now
            percent = 100.0 * metrics["step"] / metrics["n_steps"]
            line = watch.line(metrics)
            if self.bar is None:
                self.bar = create_progress_artifact(key=f"{self.stage}-progress", progress=percent, description=line)
            else:
                update_progress_artifact(self.bar, progress=percent, description=line)
        if now >= self.page_due or last:
            page = curves.page(self.stage, self.rows, self.sick)
            if self.page is None:
                self.page = create_markdown_artifact(key=f"{self.stage}-loss", markdown=page)
            else:  # in place: a stage of days would else leave gigabytes of versions in the database
                get_client(sync_client=True).update_artifact(self.page, ArtifactUpdate(data=page))
            took = time.monotonic() - now
            self.page_due = now + max(PAGE_S, took / PAGE_SHARE, min((now - self.began) * PAGE_AGE, PAGE_MOST_S))


@contextmanager
def _server_may_be_away() -> Iterator[None]:
    """A server that restarts costs a few updates of a page, not days of training."""
    try:
        yield
    except httpx.HTTPError as error:
        get_run_logger().warning("the page is not updated: %s: %s", type(error).__name__, error)


@flow(name="train", flow_run_name="train-{node[name]}", log_prints=False)
def train_flow(node: dict[str, Any], inputs: dict[str, Made], force: bool = False) -> Made | State:
    """Train one stage."""
    try:
        with gpu_slot(), cancel.noticed() as cancelled:
            live = Live(node["name"])
            hooks: dict[str, Any] = {"on_metric": live, "on_sick": live.tell_sick, "stop_asked": cancelled.is_set}
            return build(node, inputs, force, **hooks)
    except ValueError as error:
        return Failed(message=str(error))
    except Interrupted as error:
        if not cancelled.is_set():
            raise
        return Cancelled(message=str(error))


train = through_flow("train", train_flow)
