"""Takedown: the list of what may not be kept, `datasets_spec/takedown.csv`, and which samples it means.

In: a CSV with the columns kind, value, reason, date, reference; a line that begins with `#` is a comment. Kinds: `url`
(http and https are one, a fragment does not count), `host` (`example.org`, or `*.example.org` for all below it),
`sha256` (of a picture's bytes as served or as acquired), `key`. Out: entries, and by entry the rows of an outcome table
that they mean. Invariants: whatever cannot be understood is an error that names file, row and field, never a line that
silently matches nothing; the first entry of the file that means a row has it; an entry's id tells nobody what it lists.
Cost: matching is one scan of a few columns of the outcomes.
"""

from __future__ import annotations

import csv
import hashlib
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import quote, urlsplit

from solo.spec import SpecError

FILE = "takedown.csv"
TAKEN_DOWN = "taken_down"  # the status of what is listed
Kind = Literal["url", "host", "sha256", "key"]
KINDS: tuple[Kind, ...] = get_args(Kind)
COLUMNS = ("kind", "value", "reason", "date", "reference")
KEY = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*-[0-9a-f]{16}")
HOST = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*|\[[0-9a-f:.]+\]")
PORTS = {"http": 80, "https": 443}
AS_THEY_ARE = "!#$%&'()*+,/:;=?@[]~"  # characters of a path or query that percent-encoding leaves alone

# Hosts are compared here so that only few URLs are taken apart in Python; one that is not plain ASCII always is.
HOST_OF = "rtrim(lower(regexp_extract(url, '^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@]*@)?([^/?#:]*)', 1)), '.')"
LIKELY_URL = f"""(url IS NOT NULL AND ({HOST_OF} IN (SELECT value FROM hosts) OR regexp_matches({HOST_OF}, $below)
  OR regexp_matches({HOST_OF}, '[^\\x00-\\x7F]|%|\\[|\\\\')))"""
NUMBERED = "SELECT file_row_number AS n, * FROM read_parquet($outcomes, file_row_number := TRUE)"
LIKELY = f"""
SELECT n, key, url, served_sha256, sha256 FROM ({NUMBERED})
WHERE key IN (SELECT value FROM keys) OR sha256 IN (SELECT value FROM hashes)
  OR served_sha256 IN (SELECT value FROM hashes) OR {LIKELY_URL}
ORDER BY n
"""
REDIRECTED = f"""
SELECT DISTINCT key, url FROM (SELECT key, unnest(redirects) AS url FROM read_parquet($fetches))
WHERE key IS NOT NULL AND {LIKELY_URL}
"""
KEPT_OF = f"SELECT n, key FROM ({NUMBERED}) WHERE raw_shard IS NOT NULL AND n IN (SELECT n FROM found)"
SAME_KEY = f"SELECT n, key FROM ({NUMBERED}) WHERE key IN (SELECT value FROM gone)"
STORED = """
SELECT key, raw_shard FROM read_parquet($outcomes) WHERE raw_shard IS NOT NULL AND n_images > 1 ORDER BY raw_shard
"""


@dataclass(frozen=True)
class Entry:
    """One line of the list; `value` is canonical, `written` as it stands there."""

    kind: Kind
    value: str
    written: str
    reason: str
    date: date
    reference: str
    row: int

    @cached_property
    def id(self) -> str:
        """What stands for it in specs, outcomes and manifests, which may not repeat what they forget."""
        return hashlib.sha256(f"{self.kind}\0{self.value}".encode()).hexdigest()[:16]


def read(specs: Path) -> tuple[Entry, ...]:
    """The list, empty where there is no file; SpecError at the first line that is not right."""
    path = specs / FILE
    if not path.is_file():
        return ()
    entries: dict[str, Entry] = {}
    header: str | None = None
    for number, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        where = f"{path}:{number}"
        line = _line(raw, where)
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if header is None:
            header = line.strip()
            if header != ",".join(COLUMNS):
                raise SpecError(f"{where}: the first line is {header!r}; it must be {','.join(COLUMNS)!r}")
            continue
        cells = _cells(line, where)
        entry = _entry(dict(zip(COLUMNS, cells, strict=True)), number, where)
        if entry.id in entries:
            raise SpecError(f"{where}: value: {entry.written!r} is row {entries[entry.id].row} again; take one out")
        entries[entry.id] = entry
    return tuple(entries.values())


