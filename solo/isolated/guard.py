"""Run img2dataset with our own fetching and resizing; executed by the isolated environment's own python.

In: img2dataset's command line and SOLO_GUARD (solo/isolated/rules.py). Each `url` is a request, `key hash URL`.
Out: img2dataset's shards, whose error messages begin `solo:STATUS:HTTP_STATUS:`, and one JSON line per URL.
Invariants: reading, sharding, writing and distribution stay img2dataset's; what it would fetch by itself is refused
(urllib's opener has no handler), so a version that does not take our functions fetches nothing. It holds in spawned
workers too, since they import this file again.
Cost: wandb, albumentations, scipy and, in workers, pandas are not imported: 0.3 s of 2.2 are left in each process.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import signal
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

PR_SET_PDEATHSIG = 1
PARENT = "SOLO_GUARD_PARENT"


class Picture(io.BytesIO):
    """A fetched body with what its header declares."""

    seen: Any = None


class Fetcher:
    """img2dataset's fetch function; the guest and the log are made in the process that uses them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._guest: Guest | None = None
        self._log = -1

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
                rules = ruled.from_env()
                name = Path(rules.log, f"{os.getpid()}.jsonl")
                self._log = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                self._guest = Guest(rules)
            return self._guest


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
    from img2dataset import downloader

    assert hasattr(downloader, "download_image_with_retry"), "this img2dataset fetches by another name"
    downloader.download_image_with_retry = Fetcher()


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
    from img2dataset.main import main

    main()
