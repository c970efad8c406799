"""Handover: parts that are made on another machine, which shares a store ($SOLO_STORE) with this one and nothing else.

In: a node, the Refs of its inputs, a data root and its store. Out: here, inputs in the store and the result in the data
root; there, the inputs that it lacks, and its result in the store. Invariants: what is brought has the digest that was
asked for; a training reads shards in the store, by range, so no tar is copied and no folder here is half an artifact;
where everything is here, a store is asked nothing. Cost: a request for each artifact that is there already, else its
bytes once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from solo import artifact
from solo.artifact import WORK, Artifact, Job, Manifest
from solo.estimate_text import size
from solo.store.folders import Damaged, Store

if TYPE_CHECKING:
    from solo.line import Node, Ref, Settings

log = logging.getLogger(__name__)

HANDED = ("train", "evaluate")  # parts that another machine may be asked for


def give(inputs: Mapping[str, Ref], settings: Settings) -> None:
    """Put the inputs of a part into the store, before another machine is asked for it."""
    if settings.store is None:
        return
    settings.store.check()
    for ref in inputs.values():
        _put(settings.store, ref.open(settings.root))


def take(node: Node, fingerprint: str, settings: Settings) -> bool:
    """Bring the artifact that the store has of a node, unless it is here; whether there is one."""
    if settings.store is None:
        return False
    place = f"{node.id}/{fingerprint}"
    found = _found(settings.store, place)
    if found is not None:
        _bring(settings, place, found)
    return found is not None


def opened(reader: Node, ref: Ref, settings: Settings) -> Artifact:
    """An input, from the data root where it is there, else from the store."""
    folder, store = ref.path(settings.root), settings.store
    if store is None or reader.part not in HANDED or artifact.damage(folder) is None:
        return ref.open(settings.root)
    place = f"{ref.id}/{ref.fingerprint}"
    found = _found(store, place)
    if found is None or found.digest != ref.digest:
        what = "is not there" if found is None else f"has content {found.digest[:8]}, not {ref.digest[:8]}"
        raise ValueError(
            f"{store.where(place)}: {what}, nor is it in {settings.root}; set SOLO_STORE where the recipe runs as here"
        )
    if reader.part == "train" and found.part == "shard":
        return Artifact(folder, found, url=store.where(place))
    _bring(settings, place, found)
    return ref.open(settings.root)


def make(job: Job, made: Callable[[], tuple[Artifact, bool]], *, force: bool) -> tuple[Artifact, bool]:
    """What `made` gives, put into the store of the job; where the store has it already, that."""
    store, place = job.store, job.out.relative_to(job.root).as_posix()
    if store is None or job.part not in HANDED:
        return made()
    if force:
        store.remove(f"{place}/{WORK}")
    elif artifact.damage(job.out) is not None:
        store.check()
        if (found := _found(store, place)) is not None:
            _bring(job, place, found)
    done, ran = made()
    if _put(store, done) or ran:
        store.remove(f"{place}/{WORK}")
    return done, ran


def _put(store: Store, done: Artifact) -> int:
    m = done.manifest
    sent = store.put(done.path, f"{m.id}/{m.fingerprint}")
    if sent:
        log.info("%s: %s put into %s", m.id, size(sent), store.url)
    return sent


def _found(store: Store, place: str) -> Manifest | None:
    """The manifest of an artifact in the store, if it is one."""
    raw = store.manifest(place)
    if raw is None:
        return None
    try:
        found = Manifest(**raw)
        right = found.digest == artifact.content_digest(found.files)
    except (TypeError, KeyError):
        right = False
    if not right or f"{found.id}/{found.fingerprint}" != place:
        name = store.where(f"{place}/{artifact.MANIFEST}")
        raise Damaged(f"{name}: it is not the manifest of {place}; delete it and run again where that was made")
    return found


def _bring(where: Settings | Job, place: str, found: Manifest) -> None:
    """Make the folder here what the store has, unless it is."""
    folder, store = where.root / place, where.store
    assert store is not None
    with artifact.alone(folder, found.id):
        here: Any = artifact.read_manifest(folder)
        if artifact.damage(folder) is None and here.digest == found.digest:
            return
        log.info("%s: %s from %s", found.id, size(store.get(place, folder)), store.url)
