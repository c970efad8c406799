"""Ranges of shards: only what was asked for, from a folder or an object store, through a cache that keeps its bound."""

import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loader import PACK_TOKENS, TOKENS, made, same  # noqa: F401, `made` is a fixture

from solo.sequence import shards as module
from solo.sequence.loader import DamagedSampleError, PackLoader
from solo.sequence.shards import Cache, Shards

DATA = bytes(range(256)) * 40


@pytest.fixture
def store(monkeypatch):
    """fsspec's memory store, with a list of the ranges asked of it."""
    memory = fsspec.filesystem("memory")
    asked, real = [], type(memory).cat_file

    def cat_file(self, path, start=None, end=None, **kwargs):
        asked.append((path.rsplit("/", 1)[-1], start, end))
        return real(self, path, start=start, end=end, **kwargs)

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.001)
    memory.asked, memory.root = asked, f"memory://{uuid.uuid4().hex}"
    yield memory
    memory.rm(memory.root, recursive=True)


def upload(store, folder):
    for path in folder.rglob("shards/*"):
        store.pipe_file(f"{store.root}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def remote(store, plan, **options):
    places = {s: f"{store.root}/{s}" for s in ("web", "chat")}
    return PackLoader(plan, Shards(places, **options), TOKENS, PACK_TOKENS)


def test_packs_from_a_store_are_the_packs_from_a_folder(made, store, tmp_path):  # noqa: F811
    folder, _, packs = made
    upload(store, folder)
    local = PackLoader(folder / "plan", {s: folder / s for s in ("web", "chat")}, TOKENS, PACK_TOKENS)
    expected = [local.load(i) for i in range(len(local))]
    for options in ({}, {"cache": tmp_path / "cache", "cache_bytes": 1 << 30}):
        loader = remote(store, folder / "plan", **options)
        store.asked.clear()
        assert all(same(a, b) for a, b in zip(expected, loader.iterate(0, batch_packs=3, workers=4), strict=True))
        rows = [row for pack in packs for row in pack]
        wanted = sorted((f"{r['shard']:05d}.tar", r["offset"], r["offset"] + r["length"]) for r in rows)
        assert sorted(store.asked) == wanted  # just the ledger's ranges, each once
        assert loader.shards.read_so_far.n_bytes == sum(row["length"] for row in rows)
    store.asked.clear()  # a second run of the same process folder finds all of it
    loader = remote(store, folder / "plan", cache=tmp_path / "cache", cache_bytes=1 << 30)
    assert all(same(a, loader.load(i)) for i, a in enumerate(expected))
    assert not store.asked and loader.shards.read_so_far.n_cached == loader.shards.read_so_far.n_reads == len(rows)


def test_a_damaged_remote_document_names_key_and_place(made, store):  # noqa: F811
    folder, _, packs = made
    upload(store, folder)
    row = packs[2][0]
    name = f"{store.root}/{row['source']}/shards/{row['shard']:05d}.tar"
    data = bytearray(store.cat_file(name))
    data[row["offset"] + 512 + 60] ^= 0x41  # still JSON: only the ledger's SHA-256, read from the store, tells
    store.pipe_file(name, bytes(data))
    with pytest.raises(DamagedSampleError, match=rf"^{row['key']}: no sample at {row['shard']:05d}\.tar\["):
        remote(store, folder / "plan").load(2)
    store.pipe_file(name, bytes(data[: row["offset"] + 10]))
    with pytest.raises(DamagedSampleError, match=r"has 10 of the \d+ bytes"):
        remote(store, folder / "plan").load(2)
    store.rm(name)
    with pytest.raises(DamagedSampleError, match="FileNotFoundError"):
        remote(store, folder / "plan").load(2)


def test_a_store_that_fails_is_asked_again_and_a_missing_shard_is_not(store, monkeypatch):
    store.pipe_file(f"{store.root}/web/shards/00000.tar", DATA)
    counted, failures = type(store).cat_file, [ConnectionError("reset"), TimeoutError("slow")]

    def flaky(self, *args, **kwargs):
        if failures:
            raise failures.pop()
        return counted(self, *args, **kwargs)

    monkeypatch.setattr(type(store), "cat_file", flaky)
    shards = Shards({"web": f"{store.root}/web"})
    assert shards.read("web", 0, 100, 50) == DATA[100:150] and not failures and len(store.asked) == 1
    failures += [ConnectionError("down")] * 9
    with pytest.raises(ConnectionError, match="down"):
        shards.read("web", 0, 100, 50)
    assert len(failures) == 9 - module.TRIES
    failures.clear()
    store.asked.clear()
    with pytest.raises(FileNotFoundError):
        shards.read("web", 1, 0, 1)
    assert len(store.asked) == 1


def test_a_local_range_ends_where_the_file_ends(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "00000.tar").write_bytes(DATA)
    shards = Shards({"web": tmp_path})
    assert shards.read("web", 0, 5, 7) == DATA[5:12]
    with pytest.raises(ValueError, match=r"00000\.tar has 3 of the 9 bytes from 10237 on"):
        shards.read("web", 0, len(DATA) - 3, 9)
    with pytest.raises(FileNotFoundError):
        shards.read("web", 7, 0, 1)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 400)), max_size=60), st.integers(100, 1500))
