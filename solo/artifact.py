"""Artifacts: the immutable output folders of the line, and the rules of reuse.

In: a `Job` (part, name, version, spec fields, input artifacts). Out: `ROOT/<part>/<name>/<fingerprint>/` with a
`manifest.json` written last. Invariants: the fingerprint depends on what is asked and on the content of the inputs,
never on paths, hosts, workers or time; the digest depends on the bytes made; a ledger that does not close is an error.
Cost: one hash pass over the files a part wrote.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from solo.store.folders import Store

log = logging.getLogger(__name__)

CHECKOUT = Path(__file__).resolve().parents[1]
MANIFEST = "manifest.json"
RECORD = "prefect-result.json"  # Prefect's cache record lives beside the manifest, so `rm -r` drops both
WORK = ".work"  # scratch of an unfinished part; removed when the manifest is written
CHUNK_BYTES = 1 << 20
SAY_S = 1.0  # a lock that is held longer is held by a run that works, not by one that looks


class LedgerError(AssertionError):
    """A part's inputs are not the sum of what it kept and what it dropped."""


@dataclass(frozen=True)
class Manifest:
    """What an artifact is, where it came from and what it counted. The JSON beside the files holds just this."""

    part: str
    name: str
    fingerprint: str
    version: int
    spec: dict[str, Any]
    inputs: dict[str, str]  # node id -> digest of its content
    digest: str
    files: list[dict[str, Any]]  # path, bytes, sha256, and volatile when the bytes are outside the digest
    counts: dict[str, Any]  # in, kept, dropped {reason: n}
    stats: dict[str, Any]
    record: dict[str, Any]  # seconds, made_at, commit: facts about the run, no part of any identity

    @property
    def id(self) -> str:
        """Node id, `part/name`."""
        return f"{self.part}/{self.name}"


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its folder and its manifest."""

    path: Path
    manifest: Manifest
    url: str | None = None  # where its files are, if they lie in a store and not in the folder

    @property
    def place(self) -> str:
        """Where its files are."""
        return self.url or str(self.path.resolve())


@dataclass(frozen=True)
class Job:
    """One artifact to be made. `spec` and `inputs` bear identity; `out`, `specs`, `workers` and `progress` do not."""

    part: str
    name: str
    version: int
    spec: dict[str, Any]
    inputs: dict[str, Artifact]  # node id ("filter/cc3m") -> artifact
    root: Path
    specs: Path
    workers: int
    progress: Callable[[str], None] = field(default=log.info, compare=False)
    where: Mapping[str, Any] = field(default_factory=dict, compare=False)  # spec fields that bear no identity
    store: Store | None = field(default=None, compare=False)

    @property
    def fingerprint(self) -> str:
        """Eight hex digits of identity."""
        return fingerprint(self.part, self.name, self.version, self.spec, self.input_digests)

    @property
    def input_digests(self) -> dict[str, str]:
        """Node id -> content digest of each input."""
        return {node: artifact.manifest.digest for node, artifact in self.inputs.items()}

    @property
    def out(self) -> Path:
        """The artifact's folder."""
        return self.root / self.part / self.name / self.fingerprint

    @property
    def work(self) -> Path:
        """Scratch inside the artifact's folder; it survives a kill and is removed when the part is done."""
        return self.out / WORK

    def of(self, part: str) -> dict[str, Artifact]:
        """Inputs made by one part, by name."""
        prefix = part + "/"
        return {node.removeprefix(prefix): a for node, a in self.inputs.items() if node.startswith(prefix)}

    def one(self, part: str) -> Artifact:
        """The only input made by one part."""
        found = list(self.of(part).values())
        assert len(found) == 1, f"{self.part}/{self.name} has {len(found)} inputs of part {part}"
        return found[0]


@dataclass(frozen=True)
class Result:
    """What a part reports when its files are written: counts that close, statistics, and which files are volatile."""

    n_in: int
    n_kept: int
    dropped: dict[str, int]
    stats: dict[str, Any]
    volatile: tuple[str, ...] = ()  # glob patterns of files whose bytes may differ between equal runs (times, logs)


