"""train: a flow of its own, one run per stage, so that hours of training have a page, a state and a cancel button.

Inside `solo` it is a tracked sub-flow-run; with $SOLO_TRAIN_DEPLOYMENT (say `train/gpu`) it is started as that
deployment on a GPU work pool, the data root being shared storage.
"""

from __future__ import annotations

import time
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.client.schemas.objects import State
from prefect.states import Failed

from flows.elsewhere import gpu_slot
from flows.part import Made, build, through_flow
from solo import curves, watch

PROGRESS_S = 2.0
PAGE_S, PAGE_MOST_S = 15.0, 300.0
PAGE_AGE = 0.02  # of a stage's age lies between two pages: the older, the less one step changes
PAGE_SHARE = 0.03  # of the time, at most, goes into drawing: on a CPU the ranks wait for those cores


class Live:
    """Metrics of a running stage as one progress bar and one page of charts, both updated in place."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.rows: list[dict[str, Any]] = []
        self.bar: Any = None
        self.page: Any = None
        self.began = time.monotonic()
        self.bar_at = self.page_due = 0.0

    def __call__(self, metrics: dict[str, Any]) -> None:
        """Take one optimizer step's metrics."""
        self.rows.append(metrics)
        now, last = time.monotonic(), metrics["step"] >= metrics["n_steps"]
        if now - self.bar_at >= PROGRESS_S or last:
            self.bar_at = now
            percent = 100.0 * metrics["step"] / metrics["n_steps"]
            line = watch.line(metrics)
            if self.bar is None:
                self.bar = create_progress_artifact(key=f"{self.stage}-progress", progress=percent, description=line)
            else:
                update_progress_artifact(self.bar, progress=percent, description=line)
        if now >= self.page_due or last:
            page = curves.page(self.stage, self.rows)
            if self.page is None:
                self.page = create_markdown_artifact(key=f"{self.stage}-loss", markdown=page)
            else:  # in place: a stage of days would else leave gigabytes of versions in the database
                get_client(sync_client=True).update_artifact(self.page, ArtifactUpdate(data=page))
            took = time.monotonic() - now
            self.page_due = now + max(PAGE_S, took / PAGE_SHARE, min((now - self.began) * PAGE_AGE, PAGE_MOST_S))


@flow(name="train", flow_run_name="train-{node[name]}", log_prints=False)
def train_flow(node: dict[str, Any], inputs: dict[str, Made], force: bool = False) -> Made | State:
    """Train one stage."""
    try:
        with gpu_slot():
            return build(node, inputs, force, on_metric=Live(node["name"]))
    except ValueError as error:
        return Failed(message=str(error))


train = through_flow("train", train_flow)
