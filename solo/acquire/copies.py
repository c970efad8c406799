"""Copies of what sources are published as, in the data root: fetched once, for all sources and runs.

In: what is asked for (solo/acquire/location.py). Out: `ROOT/downloads/<key>/<name>`, the key being the pin: what
adapters read, as they read a local copy. Invariants: a copy stands under its key when all its files are there and
right, and not before; its files are hard links to `ROOT/downloads/files/`, where each lies once, named by its digest;
no part of it is identity. Cost: the bytes that are not there, FILES_AT_ONCE files at a time, each hashed as it is
written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from solo.acquire import published, transfer
from solo.acquire.location import UNPINNED, Asked, asked
from solo.acquire.patience import Stopped
from solo.acquire.published import File
from solo.artifact import canonical, combined_sha256, file_sha256, write_atomic
from solo.estimate import published_bytes
from solo.estimate_text import size
from solo.spec import SourceSpec

FILES_AT_ONCE = 4
SAID_EVERY_S = 5.0
SIZES = "sizes.json"  # of a copy's files, beside them

Told = Callable[[str], None]


def place(want: Asked, root: Path) -> Path:
    """Where the copy lies, or would."""
    return root / "downloads" / _key(want) / want.name


def _key(want: Asked) -> str:
    """The pin: bytes and the name they are read under, or a commit and what is wanted of it."""
    named: object = [want.revision, want.name]
    if not want.revision.startswith("sha256:"):
        named = [want.location, want.revision, sorted(want.files), sorted(want.sha256.items())]
    return hashlib.sha256(canonical(named)).hexdigest()[:16]


def absent_bytes(want: Asked, root: Path) -> int | None:
    """Bytes that fetching would bring; None where nobody has listed the files yet. Asks nobody."""
    if place(want, root).exists():
        return 0
    files = _known(want, root)
    if files is None:
        return None
    left = 0
    for file in files:
        path = _file(want, file, root)
        if path.exists():
            continue
        if file.size is None:
            return None
        part = path.with_name(path.name + ".part")
        left += file.size - (part.stat().st_size if part.exists() else 0)
    return left


@dataclass(frozen=True)
class Download:
    """Bytes that acquiring some sources of one upstream would fetch; not `listed` where only their spec says so."""

    sources: tuple[str, ...]
    n_bytes: int | None
    listed: bool


def downloads(specs: Sequence[SourceSpec], root: Path) -> list[Download]:
    """What is not there yet of these sources, each copy once."""
    by_copy: dict[Path, list[SourceSpec]] = {}
    for spec in specs:
        want = asked(spec)
        if want.kind != "local" and spec.revision != UNPINNED:
            by_copy.setdefault(place(want, root), []).append(spec)
    found = []
    for path, wanting in by_copy.items():
        if path.exists():
            continue
        left = absent_bytes(asked(wanting[0]), root)
        told = max((n for spec in wanting if (n := _about(spec)) is not None), default=None)
        names = tuple(spec.name for spec in wanting)
        found.append(Download(names, told if left is None else left, left is not None))
    return found


def _about(spec: SourceSpec) -> int | None:
    """What a spec lets expect: the size it tells, or what its counts come to (of a URL list they are the pictures)."""
    if spec.upstream and spec.upstream.download_bytes:
        return spec.upstream.download_bytes
    return None if spec.acquire.adapter.startswith("url_") else published_bytes(spec)


def sentence(found: Sequence[Download], most: int = 4) -> str:
    """The same for people, where there is any."""
    names = [name for one in found for name in one.sources]
    shown = ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
    about = "" if all(one.listed for one in found) else "about "
    unknown = [name for one in found if one.n_bytes is None for name in one.sources]
    n_bytes = f"{about}{size(sum(one.n_bytes or 0 for one in found))} " if len(unknown) < len(names) else ""
    more = f"; how much {len(unknown)} of them are is not known before they are listed" if unknown else ""
    return f"acquire will download {n_bytes}for {shown}{more}"


def fetch(want: Asked, root: Path, told: Told) -> Path:
    """The complete copy; what is there of it is not fetched again, unless it was harmed since."""
    target = place(want, root)
    target.parent.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent.with_name(f".{target.parent.name}.lock"), want.source, told):
        if target.exists() and (harmed := _harmed(target)) is None:
            return target
        if target.exists():
            told(f"{want.source}: {harmed}; what is wrong is fetched again")
            shutil.rmtree(target.parent)
        files = _known(want, root)
        if files is None:
            files = published.listed(want)
            if want.revision != UNPINNED:
                write_atomic(_listing(want, root), json.dumps([asdict(file) for file in files], indent=1).encode())
        try:
            digests = _fetch_all(want, files, root, told)
            _check_all(want, files, digests, root)
        except ValueError as error:
            if want.kind != "hub" and not isinstance(error, transfer.Later):  # its server may have told other sizes
                _listing(want, root).unlink(missing_ok=True)
            raise
        _link(want, files, root, target.parent)
    return target


def pin(want: Asked, root: Path, told: Told) -> str:
    """The revision of what is published now; but for the hub's, all of it is fetched to tell, and stays."""
    now = replace(want, revision=UNPINNED)
    if want.kind == "hub":
        from solo.acquire import hub_files

        return hub_files.latest(now)
    target = fetch(now, root, told)
    names = {p.relative_to(target).as_posix(): p for p in target.rglob("*") if p.is_file()}
    digests = {name: file_sha256(path) for name, path in names.items()}
    revision = f"sha256:{combined_sha256(digests) if names else file_sha256(target)}"
    for name in names or [""]:  # else the next call would take them for what is published then
        _file(now, File(name), root).unlink(missing_ok=True)
    pinned = place(replace(want, revision=revision), root).parent
    if not pinned.exists():
        target.parent.rename(pinned)
    shutil.rmtree(target.parent, ignore_errors=True)
    return revision


