"""The flow `solo`: a whole recipe, or all of it up to one part, as one tracked run.

`solo/full-recipe` and the deployments of single parts are this flow with other defaults. Wiring only: which nodes,
what is reused, where the statistics are shown. The work is in `solo/`.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any, cast
from uuid import UUID

from prefect import flow, get_run_logger, runtime
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.settings import PREFECT_UI_URL
from prefect.states import Completed, Failed

from flows import acquire, curate, evaluate, filter, pack, report, shard, train
from flows.part import Made, publish, refs_of
from solo import line, runs
from solo.artifact import Artifact
from solo.curate import mix_diff
from solo.line import Node, Part, Settings
from solo.report import pages

TASKS = {
    "acquire": acquire.acquire,
    "filter": filter.filter,
    "shard": shard.shard,
    "curate": curate.curate,
    "pack": pack.pack,
    "train": train.train,
    "evaluate": evaluate.evaluate,
    "report": report.report,
}


@flow(name="solo", flow_run_name="{recipe}-to-{until}", log_prints=False)
def solo(
    recipe: str = "sample",
    until: Part = "report",
    only: list[Part] | None = None,
    force: list[Part] | None = None,
    plan: bool = False,
) -> State:
    """Make a recipe's artifacts up to `until`; whatever is intact shows as Cached.

    Args:
        recipe: Name of a file in datasets_spec/recipes/.
        until: Last part to make; the parts before it are checked and made where stale.
        only: Make just these parts, and fail if a part they read is stale.
        force: Parts to make again from nothing; what reads them runs only if their content changes.
        plan: Say what would run and why, and stop.
    """
    settings = Settings.from_env()
    try:
        nodes = line.nodes(recipe, settings.specs, settings.root)
        nodes = line.select(nodes, max(only, key=line.PARTS.index) if only else until)
        planned = line.plan(nodes, settings, force or ())
        line.check_only(planned, only)
    except ValueError as error:
        return Failed(message=str(error))
    create_markdown_artifact(key=f"{recipe}-plan", markdown=runs.plan_page(recipe, planned))
    if plan:
        return Completed(message=runs.plan_sentence(planned))
    return _run(recipe, nodes, settings, force or [])


def _run(recipe: str, nodes: list[Node], settings: Settings, force: list[Part]) -> State:
    """Make the nodes in order, show each part's statistics once its last node is there, and keep the run's record."""
    log, made, states = get_run_logger(), cast(dict[str, Made], {}), cast(dict[str, str], {})
    artifacts: dict[str, Artifact] = {}
    shown: dict[str, UUID] = {}
    for i, node in enumerate(nodes):
        inputs = {node_id: made[node_id] for node_id in node.inputs}
        state = _one(node, inputs, settings, node.part in force)
        if not state.is_completed():
            return Failed(message=f"{node.id}: {state.message}")
        made[node.id] = cast(Made, state.result())
        states[node.id] = "reused" if state.name == "Cached" or not made[node.id]["ran"] else "ran"
        artifacts[node.id] = refs_of(made)[node.id].open(settings.root)
        log.info("%s %s", node.id, states[node.id])
        if i + 1 == len(nodes) or nodes[i + 1].part != node.part:
            shown[node.part] = publish(
                recipe, node.part, [artifacts[n.id] for n in nodes if n.part == node.part], artifacts
            )
            if node.part == "curate":
                _show_changes(recipe, settings, [artifacts[n.id] for n in nodes if n.part == "curate"])
    overview = create_markdown_artifact(key=recipe, markdown=pages.overview(list(artifacts.values())))
    base = f"{PREFECT_UI_URL.value()}/v2"
    links = {"run": f"{base}/runs/flow-run/{runtime.flow_run.id}", "overview": f"{base}/artifacts/artifact/{overview}"}
    links |= {part: f"{base}/artifacts/artifact/{page}" for part, page in shown.items()}
    runs.write(settings.root, recipe, states, artifacts, links)
    return Completed(message=runs.sentence(states))


def _show_changes(recipe: str, settings: Settings, locks: list[Artifact]) -> None:
    """A page for each mix whose lock is not that of the recipe's last run."""
    for mix, page in mix_diff.changed(settings.root, runs.last(settings.root, recipe), locks):
        create_markdown_artifact(key=f"{recipe}-{mix}-diff", markdown=page, description=f"what changed in {mix}")


def _one(node: Node, inputs: dict[str, Made], settings: Settings, force: bool) -> State:
    """Make one node or find it made; the record of a damaged artifact is not believed."""
    stale = force or not line.intact(node, refs_of(inputs), settings)
    task = TASKS[node.part].with_options(refresh_cache=stale, result_storage=settings.root)
    return cast(State, task(node=asdict(node), inputs=inputs, force=force, return_state=True))


if __name__ == "__main__":
    arguments = dict(pair.split("=", 1) for pair in sys.argv[1:])
    lists = {k: v.split(",") for k, v in arguments.items() if k in ("only", "force")}
    ended = solo(**cast(Any, arguments | lists), return_state=True)
    if not ended.is_completed():
        sys.exit(f"error: {ended.message}")
