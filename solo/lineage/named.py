"""Named: which samples a key, the beginning of one, a URL or a SHA-256 means.

In: the artifacts under a data root, and a text. Out: keys, or `Unknown`, which says what is near. Invariants: of each
part and name the artifact made last counts; a URL in another spelling is the same URL, as in the list of takedowns.
Cost: a key some row groups (solo/lineage/keyed.py), a URL or hash one scan of that column of the outcomes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from solo.artifact import Artifact, read_manifest
from solo.lineage import takedown
from solo.lineage.keyed import Keyed, Row
from solo.lineage.takedown import Entry, Listed, canonical_url

KEY = re.compile(r"(?P<source>[a-z0-9]+(?:-[a-z0-9]+)*)-(?P<hex>[0-9a-f]{1,16})")
HEX = re.compile(r"[0-9a-f]{4,16}")
SHA256 = re.compile(r"(sha256:)?(?P<hex>[0-9a-fA-F]{64})")
MOST = 20  # samples of one answer; a URL with more captions says how many there are
BY_URL = "SELECT DISTINCT key FROM read_parquet($files) WHERE url = $asked AND key IS NOT NULL ORDER BY key"
BY_HASH = "SELECT DISTINCT key FROM read_parquet($files) WHERE {column} = $asked AND key IS NOT NULL ORDER BY key"
BY_COLUMN = "SELECT DISTINCT key FROM read_parquet($files, union_by_name := TRUE) WHERE {column} = $asked ORDER BY key"
OF_HOST = """
SELECT DISTINCT url FROM read_parquet($files) WHERE starts_with(url, $start)
ORDER BY jaro_winkler_similarity(url, $asked) DESC, url LIMIT 3
"""


class Unknown(ValueError):
    """Nothing of that name, or too much of it; the message says what is near."""


class Root:
    """The artifacts under a data root that a trace reads: of each part and name the one made last."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._files: dict[Path, Keyed] = {}
        self._con: Any = None

    def artifact(self, part: str, name: str) -> Artifact | None:
        """The artifact made last; None where there is none."""
        made = [Artifact(f, m) for f in (self.root / part / name).glob("*/") if (m := read_manifest(f))]
        return max(made, key=lambda a: (float(a.manifest.record["made_at"]), a.path.name), default=None)

    def all(self, part: str) -> dict[str, Artifact]:
        """Of every name of a part the artifact made last."""
        names = sorted(f.name for f in (self.root / part).glob("*/") if not f.name.startswith("."))
        return {name: made for name in names if (made := self.artifact(part, name))}

    def keyed(self, path: Path) -> Keyed | None:
        """A file by key, opened once; None where it is not there."""
        if path not in self._files and path.is_file():
            self._files[path] = Keyed(path)
        return self._files.get(path)

    def rows(self, sql: str, **given: Any) -> list[Row]:
        """Rows of a query, where no order by key helps."""
        import duckdb  # a tenth of a second that a trace by key to a lock does not need

        self._con = self._con or duckdb.connect()
        found = self._con.execute(sql, given)
        names = [d[0] for d in found.description or ()]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def taken_down(asked: str, specs: Path | None) -> str | None:
    """What to say of a name that the list of takedowns means."""
    listed = Listed.of(specs) if specs else Listed(())
    entry = listed.first(key=asked, urls=[asked], hashes=[asked.lower().removeprefix("sha256:")])
    if entry is None:
        return None
    return (
        f"trace: {asked!r} is on the list of takedowns, {takedown.FILE}:{entry.row} ({entry.reason}, {entry.date}, "
        f"{entry.reference}); `solo takedown` says what still holds it and which checkpoints saw it"
    )


def resolve(root: Root, asked: str) -> tuple[str, list[str]]:
    """What kind of name this is, and the keys it means; Unknown where there are none."""
    acquired = root.all("acquire")
    if not acquired:
        raise Unknown(f"trace: nothing was acquired under {root.root}; run a recipe first")
    if match := SHA256.fullmatch(asked):
        return "sha256", _by_hash(root, acquired, match["hex"].lower())
    if "://" in asked:
        return "url", _by_url(root, acquired, asked)
    match = KEY.fullmatch(asked)
    if match and match["source"] in acquired and len(match["hex"]) == 16:
        if acquired_rows(root, asked, ["key"]):
            return "key", [asked]
        raise Unknown(f"trace: no sample {asked!r}; {_near_keys(root, asked, match['source'])}")
    return "key", _by_prefix(root, acquired, asked)