def _listing(want: Asked, root: Path) -> Path:
    return root / "downloads" / f"{_key(want)}.json"


def _known(want: Asked, root: Path) -> list[File] | None:
    """The files of a pin, where they were listed before."""
    try:
        found = json.loads(_listing(want, root).read_text())
        return [File(**entry) for entry in found]
    except (OSError, ValueError, TypeError):
        return None


def _file(want: Asked, file: File, root: Path) -> Path:
    """Where one file lies: by its digest, or where only that of all together is known by that and its name."""
    if file.sha256:
        name = file.sha256
    elif file.git:
        name = f"git-{file.git}"
    else:
        name = hashlib.sha256(canonical([_key(want), file.name])).hexdigest()[:32]
    return root / "downloads" / "files" / name


def _fetch_all(want: Asked, files: Sequence[File], root: Path, told: Told) -> dict[str, str]:
    """All files under their digests, which are returned by name where they were fetched now.

    The first that cannot be had ends it, and the others stay where they are.
    """
    paths = {file: _file(want, file, root) for file in files}
    for file, path in paths.items():
        if file.size is not None and path.exists() and path.stat().st_size != file.size:
            path.unlink()  # harmed since it was fetched
    todo = [file for file in files if not paths[file].exists()]
    left = absent_bytes(want, root) if todo else 0
    folder = root / "downloads" / "files"
    folder.mkdir(parents=True, exist_ok=True)
    transfer.room(folder, left or 0, want.source)
    opened = published.opener(want) if todo else None
    said = _Said(want, todo, told)
    stop = threading.Event()

    digests: dict[str, str] = {}

    def one(file: File) -> None:
        path, what = paths[file], f"{want.source}: {file.name or want.name} of {want.location.partition('?')[0]}"
        with _locked(path.with_name(f".{path.name}.lock"), want.source, lambda _: None, stop):
            if path.exists():
                return  # another source wanted it too
            assert opened is not None
            digests[file.name] = transfer.fetch(file, opened, path, what=what, stop=stop, told=said.gain)

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        running: set[Future[None]] = {pool.submit(one, file) for file in todo}
        try:
            while running:
                done, running = wait(running, SAID_EVERY_S, FIRST_COMPLETED)
                for future in done:
                    future.result()
                said.say(len(todo) - len(running))
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return digests