def _line(raw: bytes, where: str) -> str:
    try:
        line = raw.decode("utf-8").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise SpecError(f"{where}: byte {error.start + 1} is no UTF-8; save the file as UTF-8") from None
    for c in line:
        if unicodedata.category(c) in ("Cc", "Cf", "Co", "Cn") and c != "\t":
            raise SpecError(
                f"{where}: holds the invisible character U+{ord(c):04X}; nothing would match it, take it out"
            )
    return line


def _cells(line: str, where: str) -> list[str]:
    try:
        (cells,) = csv.reader([line], strict=True)
    except csv.Error as error:
        raise SpecError(f"{where}: not a CSV line: {error}; quote a value that holds a comma or a quote") from None
    if len(cells) != len(COLUMNS):
        raise SpecError(
            f"{where}: {len(cells)} fields, not {len(COLUMNS)} ({','.join(COLUMNS)}); quote what holds a comma"
        )
    return cells


def _entry(cells: Mapping[str, str], number: int, where: str) -> Entry:
    for name, cell in cells.items():
        if cell != cell.strip() or not cell:
            raise SpecError(f"{where}: {name}: {cell!r} is empty or has spaces around it; every field is needed")
    kind, value = cells["kind"], cells["value"]
    if kind not in KINDS:
        raise SpecError(f"{where}: kind: {kind!r} is not one of {', '.join(KINDS)}")
    try:
        day = date.fromisoformat(cells["date"])
    except ValueError:
        raise SpecError(f"{where}: date: {cells['date']!r} is no date; write 2026-01-31") from None
    try:
        canonical = CANONICAL[kind](value)
    except ValueError as error:
        raise SpecError(f"{where}: value: {error}") from None
    return Entry(kind, canonical, value, cells["reason"], day, cells["reference"], number)


def canonical_url(url: str) -> str:
    """`host[:port]/path?query` of an http URL: two URLs that ask one server for one thing have the same."""
    split = urlsplit(url)
    if split.scheme.lower() not in PORTS or not split.hostname:
        raise ValueError(f"{url!r} is no http or https URL")
    port = split.port if split.port not in (None, *PORTS.values()) else None
    path = quote(split.path or "/", safe=AS_THEY_ARE)
    query = f"?{quote(split.query, safe=AS_THEY_ARE)}" if split.query else ""
    same_case = re.sub(r"%[0-9a-fA-F]{2}", lambda m: m[0].upper(), path + query)
    return f"{canonical_host(split.hostname)}{f':{port}' if port else ''}{same_case}"


def canonical_host(host: str) -> str:
    """A host name in lower case ASCII, without the dot of the root."""
    plain = host.lower().rstrip(".")
    stars, name = ("*.", plain[2:]) if plain.startswith("*.") else ("", plain)
    try:
        name = name if name.isascii() else name.encode("idna").decode()
    except UnicodeError:
        raise ValueError(f"{host!r} is no host name") from None
    name = f"[{name}]" if ":" in name and not name.startswith("[") else name
    if not HOST.fullmatch(stars + name):
        raise ValueError(f"{host!r} is no host name; write example.org, or *.example.org for all hosts below it")
    return stars + name


def _sha256(value: str) -> str:
    plain = value.lower().removeprefix("sha256:")
    if not re.fullmatch(r"[0-9a-f]{64}", plain):
        raise ValueError(f"{value!r} is no SHA-256; give 64 hex digits")
    return plain


def _key(value: str) -> str:
    if not KEY.fullmatch(value):
        raise ValueError(f"{value!r} is no key; a key is its source and 16 hex digits, as `solo trace` shows it")
    return value


CANONICAL = {"url": canonical_url, "host": canonical_host, "sha256": _sha256, "key": _key}


