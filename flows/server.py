"""The local Prefect server of this checkout: start it, its worker and the deployments; stop them by pid.

State lives in `.solo/prefect/` (SQLite, logs, pids); the API's address is written to `.env`, where any `prefect`
command run in the checkout finds it. Binds to 127.0.0.1 only. Two homes never share a port, a pid or a database.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from solo.artifact import CHECKOUT

HOME = Path(os.environ.get("SOLO_PREFECT_HOME", CHECKOUT / ".solo" / "prefect")).resolve()
STATE = HOME / "solo-server.json"
POOL = "solo-local"
DATABASE = "prefect.db"
DEFAULT_PORT = 4200
START_S = 120.0
STOP_S = 40.0  # longer than a stage needs for its checkpoint (solo.train.launch.GRACE_S)
MARK = "# written by `solo up`"


def port() -> int:
    """$SOLO_PORT, else the port of last time, else 4200, else a free one; a taken $SOLO_PORT is an error."""
    asked = os.environ.get("SOLO_PORT")
    if asked:
        if not asked.isdigit() or not 0 < int(asked) < 2**16:
            raise ValueError(f"SOLO_PORT is {asked!r}, not a port number; give one from 1 to 65535, or unset it")
        if not _free(int(asked)):
            raise ValueError(f"SOLO_PORT={asked} is in use by another program; give another port, or unset it")
        return int(asked)
    for candidate in (_state().get("port"), DEFAULT_PORT):
        if candidate and _free(candidate):
            return int(candidate)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _free(number: int) -> bool:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", number))
        except OSError:
            return False
    return True


def _state() -> dict[str, Any]:
    try:
        return dict(json.loads(STATE.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def environment(number: int) -> dict[str, str]:
    """Settings of server, worker and command line; the reasons are in infra/README.md."""
    return {
        "PREFECT_HOME": str(HOME),
        "PREFECT_API_URL": f"http://127.0.0.1:{number}/api",
        "PREFECT_UI_URL": f"http://127.0.0.1:{number}",
        "PREFECT_SERVER_API_PORT": str(number),
        "PREFECT_SERVER_UI_API_URL": "/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "solo",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "DO_NOT_TRACK": "1",
    }


def alive(name: str) -> psutil.Process | None:
    """The process started under this name, if it still is that process (a pid may have been given to another)."""
    entry = _state().get(name)
    if not entry:
        return None
    try:
        process = psutil.Process(entry["pid"])
        same = abs(process.create_time() - entry["created"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return None
    return process if same else None


def up(*, worker: bool) -> str:
    """Start what is not running yet; returns the UI's address."""
    HOME.mkdir(parents=True, exist_ok=True)
    with FileLock(HOME / "up.lock"):  # two commands at once would each start a server
        state = _state()
        if alive("server") is None:
            _stop("worker")  # it calls the server that is gone
            # Two homes that start at once would both find a port free, and one use the other's server.
            with FileLock(Path(tempfile.gettempdir()) / f"solo-server-{os.getuid()}.lock"):
                state = {"port": port()}
                _write_env(environment(state["port"]))
                _start("server", ["server", "start", "--host", "127.0.0.1", "--port", str(state["port"])], state)
                _wait(state["port"])
        env = os.environ | environment(state["port"])
        if worker and alive("worker") is None:
            _prefect(env, "work-pool", "create", POOL, "--type", "process", "--overwrite")
            _prefect(env, "deploy", "--prefect-file", "infra/prefect.yaml", "--all")
            _start("worker", ["worker", "start", "--pool", POOL, "--type", "process"], state)
    return f"http://127.0.0.1:{state['port']}"


def _start(name: str, arguments: list[str], state: dict[str, Any]) -> None:
    with (HOME / f"{name}.log").open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *arguments],
            cwd=CHECKOUT,
            env=os.environ | environment(state["port"]),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    state[name] = {"pid": process.pid, "created": psutil.Process(process.pid).create_time()}
    STATE.write_text(json.dumps(state), encoding="utf-8")


def _wait(number: int) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{number}/api/health", timeout=2):
                return
        except OSError:
            if alive("server") is None:
                break
            time.sleep(0.25)
    tail = (HOME / "server.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    raise ValueError(f"the Prefect server did not answer on port {number}; see {HOME / 'server.log'} {tail}")


def _prefect(env: dict[str, str], *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
        check=False,
        cwd=CHECKOUT,
        env=env,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise ValueError(f"prefect {' '.join(arguments)} failed: {' '.join(last)}")


def _write_env(settings: dict[str, str]) -> None:
    """Replace our lines of `.env`, keep the user's."""
    path = CHECKOUT / ".env" if HOME.is_relative_to(CHECKOUT) else HOME / ".env"
    old = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept = [line for line in old if not line.startswith(("PREFECT_", "DO_NOT_TRACK", MARK))]
    path.write_text("\n".join([*kept, MARK, *(f"{k}={v}" for k, v in settings.items())]) + "\n", encoding="utf-8")


def down() -> list[str]:
    """Stop worker, then server, with everything they started; returns the names of what was stopped."""
    return [name for name in ("worker", "server") if _stop(name)]


def _stop(name: str) -> bool:
    """SIGTERM to a process of ours and its children, so that a running stage makes its checkpoint; then SIGKILL."""
    process = alive(name)
    if process is None:
        return False
    tree = [*process.children(recursive=True), process]
    for p in [*process.children(), process]:
        with suppress(psutil.NoSuchProcess):
            p.terminate()
    _, left = psutil.wait_procs(tree, timeout=STOP_S)
    for p in left:
        with suppress(psutil.NoSuchProcess):
            p.kill()
    return True


def run(module: str, arguments: list[str]) -> None:
    """Become `python -m MODULE`, with the settings that lead to this home's server whatever `.env` says."""
    number = _state().get("port")
    if number is None or alive("server") is None:
        raise ValueError(f"no Prefect server runs for {HOME}; `solo up` starts it")
    os.chdir(CHECKOUT)
    command = [sys.executable, "-m", module, *arguments]
    os.execve(sys.executable, command, os.environ | environment(number))


def main(action: str, arguments: list[str]) -> None:
    """Start `worker` (with server and deployments) or `run` (a recipe), speak by `prefect` or `shown`, or go `down`."""
    try:
        if action == "down":
            sys.stdout.write(f"stopped: {', '.join(down()) or 'nothing was running'}\n")
        elif action == "prefect":
            run("prefect", arguments)
        elif action == "shown":
            if (HOME / DATABASE).exists():  # else nothing was ever shown
                run("flows.shown", arguments)
        else:
            sys.stdout.write(f"Prefect UI: {up(worker=action == 'worker')}\n")
            sys.stdout.flush()
            if action == "run":
                os.environ["PREFECT_LOGGING_SETTINGS_PATH"] = str(CHECKOUT / "infra" / "console.yml")
                run("flows.recipe", arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
