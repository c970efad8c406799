"""A real worker and two homes: cancel leaves a checkpoint and no process, a rerun goes on; homes do not collide."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from conftest import clean_env, settings_of

from solo import artifact
from solo.artifact import CHECKOUT
from solo.train import checkpoint

MANY = 15.0  # epochs: a stage that a fast machine is still training when the cancel arrives


def serve(action: str, env: dict[str, str], *, ok: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.server", action]
    done = subprocess.run(command, cwd=CHECKOUT, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is ok, done.stderr
    return done


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@dataclass
class Second:
    """A server with a worker beside the first; the worker's runs work in `base`."""

    home: Path
    base: Path
    env: dict[str, str]

    def prefect(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "prefect", *arguments]
        env = self.env | {"COLUMNS": "200"}
        done = subprocess.run(command, cwd=CHECKOUT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def start(self, deployment: str = "solo/train", **env: str) -> str:
        """What `prefect deployment run` asks for, without the seconds that the command takes to begin."""
        made = self.api(f"deployments/name/{deployment}")["id"]
        asked = {"parameters": {"recipe": "toy"}, "job_variables": {"env": env}, "state": {"type": "SCHEDULED"}}
        return str(self.api(f"deployments/{made}/create_flow_run", asked)["id"])

    def cancel(self, run_id: str) -> None:
        self.api(f"flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})

    def api(self, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(f"{self.env['PREFECT_API_URL']}/{path}", data)
        if body is not None:
            token = self.api("csrf-token?client=test")["token"]
            own = {"Content-Type": "application/json", "Prefect-Csrf-Client": "test", "Prefect-Csrf-Token": token}
            asked.headers.update(own)
        for _ in range(20):  # a server on SQLite that is busy answers 503, and Prefect's own client asks again
            try:
                with urllib.request.urlopen(asked, timeout=10) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise
                time.sleep(0.5)
        raise AssertionError(f"{path}: the server is busy for 10 s")

    def state(self, run_id: str) -> dict[str, Any]:
        return dict(self.api(f"flow_runs/{run_id}")["state"])

    def ended(self, run_id: str, *, within_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + within_s
        while (state := self.state(run_id))["type"] not in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            assert time.monotonic() < deadline, (state, (self.home / "worker.log").read_text()[-2000:])
            time.sleep(0.5)
        return state


@pytest.fixture(scope="module")
def second(server: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Second]:
    home, base = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("base")
    tiny.write_specs(base / "specs")
    sources = [{"source": s, "epochs": MANY} for s in ("toy-pictures", "toy-text")]
    tiny.edit(base / "specs", "mixes/toy.yaml", sources=sources)
    recipe = base / "specs" / "recipes" / "toy.yaml"
    recipe.write_text(recipe.read_text().replace("checkpoint_every_steps: 2", "checkpoint_every_steps: 400"))
    env = clean_env(home) | {"SOLO_ROOT": str(base / "root"), "SOLO_SPECS": str(base / "specs")}
    # A home whose server died without `down`: its port is the first server's by now.
    first = int(server["PREFECT_SERVER_API_PORT"])
    stale = {
        "port": first,
        "server": {"pid": dead_pid(), "created": 1.0},
        "worker": {"pid": dead_pid(), "created": 1.0},
    }
    (home / "solo-server.json").write_text(json.dumps(stale))
    serve("worker", env)
    yield Second(home, base, env | settings_of(home))
    serve("down", env)


@pytest.fixture(scope="module")
def gpu_pool(second: Second) -> Iterator[dict[str, str]]:
    """A worker of a pool of its own, as on a machine with GPUs; the setting that sends stages there."""
    second.api("work_pools/", {"name": "solo-gpu", "type": "process"})
    second.prefect("--no-prompt", "deploy", "--prefect-file", "infra/gpu.yaml", "--all")
    second.api("v2/concurrency_limits/", {"name": "gpu", "limit": 1})
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "solo-gpu", "--type", "process"]
    store = {"SOLO_STORE": f"file://{second.base}/store"}
    env, out = second.env | {"SOLO_GPU_LIMIT": "gpu"} | store, (second.home / "gpu.log").open("ab")
    worker = subprocess.Popen(command, cwd=CHECKOUT, env=env, stdout=out, stderr=out)
    yield {"SOLO_TRAIN_DEPLOYMENT": "train/gpu"}
    worker.terminate()
    worker.wait(30)


def processes_of(base: Path) -> list[str]:
    """Command lines and environments that name the folder, the server and its worker apart."""
    found = []
    for p in psutil.process_iter(["cmdline"]):
        command = " ".join(p.info["cmdline"] or [])
        if str(base) in command or ("prefect.engine" in command and str(base) in str(_environ(p))):
            found.append(command)
    return found


def _environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def wait_for(what: Any, *, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.timeout(600)
def test_cancel_stops_the_trainers_with_a_checkpoint_and_a_rerun_goes_on(
    second: Second, gpu_pool: dict[str, str]
) -> None:
    stage = second.base / "root" / "train" / "toy-stage"
    last = n_cancels = 0
    # On the GPU pool the stage is a deployment's run, started by the recipe's run; else a run inside it, without a
    # process of its own, which can be cancelled alone too.
    for elsewhere, alone in ((gpu_pool, False), ({}, False), ({}, True)):
        run_id, n, n_cancels = second.start(**elsewhere), last + 5, n_cancels + 1

        def trained(n: int = n) -> bool:
            return sum(len(path.read_bytes().splitlines()) for path in stage.glob("*/metrics.jsonl")) >= n

        assert wait_for(trained, within_s=150), (second.home / "worker.log").read_text()[-3000:]
        if elsewhere:
            assert second.api("v2/concurrency_limits/gpu")["active_slots"] == 1
        stage_id, _ = (r["id"] for r in second.api("flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 2}))
        second.cancel(stage_id if alone else run_id)
        assert wait_for(lambda: not processes_of(second.base), within_s=30), processes_of(second.base)
        state = second.ended(run_id, within_s=30)
        assert state["type"] == ("FAILED" if alone else "CANCELLED"), state
        assert not alone or "train/toy-stage: stopped on request, checkpoint step-" in state["message"]
        own = second.api(f"flow_runs/{stage_id}")
        assert (own["state_type"], own["deployment_id"] is not None) == ("CANCELLED", bool(elsewhere))
        work = next(stage.glob("*/.work"))
        found = checkpoint.newest(work / "checkpoints")
        assert found is not None and found.step >= n
        assert not (work.parent / "manifest.json").exists()
        said = (work.parent / "train.log").read_text()
        assert said.count('"event": "interrupted"') == n_cancels
        last = found.step
    assert second.api("v2/concurrency_limits/gpu")["active_slots"] == 0

    assert second.ended(second.start(**gpu_pool), within_s=300)["type"] == "COMPLETED"
    manifest = json.loads((work.parent / "manifest.json").read_text())
    metrics = [json.loads(line)["step"] for line in (work.parent / "metrics.jsonl").read_text().splitlines()]
    assert metrics == list(range(1, manifest["stats"]["n_steps"] + 1))
    # The ranks were launched again, and did not begin at the first step.
    assert [json.loads(line)["step"] for line in said.splitlines() if line.startswith('{"step')][-1] == last
    assert wait_for(lambda: not processes_of(second.base), within_s=30)

    again = second.start(**gpu_pool)
    assert second.ended(again, within_s=90)["type"] == "COMPLETED"
    ran = second.api("task_runs/filter", {"task_runs": {"flow_run_id": {"any_": [again]}}})
    assert {r["name"]: r["state"]["name"] for r in ran}["train/toy-stage"] == "Cached"


SPIKES = """
import json, sys, time
from pathlib import Path
from prefect import flow
from flows.train import Live

@flow(name="train")
def stage(event):
    live = Live("tiny")
    for step in (11, 12, 13):
        live.tell_sick(event | {"step": step}, Path(sys.argv[2]))
    time.sleep(60)

stage(json.loads(sys.argv[1]))
"""


def test_three_spikes_in_an_hour_are_events_that_cancel_the_stage(second: Second, tmp_path: Path) -> None:
    second.prefect("automation", "create", "--from-file", "infra/automations.yaml")
    event = {"kind": "spike", "done": "recorded", "loss": 9.0, "limit": 3.0, "packs": [44, 47], "sources": ["caption"]}
    event |= {"loss_by_source": {"caption": 9.0}, "worst": [{"key": "caption-1", "loss": 12.5}], "documents": [{}] * 5}
    command = [sys.executable, "-c", SPIKES, json.dumps(event), str(tmp_path)]
    with subprocess.Popen(command, cwd=CHECKOUT, env=second.env, stderr=subprocess.DEVNULL) as process:
        asked = {"flows": {"name": {"any_": ["train"]}}, "flow_runs": {"state": {"type": {"any_": ["CANCELLING"]}}}}
        found = wait_for(lambda: second.api("flow_runs/filter", asked), within_s=40)
        process.kill()
    assert found and "Automation" in second.api("flow_runs/filter", asked)[0]["state"]["message"]
    prefix = {"filter": {"event": {"prefix": ["solo.train."]}}}
    assert wait_for(lambda: second.api("events/filter", prefix)["total"] == 3, within_s=40)  # kept a batch at a time
    seen = second.api("events/filter", prefix)["events"]
    assert {e["event"] for e in seen} == {"solo.train.loss_spike"}
    assert {e["resource"]["prefect.resource.id"] for e in seen} == {"solo.stage.tiny"}
    assert sorted(e["payload"]["step"] for e in seen) == [11, 12, 13]
    assert seen[0]["payload"]["n_documents"] == 5 and seen[0]["payload"]["worst"] == event["worst"]


@pytest.mark.timeout(300)
def test_a_recipe_and_a_pool_that_share_nothing_but_a_store(second: Second, gpu_pool: dict[str, str]) -> None:
    """The pool has the stage of the test before, if that ran; where it is known to nobody, test_store.py trains it."""
    store, other = second.base / "store", second.base / "other"
    shutil.rmtree(store, ignore_errors=True)
    env = gpu_pool | {"SOLO_STORE": f"file://{store}", "SOLO_ROOT": str(other)}
    state = second.ended(second.start(**env), within_s=200)
    assert state["type"] == "COMPLETED", (state, (second.home / "gpu.log").read_text()[-3000:])
    (ours,) = other.glob("train/toy-stage/*/manifest.json")
    theirs = second.base / "root" / ours.relative_to(other)
    assert ours.read_bytes() == theirs.read_bytes() and artifact.damage(ours.parent, deep=True) is None
    found = sorted(path.relative_to(store).parts[:2] for path in store.glob("*/*/*/manifest.json"))
    assert found == [("pack", "toy"), ("shard", "toy-pictures"), ("shard", "toy-text"), ("train", "toy-stage")]
    assert not list(store.glob("*/*/*/.work"))


def test_a_failed_run_is_retried_once_its_cause_is_mended(second: Second) -> None:
    spec = second.base / "specs" / "sources" / "toy-text.yaml"
    right = spec.read_text()
    tiny.edit(second.base / "specs", "sources/toy-text.yaml", revision="sha256:" + "1" * 64)
    run_id = second.start("solo/filter")
    failed = second.ended(run_id, within_s=90)
    assert failed["type"] == "FAILED" and "acquire/toy-text" in failed["message"], failed
    spec.write_text(right)
    second.prefect("flow-run", "retry", run_id)
    assert wait_for(lambda: second.state(run_id)["type"] == "COMPLETED", within_s=90), second.state(run_id)


def test_a_second_home_has_a_port_of_its_own_and_is_stopped_alone(server: dict[str, str], second: Second) -> None:
    ports = [int(env["PREFECT_SERVER_API_PORT"]) for env in (server, second.env)]
    assert ports[0] != ports[1]
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert serve("down", second.env).stdout == "stopped: worker, server\n"
        assert not healthy(second.env["PREFECT_API_URL"]) and healthy(server["PREFECT_API_URL"])
        # A pid that another program was given since is not ours to stop.
        state = json.loads((second.home / "solo-server.json").read_text())
        state["worker"] = {"pid": stranger.pid, "created": 1.0}
        (second.home / "solo-server.json").write_text(json.dumps(state))
        assert serve("down", second.env).stdout == "stopped: nothing was running\n"
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_taken_port_is_passed_over_unless_it_was_asked_for(tmp_path: Path) -> None:
    env = clean_env(tmp_path)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        (tmp_path / "solo-server.json").write_text(json.dumps({"port": taken}))
        code = "from flows import server; server.DEFAULT_PORT = server._state()['port']; print(server.port())"
        command = [sys.executable, "-c", code]
        shown = subprocess.run(command, cwd=CHECKOUT, env=env, capture_output=True, text=True, check=True).stdout
        assert int(shown) not in (taken, 0)
        error = serve("server", env | {"SOLO_PORT": str(taken)}, ok=False).stderr
        assert error == f"error: SOLO_PORT={taken} is in use by another program; give another port, or unset it\n"