def _by_prefix(root: Root, acquired: Mapping[str, Artifact], asked: str) -> list[str]:
    """The one key that begins so, its source named or not."""
    match = KEY.fullmatch(asked)
    starts = [asked] if match and match["source"] in acquired else []
    if HEX.fullmatch(asked):
        starts += [f"{source}-{asked}" for source in acquired]
    if not starts:
        near = difflib.get_close_matches(asked.rpartition("-")[0] or asked, acquired, cutoff=0.4)
        raise Unknown(
            f"trace: {asked!r} is no URL, no SHA-256 and no key of a source acquired here "
            f"({'did you mean ' + ' or '.join(near) if near else 'sources are ' + ', '.join(acquired)}); "
            f"a key is its source and 16 hex digits, of which the first 4 do where they are enough"
        )
    found: dict[str, None] = {}
    for start in starts:
        file = root.keyed(acquired[start.rpartition("-")[0]].path / "outcomes.parquet")
        found |= dict.fromkeys(r["key"] for r in (file.beginning(start, MOST + 1, ["key"]) if file else []))
    keys = list(found)
    if not keys:
        raise Unknown(
            f"trace: no key begins with {asked!r}; {_near_keys(root, starts[0], starts[0].rpartition('-')[0])}"
        )
    if len(keys) > 1:
        more = "and more" if len(keys) > MOST else "give another digit"
        raise Unknown(f"trace: {asked!r} begins {len(keys)} keys: {', '.join(keys[:MOST])}; {more}")
    return keys


def _near_keys(root: Root, key: str, source: str) -> str:
    made = root.artifact("acquire", source)
    file = root.keyed(made.path / "outcomes.parquet") if made else None
    near = file.around(key, 3) if file else []
    return f"the nearest are {', '.join(near)}" if near else f"{source} has none"


def _by_url(root: Root, acquired: Mapping[str, Artifact], url: str) -> list[str]:
    files = [str(a.path / "outcomes.parquet") for a in acquired.values()]
    keys = [str(r["key"]) for r in root.rows(BY_URL, files=files, asked=url)]
    keys = keys or [key for a in acquired.values() for key in _spelt_otherwise(a.path / "outcomes.parquet", url)]
    if keys:
        return keys
    parts = urlsplit(url)
    near = root.rows(OF_HOST, files=files, start=f"{parts.scheme}://{parts.netloc}", asked=url)
    said = f"the nearest are {', '.join(r['url'] for r in near)}" if near else f"none is of host {parts.netloc!r}"
    raise Unknown(f"trace: no sample has the URL {url!r}; {said}")


def _spelt_otherwise(outcomes: Path, url: str) -> list[str]:
    """Keys whose URL asks the same server for the same thing."""
    try:
        asked = Entry("url", canonical_url(url), url, "", date.min, "", 0)
    except ValueError:
        return []
    rows = takedown.matches(Listed([asked]), outcomes, outcomes.with_name("fetch.parquet"))
    keys = Keyed(outcomes).keys_at(rows) if rows else []
    return sorted({key for key in keys if key})


def _by_hash(root: Root, acquired: Mapping[str, Artifact], sha256: str) -> list[str]:
    """Samples by the bytes served, the bytes kept, their pictures together, or the whole sample in a shard."""
    files = [str(a.path / "outcomes.parquet") for a in acquired.values()]
    for column in ("sha256", "served_sha256"):  # 64 digits do not compress: one column takes half the time of two
        if rows := root.rows(BY_HASH.format(column=column), files=files, asked=sha256):
            return [str(r["key"]) for r in rows]
    signals = [file for a in root.all("filter").values() if (file := root.keyed(a.path / "signals.parquet"))]
    for column in ("image_sha256", "text_sha256"):
        files = [str(file.path) for file in signals if column in file.columns]
        if files and (rows := root.rows(BY_COLUMN.format(column=column), files=files, asked=sha256)):
            return [str(r["key"]) for r in rows]
    ledgers = [str(p) for a in root.all("shard").values() for p in sorted((a.path / "shards").glob("*.parquet"))]
    if ledgers and (rows := root.rows(BY_COLUMN.format(column="sha256"), files=ledgers, asked=sha256)):
        return [str(r["key"]) for r in rows]
    raise Unknown(
        f"trace: no sample has the SHA-256 {sha256}; it may be of the bytes as served, of the pictures as kept, "
        f"or of the sample in a shard; of a picture cut out of a shard it is not known"
    )


def acquired_rows(root: Root, key: str, columns: Sequence[str] | None = None) -> list[Row]:
    """The outcome rows of a key."""
    made = root.artifact("acquire", key.rpartition("-")[0])
    file = root.keyed(made.path / "outcomes.parquet") if made else None
    return file.rows(key, columns) if file else []
