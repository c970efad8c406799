"""The local Prefect server of this checkout: start it, its worker and the deployments; stop them by pid.

State lives in `.solo/prefect/` (SQLite, logs, pids); the API's address is written to `.env`, where any `prefect`
command run in the checkout finds it. Binds to 127.0.0.1 only.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from solo.line import CHECKOUT

HOME = Path(os.environ.get("SOLO_PREFECT_HOME", CHECKOUT / ".solo" / "prefect")).resolve()
STATE = HOME / "solo-server.json"
POOL = "solo-local"
DEFAULT_PORT = 4200
START_S = 120.0
MARK = "# written by `solo up`"


def port() -> int:
    """$SOLO_PORT, else the port of last time, else 4200, else a free one; a taken $SOLO_PORT is an error."""
    asked = os.environ.get("SOLO_PORT")
    if asked:
        if not asked.isdigit() or not _free(int(asked)):
            raise ValueError(f"SOLO_PORT={asked} is in use or no port number; free it or choose another SOLO_PORT")
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
        return json.loads(STATE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
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
    state = _state()
    if alive("server") is None:
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
    stopped = []
    for name in ("worker", "server"):
        process = alive(name)
        if process is None:
            continue
        tree = [*process.children(recursive=True), process]
        process.terminate()
        _, left = psutil.wait_procs(tree, timeout=40)
        for p in left:
            p.kill()
        stopped.append(name)
    return stopped


def main(action: str) -> None:
    """`server`: server only; `worker`: server, deployments and worker; `down`: stop both."""
    try:
        if action == "down":
            sys.stdout.write(f"stopped: {', '.join(down()) or 'nothing was running'}\n")
        else:
            sys.stdout.write(f"Prefect UI: {up(worker=action == 'worker')}\n")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1])
