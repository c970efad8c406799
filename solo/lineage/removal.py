"""Removal: `solo takedown`, what is listed, what holds it, and taking it out of everything under a data root.

In: the list and a data root. Out: a summary for JSON and lines for people. Invariants: nothing is removed before the
acquire artifact of the present spec has been made without it, so nothing is fetched again; which checkpoints saw it is
noted before their packs go, because a model cannot forget; stopped anywhere, the same command goes on. Cost: that of
solo/lineage/holders.py, twice; an artifact that goes is made again by the next run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from solo import artifact
from solo.acquire import copies, location, passes
from solo.acquire import part as acquire
from solo.artifact import Job, write_atomic
from solo.line import PARTS, Settings
from solo.lineage import erase, holders, shown, takedown
from solo.lineage.holders import REMOVED, SAW, Held, Needles
from solo.lineage.takedown import Listed
from solo.plugin import resolve
from solo.sample import Sample
from solo.spec import BenchmarkSpec, SourceSpec, load

UNFORGETTING = "train"  # its artifacts go only where that is asked for
BENCHMARKS, DOWNLOADS = "benchmarks", "downloads"


@dataclass(frozen=True)
class Found:
    """What holds the list, and what saw it."""

    listed: Listed
    needles: Needles
    held: list[Held]
    saw: list[dict[str, Any]]

    @property
    def is_clean(self) -> bool:
        """Whether no file holds anything."""
        return not self.held


def look(settings: Settings, *, deep: bool = True) -> Found:
    """Search the data root and the benchmarks' data."""
    listed = Listed.of(settings.specs)
    if not listed:
        return Found(listed, Needles(listed), [], [])
    needles = holders.survey(settings.root, listed, deep=deep, workers=settings.workers)
    held = holders.holders(settings.root, needles, workers=settings.workers)
    held += _copied(settings, listed, held)
    held += _asked(settings, needles) if deep else []
    return Found(listed, needles, held, holders.saw(settings.root, needles))


def _copied(settings: Settings, listed: Listed, held: Sequence[Held]) -> Iterator[Held]:
    """Fetched copies of what sources are published as, where the source holds or held something."""
    ids = {e.id for e in listed.entries}
    meant = _places([h for h in held if h.place.startswith(("acquire/", f"{passes.PART}/"))])
    for path in sorted((settings.specs / "sources").glob("*.yaml")):
        spec = load(SourceSpec, path.stem, settings.specs)
        if location.kind(spec.acquire.location) == "local":
            continue
        copy = copies.place(location.asked(spec), settings.root)
        if not copy.exists():
            continue
        found = {e for place, some in meant.items() if place.split("/")[1] == spec.name for e in some}
        for folder in (settings.root / "acquire" / spec.name).glob("*/"):
            manifest = artifact.read_manifest(folder)
            found |= takedown.recorded(manifest.spec) & ids if manifest else set()
        yield from (Held(e, copy.parent.relative_to(settings.root).as_posix(), copy.name) for e in sorted(found))


def _asked(settings: Settings, needles: Needles) -> Iterator[Held]:
    """Questions of benchmarks that hold it in their data, where that is at hand."""
    for path in sorted((settings.specs / BENCHMARKS).glob("*.yaml")):
        spec = load(BenchmarkSpec, path.stem, settings.specs)
        location = settings.specs / spec.location
        if not location.exists():
            continue
        for item in resolve("adapters", spec.adapter)(location, source=spec.name, **spec.args):
            if not isinstance(item, Sample):
                continue
            url = item.meta.get("url")
            hashes = [hashlib.sha256(data).hexdigest() for data in item.images]
            urls = [url] if isinstance(url, str) else []
            if entry := needles.listed.first(key=item.key, urls=urls, hashes=hashes):
                yield Held(entry.id, f"{BENCHMARKS}/{path.name}", f"item {item.meta.get('id', item.key)}")


def apply(settings: Settings, *, checkpoints: bool = False, say: Callable[[str], None] = lambda line: None) -> None:
    """Make the acquire artifacts of the present specs without what is listed, then remove whatever holds it."""
    found = look(settings)
    for source, ids in sorted(_touched(settings, found).items()):
        say(f"acquire/{source}: making it anew without {len(ids)} entries, from what is there")
        _erased(settings, source, ids)
    _note(settings.root, found)
    shown.note(settings.root, found.held)
    for place in sorted(_places(found.held)):
        part = place.split("/")[0]
        if part == BENCHMARKS or (part == UNFORGETTING and not checkpoints):
            continue
        say(f"{place}: {_remove(settings, place, sorted({h.file for h in found.held if h.place == place}))}")
    for row in found.saw if checkpoints else ():
        if row["is_there"]:
            place = f"{UNFORGETTING}/{row['stage']}/{row['fingerprint']}"
            say(f"{place}: {_remove(settings, place, [])}")
    shown.note(settings.root, found.held)  # up to now, also if a run showed something meanwhile


def _places(held: Sequence[Held]) -> dict[str, set[str]]:
    places: dict[str, set[str]] = {}
    for h in held:
        places.setdefault(h.place, set()).add(h.entry)
    return places


def _touched(settings: Settings, found: Found) -> dict[str, set[str]]:
    """Sources whose acquire artifact of the present spec holds something, and the entries it holds."""
    touched: dict[str, set[str]] = {}
    for place, ids in _places(found.held).items():
        part, *rest = place.split("/")
        if part in ("acquire", passes.PART) and (settings.specs / "sources" / f"{rest[0]}.yaml").is_file():
            touched[rest[0]] = touched.get(rest[0], set()) | ids
    return touched


