"""Fixtures shared by the tests: a data root, a Prefect server, and no settings of the user's."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from filelock import FileLock

from solo.artifact import CHECKOUT

# Processes cost seconds to start and change no byte (test_recipe and test_train see to that with two).
ONE = {"SOLO_RANKS": "1", "SOLO_WORKERS": "1"}


os.environ.setdefault("WDS_SECURE", "1")  # webdataset would unpickle members else


hypothesis.settings.register_profile("solo", deadline=None)  # else a busy machine fails a property
hypothesis.settings.load_profile("solo")

# The files that take longest begin first, so that all processes end together.
LONGEST = ("test_server", "test_recipe", "test_train", "test_train_ends", "test_store", "test_cli")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files, and nothing inside them."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(autouse=True)
def _no_user_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ("SOLO_ROOT", "SOLO_SPECS", "SOLO_WORKERS", "SOLO_RANKS", "SOLO_DEEPSPEED", "SOLO_HOSTS")
    for name in (*line, "SOLO_DISTRIBUTOR", "SOLO_MACHINES", "SOLO_IMAGES", "SOLO_STORE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def clean_env(home: Path) -> dict[str, str]:
    """The environment of a user who set nothing but where Prefect's state lies."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "SOLO_"))}
    return env | {"SOLO_PREFECT_HOME": str(home)}


def settings_of(home: Path) -> dict[str, str]:
    """The settings a server's start wrote for the `prefect` command."""
    lines = (home / ".env").read_text().splitlines()
    return dict(entry.split("=", 1) for entry in lines if not entry.startswith("#"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a Prefect server, one for all processes of a test run, as it takes 6 % of a core."""
    own = tmp_path_factory.getbasetemp()
    home = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "prefect"
    env, users = clean_env(home), home / "users"
    with FileLock(home.with_suffix(".lock")):
        (users / str(os.getpid())).mkdir(parents=True)
        subprocess.run([sys.executable, "-m", "flows.server", "server"], cwd=CHECKOUT, env=env, check=True)
    yield env | settings_of(home)
    with FileLock(home.with_suffix(".lock")):
        (users / str(os.getpid())).rmdir()
        if not any(users.iterdir()):
            subprocess.run([sys.executable, "-m", "flows.server", "down"], cwd=CHECKOUT, env=env, check=True)


class Driver:
    """A process that has imported Prefect and makes flow runs one after the other: 5 s less for each of them."""

    def __init__(self, env: dict[str, str], log: Path) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("flow_runs.py"))],
            cwd=CHECKOUT,
            env=env | {"PYTHONPATH": str(CHECKOUT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("wb"),
            text=True,
        )

    def run(self, base: Path, *, extra: dict[str, str] | None = None, **parameters: Any) -> dict[str, Any]:
        """Final state and message of one run of the toy recipe under a test's folder."""
        assert self.process.stdin and self.process.stdout
        env = {"SOLO_ROOT": str(base / "root"), "SOLO_SPECS": str(base / "specs")} | ONE | (extra or {})
        asked = {"env": env, "parameters": parameters}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self.log.read_text()[-3000:]
        return dict(json.loads(answer))


@pytest.fixture(scope="session")
def driver(server: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """Where flow runs are made that need no process of their own."""
    started = Driver(server, tmp_path_factory.mktemp("driver") / "log")
    yield started
    assert started.process.stdin
    started.process.stdin.close()
    started.process.wait(30)


@pytest.fixture(scope="module")
def inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A plan of the tiny stage, of as many steps as the file says."""
    from tiny_stage import make_plan

    return make_plan(tmp_path_factory.mktemp("plan"), request.module.N_STEPS)


@pytest.fixture(scope="module")
def alone() -> Iterator[Any]:
    """What trains a job in this process and gives its metrics."""
    from tiny_stage import one_rank

    with one_rank() as run:
        yield run


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder of pictures that is published, its pin, and the artifact of a local copy, for all files about copies."""
    from published_pictures import made_locally

    return made_locally(tmp_path_factory.mktemp("local") / "specs")


@pytest.fixture
def site(published: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Where that folder is published."""
    from published_pictures import served

    with served(published[0]) as made:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{made.port}")
        yield made


@pytest.fixture
def quick_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses before a fetch is tried again, and none of the user's mirrors and proxies."""
    from solo.acquire import patience

    monkeypatch.setattr(patience, "FIRST_WAIT_S", 0.001)
    for name in ("HF_TOKEN", "HF_ENDPOINT", "AWS_ENDPOINT_URL", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[dict[str, str]]:
    """The environment that leads to a real server of objects, moto's, on the loopback; a bucket for each test file.

    One for all: moto has one state a process, and fsspec keeps the clients that it made.
    """
    for name in ("s3fs", "flask_cors"):
        pytest.importorskip(name, reason=f"{name} is not installed; pip install -e '.[dev]' brings it")
    moto = pytest.importorskip("moto.server", reason="moto[s3] is not installed; pip install -e '.[dev]' brings it")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    secrets = {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": "aws-secret-key"}
    yield {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"} | secrets
    server.stop()
