"""The shared copies of published archives: the artifact of a local copy, pinned, mended, fetched once."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from published_pictures import COMMIT, FILES, HUB, job, source, web
from test_acquire import content

from solo.acquire import copies, location
from solo.acquire import part as acquire
from solo.acquire.location import Asked
from solo.artifact import make

pytestmark = pytest.mark.usefixtures("quick_tries")


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


def test_a_single_file_is_its_own_location(site, tmp_path):
    body = site.files["/archive/pics/train-0.tar"]
    pin = f"sha256:{hashlib.sha256(body).hexdigest()}"
    asked = Asked(
        "one", "http://archive.test/archive/pics/train-0.tar", pin, loopback_ports={"archive.test": site.port}
    )
    path = copies.fetch(asked, tmp_path, print)
    assert path.is_file() and path.name == "train-0.tar" and path.read_bytes() == body
    assert acquire.content_sha256(path) == pin.removeprefix("sha256:")