def _erased(settings: Settings, source: str, ids: set[str]) -> None:
    """The acquire artifact of a source's present spec without these entries, where it was acquired at all."""
    spec = load(SourceSpec, source, settings.specs)
    entries = takedown.read(settings.specs)
    asked = passes.identity(settings.root, acquire.VERSION, location.identity(spec))
    if passes.nearest(settings.root, acquire.VERSION, asked, {e.id for e in entries}) is None:
        return
    asked = erase.identity(settings.root, acquire.VERSION, asked, entries)
    asked = takedown.with_ids(asked, takedown.recorded(asked) | ids)
    job = Job("acquire", source, acquire.VERSION, asked, {}, settings.root, settings.specs, settings.workers)
    acquire.made(replace(job, where=location.where(spec)), acquire.run)


def _note(root: Path, found: Found) -> None:
    """Keep what the artifacts that go could tell: hashes of keys, digests of what pages showed, what was trained."""
    memory = root / erase.MEMORY
    by_source: dict[str, dict[str, str]] = {}
    for key, entry in found.needles.keys.items():
        hashed = hashlib.sha256(key.encode()).hexdigest()
        by_source.setdefault(key.rpartition("-")[0], {})[hashed] = entry
    for source, known in by_source.items():
        _merge(memory / source / "found.json", known)
    _merge(memory / SAW, {row["fingerprint"]: {k: row[k] for k in row if k != "is_there"} for row in found.saw})
    digests = {}
    for h in found.held:
        manifest = artifact.read_manifest(root / h.place)
        if manifest and manifest.part in ("acquire", "filter"):
            digests[manifest.digest] = h.entry
    _merge(memory / REMOVED, digests)


def _merge(path: Path, rows: dict[str, Any]) -> None:
    if rows:
        known = json.loads(path.read_bytes()) if path.is_file() else {}
        write_atomic(path, json.dumps(dict(sorted((known | rows).items())), indent=1).encode())


def _remove(settings: Settings, place: str, files: Sequence[str]) -> str:
    """Remove an artifact as a whole, or single files of a cache, unless a run is at work on it; what was done."""
    root = settings.root
    folder, parts = root / place, place.split("/")
    if parts[0] == DOWNLOADS:
        return _remove_copy(root, folder)
    if parts[0] not in (*PARTS, passes.PART):
        for file in files:
            (folder / file).unlink(missing_ok=True)
        return f"{len(files)} files removed"
    if parts[2].startswith("."):  # left by a removal that was stopped, or the lock of an artifact
        shutil.rmtree(folder, ignore_errors=True)
        return "removed"
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            if settings.store:
                settings.store.remove(place)
            artifact.remove(folder)
    except Timeout:
        return "NOT removed, a run is at work on it; run this again afterwards"
    return "removed"


def _remove_copy(root: Path, folder: Path) -> str:
    """Remove a fetched copy as a whole, and the files it shares with the store of all copies."""
    store = root / DOWNLOADS / "files"
    inodes = {p.stat().st_ino for p in folder.rglob("*") if p.is_file()}
    for path in [p for p in store.rglob("*") if p.is_file() and p.stat().st_ino in inodes]:
        path.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    return "removed, the publisher's files; a source that is read anew fetches them again"


def summary(found: Found) -> dict[str, Any]:
    """For machines: each entry, the files that hold it, the checkpoints that saw it."""
    entries = []
    for e in found.listed.entries:
        own = [h for h in found.held if h.entry == e.id]
        saw = [
            {k: row[k] for k in ("stage", "fingerprint", "is_there")} | row["entries"][e.id]
            for row in found.saw
            if e.id in row["entries"]
        ]
        names = {"kind": e.kind, "value": e.written, "reason": e.reason, "date": e.date.isoformat()}
        held = [{"place": h.place, "file": h.file} for h in own]
        entries.append({"row": e.row, "id": e.id, **names, "reference": e.reference, "held": held, "saw": saw})
    return {"entries": entries, "n_held": len(found.held), "clean": found.is_clean}


def lines(found: Found, *, most: int = 20) -> Iterator[str]:
    """For people: by entry, the artifacts that hold it and the checkpoints that saw it."""
    for e in summary(found)["entries"]:
        yield f"{takedown.FILE}:{e['row']}  {e['kind']} {e['value']}  ({e['reason']}, {e['date']}, {e['reference']})"
        places = Counter(h["place"] for h in e["held"])
        first = {h["place"]: h["file"] for h in reversed(e["held"])}
        for place, n in sorted(places.items())[:most]:
            yield f"    held by {place}: {first[place]}" + (f" and {n - 1} files more" if n > 1 else "")
        if len(places) > most:
            yield f"    and by {len(places) - most} more; --json has all"
        for s in e["saw"]:
            steps = ", ".join(map(str, s["steps"][:most])) + (", ..." if len(s["steps"]) > most else "")
            gone = "" if s["is_there"] else ", which is gone"
            yield f"    trained into {s['stage']} {s['fingerprint']}{gone}: {s['documents']} documents at steps {steps}"
        if not e["held"] and not e["saw"]:
            yield "    nothing here holds it"
    verdict = "no file holds anything listed" if found.is_clean else f"{len(found.held)} files hold what is listed"
    yield f"{len(found.listed.entries)} entries; {verdict}"
