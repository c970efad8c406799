"""Copies of what the hub publishes: the artifact of a local copy; refusals, silence and mirrors are one line."""

from __future__ import annotations

import hashlib
import socket
import threading
import time

import pytest
from archive_server import Site, serving
from published_pictures import COMMIT, FILES, HUB, TOKEN, job, source
from test_acquire import content

from solo import sources
from solo.acquire import copies, hub_files, location, web_files
from solo.acquire import part as acquire
from solo.artifact import make

pytestmark = pytest.mark.usefixtures("quick_tries")


def test_the_hub_gives_it_too(published, site, tmp_path, monkeypatch):
    _, _, local = published
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    site.hub.token = TOKEN
    made, _ = make(job(source(COMMIT, HUB), tmp_path, tmp_path), acquire.run)
    assert content(made.path) == content(local.path) and made.manifest.digest == local.manifest.digest
    with_token = [path for path, headers in site.asked if "authorization" in headers]
    assert {path.split("/")[1] for path in with_token} == {"api", "datasets", "store"}  # all one origin here
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"signed-secret" in p.read_bytes()]
    n = len(site.asked)
    other = source(COMMIT, HUB | {"samples_per_shard": 3}, name="pics-sft")
    make(job(other, tmp_path, tmp_path), acquire.run)
    assert len(site.asked) == n  # two sources of one upstream share it


HUB_ERRORS = {
    "no repository": (HUB | {"location": "huggingface:owner/none"}, {}, r"no such dataset; correct acquire\.location"),
    "no commit": (HUB, {"revision": "f" * 40}, r"the repository has no such commit; correct revision"),
    "no folder": (HUB | {"location": "huggingface:owner/set/nowhere"}, {}, r"no such folder at this commit"),
    "no match": (
        HUB | {"files": ["*.zip"]},
        {},
        r"nothing matches '\*\.zip' at hugg.*it has 3 other files, such as \['ma",
    ),
    "gated": (HUB, {"token": "other"}, r"the hub refuses; HF_TOKEN may not read it; accept its terms at https://hugg"),
    "gated, no token": (HUB, {"token": "other", "ours": None}, r"the hub refuses; HF_TOKEN is not set; accept its"),
}


@pytest.mark.parametrize("case", HUB_ERRORS)
def test_what_the_hub_refuses_is_one_line(site, tmp_path, monkeypatch, case):
    fields, how, says = HUB_ERRORS[case]
    if ours := how.get("ours", TOKEN):
        monkeypatch.setenv("HF_TOKEN", ours)
    site.hub.token = how.get("token", ours)
    with pytest.raises(ValueError, match=says) as error:
        acquire.run(job(source(how.get("revision", COMMIT), fields), tmp_path, tmp_path))
    assert "\n" not in str(error.value) and TOKEN not in str(error.value)


@pytest.mark.parametrize("there", ["nobody", "a silent one"])
@pytest.mark.parametrize("fields", [HUB, {"location": "http://archive.test/pics", "files": FILES}], ids=["hub", "web"])
def test_a_probe_says_within_seconds_that_nobody_answers(tmp_path, monkeypatch, there, fields):
    """A fetch asks again and again: nobody waits for it."""
    monkeypatch.undo()  # of `quick_tries`: pauses as they are
    for module in (hub_files, web_files):
        monkeypatch.setattr(module, "ONCE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        server.close() if there == "nobody" else None
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        mapped = {"loopback_ports": {"archive.test": port}} if "http" in fields["location"] else {}
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"pics: .*; try again later") as error:
            sources.check(source(f"sha256:{'0' * 64}" if mapped else COMMIT, fields | mapped), tmp_path, tmp_path)
    assert time.monotonic() - began < 3 and "\n" not in str(error.value)


def test_a_mirror_cannot_change_a_byte_of_a_commit(site, tmp_path):
    tree = site.hub.repositories["owner/set"][COMMIT]
    digest = hashlib.sha256(tree["data/pics/train-0.tar"]).hexdigest()
    site.files[f"/store/{digest}"] = tree["data/pics/train-0.tar"][::-1]
    asked = location.asked(source(COMMIT, HUB))
    with pytest.raises(ValueError, match=rf"^pics: train-0\.tar of hugg.*it has sha256 .*, {digest} is pinned"):
        copies.fetch(asked, tmp_path, print)
    del site.files[f"/store/{digest}"]
    tree["data/pics/mapping.txt"] += b"\n"  # no LFS file: its git id tells
    site.hub.repositories["owner/set"]["e" * 40] = dict(tree)
    listed = copies.published.listed(location.asked(source("e" * 40, HUB)))
    tree["data/pics/mapping.txt"] = tree["data/pics/mapping.txt"][:-1] + b" "
    site.hub.repositories["owner/set"]["e" * 40]["data/pics/mapping.txt"] = tree["data/pics/mapping.txt"]
    stop, opened = threading.Event(), copies.published.opener(location.asked(source("e" * 40, HUB)))
    with pytest.raises(ValueError, match=r"it has the git id [0-9a-f]{40}, [0-9a-f]{40} is pinned"):
        copies.transfer.fetch(listed[0], opened, tmp_path / "x", what="m", stop=stop, told=lambda _: None)


def test_a_hub_that_redirects_elsewhere_gets_no_further_and_no_token(site, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving(Site()) as other:
        site.hub.store = f"http://127.0.0.1:{other.port}"
        with pytest.raises(ValueError, match=r"127\.0\.0\.1 is not at a public address"):
            copies.fetch(location.asked(source(COMMIT, HUB)), tmp_path, print)
        assert other.asked == []
