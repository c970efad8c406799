"""Locks: the finished mix locks under a data root, and the shards each was drawn from.

In: a data root and names, `mix` or `mix@fingerprint`. Out: artifacts. Invariant: a lock's shards are those whose
content its manifest names, never newer ones of the same source. Cost: manifests only.
"""

from __future__ import annotations

from pathlib import Path

from solo import artifact
from solo.artifact import Artifact


def pair(root: Path, name: str, other: str | None) -> tuple[Artifact, Artifact]:
    """The two locks asked for: `mix` or `mix@fingerprint`, before and after; one name means its newest two."""
    if other is not None:
        return one(root, name), one(root, other)
    found = of(root, name)
    if len(found) < 2:
        raise ValueError(f"{name}: {len(found)} lock under {root}, not two; name another mix to compare with")
    return found[-2], found[-1]


def one(root: Path, asked: str) -> Artifact:
    """The lock `mix@fingerprint`, or the newest of `mix`."""
    name, _, fingerprint = asked.partition("@")
    found = [a for a in of(root, name) if a.path.name == fingerprint or not fingerprint]
    if not found:
        have = [a.path.name for a in of(root, name)]
        raise ValueError(f"{name}: no lock {fingerprint}; there are {have}")
    return found[-1]


def of(root: Path, name: str) -> list[Artifact]:
    """Whole locks of a mix, the newest last."""
    folders = [f for f in (root / "curate" / name).glob("*/") if artifact.damage(f) is None]
    found = [Artifact(f, m) for f in folders if (m := artifact.read_manifest(f))]
    if not found:
        have = sorted(f.name for f in (root / "curate").glob("*/"))
        raise ValueError(f"{name}: no finished lock under {root}; there are {have}")
    return sorted(found, key=lambda a: (float(a.manifest.record["made_at"]), a.path.name))


def shards(root: Path, lock: Artifact) -> dict[str, Artifact]:
    """Source -> the very shard artifact that a lock was drawn from, where it is still there."""
    found = {}
    for node, digest in lock.manifest.inputs.items():
        if node.startswith("shard/"):
            for folder in sorted((root / node).glob("*/")):
                m = artifact.read_manifest(folder)
                if m and m.digest == digest and artifact.damage(folder) is None:
                    found[m.name] = Artifact(folder, m)
    return found
