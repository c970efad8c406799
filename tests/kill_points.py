"""SIGKILL a run at random moments in every part, run again, compare content digests with an undisturbed run's.

    .venv/bin/python tests/kill_points.py --recipe sample --kills 32

Needs a finished run of the recipe under $SOLO_ROOT and a running server (`make recipe` leaves both). Prints one line a
kill and one JSON line at the end; exit code 1 if a digest differs, a run does not finish, or a process outlives.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from solo import runs
from solo.artifact import CHECKOUT
from solo.line import PARTS, Settings

COMMAND = [sys.executable, "-m", "flows.recipe"]
LEFT_S = 30.0


def digests(root: Path, recipe: str) -> dict[str, str]:
    return {m.id: m.digest for m in runs.read(root, recipe)[1]}


def run(recipe: str) -> None:
    done = subprocess.run([*COMMAND, f"recipe={recipe}"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"a run after a kill did not finish:\n{done.stderr[-2000:]}")


def kill_once(root: Path, recipe: str, part: str, seconds: float) -> tuple[float, bool]:
    """Start the recipe with one part's artifacts gone; SIGKILL its group `seconds` after that part began.

    Returns when it was killed and whether the part was unfinished then.
    """
    record, _ = runs.read(root, recipe)
    mine = [root / node / fp for node, fp in record["artifacts"].items() if node.startswith(part + "/")]
    for path in mine:
        shutil.rmtree(path)
    if part == "filter":
        shutil.rmtree(root / "signals", ignore_errors=True)  # else there is nothing left to measure
    child = subprocess.Popen(
        [*COMMAND, f"recipe={recipe}"],
        cwd=CHECKOUT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while child.poll() is None and not any((p / ".work").exists() for p in mine):
        time.sleep(0.005)
    time.sleep(seconds)
    unfinished = not all((p / "manifest.json").exists() for p in mine)
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return seconds, unfinished


def left_over(root: Path, within_s: float) -> list[str]:
    """Command lines of processes that still work on this root after the time given."""
    deadline = time.monotonic() + within_s
    alive: list[str] = []
    while time.monotonic() < deadline:
        lines = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
        alive = [x for x in lines if str(root) in x and "kill_points" not in x]
        if not alive:
            return []
        time.sleep(0.2)
    return alive


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--recipe", default="sample")
    options.add_argument("--kills", type=int, default=32)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--parts", nargs="*", default=list(PARTS))
    asked = options.parse_args()
    root, rng = Settings.from_env().root, random.Random(asked.seed)
    env = CHECKOUT / ".env"
    for entry in env.read_text().splitlines() if env.is_file() else []:
        if "=" in entry and not entry.startswith("#"):
            os.environ.setdefault(*entry.split("=", 1))
    truth = digests(root, asked.recipe)
    spans: dict[str, float] = {}
    for manifest in runs.read(root, asked.recipe)[1]:
        spans[manifest.part] = spans.get(manifest.part, 0.0) + manifest.record["seconds"]
    failures, inside = [], 0
    for i in range(asked.kills):
        part = asked.parts[i % len(asked.parts)]
        at, unfinished = kill_once(root, asked.recipe, part, rng.uniform(0, spans[part] * 0.95))
        inside += unfinished
        left = left_over(root, LEFT_S)
        run(asked.recipe)
        now = digests(root, asked.recipe)
        wrong = [node for node in truth if now.get(node) != truth[node]]
        if wrong or left:
            failures.append({"part": part, "at_s": round(at, 2), "wrong": wrong, "left": left})
        sys.stdout.write(
            f"{i + 1:3d} {part:<9} +{at:6.2f} s unfinished={unfinished} {'FAIL' if wrong or left else 'ok'}\n"
        )
        sys.stdout.flush()
    print(json.dumps({"kills": asked.kills, "inside_a_part": inside, "failures": failures}))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