def test_the_cache_keeps_its_bound_and_gives_back_what_was_put(tmp_path_factory, calls, limit):
    folder = tmp_path_factory.mktemp("cache")
    cache, last = Cache(folder, limit), {}
    for number, size in calls:
        data = bytes([number]) * size
        last[number] = data
        cache.put(str(number), data)
        on_disk = sum(p.stat().st_size for p in folder.iterdir())
        assert cache.n_bytes == on_disk <= limit
        if size + 32 <= limit:
            assert cache.get(str(number)) == data
    again = Cache(folder, limit)
    assert again.n_bytes == cache.n_bytes
    for number, data in last.items():
        assert again.get(str(number)) in (data, None) or len(data) + 32 > limit
    assert Cache(folder, 0).n_bytes == 0 and not list(folder.iterdir())


def test_the_least_recently_used_leaves_first(tmp_path):
    cache = Cache(tmp_path, 3 * 132)
    for name in "abc":
        cache.put(name, name.encode() * 100)
    assert cache.get("a")
    cache.put("d", b"d" * 100)
    assert [bool(cache.get(name)) for name in "abcd"] == [True, False, True, True]


def test_a_damaged_or_half_written_entry_is_fetched_again(tmp_path):
    cache = Cache(tmp_path, 10_000)
    cache.put("a", b"right")
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(entry.read_bytes()[:-1] + b"!")
    assert cache.get("a") is None and cache.n_bytes == 0
    (tmp_path / "killed.123").write_bytes(b"half")
    assert Cache(tmp_path, 10_000).n_bytes == 0 and not list(tmp_path.iterdir())


def test_many_threads_share_one_cache(tmp_path):
    cache, wrong = Cache(tmp_path, 2_000), []
    start = threading.Barrier(8)

    def work(seed):
        start.wait()
        for i in range(150):
            name = str((i * 7 + seed) % 23)
            found = cache.get(name)
            if found is None:
                cache.put(name, name.encode() * 60)
            elif found != name.encode() * 60:
                wrong.append(name)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert not wrong
    assert cache.n_bytes == sum(p.stat().st_size for p in tmp_path.iterdir()) <= 2_000


def test_a_store_without_its_client_is_said_before_a_document_is_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # what an environment without it looks like to an import
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    message = r"^s3://bucket/web: no client for s3://: .*s3fs.*; pip install -e '\.\[s3\]'$"
    with pytest.raises(ValueError, match=message):
        Shards({"text": "memory://text", "web": "s3://bucket/web"})
    with pytest.raises(ValueError, match=r"^nowhere://x: .*nowhere.*; use a folder or a URL that fsspec opens"):
        Shards({"web": "nowhere://x"})


def test_packs_from_an_s3_store(made, tmp_path, monkeypatch, s3_server):  # noqa: F811
    """A real server and client, moto's and s3fs, on the loopback."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    store.mkdir("packs")
    folder, _, packs = made
    for path in folder.rglob("shards/*"):
        store.pipe_file(f"packs/{path.relative_to(folder).as_posix()}", path.read_bytes())
    places = {s: f"s3://packs/{s}" for s in ("web", "chat")}
    shards = Shards(places, cache=tmp_path / "cache", cache_bytes=20_000)
    remote_loader = PackLoader(folder / "plan", shards, TOKENS, PACK_TOKENS)
    local = PackLoader(folder / "plan", {s: folder / s for s in ("web", "chat")}, TOKENS, PACK_TOKENS)
    for _ in range(2):
        got = list(remote_loader.iterate(0, batch_packs=3, workers=4))
        assert all(same(local.load(i), pack) for i, pack in enumerate(got)) and len(got) == len(local)
    assert 0 < sum(p.stat().st_size for p in (tmp_path / "cache").iterdir()) <= 20_000
    row = packs[2][0]
    store.rm(f"packs/{row['source']}/shards/{row['shard']:05d}.tar")
    store.invalidate_cache()
    with pytest.raises(DamagedSampleError, match=rf"^{row['key']}: .*FileNotFoundError"):
        PackLoader(folder / "plan", places, TOKENS, PACK_TOKENS).load(2)