class Listed:
    """The list as it is asked: does it mean this key, URL or hash?"""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        self.by_kind: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}
        for entry in entries:
            self.by_kind[entry.kind][entry.value] = entry
        self.below = {v[1:]: e for v, e in self.by_kind["host"].items() if v.startswith("*.")}

    @classmethod
    def of(cls, specs: Path) -> Listed:
        """The list of a spec folder."""
        return cls(read(specs))

    def __bool__(self) -> bool:
        """Whether anything is listed."""
        return bool(self.entries)

    def first(self, *, key: str | None = None, urls: Iterable[str] = (), hashes: Iterable[str] = ()) -> Entry | None:
        """The first entry of the file that means any of these."""
        found = [e for h in hashes if (e := self.by_kind["sha256"].get(h))]
        found += [e for url in urls for e in self._of_url(url)]
        found += [self.by_kind["key"][key]] if key in self.by_kind["key"] else []
        return min(found, key=lambda e: e.row, default=None)

    def _of_url(self, url: str) -> Iterator[Entry]:
        try:
            canonical = canonical_url(url)
        except ValueError:
            return
        host = canonical_host(str(urlsplit(url).hostname))
        for kind, value in (("url", canonical), ("host", host)):
            if value in self.by_kind[kind]:
                yield self.by_kind[kind][value]
        yield from (entry for end, entry in self.below.items() if host.endswith(end))

    def compared(self) -> tuple[dict[str, list[str]], str]:
        """Values to compare with in SQL, and a pattern of the hosts below a starred one."""
        hosts = {re.split(r"[/?:]", value, maxsplit=1)[0] for value in self.by_kind["url"]}
        hosts |= {value for value in self.by_kind["host"] if not value.startswith("*.")}
        below = "|".join(re.escape(end) for end in sorted(self.below))
        values = {"keys": [*self.by_kind["key"]], "hashes": [*self.by_kind["sha256"]], "hosts": sorted(hosts)}
        return values, f"({below})$" if below else "^$a"


def matches(listed: Listed, outcomes: Path, fetches: Path, raw: Path | None = None) -> dict[int, Entry]:
    """Row number of an outcome table -> the entry that means it; `raw`: hash every picture where a sample has more.

    A row whose key is that of a kept sample that is meant goes with it.
    """
    if not listed:
        return {}
    import duckdb

    values, below = listed.compared()
    by_key: dict[str, Entry] = {}
    with duckdb.connect() as con:
        for name, some in values.items():
            _register(con, name, some)
        rows = con.execute(LIKELY, {"outcomes": str(outcomes), "below": below}).fetchall()
        if fetches.is_file() and (listed.by_kind["url"] or listed.by_kind["host"]):
            redirected = con.execute(REDIRECTED, {"fetches": str(fetches), "below": below}).fetchall()
            by_key |= {k: e for k, url in redirected if (e := listed.first(urls=[url]))}
        if raw and listed.by_kind["sha256"]:
            stored = con.execute(STORED, {"outcomes": str(outcomes)}).fetchall()
            by_key |= _of_pictures(listed, raw, stored)
        found = {}
        for n, key, url, served, kept in rows:
            entry = listed.first(key=key, urls=[url] if url else [], hashes=[h for h in (served, kept) if h])
            if entry:
                found[int(n)] = entry
        return found | _with_their_keys(con, outcomes, found, by_key)


def _register(con: Any, name: str, values: Sequence[str]) -> None:  # noqa: ANN401 - a connection of DuckDB
    import pyarrow as pa

    con.register(name, pa.table({"value": pa.array(values, pa.string())}))


def _of_pictures(listed: Listed, raw: Path, stored: Sequence[tuple[str, int]]) -> dict[str, Entry]:
    """Keys of samples of several pictures one of which is listed by its hash."""
    from solo.sample import read_samples

    keys, found = {key for key, _ in stored}, {}
    for shard in sorted({shard for _, shard in stored}):
        for sample in read_samples(raw / f"{shard:05d}.tar"):
            hashes = [hashlib.sha256(data).hexdigest() for data in sample.images if sample.key in keys]
            if entry := listed.first(hashes=hashes):
                found[sample.key] = entry
    return found


def _with_their_keys(
    con: Any,  # noqa: ANN401 - a connection of DuckDB, which is not imported where nothing is listed
    outcomes: Path,
    found: Mapping[int, Entry],
    by_key: dict[str, Entry],
) -> dict[int, Entry]:
    """Rows that share the key of a sample that is meant and was kept, or that are meant by their key alone."""
    import pyarrow as pa

    con.register("found", pa.table({"n": pa.array(found, pa.int64())}))
    for n, key in con.execute(KEPT_OF, {"outcomes": str(outcomes)}).fetchall():
        by_key.setdefault(key, found[n])
    if not by_key:
        return {}
    _register(con, "gone", list(by_key))
    rows = con.execute(SAME_KEY, {"outcomes": str(outcomes)}).fetchall()
    return {int(n): by_key[key] for n, key in rows if n not in found}


def recorded(spec: Mapping[str, Any]) -> set[str]:
    """Ids of the entries that were applied to an acquire artifact."""
    return set(spec.get("takedown", ()))


def with_ids(spec: Mapping[str, Any], ids: Collection[str]) -> dict[str, Any]:
    """The spec of an acquire artifact to which these entries were applied; with none it is as if there were no list."""
    others = {name: value for name, value in spec.items() if name != "takedown"}
    return others | ({"takedown": sorted(ids)} if ids else {})