class _Said:
    """Progress: bytes come in from threads, lines go out from the one that waits."""

    def __init__(self, want: Asked, files: Sequence[File], told: Told) -> None:
        self.want, self.told, self.n_files = want, told, len(files)
        self.total = sum(file.size or 0 for file in files) if all(file.size is not None for file in files) else None
        self.n_bytes, self.began, self.last = 0, time.monotonic(), -SAID_EVERY_S
        self._lock = threading.Lock()
        if files:
            of = f" of {size(self.total)}" if self.total is not None else ""
            told(f"{want.source}: fetching {len(files)} files{of} from {want.location.partition('?')[0]}")

    def gain(self, n_bytes: int) -> None:
        with self._lock:
            self.n_bytes += n_bytes

    def say(self, n_done: int) -> None:
        now = time.monotonic()
        if now - self.last < SAID_EVERY_S and n_done < self.n_files:
            return
        self.last = now
        of = f" of {size(self.total)}" if self.total is not None else ""
        self.told(f"{self.want.source}: {n_done} of {self.n_files} files, {size(self.n_bytes)}{of} fetched")


def _check_all(want: Asked, files: Sequence[File], fetched: Mapping[str, str], root: Path) -> None:
    """Refuse files that together are not what the revision names; those that no digest of their own names go."""
    if not want.revision.startswith("sha256:"):
        return
    paths = {file: _file(want, file, root) for file in files}
    digests = {f.name: f.sha256 or fetched.get(f.name) or file_sha256(path) for f, path in paths.items()}
    found = f"sha256:{digests[''] if '' in digests else combined_sha256(digests)}"
    if found == want.revision:
        return
    for file, path in paths.items():
        if not file.sha256:
            path.unlink(missing_ok=True)
    raise ValueError(
        f"{want.source}: {want.location.partition('?')[0]} has {found} but revision is {want.revision}; "
        "fetch the pinned data from where they are, or set revision to what is published now"
    )


def _link(want: Asked, files: Sequence[File], root: Path, folder: Path) -> None:
    """The copy, made aside and renamed: hard links, so that deleting a copy or `files/` harms no other."""
    aside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    sizes = {}
    for file in files:
        path = aside / want.name / file.name if file.name else aside / want.name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(_file(want, file, root), path)
        sizes[path.relative_to(aside).as_posix()] = path.stat().st_size
    write_atomic(aside / SIZES, json.dumps(sizes, indent=1).encode())
    aside.rename(folder)


def _harmed(target: Path) -> str | None:
    """Which file of a copy is no longer as it was when the copy was whole, or None."""
    try:
        sizes = json.loads((target.parent / SIZES).read_text())
    except (OSError, ValueError):
        return f"{target.parent} has no {SIZES}"
    for name, n_bytes in sizes.items():
        path = target.parent / name
        if not path.is_file() or path.stat().st_size != n_bytes:
            return f"{path} is gone" if not path.exists() else f"{path} has {path.stat().st_size} bytes of {n_bytes}"
    return None


@contextlib.contextmanager
def _locked(path: Path, source: str, told: Told, stop: threading.Event | None = None) -> Iterator[None]:
    """A kernel lock, released when its holder dies: two runs that want the same bytes fetch them once."""
    lock, waits = FileLock(path), False
    while True:
        try:
            lock.acquire(timeout=1.0)
            break
        except Timeout:
            if stop is not None and stop.is_set():
                raise Stopped from None
            if not waits:
                told(f"{source}: another run fetches it; waiting")
            waits = True
    try:
        yield
    finally:
        lock.release()