def canonical(value: object) -> bytes:
    """One byte string per JSON value. Key order counts: the first failing predicate of a filter is the reason."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def fingerprint(part: str, name: str, version: int, spec: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """H(part, name, version, spec fields, content digests of the inputs), eight hex digits."""
    return hashlib.sha256(canonical([part, name, version, dict(spec), sorted(inputs.items())])).hexdigest()[:8]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, streamed."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def combined_sha256(digests: Mapping[str, str]) -> str:
    """One SHA-256 of files by name: that of the sorted lines `name NUL sha256 LF`."""
    return hashlib.sha256(b"".join(f"{name}\0{digests[name]}\n".encode() for name in sorted(digests))).hexdigest()


def content_digest(files: Sequence[Mapping[str, Any]]) -> str:
    """The digest of an artifact, of its manifest's files."""
    return hashlib.sha256(canonical([[f["path"], f["sha256"]] for f in files if "volatile" not in f])).hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write aside, flush to disk, rename: a reader sees the old file or the new one, never a piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of an artifact folder, or None where it is absent or unreadable (then the part runs again)."""
    try:
        return Manifest(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def damage(folder: Path, *, deep: bool = False) -> str | None:
    """Why an artifact cannot be reused, or None when every file is there; `deep` rehashes the bytes."""
    manifest = read_manifest(folder)
    if manifest is None:
        return "not made yet"
    for entry in manifest.files:
        path = folder / entry["path"]
        if not path.is_file():
            return f"{entry['path']} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{entry['path']} has {path.stat().st_size} bytes, its manifest says {entry['bytes']}"
        if deep and file_sha256(path) != entry["sha256"]:
            return f"{entry['path']} does not match its sha256"
    return None


def make(job: Job, run: Callable[[Job], Result], *, force: bool = False) -> tuple[Artifact, bool]:
    """The artifact of a job, made now or reused; the flag is True when work was done.

    A kernel lock on the folder (released when its holder dies) keeps two runs from making one artifact at once.
    Unless `force`, files of an interrupted attempt stay, and the part goes on from them; what was finished and is
    damaged now is made again from nothing.
    """
    out = job.out
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # A worker re-imports the main script; without this line it would wait for the lock its parent holds.
        raise RuntimeError("a script that makes artifacts needs `if __name__ == '__main__':` around its work")
    with alone(out, f"{job.part}/{job.name}", job.progress):
        if not force and damage(out) is None:
            manifest = read_manifest(out)
            assert manifest is not None
            return Artifact(out, manifest), False
        if force or (out / MANIFEST).exists():
            # A file that is there counts as done only in an attempt of our own: of a finished artifact that was harmed
            # later, any file may be missing, short, or named by a neighbour that is still there.
            remove(out)
        job.work.mkdir(parents=True, exist_ok=True)
        began = time.time()
        result = run(job)
        manifest = seal(job, result, seconds=time.time() - began)
    return Artifact(out, manifest), True


@contextmanager
def alone(folder: Path, what: str, say: Callable[[str], None] = log.info) -> Iterator[None]:
    """Hold the lock on an artifact's folder; a wait for another run is said."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=SAY_S)
    except Timeout:
        say(f"{what}: another run is making it; waits for that one to end")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def remove(folder: Path) -> None:
    """Remove a folder as a whole: it has left its name before its first file goes."""
    aside = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
        shutil.rmtree(aside)


def seal(job: Job, result: Result, *, seconds: float) -> Manifest:
    """Check the sum, hash the files, remove the scratch, write the manifest last."""
    check_closes(f"{job.part}/{job.name}", result.n_in, result.n_kept, result.dropped)
    shutil.rmtree(job.work, ignore_errors=True)
    files = []
    for path in sorted(p for p in job.out.rglob("*") if p.is_file()):
        name = path.relative_to(job.out).as_posix()
        if name in (MANIFEST, RECORD) or name.endswith(".tmp"):
            continue
        entry: dict[str, Any] = {"path": name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        if any(fnmatch.fnmatch(name, pattern) for pattern in result.volatile):
            entry["volatile"] = True
        files.append(entry)
    manifest = Manifest(
        part=job.part,
        name=job.name,
        fingerprint=job.fingerprint,
        version=job.version,
        spec=job.spec,
        inputs=job.input_digests,
        digest=content_digest(files),
        files=files,
        counts={"in": result.n_in, "kept": result.n_kept, "dropped": dict(sorted(result.dropped.items()))},
        stats=result.stats,
        record={"seconds": round(seconds, 3), "made_at": time.time(), "commit": commit()},
    )
    write_atomic(job.out / MANIFEST, json.dumps(asdict(manifest), indent=1, ensure_ascii=False).encode())
    return manifest


def check_closes(what: str, n_in: int, n_kept: int, dropped: Mapping[str, int]) -> None:
    """Raise LedgerError with the whole equation unless in = kept + sum(dropped)."""
    if n_in != n_kept + sum(dropped.values()):
        terms = " + ".join(f"{n} {reason}" for reason, n in sorted(dropped.items())) or "0 dropped"
        raise LedgerError(
            f"{what}: the ledger does not close: {n_in} in != {n_kept} kept + {terms} "
            f"= {n_kept + sum(dropped.values())}; this is a bug in the part, please report it"
        )


def latest(root: Path, part: str, name: str) -> Manifest | None:
    """The manifest made last for a part and name, whatever its fingerprint: what a plan compares with."""
    found = [m for folder in (root / part / name).glob("*/") if (m := read_manifest(folder))]
    return max(found, key=lambda m: float(m.record["made_at"]), default=None)


@cache
def commit() -> str:
    """Commit of the code, with `+dirty` when the tree differs from it; `unknown` outside a checkout."""
    here = CHECKOUT / "solo"
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--", here], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+dirty" if dirty.stdout.strip() else "")
