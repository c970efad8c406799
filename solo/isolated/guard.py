"""Run img2dataset with our own fetching and resizing; executed by the isolated environment's own python.

In: img2dataset's command line and SOLO_GUARD (solo/isolated/rules.py). Each `url` is a request, `key hash URL`.
Out: img2dataset's shards, whose error messages begin `solo:STATUS:HTTP_STATUS:`, and one JSON line per URL.
Invariants: reading, sharding, writing and distribution stay img2dataset's; what it would fetch by itself is refused
(urllib's opener has no handler), so a version that does not take our functions fetches nothing. Spawned workers import
this file again; to those of Ray and Spark, which know nothing of it, the downloader brings it along when it is
unpickled (each node has this checkout at the same path), and without it refuses to work.
Cost: wandb, albumentations, scipy and, in workers, pandas are not imported: 0.3 s of 2.2 are left in each process.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import json
import os
import signal
import socket
import sys
import threading
import time
import types
import urllib.request
from pathlib import Path
from typing import Any

if "solo" not in sys.modules:  # the isolated environment has no package `solo`; its path must not hold ours
    package = types.ModuleType("solo")
    package.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["solo"] = package

from solo.isolated import rules as ruled
from solo.isolated.resizer import Resizer
from solo.isolated.web import Guest, Visit

sys.modules.setdefault("solo.isolated.guard", sys.modules[__name__])  # one guard, also where it is the main module
PR_SET_PDEATHSIG = 1
PARENT = "SOLO_GUARD_PARENT"
REMEDY = "install infra/img2dataset-cluster.txt in img2dataset's environment"


class Picture(io.BytesIO):
    """A fetched body with what its header declares."""

    seen: Any = None


class Fetcher:
    """img2dataset's fetch function; the guest and the log are made in the process that uses them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._guest: Guest | None = None
        self._rules = ""
        self._log = -1

    def use(self, rules: str) -> None:
        """Fetch under these rules from now on."""
        with self._lock:
            if rules != self._rules:
                self._rules, self._guest = rules, None

    def __call__(self, row: tuple[int, str], *_: object, **__: object) -> tuple[int, Picture | None, str | None]:
        """(key, picture, error) of one request; never raises."""
        number, request = row
        key, expected, url = request.split(" ", 2)
        guest = self._start()
        began = time.time()
        visit = guest.visit(url, "" if expected == "-" else expected)
        os.write(self._log, line(key, visit, began))
        if visit.failed is not None or visit.body is None:
            return number, None, str(visit.failed)
        picture = Picture(visit.body)
        picture.seen = visit.seen
        return number, picture, None

    def _start(self) -> Guest:
        with self._lock:
            if self._guest is None:
                rules = ruled.parse(self._rules) if self._rules else ruled.from_env()
                name = Path(rules.log, f"{socket.gethostname()}-{os.getpid()}.jsonl")
                self._log = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                self._guest = Guest(rules)
            return self._guest


FETCH = Fetcher()


def line(key: str, visit: Visit, began: float) -> bytes:
    """One URL's log line."""
    failed = visit.failed
    seen = {
        "key": key,
        "fetched_at": began,
        "seconds": round(time.time() - began, 4),
        "status": failed.status if failed else "fetched",
        "http_status": visit.http_status,
        "evidence": failed.evidence if failed else None,
        "robots": visit.robots,
        "headers": visit.headers,
        "redirects": visit.redirects,
        "n_tries": visit.n_tries,
        "served_sha256": visit.sha256,
    }
    return json.dumps(seen, ensure_ascii=True).encode() + b"\n"


def install() -> None:
    """Put our functions where img2dataset looks for its own, and leave urllib without a way out."""
    urllib.request.install_opener(urllib.request.OpenerDirector())
    if "img2dataset" not in sys.modules:
        _stand_in()
    downloader = importlib.import_module("img2dataset.downloader")
    assert hasattr(downloader, "download_image_with_retry"), "this img2dataset fetches by another name"
    downloader.download_image_with_retry = FETCH  # type: ignore[attr-defined]
    if main := sys.modules.get("img2dataset.main"):
        main.Downloader = guarded()  # type: ignore[attr-defined]


