"""The whole line through Prefect, on a real local server: reuse, early cut-off, damage, force, kills, cancel.

One tiny recipe drives every part; each case starts from a copy of the finished data root.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny
from conftest import ONE, Driver

from solo import line, runs
from solo.artifact import CHECKOUT, damage, read_manifest
from solo.line import Settings

ALL = ["acquire", "filter", "shard", "curate", "pack", "train", "evaluate", "report"]


def run(driver: Driver, base: Path, **parameters: object) -> None:
    ended = driver.run(base, **parameters)
    assert ended["completed"], ended["message"] + driver.log.read_text()[-3000:]


def states(base: Path) -> dict[str, set[str]]:
    """Part -> what its artifacts did in the last run."""
    record = json.loads((base / "root" / "runs" / "toy.json").read_text())
    found: dict[str, set[str]] = {}
    for node, state in record["states"].items():
        found.setdefault(node.split("/")[0], set()).add(state)
    return found


def ran(base: Path) -> list[str]:
    return [part for part in ALL if "ran" in states(base)[part]]


def digests(base: Path) -> dict[str, str]:
    _, manifests = runs.read(base / "root", "toy")
    return {m.id: m.digest for m in manifests if m.part != "report"}


@pytest.fixture(scope="module")
def finished(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("finished")
    tiny.write_specs(base / "specs")
    run(driver, base)
    assert ran(base) == ALL
    return base


@pytest.fixture
def base(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "root", tmp_path / "root")
    shutil.copytree(finished / "specs", tmp_path / "specs")
    return tmp_path


def folder(base: Path, node: str) -> Path:
    record = json.loads((base / "root" / "runs" / "toy.json").read_text())
    return base / "root" / node / record["artifacts"][node]


def take_more(base: Path) -> None:
    sources = [{"source": "toy-pictures", "epochs": 2.5}, {"source": "toy-text", "epochs": 1.0}]
    tiny.edit(base / "specs", "mixes/toy.yaml", sources=sources)


def change_text_data(base: Path) -> None:
    path = base / "specs" / "data" / "text" / "part_0.jsonl"
    path.write_text(path.read_text().replace("cat", "dog"))
    tiny.pin(base / "specs")


CASES = {
    "again": (lambda b: None, {}, []),
    "curate's spec changed": (
        take_more,
        {},
        ["curate", "pack", "train", "evaluate", "report"],
    ),
    # Whole epochs draw nothing by chance: another seed gives the lock it gave before.
    "curate's spec changed, same bytes out": (
        lambda b: tiny.edit(b / "specs", "mixes/toy.yaml", seed=5),
        {},
        ["curate"],
    ),
    "filter's spec changed, same bytes out": (
        lambda b: tiny.edit(b / "specs", "sources/toy-text.yaml", filter__keep__length="n_chars >= 11"),
        {},
        ["filter"],
    ),
    "one shard deleted": (
        lambda b: next(folder(b, "shard/toy-text").glob("shards/*.tar")).unlink(),
        {},
        ["shard"],
    ),
    "output directory of curate removed": (lambda b: shutil.rmtree(folder(b, "curate/toy")), {}, ["curate"]),
    "force, same content": (lambda b: None, {"force": ["acquire"]}, ["acquire"]),
    "data changed": (change_text_data, {}, ALL),
    "cache records gone, artifacts there": (
        lambda b: [p.unlink() for p in (b / "root").rglob("prefect-result.json")],
        {},
        [],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_runs_again(case: str, driver: Driver, base: Path) -> None:
    change, parameters, expected = CASES[case]
    before = digests(base)
    change(base)
    run(driver, base, **parameters)
    assert ran(base) == expected
    if "report" not in expected:
        assert digests(base) == before


def test_evaluation_holds_a_slot_as_training_does(driver: Driver, base: Path) -> None:
    ended = driver.run(base, extra={"SOLO_GPU_LIMIT": "no-such"}, force=["evaluate"])
    assert not ended["completed"]
    assert re.search(
        r"^evaluate/\S+: SOLO_GPU_LIMIT: .*`prefect gcl create no-such --limit 1` makes it", ended["message"]
    )


def test_counts_close_and_a_broken_sum_is_seen(finished: Path, base: Path) -> None:
    from solo.report.part import summarise

    _, manifests = runs.read(finished / "root", "toy")
    summary = summarise(manifests)
    assert summary["closes"], [c for c in summary["checks"] if not c["ok"]]
    path = folder(base, "shard/toy-text") / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["counts"]["kept"] -= 1
    path.write_text(json.dumps(manifest))
    broken = summarise(runs.read(base / "root", "toy")[1])
    assert not broken["closes"]


@pytest.mark.parametrize("part", ["filter", "shard", "train"])
def test_killed_at_a_random_moment_then_the_same_bytes(
    part: str, server: dict[str, str], driver: Driver, base: Path
) -> None:
    truth = digests(base)
    shutil.rmtree(base / "root" / part)
    env = server | {"SOLO_ROOT": str(base / "root"), "SOLO_SPECS": str(base / "specs")} | ONE
    env["SOLO_WORKERS"] = "2"  # a pool's processes must go too
    child = subprocess.Popen(
        [sys.executable, "-m", "flows.recipe", "recipe=toy"],
        cwd=CHECKOUT,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    begun = "*/*/.work/checkpoints/step-*" if part == "train" else "*/*/.work"
    deadline = time.monotonic() + 90
    while not list((base / "root" / part).glob(begun)):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.01)
    time.sleep(random.random() / 5)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert no_process_of(base, within_s=20)
    run(driver, base)
    assert digests(base) == truth


def no_process_of(base: Path, *, within_s: float) -> bool:
    """Whether every process that names this test's folder is gone in time."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        alive = [p for p in psutil.process_iter(["cmdline"]) if str(base) in " ".join(p.info["cmdline"] or [])]
        if not alive:
            return True
        time.sleep(0.2)
    return False


def test_one_and_two_workers_give_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    truth = {node: digest for node, digest in digests(finished).items() if not node.startswith(("train", "evaluate"))}
    for workers in (1, 2):
        settings = Settings(tmp_path / str(workers), finished / "specs", workers)
        refs: dict[str, line.Ref] = {}
        for node in line.select(line.nodes("toy", settings.specs), "pack"):
            refs[node.id], _ = line.make_node(node, refs, settings)
        assert {i: r.digest for i, r in refs.items()} == truth


def test_artifacts_are_whole_to_the_byte(finished: Path) -> None:
    for path in (finished / "root").glob("*/*/*/manifest.json"):
        manifest = read_manifest(path.parent)
        assert manifest is not None
        assert damage(path.parent, deep=True) is None
        assert not (path.parent / ".work").exists()
