"""Runs: what a run will do, said before; what it did, kept after.

In: planned nodes or finished artifacts. Out: sentences, a plan page, and `ROOT/runs/<recipe>.json`, the record that
`solo report` reads. Records say which artifacts a run ended with; they bear no identity.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from solo.artifact import Artifact, Manifest, read_manifest, write_atomic
from solo.line import Planned

MOST_ROWS = 12  # of one part and action that a plan lists; --json has all
REASONS = {"run": "each for its own reason, see --json", "unknown": "reads what runs before", "reuse": "in place"}


def plan_json(recipe: str, planned: Sequence[Planned]) -> dict[str, Any]:
    """The plan for machines."""
    parts = []
    for p in planned:
        row: dict[str, Any] = {"part": p.part, "name": p.name, "action": p.action, "because": p.because}
        if p.ref:
            row["fingerprint"] = p.ref.fingerprint
        if p.last:
            row["last"] = {
                "fingerprint": p.last.fingerprint,
                "seconds": p.last.record["seconds"],
                "in": p.last.counts["in"],
                "kept": p.last.counts["kept"],
                "tokens": p.last.stats.get("n_tokens"),
                "bytes": sum(f["bytes"] for f in p.last.files),
            }
        parts.append(row)
    return {"recipe": recipe, "parts": parts, "estimate": estimate(planned)}


def estimate(planned: Sequence[Planned]) -> dict[str, Any]:
    """Seconds and bytes of what may run, from the artifacts these parts made last; parts never made are counted."""
    todo = [p for p in planned if p.action != "reuse"]
    known = [p.last for p in todo if p.last]
    return {
        "seconds": round(sum(float(m.record["seconds"]) for m in known), 1),
        "bytes": sum(f["bytes"] for m in known for f in m.files),
        "parts_without_a_past": len(todo) - len(known),
    }


def plan_sentence(planned: Sequence[Planned]) -> str:
    """One line: how many artifacts are reused, run, or depend on what runs."""
    n = Counter(p.action for p in planned)
    if not n["run"]:
        return f"nothing to do: all {n['reuse']} artifacts are in place"
    past = estimate(planned)
    seconds = f"about {past['seconds']:.0f} s by their last runs" if past["seconds"] else "no earlier run to judge by"
    if past["seconds"] and past["parts_without_a_past"]:
        seconds += f", without the {past['parts_without_a_past']} that never ran"
    return f"{n['run']} to run, {n['unknown']} depend on those, {n['reuse']} reused; {seconds}"


def plan_rows(planned: Sequence[Planned], most: int = MOST_ROWS) -> list[tuple[str, str, str, str]]:
    """(part, name, action, because) of each node; those of a part that share an action are one row where many."""
    rows: list[tuple[str, str, str, str]] = []
    for (part, action), group in groupby(planned, key=lambda p: (p.part, p.action)):
        same = list(group)
        if len(same) <= most:
            rows += [(p.part, p.name, p.action, p.because) for p in same]
            continue
        reasons = {p.because for p in same}
        because = reasons.pop() if len(reasons) == 1 else REASONS[action]
        rows.append((part, f"{same[0].name} and {len(same) - 1} more", action, because))
    return rows


def plan_page(recipe: str, planned: Sequence[Planned]) -> str:
    """The plan as a page of the UI."""
    rows = [f"| {part} | {name} | {action} | {_cell(because)} |" for part, name, action, because in plan_rows(planned)]
    head = [
        f"# Plan of `{recipe}`",
        "",
        plan_sentence(planned),
        "",
        "| part | name | action | because |",
        "|---|---|---|---|",
    ]
    return "\n".join(head + rows) + "\n"


def _cell(value: str) -> str:
    """Text as a table cell: no column breaks, no HTML."""
    return value.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("\n", " ")


def sentence(states: Mapping[str, str]) -> str:
    """One line: how many artifacts a run made and how many it reused."""
    n = Counter(states.values())
    return f"{n['ran']} artifacts made, {n['reused']} reused"


def write(
    root: Path,
    recipe: str,
    states: Mapping[str, str],
    artifacts: Mapping[str, Artifact],
    links: Mapping[str, str],
) -> None:
    """Keep what a run ended with."""
    record = {
        "recipe": recipe,
        "finished_at": time.time(),
        "states": dict(states),
        "artifacts": {node: a.manifest.fingerprint for node, a in artifacts.items()},
        "links": dict(links),
    }
    write_atomic(root / "runs" / f"{recipe}.json", json.dumps(record, indent=1).encode())


def read(root: Path, recipe: str) -> tuple[dict[str, Any], list[Manifest]]:
    """The last run's record and the manifests of the artifacts it ended with."""
    path = root / "runs" / f"{recipe}.json"
    if not path.is_file():
        raise ValueError(
            f"{path}: no finished run of recipe {recipe!r} under this data root; `solo run {recipe}` first"
        )
    record = json.loads(path.read_text(encoding="utf-8"))
    manifests = []
    for node, fingerprint in record["artifacts"].items():
        manifest = read_manifest(root / node / fingerprint)
        if manifest is None:
            raise ValueError(f"{node}/{fingerprint} is gone from {root}; `solo run {recipe}` makes it again")
        manifests.append(manifest)
    return record, manifests
