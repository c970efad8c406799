"""Shards: byte ranges of tars, from a local folder or an object store.

In: source -> shard artifact (a folder, or any fsspec URL), and a ledger's (shard, offset, length). Out: just those
bytes. Invariants: nothing but the asked range is read; a short answer is an error; the cache never holds more than its
bound, and what it gives back was checked against its SHA-256. Cost: local, one open and one pread; remote, one ranged
request, so the loader's threads are what hides its latency.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

log = logging.getLogger(__name__)

TRIES = 4
FIRST_WAIT_S = 0.5
DIGEST_BYTES = 32
MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)  # asking again does not help


@dataclass
class Read:
    """What was read so far."""

    n_reads: int = 0
    n_bytes: int = 0
    n_cached: int = 0  # of the remote ranges, those that came from the cache


class Shards:
    """Ranges of the shards of some sources; threads may share one."""

    def __init__(self, places: Mapping[str, Path | str], *, cache: Path | None = None, cache_bytes: int = 0) -> None:
        """`cache`: a folder of this process alone for remote ranges, at most `cache_bytes` of them."""
        self.places = {source: place if is_url(place) else Path(place) for source, place in places.items()}
        for place in self.places.values():
            if isinstance(place, str):
                check_protocol(place)
        self.read_so_far = Read()
        self._cache = Cache(cache, cache_bytes) if cache and cache_bytes else None
        self._stores: dict[str, tuple[Any, str]] = {}
        self._lock = threading.Lock()

    def where(self, source: str, shard: int) -> str:
        """The shard's path or URL, for messages."""
        return f"{self.places[source]}/shards/{shard:05d}.tar"

    def read(self, source: str, shard: int, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on."""
        place = self.places[source]
        name = f"shards/{shard:05d}.tar"
        data, cached = self._local(f"{place}/{name}", offset, length) if isinstance(place, Path) else (None, False)
        if data is None:
            data, cached = self._remote(source, name, offset, length)
        if len(data) != length:
            raise ValueError(f"{name} has {len(data)} of the {length} bytes from {offset} on; copy the shard again")
        with self._lock:
            self.read_so_far.n_reads += 1
            self.read_so_far.n_bytes += length
            self.read_so_far.n_cached += cached
        return data

    def ledger_sha256(self, source: str, shard: int, key: str) -> str | None:
        """What the shard's ledger says of one sample's bytes; None where there is no ledger or no such row."""
        place, name = self.places[source], f"shards/{shard:05d}.parquet"
        try:
            if isinstance(place, Path):
                data = (place / name).read_bytes()
            else:
                store, root = self._store(source)
                data = store.cat_file(f"{root}/{name}")
        except FileNotFoundError:
            return None
        rows = pq.read_table(pa.BufferReader(data), columns=["sha256"], filters=[("key", "=", key)])
        found: list[str] = rows["sha256"].to_pylist()
        return found[0] if found else None

    def _local(self, path: str, offset: int, length: int) -> tuple[bytes, bool]:
        file = os.open(path, os.O_RDONLY)
        try:
            return os.pread(file, length, offset), False
        finally:
            os.close(file)

    def _remote(self, source: str, name: str, offset: int, length: int) -> tuple[bytes, bool]:
        store, root = self._store(source)
        entry = f"{self.places[source]}/{name}[{offset}:+{length}]"
        found = self._cache.get(entry) if self._cache else None
        if found is not None:
            return found, True
        for attempt in range(TRIES):
            try:
                data: bytes = store.cat_file(f"{root}/{name}", start=offset, end=offset + length)
                break
            except MISSING:
                raise
            except (OSError, TimeoutError) as error:
                if attempt == TRIES - 1:
                    raise
                wait_s = FIRST_WAIT_S * 2**attempt
                log.warning("%s: %s: %s; again in %s s", entry, type(error).__name__, error, wait_s)
                time.sleep(wait_s)
        if self._cache and len(data) == length:
            self._cache.put(entry, data)
        return data, False

    def _store(self, source: str) -> tuple[Any, str]:
        with self._lock:
            if source not in self._stores:
                from fsspec.core import url_to_fs

                store, root = url_to_fs(str(self.places[source]))
                self._stores[source] = (store, root.rstrip("/"))
            return self._stores[source]


class Cache:
    """Byte strings in a folder, the least recently used leave first; one process at a time."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """What an earlier process left is kept, the oldest first to go."""
        self.folder, self.limit_bytes, self.n_bytes = folder, limit_bytes, 0
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.iterdir(), key=lambda p: (p.stat().st_mtime_ns, p.name)):
            if path.suffix:
                path.unlink()  # a half-written entry of a killed process
            else:
                self._sizes[path.name] = path.stat().st_size
        self.n_bytes = sum(self._sizes.values())
        self._shrink(0)

    def get(self, entry: str) -> bytes | None:
        """What was put under this name, or None."""
        name = _name(entry)
        with self._lock:
            if name not in self._sizes:
                return None
            self._sizes.move_to_end(name)
        try:
            found = (self.folder / name).read_bytes()
        except FileNotFoundError:  # another thread made room in between
            return None
        digest, data = found[:DIGEST_BYTES], found[DIGEST_BYTES:]
        if hashlib.sha256(data).digest() == digest:
            return data
        log.warning("cache entry of %s is damaged; it is fetched again", entry)
        with self._lock:
            self._drop(name)
        return None

    def put(self, entry: str, data: bytes) -> None:
        """Keep these bytes, unless they alone exceed the bound."""
        name, size = _name(entry), len(data) + DIGEST_BYTES
        if size > self.limit_bytes:
            return
        aside = self.folder / f"{name}.{threading.get_ident()}"
        with self._lock:  # room first, so that the bound holds at every moment
            self._drop(name)
            self._shrink(size)
            self.n_bytes += size
        try:
            aside.write_bytes(hashlib.sha256(data).digest() + data)
        except OSError as error:  # a full disk costs speed, not the run
            log.warning("cache entry of %s is not kept: %s", entry, error)
            aside.unlink(missing_ok=True)
            with self._lock:
                self.n_bytes -= size
            return
        with self._lock:
            if name in self._sizes:  # another thread fetched the same range
                self.n_bytes -= size
                aside.unlink()
                return
            aside.replace(self.folder / name)
            self._sizes[name] = size

    def _shrink(self, room: int) -> None:
        while self._sizes and self.n_bytes + room > self.limit_bytes:
            self._drop(next(iter(self._sizes)))

    def _drop(self, name: str) -> None:
        if name in self._sizes:
            self.n_bytes -= self._sizes.pop(name)
            (self.folder / name).unlink(missing_ok=True)


def is_url(place: Path | str) -> bool:
    """True for what fsspec opens; a plain path is read without it."""
    return isinstance(place, str) and "://" in place


def check_protocol(url: str) -> None:
    """Refuse a store whose client is not installed, before anything is asked of it."""
    from fsspec import get_filesystem_class

    protocol = url.partition("://")[0].rpartition("::")[2]
    try:
        get_filesystem_class(protocol)
    except ImportError as error:
        remedy = "pip install -e '.[s3]'" if protocol in ("s3", "s3a") else "install what it names"
        raise ValueError(f"{url}: no client for {protocol}://: {error}; {remedy}") from None
    except ValueError as error:  # a protocol fsspec does not know
        raise ValueError(f"{url}: {error}; use a folder or a URL that fsspec opens") from None


def _name(entry: str) -> str:
    return hashlib.sha256(entry.encode()).hexdigest()
