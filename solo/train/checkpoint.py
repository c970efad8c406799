"""Checkpoints of a stage that is still running: folders that count only when complete.

In: a folder that the ranks have just filled. Out: `ROOT/step-000010/` with `manifest.json` (the loader's state, world
size, sha256 of every file and of itself) written last, then renamed into place, and `ROOT/latest`, its name, replaced
as a whole. Invariants: a folder under its final name was complete when it got that name, and damage done to it later is
found before it is used; what `latest` names is there. Cost: one hash pass per resume; a save hashes only what its
writers did not.
No torch here: the supervisor reads this module before any rank starts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solo.artifact import MANIFEST, canonical, file_sha256, write_atomic

log = logging.getLogger(__name__)

NAME = re.compile(r"step-(\d{6,})")
LATEST = "latest"  # for people and their tools: a run itself looks at every folder, as it must find damage
HASH_THREADS = 8  # hashlib frees the interpreter lock; one thread takes 60 s for the 87 GB of a 7B stage


Entry = tuple[Path, int, str]  # a file, its bytes, its sha256


@dataclass(frozen=True)
class Keep:
    """Which checkpoints of a running stage stay; a setting of the machine, as it changes no number."""

    last: int = 2  # the newest, and the one before it should a disk damage the newest
    every: int | None = None  # and those of steps that are multiples of this

    @classmethod
    def from_env(cls) -> Keep:
        """$SOLO_KEEP_LAST and $SOLO_KEEP_EVERY."""
        last, every = (os.environ.get(name) for name in ("SOLO_KEEP_LAST", "SOLO_KEEP_EVERY"))
        for name, value in (("SOLO_KEEP_LAST", last), ("SOLO_KEEP_EVERY", every)):
            if value is not None and not (value.isdigit() and int(value) > 0):
                raise ValueError(f"{name} is {value!r}; give a whole number, 1 or more, or unset it")
        return cls(int(last) if last else cls.last, int(every) if every else None)

    def outdated(self, steps: Sequence[int]) -> list[int]:
        """Of steps in ascending order, those whose checkpoints go."""
        return [step for step in steps[: -self.last] if not self.every or step % self.every]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of a running stage."""

    path: Path
    step: int  # optimizer steps done
    world_size: int  # ranks that wrote it; any number can go on from it
    loader: dict[str, Any]  # its state, for `Plan.step_of`
    facts: dict[str, Any]  # stage, commit: for people, compared with nothing


def begin(root: Path, step: int) -> Path:
    """An empty folder aside for one rank 0 to make and all ranks to fill."""
    aside = aside_of(root, step)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def aside_of(root: Path, step: int) -> Path:
    """Where the ranks write a checkpoint that does not count yet."""
    return root / f".step-{step:06d}.tmp"


