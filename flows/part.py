"""One node of the line as a cached Prefect task, and its statistics as Prefect artifacts.

The cache key is the path of a record inside the artifact's own folder, so deleting the folder deletes the cache
entry; `solo.artifact.damage` decides whether the record may be believed. A user's mistake (ValueError) fails the run
with one line; anything else raises with its traceback, because it is ours to mend.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, cast
from uuid import UUID

from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.states import Failed

from flows import elsewhere as away
from solo import line
from solo.artifact import RECORD, Artifact
from solo.line import Node, Ref, Settings
from solo.report import pages
from solo.store import handover

logging.getLogger("solo").setLevel(logging.INFO)  # Prefect forwards the lines of a part, but only from WARNING on
Made = dict[str, Any]  # {"ref": Ref as a dict, "ran": bool}: JSON, because a worker reads it back


def record_key(_context: TaskRunContext, args: dict[str, Any]) -> str:
    """Path of the cache record below the data root."""
    node, refs = Node(**args["node"]), refs_of(args["inputs"])
    return f"{node.id}/{line.fingerprint(node, refs)}/{RECORD}"


def refs_of(inputs: dict[str, Made]) -> dict[str, Ref]:
    """Node id -> Ref, from what upstream tasks returned."""
    return {node_id: Ref(**made["ref"]) for node_id, made in inputs.items()}


def build(node: dict[str, Any], inputs: dict[str, Made], force: bool, **hooks: Callable[..., Any]) -> Made | State:
    """Body of every part's task: make the artifact, or say in one line what the user can mend."""
    try:
        ref, ran = line.make_node(Node(**node), refs_of(inputs), Settings.from_env(), force=force, **hooks)
    except ValueError as error:
        return Failed(message=str(error))
    return {"ref": asdict(ref), "ran": ran}


def part_task(part: str, body: Callable[..., Made | State] = build, **options: Any) -> Any:  # noqa: ANN401
    """The cached task of one part, called directly, so that SIGTERM reaches the work; `body` is that work."""

    def run(node: dict[str, Any], inputs: dict[str, Made], force: bool) -> Made | State:
        return body(node, inputs, force)

    return cast(Any, task)(
        run,
        name=part,
        task_run_name=part + "/{node[name]}",
        cache_policy=CacheKeyFnPolicy(cache_key_fn=record_key),
        persist_result=True,
        result_serializer="json",
        **options,
    )


def through_flow(part: str, inner: Any) -> Any:  # noqa: ANN401 - a Flow and a Task
    """The cached task of a part whose work is a flow: reused it costs milliseconds, a flow run costs a second."""

    def run(node: dict[str, Any], inputs: dict[str, Made], force: bool) -> Made | State:
        elsewhere = os.environ.get(f"SOLO_{part.upper()}_DEPLOYMENT")
        parameters = {"node": node, "inputs": inputs, "force": force}
        if elsewhere is None:
            state = inner(**parameters, return_state=True)
            return cast(Made, state.result()) if state.is_completed() else Failed(message=state.message)
        try:
            failed = _handed(elsewhere, parameters)
        except ValueError as error:  # of the store
            failed = Failed(message=str(error))
        return failed or cast(Made, build(node, inputs, False)) | {"ran": True}

    return part_task(part, run)


def _handed(deployment: str, parameters: dict[str, Any]) -> State | None:
    """Have a part made by a deployment's run; the state of what went wrong, None once the artifact is here."""
    node, refs, settings = Node(**parameters["node"]), refs_of(parameters["inputs"]), Settings.from_env()
    fingerprint = line.fingerprint(node, refs)
    if not parameters["force"] and handover.take(node, fingerprint, settings):
        return None
    handover.give(refs, settings)
    state = away.run(deployment, parameters)
    if not state.is_completed():
        return Failed(message=f"{deployment}: {state.message}")
    handover.take(node, fingerprint, settings)
    if line.intact(node, refs, settings):
        return None
    share = "share the data root, or set SOLO_STORE on both machines"
    return Failed(message=f"{deployment} completed, but {settings.root} lacks its artifact; {share}")


def publish(recipe: str, part: str, artifacts: Sequence[Artifact], inputs: dict[str, Artifact]) -> UUID:
    """Table and page of one part, from manifests and files: cached parts show their statistics too. The page's id."""
    create_table_artifact(
        key=f"{recipe}-{part}-table",
        table=pages.table(part, list(artifacts)),
        description=f"{part} of {recipe}",
    )
    for name, page in pages.details(part, list(artifacts), inputs).items():
        create_markdown_artifact(key=f"{recipe}-{part}-{name}", markdown=page, description=f"{part} of {name}")
    page = pages.page(part, list(artifacts), inputs=inputs)
    return cast(
        UUID, create_markdown_artifact(key=f"{recipe}-{part}", markdown=page, description=f"{part} of {recipe}")
    )
