"""Store: finished artifacts and checkpoints of running stages in an object store, a second place beside the data root.

In: $SOLO_STORE, an fsspec URL; folders whose files a `manifest.json` lists. Out: `STORE/<place>/...`, laid out as the
data root is; such a folder here. Invariants: in both places the manifest comes last, so what has one was whole; what is
got has the SHA-256 that its manifest says; no part of it is identity. Cost: one request for what the store has already,
else a listing and each file that it lacks, FILES_AT_ONCE at a time.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from solo.acquire import store_files, transfer
from solo.acquire.location import Asked, check_name
from solo.acquire.patience import Stopped, patiently
from solo.acquire.published import File
from solo.artifact import MANIFEST, WORK, file_sha256, remove, write_atomic
from solo.isolated.rules import Failed
from solo.sequence.shards import check_protocol

log = logging.getLogger(__name__)

SETTING = "SOLO_STORE"
COMING = ".coming.json"  # the manifest of what is being put: says what the objects are that lie there already
PROBE = ".solo"  # an empty object that is written to see whether that can be done
FILES_AT_ONCE = 8
SAY_S = 30.0
FULL = (errno.ENOSPC, errno.EDQUOT)
# s3fs would hold ten pieces of 50 MB of each file.
OPTIONS: Mapping[str, dict[str, Any]] = {
    "file": {"auto_mkdir": True},
    "s3": {"max_concurrency": 2},
    "s3a": {"max_concurrency": 2},
}
T = TypeVar("T")


class Unreachable(ValueError):
    """The store does not answer, or refuses."""


class Damaged(ValueError):
    """What lies in the store is not what its manifest says."""


@dataclass(frozen=True)
class Store:
    """A place of artifacts that machines without a common file system share."""

    url: str

    @classmethod
    def from_env(cls) -> Store | None:
        """$SOLO_STORE, if it is set."""
        url = os.environ.get(SETTING)
        if not url:
            return None
        if "://" not in url or "::" in url:
            raise ValueError(f"{SETTING} is {url!r}; give a URL that fsspec opens, say s3://bucket/solo, or unset it")
        if urlsplit(url).password is not None:
            raise ValueError(f"{SETTING} holds a password; credentials have variables of their own")
        check_protocol(url)
        return cls(url.rstrip("/"))

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """The client, and what its paths begin with."""
        from fsspec.core import url_to_fs

        files, root = url_to_fs(self.url, **OPTIONS.get(self.url.partition("://")[0], {}))
        return files, root.rstrip("/")

    def where(self, name: str) -> str:
        """The URL of a place or an object, also for messages."""
        return f"{self.url}/{name}"

    def check(self) -> None:
        """Refuse a store that cannot be reached or written to, before work is done whose result ends there."""
        self.write(PROBE, b"", patient=False)

    def read(self, name: str) -> bytes | None:
        """The bytes of an object, or None where it is not there."""
        files, root = self._opened
        try:
            return bytes(self._ask(name, lambda: files.cat_file(f"{root}/{name}")))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes, *, patient: bool = True) -> None:
        """One object as a whole."""
        files, root = self._opened
        try:
            self._ask(name, lambda: files.pipe_file(f"{root}/{name}", data), patient=patient)
        except FileNotFoundError:
            raise Unreachable(f"{self.url}: it is not there; make the bucket, or correct {SETTING}") from None

    def manifest(self, place: str) -> dict[str, Any] | None:
        """The manifest of what is whole there; None where nothing is, or half of it."""
        return _parsed(self.read(f"{place}/{MANIFEST}"))

    def listed(self, place: str) -> dict[str, int]:
        """Objects below a place, by name: their bytes."""
        files, root = self._opened
        files.invalidate_cache()
        with suppress(FileNotFoundError):
            found = self._ask(place, lambda: files.find(f"{root}/{place}", detail=True))
            return {path.removeprefix(f"{root}/{place}/"): int(entry["size"]) for path, entry in found.items()}
        return {}

    def remove(self, place: str) -> None:
        """All that is below a place, its manifest first."""
        self._delete(place, [MANIFEST])
        self._delete(place, sorted(self.listed(place)))

    def put(self, folder: Path, place: str, *, stop: threading.Event | None = None) -> int:
        """Put a folder there, its manifest last; the bytes sent. Once `stop` is set no further file is begun.

        An object that is there counts as the file only where the last manifest put there, or begun, says so: size alone
        tells no two weights apart.
        """
        raw = (folder / MANIFEST).read_bytes()
        own = json.loads(raw)
        there = self.manifest(place)
        if there is not None and _content(there) == _content(own):
            return 0
        said = there or _parsed(self.read(f"{place}/{COMING}")) or {"files": []}
        known, wanted = ({f["path"]: (f["bytes"], f["sha256"]) for f in m["files"]} for m in (said, own))
        sizes = self.listed(place)
        here = {name for name, (n, digest) in wanted.items() if known.get(name) == (sizes.get(name), digest)}
        self._delete(place, [MANIFEST] if there else [])
        # Before the record: what it names and what lies there is then this folder's, wherever this is stopped.
        self._delete(place, [n for n in sizes if n not in here and n != COMING and not n.startswith(f"{WORK}/")])
        self.write(f"{place}/{COMING}", raw)
        files, root = self._opened

        def send(name: str, given_up: threading.Event) -> None:
            if given_up.is_set() or (stop and stop.is_set()):
                raise Stopped
            to = f"{place}/{name}"
            self._ask(to, lambda: files.put_file(str(folder / name), f"{root}/{to}"))

        lacking = sorted(wanted.keys() - here)
        _each(send, lacking, f"{self.where(place)}: put")
        self.write(f"{place}/{MANIFEST}", raw)
        self._delete(place, [COMING])
        return sum(wanted[name][0] for name in lacking)

    def get(self, place: str, folder: Path) -> int:
        """Bring what is whole there to a folder of this machine, in place of what that holds; the bytes of it.

        It lies aside until every file is checked; killed, the next call goes on from there.
        """
        raw = self.read(f"{place}/{MANIFEST}")
        manifest = _parsed(raw)
        if raw is None or manifest is None:
            raise Damaged(f"{self.where(place)}: no manifest that can be read; put it there again")
        names = [f["path"] for f in manifest["files"]]
        for name in names:
            check_name(name, self.where(place))
        aside = folder.with_name(f".{folder.name}.coming")
        aside.mkdir(parents=True, exist_ok=True)
        try:
            self._bring(place, manifest["files"], aside)
            for path in [p for p in aside.rglob("*") if p.is_file()]:
                if path.relative_to(aside).as_posix() not in names:
                    path.unlink()
            write_atomic(aside / MANIFEST, raw)
        except OSError as error:
            if error.errno not in FULL:
                raise
            what = f"{self.where(place)}: {folder.parent} is full ({error.strerror})"
            raise ValueError(f"{what}; make room, or set SOLO_ROOT to a larger disk") from None
        remove(folder)
        aside.rename(folder)
        return sum(f["bytes"] for f in manifest["files"])

    def _bring(self, place: str, entries: Sequence[Mapping[str, Any]], aside: Path) -> None:
        """Every file under its name in the folder aside, where an attempt before may have left some."""
        amiss = f"delete {self.where(place)}/{MANIFEST} and it is put there again by who made it"
        opened = store_files.opener(Asked("", self.where(place), ""))
        lacking = [f for f in entries if not _is(aside / f["path"], f)]
        transfer.room(aside, sum(f["bytes"] for f in lacking), self.where(place))

        def fetch(entry: Mapping[str, Any], given_up: threading.Event) -> None:
            name = entry["path"]
            file = File(name, entry["bytes"], entry["sha256"], amiss=amiss)
            what = self.where(f"{place}/{name}")
            transfer.fetch(file, opened, aside / name, what=what, stop=given_up, told=lambda n: None)

        try:
            _each(fetch, lacking, f"{self.where(place)}: got")
        except transfer.Later:
            raise
        except transfer.Broken as error:
            raise Damaged(str(error)) from None

    def _delete(self, place: str, names: Sequence[str]) -> None:
        files, root = self._opened
        for name in names:
            with suppress(FileNotFoundError):
                self._ask(f"{place}/{name}", partial(files.rm_file, f"{root}/{place}/{name}"))

    def _ask(self, name: str, act: Callable[[], T], *, patient: bool = True) -> T:
        """What the store answers, a transient failure tried again; FileNotFoundError is an answer.

        s3fs tries for some seven seconds by itself, which is enough where nothing is lost yet.
        """

        def once() -> T:
            try:
                return act()
            except FileNotFoundError:
                raise
            except Exception as error:  # clients raise what their libraries do
                raise store_files.failed(error) from None

        try:
            return patiently(once) if patient else once()
        except Failed as failed:
            raise Unreachable(f"{self.where(name)}: {failed.detail}; {store_files.remedy(failed, SETTING)}") from None


def _parsed(raw: bytes | None) -> dict[str, Any] | None:
    """A manifest, or None where this is none: half of one, say."""
    with suppress(ValueError):
        found = json.loads(raw or b"null")
        if isinstance(found, dict) and isinstance(found.get("files"), list):
            return found
    return None


def _content(manifest: Mapping[str, Any]) -> object:
    """What a manifest is of: the digest of an artifact, the manifest's own hash of a checkpoint."""
    return manifest.get("digest", manifest.get("sha256"))


def _is(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file is there as its manifest says."""
    return path.is_file() and path.stat().st_size == entry["bytes"] and file_sha256(path) == entry["sha256"]


def _each(act: Callable[[T, threading.Event], None], items: Sequence[T], what: str) -> None:
    """Do it to each item in threads; the first failure, also of who waits, keeps the others from beginning."""
    given_up = threading.Event()
    with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="store") as pool:
        try:
            futures = [pool.submit(act, item, given_up) for item in items]
            while True:
                done, pending = wait(futures, SAY_S, FIRST_EXCEPTION)
                if not pending or any(future.exception() for future in done):
                    break
                log.info("%s %d of %d files", what, len(done), len(items))
        finally:
            given_up.set()
            pool.shutdown(wait=True, cancel_futures=True)
    for future in done:
        future.result()