def seal(
    aside: Path,
    *,
    loader: dict[str, Any],
    world_size: int,
    facts: dict[str, Any],
    keep: Keep | None = None,
    digests: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Flush and hash every file, write the manifest last, rename into place, drop what need not be kept.

    `digests`: the hashes of files that lie on disk already, by their path in the folder.
    """
    root, step = aside.parent, loader["step"]
    paths = sorted(p for p in aside.rglob("*") if p.is_file())
    names = [path.relative_to(aside).as_posix() for path in paths]
    hashed = dict(digests or {})
    if lost := hashed.keys() - set(names):
        raise FileNotFoundError(f"{aside}: {min(lost)} was written and is gone")
    others = [path for path, name in zip(paths, names, strict=True) if name not in hashed]
    hashed |= {p.relative_to(aside).as_posix(): h for p, h in zip(others, _hashes(others, flush=True), strict=True)}
    manifest = {
        "loader": loader,
        "world_size": world_size,
        "facts": facts,
        "files": [
            {"path": name, "bytes": path.stat().st_size, "sha256": hashed[name]}
            for path, name in zip(paths, names, strict=True)
        ],
    }
    with (aside / MANIFEST).open("wb") as file:
        file.write(canonical(manifest | {"sha256": _own(manifest)}))
        file.flush()
        os.fsync(file.fileno())
    final = root / f"step-{step:06d}"
    shutil.rmtree(final, ignore_errors=True)  # only a damaged one can lie here, else it had been resumed from
    aside.rename(final)
    _flush(root)
    write_atomic(root / LATEST, f"{final.name}\n".encode())
    folders = dict(_folders(root))
    for old in (keep or Keep()).outdated(list(folders)):
        shutil.rmtree(folders[old], ignore_errors=True)
    return Checkpoint(final, step, world_size, loader, facts)


def newest(root: Path) -> Checkpoint | None:
    """The newest complete checkpoint; a damaged one is logged, set aside as `*.damaged` and passed over."""
    for half in root.glob(".step-*.tmp"):
        log.warning("%s: written only in part when its run ended; removed", half)
        shutil.rmtree(half, ignore_errors=True)
    for step, folder in reversed(_folders(root)):
        fault = damage(folder)
        if fault is None:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            write_atomic(root / LATEST, f"{folder.name}\n".encode())  # a kill may have come before that
            return Checkpoint(folder, step, manifest["world_size"], manifest["loader"], manifest["facts"])
        log.warning("%s: %s; not used, the checkpoint before it is tried", folder, fault)
        aside = folder.with_name(folder.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        (root / LATEST).unlink(missing_ok=True)
        folder.rename(aside)
    return None


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None when every byte is as its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        own, entries = (
            manifest.pop("sha256"),
            [(folder / f["path"], f["bytes"], f["sha256"]) for f in manifest["files"]],
        )
        steps = (int(manifest["loader"]["step"]), int(folder.name.removeprefix("step-")))
        if own != _own(manifest):
            return f"{MANIFEST} does not match its own sha256"
        if steps[0] != steps[1]:
            return f"its manifest is that of step {steps[0]}"
        return _wrong_files(folder, entries) or _wrong_bytes(folder, entries)
    except FileNotFoundError as error:
        return f"{Path(error.filename or MANIFEST).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"


def _own(manifest: dict[str, Any]) -> str:
    """The hash of a manifest without its own hash."""
    return hashlib.sha256(canonical(manifest)).hexdigest()


def _wrong_files(folder: Path, entries: Sequence[Entry]) -> str | None:
    """A file that is missing, of another size, or not of this checkpoint."""
    for path, n_bytes, _ in entries:
        if path.is_symlink() or not path.is_file():
            return f"{path.relative_to(folder)} is missing"
        if path.stat().st_size != n_bytes:
            return f"{path.relative_to(folder)} has {path.stat().st_size} bytes, its manifest says {n_bytes}"
    others = {p for p in folder.rglob("*") if not p.is_dir()} - {path for path, _, _ in entries} - {folder / MANIFEST}
    return f"{min(others).relative_to(folder)} is not in its manifest" if others else None


def _wrong_bytes(folder: Path, entries: Sequence[Entry]) -> str | None:
    found = _hashes([path for path, _, _ in entries], flush=False)
    for (path, _, expected), digest in zip(entries, found, strict=True):
        if digest != expected:
            return f"{path.relative_to(folder)} does not match its sha256"
    return None


def _folders(root: Path) -> list[tuple[int, Path]]:
    """Folders under a final name, oldest first."""
    if not root.is_dir():
        return []
    return sorted((int(m[1]), p) for p in root.iterdir() if p.is_dir() and (m := NAME.fullmatch(p.name)))


def _hashes(paths: Sequence[Path], *, flush: bool) -> list[str]:
    """SHA-256 of each file, in order; `flush` first forces it to disk."""

    def one(path: Path) -> str:
        if flush:
            _flush(path)
        return file_sha256(path)

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return list(pool.map(one, paths))


def _flush(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
