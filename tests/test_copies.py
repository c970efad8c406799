"""The shared copies of published archives: the same artifact from a path, the web, a store and the hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import yaml
from archive_server import Hub, Site, serving
from test_acquire import build, content
from typer.testing import CliRunner

from solo import acquire, cli, copies, hub_files, line, location, patience, sources, web_files
from solo.artifact import Job, combined_sha256, make
from solo.location import Asked
from solo.spec import SourceSpec

COMMIT = "0123456789" * 4
TOKEN = "hf_secretsecretsecret"
FILES = ("mapping.txt", "train-0.tar", "train-1.tar")
LOCAL = {"location": "pics", "adapter": "webdataset_labels.read", "args": {"mapping": "mapping.txt"}}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(patience, "FIRST_WAIT_S", 0.001)
    for name in ("HF_TOKEN", "HF_ENDPOINT", "AWS_ENDPOINT_URL", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder that is published everywhere, and the artifact that a local copy of it becomes."""
    specs = tmp_path_factory.mktemp("local") / "specs"
    build(specs / "pics")
    pin = f"sha256:{acquire.content_sha256(specs / 'pics')}"
    made, _ = make(job(source(pin, LOCAL), specs.parent / "root", specs), acquire.run)
    return specs / "pics", pin, made


@pytest.fixture
def site(published, monkeypatch):
    """The same as a web site and as a repository of the hub, in a folder of it beside another file."""
    folder, _, _ = published
    with serving(Site()) as made:
        for path in folder.iterdir():
            made.files[f"/archive/pics/{path.name}"] = path.read_bytes()
        tree = {f"data/pics/{p.name}": p.read_bytes() for p in folder.iterdir()} | {"data/other.tar": b"no"}
        there = f"http://127.0.0.1:{made.port}"
        made.hub = Hub({"owner/set": {COMMIT: tree}}, store=there)
        monkeypatch.setenv("HF_ENDPOINT", there)
        yield made


def source(revision, fields, name="pics"):
    return SourceSpec.model_validate(
        {
            "name": name,
            "title": "Pictures",
            "licence": {"id": "CC0-1.0", "url": "https://example.org"},
            "revision": revision,
            "modality": "image-text",
            "acquire": LOCAL | {"samples_per_shard": 4} | fields,
            "filter": {"signals": [], "keep": {}},
            "shard": {"samples_per_shard": 4, "template": "plain"},
        }
    )


def job(spec, root, specs, progress=lambda _: None):
    asked = location.identity(spec)
    return Job("acquire", spec.name, acquire.VERSION, asked, {}, root, specs, 1, progress, location.where(spec))


def web(site, **fields):
    ports = {"loopback_ports": {"archive.test": site.port}}
    return {"location": "http://archive.test/archive/pics", "files": FILES} | ports | fields


HUB = {"location": "huggingface:owner/set/data/pics", "files": ["*.tar", "mapping.txt"]}


def test_the_web_gives_the_artifact_of_a_local_copy(published, site, tmp_path):
    folder, pin, local = published
    lines = []
    spec = source(pin, web(site))
    made, _ = make(job(spec, tmp_path, tmp_path, lines.append), acquire.run)
    assert content(made.path) == content(local.path) and made.manifest.digest == local.manifest.digest
    assert made.manifest.fingerprint == local.manifest.fingerprint  # its bytes are pinned, so whence they come is not
    assert lines[0].startswith("pics: fetching 3 files of ") and any("3 of 3 files" in line for line in lines)
    n = len(site.asked)
    again, worked = make(job(spec, tmp_path, tmp_path), acquire.run, force=True)
    assert worked and again.manifest.digest == local.manifest.digest and len(site.asked) == n
    assert "archive.test" not in json.dumps(made.manifest.spec)
    assert made.manifest.stats["location"] == "http://archive.test/archive/pics"
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    by_file = source("0" * 40, web(site, sha256=digests))
    assert make(job(by_file, tmp_path, tmp_path), acquire.run)[0].manifest.digest == local.manifest.digest


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
    from solo import store_files

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


def test_what_is_not_the_pinned_data_never_becomes_a_copy(published, site, tmp_path):
    _, pin, _ = published
    wrong = source("sha256:" + "0" * 64, web(site))
    with pytest.raises(
        ValueError, match=rf"^pics: http://archive\.test/archive/pics has {pin} but revision is sha256:0"
    ):
        acquire.run(job(wrong, tmp_path, tmp_path))
    assert not list((tmp_path / "downloads/files").glob("[!.]*")) and not list(tmp_path.glob("downloads/*/pics"))


