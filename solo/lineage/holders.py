"""Holders: every file under a data root that holds what is listed in takedown.csv, old artifacts and caches included.

In: a data root and the list. Out: needles (keys, URLs, hosts, hashes), the files that hold one, and the checkpoints
that were trained on one, with the steps. Invariants: keys are found by what old and new outcomes say of a URL or hash,
by what samples in tars say of themselves, and by hashes of keys that were taken down before; a report holds what the
artifacts its pages show held. Weights are not searched: what a model has seen is told by its packs. Cost: `deep` reads
every tar and hashes its pictures; else the Parquet files and the names in the tars.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from solo import artifact, pool
from solo.acquire.passes import FETCH
from solo.acquire.raw import OUTCOMES
from solo.lineage import takedown
from solo.lineage.erase import MEMORY
from solo.lineage.takedown import Listed
from solo.sample import BLOCK_BYTES, read_samples

WEIGHTS = {".safetensors", ".pt", ".npy", ".distcp"}
KEY = r"[a-z0-9]+(?:-[a-z0-9]+)*-[0-9a-f]{16}"
TOKENS = re.compile(rb"https?://[^\s\"'<>\\)\]]+|[0-9a-f]{64}|" + KEY.encode())
CHUNK_BYTES, OVERLAP_BYTES = 64 << 20, 1 << 16
SAW, REMOVED = "saw.json", "removed.json"


@dataclass
class Needles:
    """What is looked for; the values are ids of entries."""

    listed: Listed
    keys: dict[str, str] = field(default_factory=dict)
    key_hashes: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)  # of artifacts whose pictures a page may show

    def of_key(self, key: str) -> str | None:
        """The entry that a key was taken down for."""
        if key in self.keys:
            return self.keys[key]
        return self.key_hashes.get(hashlib.sha256(key.encode()).hexdigest()) if self.key_hashes else None

    def of_text(self, value: str) -> str | None:
        """The entry that a whole cell or a token of a text means."""
        if "://" in value:
            found = self.listed.first(urls=[value])
        else:
            found = self.listed.first(key=value, hashes=[value])
            host = value.lower().rstrip(".")
            found = found or self.listed.by_kind["host"].get(host)
            found = found or next((e for end, e in self.listed.below.items() if host.endswith(end)), None)
        return found.id if found else self.of_key(value) if re.fullmatch(KEY, value) else None


@dataclass(frozen=True)
class Held:
    """A file that holds an entry; `place` is its artifact, or its folder where it is of none."""

    entry: str
    place: str
    file: str


@dataclass(frozen=True)
class Unit:
    """A file to be searched, in a process of its own."""

    path: Path
    needles: Needles


def files(root: Path) -> Iterator[Path]:
    """Every file under a data root but the memory of takedowns; folders that are being removed too."""
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.relative_to(root).parts[0] != MEMORY:
            yield path


def survey(root: Path, listed: Listed, *, deep: bool, workers: int = 1) -> Needles:
    """The keys of all that is listed, as far as outcomes, tars and memory tell."""
    needles = Needles(listed)
    ids = {e.id for e in listed.entries}
    for path in sorted((root / MEMORY).glob("*/*.json")):
        needles.key_hashes |= {k: v for k, v in json.loads(path.read_bytes()).items() if v in ids}
    needles.digests = {k: v for k, v in _json(root / MEMORY / REMOVED).items() if v in ids}
    needles.keys |= {e.value: e.id for e in listed.entries if e.kind == "key"}
    for path in (p for p in files(root) if p.name == OUTCOMES):
        meant = takedown.matches(listed, path, path.with_name(FETCH))
        if meant:
            keys = pq.read_table(path, columns=["key"])["key"].to_pylist()
            needles.keys |= {keys[n]: entry.id for n, entry in meant.items() if keys[n]}
    if deep:
        tars = [Unit(p, needles) for p in files(root) if p.suffix == ".tar"]
        for found in pool.each(in_tar, tars, workers):
            needles.keys |= found
    return needles


def in_tar(unit: Unit) -> dict[str, str]:
    """Keys of the samples of a tar that are listed by their URL or by a picture's bytes."""
    found = {}
    try:
        for sample in read_samples(unit.path):
            hashes = [hashlib.sha256(data).hexdigest() for data in sample.images]
            url = sample.meta.get("url")
            entry = unit.needles.listed.first(urls=[url] if isinstance(url, str) else [], hashes=hashes)
            if entry:
                found[sample.key] = entry.id
    except (ValueError, KeyError, TypeError):
        pass  # a publisher's tar, or one of an unfinished download, is in another form; it is searched byte by byte
    return found


