"""Downloads from servers as they are: cut, without ranges, slow, lying, changing, and killed half-way."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from archive_server import How, Site, serving

from solo.acquire import copies, patience, transfer
from solo.acquire.location import Asked
from solo.artifact import combined_sha256

BODY = random.Random(5).randbytes(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(patience, "FIRST_WAIT_S", 0.001)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def site():
    with serving(Site()) as made:
        made.files["/data/a.tar"] = BODY
        yield made


def want(site, *names, sha256=None, revision=None, **fields):
    """`names` below /data, each with the digest that it has now unless `sha256` says otherwise."""
    names = names or ("a.tar",)
    digests = {n: hashlib.sha256(site.files.get(f"/data/{n}", b"")).hexdigest() for n in names}
    given = {
        "source": "pics",
        "location": "http://archive.test/data",
        "revision": revision or f"sha256:{combined_sha256(digests)}",
        "files": names,
        "sha256": digests if sha256 is None else sha256,
        "loopback_ports": {"archive.test": site.port},
    }
    return Asked(**given | fields)


def fetched(asked, root):
    return (copies.fetch(asked, root, lambda _: None) / "a.tar").read_bytes()


def test_a_connection_that_breaks_is_gone_on_from_where_it_broke(site, tmp_path):
    site.how["/data/a.tar"] = How(cuts=[70_000, 0, 90_001])
    assert fetched(want(site), tmp_path) == BODY
    assert site.ranges("/data/a.tar") == ["bytes=0-0", "bytes=0-", "bytes=70000-", "bytes=70000-", "bytes=160001-"]
    assert site.sent["/data/a.tar"] == len(BODY) + 1  # no byte twice but the one that was looked at
    etag = f'"{SHA256[:12]}"'
    assert [headers.get("if-range") for _, headers in site.asked] == [None, None, etag, etag, etag]


def test_a_server_without_ranges_begins_again(site, tmp_path):
    site.how["/data/a.tar"] = How(ranges=False, cuts=[70_000])
    assert fetched(want(site), tmp_path) == BODY
    assert site.sent["/data/a.tar"] >= len(BODY) + 70_000


def test_a_file_that_changes_under_way_is_named(site, tmp_path):
    changed = BODY[::-1]

    class Change(list):
        """Cut the first answer, and change the file with that."""

        def pop(self, _):
            site.files["/data/a.tar"] = changed
            return super().pop(0)

    asked = want(site)
    site.how["/data/a.tar"] = How(cuts=Change([70_000]))
    with pytest.raises(
        ValueError, match=r"^pics: a\.tar of http://archive\.test/data: it changed at its publisher"
    ) as error:
        fetched(asked, tmp_path)
    assert SHA256[:12] in str(error.value) and hashlib.sha256(changed).hexdigest()[:12] in str(error.value)
    assert not list(tmp_path.rglob("*.part*"))  # what was there of the old one is gone
    assert fetched(want(site), tmp_path) == changed
    site.files["/data/a.tar"] = BODY
    site.how["/data/a.tar"] = How(cuts=Change([70_000]), etag=None)  # no ETag, no date: only the digest can tell
    with pytest.raises(ValueError, match=f"{SHA256} is pinned"):
        fetched(asked, tmp_path / "other")


def test_the_etag_of_a_range_is_checked_too(site, tmp_path):
    """A server that answers 206 whatever If-Range says."""
    asked = want(site)
    part = tmp_path / "downloads/files" / f"{SHA256}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(BODY[:1000])
    part.with_name(part.name + ".json").write_text('{"total": 300000, "stamp": "W/\\"weak\\""}')
    with pytest.raises(ValueError, match=r'its ETag or date was W/"weak" and is "'):
        fetched(asked, tmp_path)
    assert site.ranges("/data/a.tar")[-1] == "bytes=1000-" and "if-range" not in site.asked[-1][1]
    assert fetched(asked, tmp_path) == BODY


LIES = {
    "shorter than said": (How(length=400_000, ranges=False), "400000 bytes.*300000|ended.*6 times in a row"),
    "longer than said": (How(length=100_000, ranges=False), f"sha256 .*{SHA256} is pinned"),
    "another length of all": (How(total=300_001), "6 times in a row; run again, it goes on from 300 kB"),
    "another range": (How(shift=1), "another range than the one asked for"),
    "packed": (How(encoding="gzip"), "Content-Encoding; the server packs"),
    "no length, no end": (How(length=-1, ranges=False, cuts=[70_000]), f"sha256 .*{SHA256} is pinned"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies_is_caught(site, tmp_path, lie):
    site.how["/data/a.tar"], says = LIES[lie]
    with pytest.raises(ValueError, match=says) as error:
        fetched(want(site), tmp_path)
    assert str(error.value).startswith("pics: a.tar") and "\n" not in str(error.value)
    assert not list((tmp_path / "downloads").glob("*/a.tar")) and not (tmp_path / "downloads/files" / SHA256).exists()
    site.how["/data/a.tar"] = How()
    with contextlib.suppress(transfer.Broken):  # "its length was 400000 and is 300000", and is forgotten with that
        fetched(want(site), tmp_path)
    assert fetched(want(site), tmp_path) == BODY  # no lie outlives its server for long


def test_bytes_without_an_announced_length_are_taken_by_their_digest(site, tmp_path):
    site.how["/data/a.tar"] = How(length=-1, ranges=False, etag=None)
    assert copies.absent_bytes(want(site), tmp_path) is None
    assert fetched(want(site), tmp_path) == BODY


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_servers_are_asked_again(site, tmp_path, status):
    wait = {"Retry-After": "1"} if status == 429 else {}
    asked = want(site)
    site.how["/data/a.tar"] = How(statuses=[(status, wait), (status, {})])
    began = time.monotonic()
    assert fetched(asked, tmp_path) == BODY
    assert (time.monotonic() - began >= 1) == bool(wait)


@pytest.mark.parametrize(("status", "says"), [(404, "correct acquire"), (403, "wants a login"), (410, "wants a login")])
def test_final_answers_are_not_asked_again(site, tmp_path, status, says):
    asked = want(site)
    site.how["/data/a.tar"] = How(statuses=[(status, {})] * 9)
    with pytest.raises(ValueError, match=rf"^pics: a\.tar at .*: HTTP {status}; .*{says}"):
        fetched(asked, tmp_path)
    assert len(site.asked) == 1


def test_a_trickle_is_given_up_and_kept(site, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "RATE_S", 0.05)
    monkeypatch.setattr(transfer, "RATE_BYTES", 1 << 20)
    site.how["/data/a.tar"] = How(bytes_per_s=160_000)
    asked = want(site)
    with pytest.raises(ValueError, match=r"comes at under .* bytes per s, 6 times in a row; run again, it goes on"):
        fetched(asked, tmp_path)
    (part,) = (tmp_path / "downloads/files").glob("*.part")
    had = part.stat().st_size
    assert 0 < had == len(BODY) - copies.absent_bytes(asked, tmp_path)
    site.how["/data/a.tar"] = How()
    assert fetched(asked, tmp_path) == BODY and site.ranges("/data/a.tar")[-1] == f"bytes={had}-"


def test_room_is_looked_for_before_the_first_byte(site, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "SPARE_BYTES", 1 << 60)
    with pytest.raises(ValueError, match=r"^pics: 300 kB are to come, and .* stay free; .*make room, or set SOLO_ROOT"):
        fetched(want(site), tmp_path)
    assert site.ranges("/data/a.tar") == ["bytes=0-0"]


def test_redirects_are_followed_five_times_and_judged_each_time(site, tmp_path):
    asked = want(site)
    for i in range(6):
        site.how[f"/{i}"] = How(redirect=f"http://archive.test/{i + 1}")
    site.how["/data/a.tar"] = How(redirect="http://archive.test/2")
    site.files["/6"] = BODY
    assert fetched(asked, tmp_path) == BODY
    site.how["/data/a.tar"] = How(redirect="/0")
    with pytest.raises(ValueError, match="over 5 redirects"):
        fetched(asked, tmp_path / "other")


def test_no_redirect_leads_to_this_machine_or_out_of_http(site, tmp_path):
    asked = want(site)
    with socket.create_server(("127.0.0.1", 0)) as canary:
        canary.settimeout(0.05)
        port = canary.getsockname()[1]
        for to in (f"http://127.0.0.1:{port}/a", f"http://[::ffff:127.0.0.1]:{port}/", f"http://2130706433:{port}/"):
            site.how["/data/a.tar"] = How(redirect=to)
            with pytest.raises(ValueError, match="not at a public address; only public addresses are asked"):
                fetched(asked, tmp_path)
        for to in ("file:///etc/passwd", "ftp://127.0.0.1/a", "http://user:pw@archive.test/a"):
            site.how["/data/a.tar"] = How(redirect=to)
            with pytest.raises(ValueError, match=r"only http and https|user information"):
                fetched(asked, tmp_path)
        with pytest.raises(TimeoutError):
            canary.accept()


def test_a_location_on_this_machine_needs_the_specs_own_word(site, tmp_path):
    there = f"http://127.0.0.1:{site.port}/data"
    with pytest.raises(ValueError, match=r"only public addresses are asked; acquire\.loopback_ports"):
        fetched(want(site, location=there, loopback_ports={}), tmp_path)
    assert site.asked == []


def test_a_broken_disk_is_noticed_and_fetched_anew(site, tmp_path):
    """Half a file whose bytes are not those that came: the digest says so, and it is fetched from its beginning."""
    part = tmp_path / "downloads/files" / f"{SHA256}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 1000)
    part.with_name(part.name + ".json").write_text('{"total": 300000, "stamp": null}')
    assert fetched(want(site), tmp_path) == BODY
    assert site.ranges("/data/a.tar")[1:] == ["bytes=1000-", "bytes=0-"]


def test_files_come_several_at_once_but_no_more(site, tmp_path):
    for i in range(9):
        site.files[f"/data/{i}"] = bytes([i]) * 40_000
        site.how[f"/data/{i}"] = How(hold=threading.Event())
    names = [str(i) for i in range(9)]
    asked = want(site, *names)
    thread = threading.Thread(target=copies.fetch, args=(asked, tmp_path, lambda _: None))
    thread.start()
    deadline = time.monotonic() + 10
    while sum("bytes=0-" in site.ranges(f"/data/{i}") for i in names) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert sum("bytes=0-" in site.ranges(f"/data/{i}") for i in names) == copies.FILES_AT_ONCE == 4
    for how in site.how.values():
        how.hold.set()
    thread.join(10)
    assert sorted(p.name for p in copies.place(asked, tmp_path).iterdir()) == names


def test_one_file_that_fails_stops_the_others_where_they_are(site, tmp_path):
    site.files["/data/b"] = BODY
    site.how["/data/b"] = How(bytes_per_s=300_000)
    asked = want(site, "a.tar", "b", sha256={"a.tar": "0" * 64})
    with pytest.raises(ValueError, match=rf"a\.tar of .* has sha256 {SHA256}, 0{{64}} is pinned"):
        fetched(asked, tmp_path)
    assert site.sent["/data/b"] < len(BODY)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Of the host cdn.example, signed by itself."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    names = ["-subj", "/CN=cdn.example", "-addext", "subjectAltName=DNS:cdn.example"]
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(path.with_name("key"))]
    subprocess.run(
        ["openssl", "req", "-x509", *key, *names, "-days", "2", "-out", str(path)], check=True, capture_output=True
    )
    path.write_bytes(path.read_bytes() + path.with_name("key").read_bytes())
    return path


def test_https_through_the_environments_proxy(site, tmp_path, monkeypatch, certificate):
    digest = f"sha256:{combined_sha256({'a.tar': SHA256})}"
    asked = Asked("pics", "https://cdn.example/data", digest, ("a.tar",), {"a.tar": SHA256})
    with serving(Site(), certificate) as far:
        far.files["/data/a.tar"] = BODY
        far.how["/data/a.tar"] = How(cuts=[70_000])
        site.tunnels["cdn.example:443"] = far.port
        monkeypatch.setenv("https_proxy", f"http://user:proxy%20word@127.0.0.1:{site.port}")
        with pytest.raises(ValueError, match=r"a\.tar at https://cdn\.example/data: TLS failed; try again later"):
            fetched(asked, tmp_path)  # nobody vouches for it yet
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert fetched(asked, tmp_path) == BODY
        assert far.ranges("/data/a.tar") == ["bytes=0-0", "bytes=0-", "bytes=70000-"]
        assert "proxy-authorization" not in far.asked[0][1]
        assert site.asked[-1][1]["proxy-authorization"] == "Basic dXNlcjpwcm94eSB3b3Jk"
        site.tunnels.clear()
        with pytest.raises(ValueError, match="the proxy answers HTTP 403") as error:
            fetched(asked, tmp_path / "other")
        assert "word" not in str(error.value)


def test_http_through_a_proxy_and_no_way_to_this_machine(site, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{site.port}")
    assert fetched(want(site, location="http://cdn.example/data", loopback_ports={}), tmp_path) == BODY
    assert site.asked[-1][1]["host"] == "cdn.example"
    n = len(site.asked)
    with pytest.raises(ValueError, match="only public addresses"):
        fetched(want(site, location="http://169.254.169.254/data", loopback_ports={}), tmp_path / "other")
    assert len(site.asked) == n


KILLED = """
import sys
from pathlib import Path
from solo.acquire import copies
from solo.acquire.location import Asked
copies.fetch(Asked(**eval(sys.argv[1])), Path(sys.argv[2]), lambda _: None)
"""


def test_killed_half_way_it_goes_on_from_the_last_byte(site, tmp_path):
    hold = threading.Event()
    site.how["/data/a.tar"] = How(hold=hold)
    asked = want(site, revision=f"sha256:{combined_sha256({'a.tar': SHA256})}", sha256={})
    command = [sys.executable, "-c", KILLED, repr(vars(asked)), str(tmp_path)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])})
    deadline = time.monotonic() + 30
    half: list[Path] = []
    while time.monotonic() < deadline and not (half and half[0].stat().st_size >= len(BODY) // 2):
        half = list((tmp_path / "downloads").rglob("*.part"))
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    had = half[0].stat().st_size
    assert len(BODY) // 2 <= had < len(BODY)
    hold.set()
    assert fetched(asked, tmp_path) == BODY
    assert site.ranges("/data/a.tar")[-1] == f"bytes={had}-"
    n_asked = len(site.asked)
    assert fetched(asked, tmp_path) == BODY and len(site.asked) == n_asked