def _stand_in() -> None:
    """Empty modules in place of those that only cost time, or that ours replace."""
    for name in ("wandb", "albumentations", "img2dataset.resizer", "img2dataset.blurrer"):
        sys.modules[name] = types.ModuleType(name)
    resizer: Any = sys.modules["img2dataset.resizer"]
    resizer.Resizer = Resizer
    blurrer: Any = sys.modules["img2dataset.blurrer"]
    blurrer.BoundingBoxBlurrer = None
    if __name__ == "__mp_main__":  # workers read no list
        reader: Any = types.ModuleType("img2dataset.reader")
        reader.Reader = None
        pandas: Any = types.ModuleType("pandas")
        pandas.__version__ = "0.0"  # so old that pyarrow, which looks for it, does without
        sys.modules |= {"img2dataset.reader": reader, "pandas": pandas}


def guarded() -> Any:  # noqa: ANN401 - a class of a package that only this environment has
    """img2dataset's Downloader, which puts the guard in place wherever it is unpickled."""
    module: Any = importlib.import_module("img2dataset.downloader")

    class Guarded(module.Downloader):  # type: ignore[misc]
        def __call__(self, row: Any) -> Any:  # noqa: ANN401
            if module.download_image_with_retry is not FETCH:
                raise RuntimeError("the guard is not in place; nothing is fetched")
            return super().__call__(row)

        def __reduce__(self) -> tuple[Any, ...]:
            state = self.__dict__ | {"resizer": None}  # its class is not known where this arrives
            return brought, (str(Path(__file__).resolve()), os.environ[ruled.VARIABLE], self.resizer.max_side_px, state)

    return Guarded


def brought(file: str, rules: str, max_side_px: int, state: dict[str, Any]) -> Any:  # noqa: ANN401
    """What a Guarded unpickles to; Ray and Spark send this function by value, so it imports what it needs."""
    import importlib.util
    import sys

    if "solo.isolated.guard" not in sys.modules:
        spec = importlib.util.spec_from_file_location("solo.isolated.guard", file)
        sys.modules["solo.isolated.guard"] = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(sys.modules["solo.isolated.guard"])  # type: ignore[union-attr]
        sys.modules["solo.isolated.guard"].install()
    return sys.modules["solo.isolated.guard"].downloader(rules, max_side_px, state)


def downloader(rules: str, max_side_px: int, state: dict[str, Any]) -> Any:  # noqa: ANN401
    """A Guarded in this process, which fetches under these rules."""
    os.environ[ruled.VARIABLE] = rules
    FETCH.use(rules)
    cls = guarded()
    one = cls.__new__(cls)
    one.__dict__ |= state | {"resizer": Resizer(max_side_px)}
    return one


def start_cluster(distributor: str, n_workers: int) -> None:
    """Connect to the cluster that Ray's or Spark's own settings name, or start one on this machine."""
    os.environ |= {"NO_ALBUMENTATIONS_UPDATE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    try:
        if distributor == "ray":
            import ray

            here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": n_workers, "include_dashboard": False}
            ray.init(runtime_env={"env_vars": {"NO_ALBUMENTATIONS_UPDATE": "1"}}, **here)
        elif distributor == "pyspark":
            from pyspark.sql import SparkSession

            os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
            master = os.environ.get("SOLO_SPARK_MASTER", f"local[{n_workers}]")
            SparkSession.builder.master(master).appName("img2dataset").getOrCreate()
    except ModuleNotFoundError as error:
        sys.exit(f"{distributor}: {error}; {REMEDY}")


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the one that started it is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ in ("__main__", "__mp_main__"):
    die_with_parent()
    install()

if __name__ == "__main__":
    if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
        sys.exit("the process that asked for this download is gone")
    given = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
    start_cluster(given["distributor"], int(given["processes_count"]))
    importlib.import_module("img2dataset.main").main()
