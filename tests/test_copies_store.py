"""Copies of what object stores hold: the artifact of a local copy, and nothing outside its folder."""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import replace

import pytest
from published_pictures import job, source
from test_acquire import content

from solo.acquire import copies, location, patience
from solo.acquire import part as acquire
from solo.acquire.location import Asked
from solo.artifact import make

pytestmark = pytest.mark.usefixtures("quick_tries")


@pytest.fixture(scope="module")
def bucket(published, s3_server):
    """The folder below s3://bucket/archive/pics."""
    import fsspec

    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.items():
            patch.setenv(name, value)
        store = fsspec.filesystem("s3", skip_instance_cache=True)
        store.mkdir("bucket")
        for path in published[0].iterdir():
            store.pipe_file(f"bucket/archive/pics/{path.name}", path.read_bytes())
    return s3_server, store


@pytest.fixture
def s3(bucket, monkeypatch):
    from fsspec import get_filesystem_class

    for name, value in bucket[0].items():
        monkeypatch.setenv(name, value)
    get_filesystem_class("s3").clear_instance_cache()
    return bucket[1]


def test_a_store_gives_it_too(published, s3, tmp_path):
    _, pin, local = published
    made, _ = make(job(source(pin, {"location": "s3://bucket/archive/pics"}), tmp_path, tmp_path), acquire.run)
    assert content(made.path) == content(local.path)
    assert (made.manifest.digest, made.manifest.fingerprint) == (local.manifest.digest, local.manifest.fingerprint)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"aws-secret-key" not in path.read_bytes()


def test_a_stores_download_goes_on_and_notices_a_change(s3, tmp_path, monkeypatch):
    from solo.acquire import store_files

    monkeypatch.setattr(store_files, "BLOCK_BYTES", 1000)
    s3.pipe_file("bucket/big/a.bin", os.urandom(5000))
    digest = hashlib.sha256(s3.cat_file("bucket/big/a.bin")).hexdigest()
    asked = Asked("big", "s3://bucket/big/a.bin", f"sha256:{digest}")
    stop = threading.Event()
    opened = store_files.opener(asked)
    (file,) = store_files.listed(asked)
    path = tmp_path / "a.bin"

    def enough(n):
        if n:
            stop.set()  # as a failure of another file does

    with pytest.raises(patience.Stopped):
        copies.transfer.fetch(file, opened, path, what="big", stop=stop, told=enough)
    assert (tmp_path / "a.bin.part").stat().st_size == 1000
    gained = []
    assert copies.transfer.fetch(file, opened, path, what="big", stop=threading.Event(), told=gained.append) == digest
    assert gained == [1000, *[1000] * 4]
    path.unlink()

    def replaced(n):
        if n:
            s3.pipe_file("bucket/big/a.bin", os.urandom(5000))

    with pytest.raises(
        ValueError, match=r"^big: it was replaced while it was read; run again to fetch it as it is now"
    ):
        copies.transfer.fetch(file, opened, path, what="big", stop=threading.Event(), told=replaced)
    assert not list(tmp_path.glob("a.bin*"))
    (tmp_path / "a.bin.part").write_bytes(b"x" * 1000)
    (tmp_path / "a.bin.part.json").write_text('{"total": 5000, "stamp": "of another object"}')
    with pytest.raises(ValueError, match=r"^big: it changed at its publisher"):
        copies.transfer.fetch(file, opened, path, what="big", stop=threading.Event(), told=gained.append)


STORE = {
    "no bucket": ("s3://nobucket/x", r"cannot be listed: it is not there; correct acquire\.location|nothing is at"),
    "no such file": ("s3://bucket/none", r"nothing is at s3://bucket/none"),
    "no client": ("gs://bucket/x", r"no client for gs://"),
}


@pytest.mark.parametrize("case", STORE)
def test_what_a_store_lacks_is_one_line(s3, tmp_path, case):
    url, says = STORE[case]
    with pytest.raises(ValueError, match=says) as error:
        copies.fetch(Asked("pics", url, "sha256:" + "0" * 64), tmp_path, print)
    assert "\n" not in str(error.value) and "aws-secret-key" not in str(error.value)


def test_names_from_a_server_stay_in_their_folder(s3, tmp_path):
    s3.pipe_file("bucket/odd/../../out", b"x")
    with pytest.raises(ValueError, match=r"is no name below a folder|nothing is at|cannot be listed"):
        copies.fetch(Asked("odd", "s3://bucket/odd", "sha256:" + "0" * 64), tmp_path, print)
    assert {p.name for p in tmp_path.iterdir()} <= {"downloads"}
    for name in ("../x", "a/../../x", "/x", "a//b", "a\\b", "", "."):
        asked = Asked("s", "s3://bucket/odd", "unpinned", files=("*/*", "*"))
        with pytest.raises(ValueError):
            location.chosen(
                [name, "good", "a/b"] if name else ["a/", "good"], replace(asked, files=() if name else ("*/*",))
            )
