"""A real worker and two homes: cancel leaves a checkpoint and no process, a rerun goes on; homes do not collide."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from conftest import clean_env, settings_of

from solo import checkpoint
from solo.line import CHECKOUT

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

    def start(self, deployment: str = "solo/train") -> str:
        shown = self.prefect("deployment", "run", deployment, "--param", "recipe=toy")
        return next(line.split(":", 1)[1].strip() for line in shown.splitlines() if "UUID" in line)

    def state(self, run_id: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.env['PREFECT_API_URL']}/flow_runs/{run_id}", timeout=10) as answer:
            return dict(json.loads(answer.read())["state"])

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
def test_cancel_stops_the_trainers_with_a_checkpoint_and_a_rerun_goes_on(second: Second) -> None:
    stage = second.base / "root" / "train" / "toy-stage"
    run_id = second.start()

    def steps() -> int:
        return sum(len(path.read_bytes().splitlines()) for path in stage.glob("*/metrics.jsonl"))

    assert wait_for(lambda: steps() >= 5, within_s=150), (second.home / "worker.log").read_text()[-3000:]
    second.prefect("flow-run", "cancel", run_id)
    assert wait_for(lambda: not processes_of(second.base), within_s=30), processes_of(second.base)
    state = second.ended(run_id, within_s=30)
    assert state["type"] == "CANCELLED", state
    listed = second.prefect("flow-run", "ls")
    assert listed.count("CANCELLED") == 2 and "RUNNING" not in listed  # the recipe's run and the stage's

    work = next(stage.glob("*/.work"))
    found = checkpoint.newest(work / "checkpoints")
    assert found is not None and found.step >= 5
    assert not (work.parent / "manifest.json").exists()
    said = (work.parent / "train.log").read_text()
    assert '"event": "interrupted"' in said

    assert second.ended(second.start(), within_s=300)["type"] == "COMPLETED"
    manifest = json.loads((work.parent / "manifest.json").read_text())
    metrics = [json.loads(line)["step"] for line in (work.parent / "metrics.jsonl").read_text().splitlines()]
    assert metrics == list(range(1, manifest["stats"]["n_steps"] + 1))
    # The ranks were launched twice, and the second time did not begin at the first step.
    assert [json.loads(line)["step"] for line in said.splitlines() if line.startswith('{"step')][-1] == found.step
    assert wait_for(lambda: not processes_of(second.base), within_s=30)


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