def holders(root: Path, needles: Needles, *, workers: int = 1) -> list[Held]:
    """Every file that holds a needle."""
    units = [Unit(path, needles) for path in files(root) if path.suffix not in WEIGHTS]
    found = []
    for unit, ids in zip(units, pool.each(search, units, workers), strict=True):
        place, file = where(root, unit.path)
        found += [Held(entry, place, file) for entry in sorted(ids)]
    return found + list(_pages(root, needles, {h.place: h.entry for h in found}))


def where(root: Path, path: Path) -> tuple[str, str]:
    """The artifact a file is of, or the folder of a cache, and its name there."""
    parts = path.relative_to(root).parts
    n = 3 if len(parts) > 3 else len(parts) - 1
    return "/".join(parts[:n]), "/".join(parts[n:])


def search(unit: Unit) -> set[str]:
    """Ids of the entries that a file holds."""
    if unit.path.suffix == ".parquet":
        return _parquet(unit)
    names = _tar_keys(unit.path) if unit.path.suffix == ".tar" else None
    if names is not None:
        return {entry for key in names if (entry := unit.needles.of_key(key))}
    return _bytes(unit)


def _parquet(unit: Unit) -> set[str]:
    found: set[str] = set()
    try:
        with pq.ParquetFile(unit.path) as file:
            for group in range(file.num_row_groups):
                for column in file.read_row_group(group).columns:
                    for chunk in column.chunks:
                        for values in _texts(chunk):
                            found |= _cells(values, unit.needles)
    except pa.ArrowException:
        return _bytes(unit)  # half-written
    return found


def _texts(array: pa.Array) -> Iterator[pa.Array]:
    """The texts of a column, whatever lists and structs they are in."""
    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        yield pc.unique(array.drop_null())
    elif pa.types.is_struct(kind):
        for child in array.flatten():
            yield from _texts(child)
    elif pa.types.is_map(kind):
        yield from _texts(array.keys)
        yield from _texts(array.items)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield from _texts(array.flatten())
    elif pa.types.is_dictionary(kind):
        yield from _texts(array.dictionary)


def _cells(values: pa.Array, needles: Needles) -> set[str]:
    """Ids of the entries that whole cells mean. Only cells that could be meant are looked at in Python."""
    listed = needles.listed.by_kind
    exact = [*needles.keys, *listed["sha256"], *listed["host"]]
    is_likely = pc.is_in(pc.utf8_lower(values), pa.array(exact, values.type))
    if listed["url"] or listed["host"]:
        is_likely = pc.or_(is_likely, pc.match_substring(values, "://"))
    if needles.key_hashes:
        is_likely = pc.or_(is_likely, pc.match_substring_regex(values, f"^{KEY}$"))
    for end in needles.listed.below:
        is_likely = pc.or_(is_likely, pc.ends_with(pc.utf8_lower(values), end))
    return {entry for value in values.filter(is_likely).to_pylist() if (entry := needles.of_text(value))}


def _tar_keys(path: Path) -> set[str] | None:
    """Keys of the members of a tar, by their names alone; None where it is not one of ours."""
    keys = set()
    with path.open("rb") as tar:
        while (header := tar.read(BLOCK_BYTES)) and any(header):
            try:
                name, size = header[:100].rstrip(b"\0").decode(), int(header[124:135], 8)
            except ValueError:
                return None
            key = name.partition(".")[0]
            if not re.fullmatch(KEY, key):
                return None
            keys.add(key)
            tar.seek(size + -size % BLOCK_BYTES, 1)
    return keys