def test_unpinned_data_are_refused_before_anything_is_asked_and_the_pin_is_told(published, site, tmp_path):
    _, pin, local = published
    for fields in (web(site), HUB):
        with pytest.raises(ValueError, match=r"revision is unpinned.*`solo revision pics` into sources/pics\.yaml"):
            acquire.run(job(source("unpinned", fields), tmp_path, tmp_path))
    assert site.asked == []
    assert copies.pin(location.asked(source("unpinned", HUB)), tmp_path, print) == COMMIT
    assert copies.pin(location.asked(source("unpinned", web(site))), tmp_path, print) == pin
    n = len(site.asked)
    made, _ = make(job(source(pin, web(site)), tmp_path, tmp_path), acquire.run)
    assert made.manifest.digest == local.manifest.digest and len(site.asked) == n  # what told the pin is the copy


@pytest.mark.parametrize("harm", ["short", "gone"])
def test_a_copy_that_was_harmed_is_mended(published, site, tmp_path, harm):
    _, pin, local = published
    spec = source(pin, web(site))
    path = copies.fetch(location.asked(spec), tmp_path, print) / "train-1.tar"
    if harm == "short":
        with path.open("r+b") as file:
            file.truncate(100)
    else:
        path.unlink()
    n, lines = len(site.asked), []
    made, _ = make(job(spec, tmp_path, tmp_path, lines.append), acquire.run)
    assert made.manifest.digest == local.manifest.digest and "what is wrong is fetched again" in lines[0]
    asked = [path for path, _ in site.asked[n:]]
    assert asked == (["/archive/pics/train-1.tar"] if harm == "short" else [])


def test_a_plan_knows_what_is_to_come(published, site, tmp_path):
    folder, pin, _ = published
    asked = location.asked(source(pin, web(site)))
    n_bytes = sum(path.stat().st_size for path in folder.iterdir())
    assert copies.absent_bytes(asked, tmp_path) is None and site.asked == []
    copies.fetch(asked, tmp_path, print)
    assert copies.absent_bytes(asked, tmp_path) == 0
    copies.shutil.rmtree(copies.place(asked, tmp_path).parent)
    assert copies.absent_bytes(asked, tmp_path) == 0  # the files are there, the copy is a matter of links
    for path in (tmp_path / "downloads/files").glob("*"):
        path.unlink()
    assert copies.absent_bytes(asked, tmp_path) == n_bytes


def test_many_who_want_the_same_fetch_it_once(published, site, tmp_path):
    _, pin, _ = published
    asked = [replace(location.asked(source(pin, web(site))), source=f"pics-{i}") for i in range(4)]
    asked += [location.asked(source(COMMIT, HUB))] * 2
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda a: copies.fetch(a, tmp_path, lambda _: None), asked))
    assert len({str(path) for path in found}) == 2
    for name in FILES:
        path = f"/archive/pics/{name}"
        assert site.sent[path] == len(site.files[path]) + 1


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
    monkeypatch.undo()  # of `_quick`: pauses as they are
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


def test_numbered_files_are_counted_out(site):
    assert location.numbered("a-{008..011}/b-{0..1}.tar")[1:3] == ["a-008/b-1.tar", "a-009/b-0.tar"]
    assert location.numbered("plain-{a..b}.tar") == ["plain-{a..b}.tar"]
    for pattern in ("a-{2..1}", "a-{0..999999999}"):
        with pytest.raises(ValueError, match=r"acquire\.files: 'a-.* counts from"):
            source("0" * 40, HUB | {"files": [pattern]})
    want = location.asked(source(COMMIT, HUB | {"files": ["train-{0..2}.tar"]}))
    with pytest.raises(ValueError, match=r"nothing matches 'train-2\.tar'"):  # a set with a hole is no set
        copies.published.listed(want)


def test_a_single_file_is_its_own_location(site, tmp_path):
    body = site.files["/archive/pics/train-0.tar"]
    pin = f"sha256:{hashlib.sha256(body).hexdigest()}"
    asked = Asked(
        "one", "http://archive.test/archive/pics/train-0.tar", pin, loopback_ports={"archive.test": site.port}
    )
    path = copies.fetch(asked, tmp_path, print)
    assert path.is_file() and path.name == "train-0.tar" and path.read_bytes() == body
    assert acquire.content_sha256(path) == pin.removeprefix("sha256:")


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
