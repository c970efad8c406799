"""What a spec may ask for of what is published, and the commands that fetch it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import tiny
import yaml
from published_pictures import COMMIT, HUB, LOCAL, source
from typer.testing import CliRunner

from solo import line
from solo.acquire import copies, location
from solo.artifact import combined_sha256
from solo.cli import app as cli

pytestmark = pytest.mark.usefixtures("quick_tries")

REFUSED = {
    "user information": ({"location": "https://user:pw@h.test/a", "files": ["a"]}, "credentials come from"),
    "a signature": ({"location": "https://h.test/a?X-Amz-Signature=abc"}, "'X-Amz-Signature', a credential"),
    "a token": ({"location": "s3://bucket/a?token=abc"}, "'token', a credential"),
    "a way out": ({"location": "https://h.test/a", "files": ["../b"]}, "no name below a folder"),
    "absolute": ({"location": "https://h.test/a", "files": ["/etc/passwd"]}, "no name below a folder"),
    "a backslash": ({"location": "https://h.test/a", "files": ["a\\b"]}, "no name below a folder"),
    "a folder named ..": ({"location": "https://h.test/a/.."}, r"acquire\.location: '\.\.' is no name"),
    "a pattern on the web": ({"location": "https://h.test/a", "files": ["*.tar"]}, "has no listing; name each file"),
    "a chain": ({"location": "simplecache::s3://bucket/a"}, "neither http"),
    "a chained store": ({"location": "s3://x::http://127.0.0.1/a"}, "neither http"),
    "another protocol": ({"location": "ftp://h.test/a"}, "neither http.* nor a store of s3, "),
    "no host": ({"location": "https:///a"}, "names no host"),
    "no repository": ({"location": "huggingface:owner"}, "is not huggingface:OWNER/NAME"),
    "out of a repository": ({"location": "huggingface:owner/set/../x", "files": ["a"]}, "is not huggingface:OWNER"),
    "no files of a repository": ({"location": "huggingface:owner/set"}, r"acquire\.files is missing"),
    "files of a path": ({"location": "here", "files": ["a"]}, "is for a location that is fetched; 'here' is a path"),
    "a digest of nothing": ({"location": "https://h.test/a", "files": ["a"], "sha256": {"b": "0" * 64}}, "not in acq"),
    "no digest": ({"location": "https://h.test/a", "files": ["a"], "sha256": {"a": "12"}}, "not 64 hex digits"),
    "a commit on the web": ({"location": "https://h.test/a", "files": ["a"]}, "pins no byte on a web server", COMMIT),
    "a commit in a store": ({"location": "s3://bucket/a"}, "pins no byte in a store", COMMIT),
    "a digest on the hub": ({"location": "huggingface:owner/set", "files": ["a"]}, "the 40 digits of a commit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_spec_that_does_not_say_what_is_fetched_is_refused(case):
    fields, says, *revision = REFUSED[case]
    with pytest.raises(ValueError, match=says):
        source(revision[0] if revision else "sha256:" + "0" * 64, fields)


def test_a_local_source_keeps_its_identity_and_a_commit_its_files():
    local = source("sha256:" + "0" * 64, {})
    assert location.identity(local)["acquire"] == LOCAL | {"samples_per_shard": 4} and location.where(local) == {}
    assert location.identity(source(COMMIT, HUB))["acquire"]["location"] == HUB["location"]
    assert location.identity(source(COMMIT, HUB))["acquire"]["files"] == HUB["files"]
    pinned = "sha256:" + "0" * 64
    a = source(pinned, {"location": "https://one.test/pics"})
    b = source(pinned, {"location": "s3://two/pics", "files": ["*"]})
    assert location.identity(a) == location.identity(b) != location.identity(source("sha256:" + "1" * 64, {}))


def test_numbered_files_are_counted_out(site):
    assert location.numbered("a-{008..011}/b-{0..1}.tar")[1:3] == ["a-008/b-1.tar", "a-009/b-0.tar"]
    assert location.numbered("plain-{a..b}.tar") == ["plain-{a..b}.tar"]
    for pattern in ("a-{2..1}", "a-{0..999999999}"):
        with pytest.raises(ValueError, match=r"acquire\.files: 'a-.* counts from"):
            source("0" * 40, HUB | {"files": [pattern]})
    want = location.asked(source(COMMIT, HUB | {"files": ["train-{0..2}.tar"]}))
    with pytest.raises(ValueError, match=r"nothing matches 'train-2\.tar'"):  # a set with a hole is no set
        copies.published.listed(want)


@pytest.fixture
def specs(site, tmp_path, monkeypatch):
    """The toy recipe, its text source at the web site."""
    folder = tmp_path / "specs"
    tiny.write_specs(folder)
    monkeypatch.setenv("SOLO_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("SOLO_SPECS", str(folder))
    return folder


def solo(*arguments):
    done = CliRunner().invoke(cli.app, list(arguments))
    if isinstance(done.exception, ValueError):
        return str(done.exception)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_commands_tell_what_is_to_come_fetch_it_and_probe_it(site, specs, tmp_path):
    before = yaml.safe_load((specs / "sources/toy-text.yaml").read_text())["acquire"]
    here = specs / before["location"]
    name = next(p.name for p in here.iterdir()) if here.is_dir() else here.name
    body = (here / name if here.is_dir() else here).read_bytes()
    site.files[f"/text/{name}"] = body
    fields = {"location": "http://archive.test/text", "files": [name], "loopback_ports": {"archive.test": site.port}}
    tiny.edit(specs, "sources/toy-text.yaml", revision="unpinned", acquire=before | fields)
    assert re.search(
        r"not here yet; 1 files, .* are published at .*`solo revision toy-text` tells", solo("check", "toy-text")
    )
    assert "revision is unpinned" in solo("fetch", "toy-text")
    pin = solo("revision", "toy-text").splitlines()[-1].removeprefix("revision: ")
    assert pin == f"sha256:{combined_sha256({name: hashlib.sha256(body).hexdigest()})}"
    copies.shutil.rmtree(tmp_path / "root/downloads")
    upstream = {"id": "x", "url": "https://x.test", "files": [name], "layout": "lines", "download_bytes": 5_000_000}
    tiny.edit(specs, "sources/toy-text.yaml", revision=pin, upstream=upstream)
    asked = len(site.asked)
    planned = json.loads(solo("plan", "toy", "--json"))["downloads"]
    assert planned == [{"sources": ["toy-text"], "n_bytes": 5_000_000, "listed": False}]
    assert "acquire will download about 5 MB for toy-text" in solo("plan", "toy") and len(site.asked) == asked
    assert "`solo fetch toy-text` brings it" in solo("check", "toy-text")
    path = solo("fetch", "toy-text").splitlines()[-1]
    assert (Path(path) / name).read_bytes() == body
    assert re.search(r"toy-text: \d+ of the first \d+ records are as expected", solo("check", "toy-text"))
    assert json.loads(solo("plan", "toy", "--json"))["downloads"] == []
    local = tmp_path / "local"
    tiny.write_specs(local)
    digests = set()
    for at in (line.Settings.from_env(), line.Settings(tmp_path / "other", local, 1)):
        (node,) = [n for n in line.nodes("toy", at.specs) if n.id == "acquire/toy-text"]
        digests.add(line.make_node(node, {}, at)[0].digest)
    assert len(digests) == 1