def _bytes(unit: Unit) -> set[str]:
    """Ids of the entries that tokens of a file of any form mean, and of hosts that stand in it as a word."""
    found: set[str] = set()
    if unit.path.name == artifact.MANIFEST and (manifest := artifact.read_manifest(unit.path.parent)):
        said = json.dumps([manifest.stats, manifest.counts, manifest.files], ensure_ascii=False)
        return tokens(said.encode(), unit.needles)  # not the spec: a host that a user names there is no sample
    with unit.path.open("rb") as file:
        tail = b""
        while chunk := file.read(CHUNK_BYTES):
            data = tail + chunk
            found |= tokens(data, unit.needles)
            tail = data[-OVERLAP_BYTES:]
    return found


def tokens(data: bytes, needles: Needles) -> set[str]:
    """Ids of the entries that tokens of a text mean, and of hosts that stand in it as a word."""
    found: set[str] = set()
    for token in {token.decode("ascii", "replace") for token in TOKENS.findall(data)}:
        for begin in [0, *(m.end() for m in re.finditer("-", token) if "://" not in token)]:  # `of-web-0123...` too
            if entry := needles.of_text(token[begin:]):
                found.add(entry)
    for e in needles.listed.by_kind["host"].values():
        host = re.escape(e.value.removeprefix("*.").encode())
        if re.search(rb"(?<![\w.-])" + host + rb"(?![\w-])", data, re.IGNORECASE):
            found.add(e.id)
    return found


def _pages(root: Path, needles: Needles, held: Mapping[str, str]) -> Iterator[Held]:
    """Reports whose pages show pictures of artifacts that held something: thumbnails have bytes of their own."""
    shown = dict(needles.digests)
    for place, entry in held.items():
        manifest = artifact.read_manifest(root / place)
        if manifest and manifest.part in ("acquire", "filter"):
            shown[manifest.digest] = entry
    for folder in sorted((root / "report").glob("*/*/")):
        manifest = artifact.read_manifest(folder)
        if manifest and folder.relative_to(root).as_posix() not in held:
            ids = {shown[d] for node, d in manifest.inputs.items() if d in shown and node.startswith(("acq", "filter"))}
            yield from (Held(entry, folder.relative_to(root).as_posix(), "report.html") for entry in sorted(ids))


def saw(root: Path, needles: Needles) -> list[dict[str, Any]]:
    """Each checkpoint that was trained on what is listed: by entry, how many documents and at which steps.

    Of packs that are gone it tells what was noted before they went.
    """
    found = {row["fingerprint"]: row for row in _json(root / MEMORY / SAW).values()}
    packs = {m.digest: folder for folder in (root / "pack").glob("*/*/") if (m := artifact.read_manifest(folder))}
    for folder in sorted((root / "train").glob("*/*/")):
        manifest = artifact.read_manifest(folder)
        plans = [packs[d] for node, d in (manifest.inputs if manifest else {}).items() if d in packs]
        if manifest is None or not plans:
            continue
        planned = artifact.read_manifest(plans[0])
        assert planned is not None
        if entries := _steps(plans[0], int(planned.spec["batch_packs"]), needles):
            row = {"stage": manifest.name, "fingerprint": manifest.fingerprint, "entries": entries}
            old = found.get(manifest.fingerprint, {"entries": {}})
            found[manifest.fingerprint] = row | {"entries": old["entries"] | entries}
    ids = {e.id for e in needles.listed.entries}
    rows = [row | {"entries": {k: v for k, v in row["entries"].items() if k in ids}} for row in found.values()]
    there = [row | {"is_there": (root / "train" / row["stage"] / row["fingerprint"]).is_dir()} for row in rows]
    return sorted((row for row in there if row["entries"]), key=lambda row: (row["stage"], row["fingerprint"]))


def _steps(plan: Path, batch_packs: int, needles: Needles) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    with pq.ParquetFile(plan / "plan.parquet") as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["key", "pack"])
            ids = {key: entry for key in pc.unique(table["key"]).to_pylist() if (entry := needles.of_key(key))}
            hits = table.filter(pc.is_in(table["key"], pa.array(list(ids), pa.string())))
            for row in hits.to_pylist():
                own = found.setdefault(ids[row["key"]], {"documents": 0, "steps": []})
                own["documents"] += 1
                own["steps"] = sorted({*own["steps"], row["pack"] // batch_packs + 1})
    return found


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes())) if path.is_file() else {}
