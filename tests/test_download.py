"""URL lists against the real img2dataset and a real loopback server that misbehaves; four runs, shared by the tests."""

from __future__ import annotations

import concurrent.futures
import http.client
import io
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from solo.acquire import download, url_rows
from solo.acquire import part as acquire
from solo.acquire.origin import Origin
from solo.artifact import Job, make
from solo.isolated import address as addresses
from solo.isolated.rules import Rules
from solo.isolated.web import Guest
from solo.lineage.takedown import Listed
from solo.sample import IMAGE, read_sample, text

HOST = "http://images.example.test"
RULES = Rules("test/1 (test@example.org)", "", "")
N_PLAIN = 110  # with the rest more than rows_per_shard, so that there are two img2dataset shards


def encoded(form, size=(40, 30), shade=90):
    out = io.BytesIO()
    Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 20 + shade % 50).convert("RGB").save(out, form)
    return out.getvalue()


ROUTES = {
    "/gone.jpg": {"status": 404},
    "/paid.jpg": {"status": 402},
    "/error.jpg": {"status": 500},
    "/moved.jpg": {"redirect": "/0.jpg"},
    "/private.jpg": {"redirect": "http://127.0.0.1:9/x.jpg"},
    "/metadata.jpg": {"redirect": "http://169.254.169.254/latest/meta-data"},
    "/tofile.jpg": {"redirect": "file:///etc/hostname"},
    "/loop.jpg": {"redirect": "/loop.jpg"},
    "/slow.jpg": {"hang_s": 30},
    "/page.jpg": {"content_type": "text/html", "body": "<html>moved</html>"},
    "/cut.jpg": {"file": "0.jpg", "truncate_bytes": 300},
    "/noai.jpg": {"file": "0.jpg", "headers": {"X-Robots-Tag": "noai"}},
    "/none.jpg": {"file": "0.jpg", "headers": {"X-Robots-Tag": "none"}},
    "/zero.jpg": {"content_type": "image/jpeg", "body": ""},
}
ODD = [  # URL, caption, expected status, HTTP status
    (f"{HOST}/gone.jpg", "c", "http_404", 404),
    (f"{HOST}/nowhere.jpg", "c", "http_404", 404),
    (f"{HOST}/paid.jpg", "c", "http_4xx", 402),
    (f"{HOST}/error.jpg", "c", "http_5xx", 500),
    (f"{HOST}/moved.jpg", "c", "ok", 200),
    (f"{HOST}/private.jpg", "c", "refused_address", None),
    (f"{HOST}/metadata.jpg", "c", "refused_address", None),
    (f"{HOST}/tofile.jpg", "c", "refused_scheme", 302),
    (f"{HOST}/loop.jpg", "c", "http_3xx", 302),
    *((f"{HOST}/slow.jpg", f"c{i}", "timeout", None) for i in range(14)),  # both shards last two seconds
    (f"{HOST}/page.jpg", "c", "not_image", 200),
    (f"{HOST}/cut.jpg", "c", "undecodable", 200),
    (f"{HOST}/noai.jpg", "c", "disallowed", 200),
    (f"{HOST}/none.jpg", "c", "disallowed", 200),
    (f"{HOST}/zero.jpg", "c", "empty", 200),
    (f"{HOST}/huge.jpg", "c", "too_large", 200),
    (f"{HOST}/large.jpg", "c", "ok", 200),
    (f"{HOST}/picture.png", "c", "ok", 200),
    (f"{HOST}/0.jpg", "the first", "duplicate_row", None),
    (f"{HOST}/0.jpg", "another caption", "ok", 200),
    (f"{HOST}/0.jpg", " ", "empty", None),
    ("file:///etc/hostname", "c", "refused_scheme", None),
    ("data:image/gif;base64,R0lGODlhAQABAAAAACw=", "c", "refused_scheme", None),
    ("ftp://images.example.test/a.jpg", "c", "refused_scheme", None),
    ("http://127.0.0.1:9/x.jpg", "c", "refused_address", None),
    ("http://[::1]/x.jpg", "c", "refused_address", None),
    ("http://2130706433/x.jpg", "c", "refused_address", None),
    ("http://no-such-host.invalid/x.jpg", "c", "dns", None),
    ("no scheme at all", "c", "bad_record", None),
    (None, "c", "bad_record", None),
]


def rows():
    plain = [(f"{HOST}/{i}.jpg", "the first" if i == 0 else f"picture {i}", "ok", 200) for i in range(N_PLAIN)]
    return plain + ODD


def build(specs):
    origin = specs / "origin"
    origin.mkdir(parents=True)
    for i in range(N_PLAIN):
        (origin / f"{i}.jpg").write_bytes(encoded("JPEG", shade=i))
    (origin / "large.jpg").write_bytes(encoded("JPEG", (300, 100)))
    (origin / "picture.png").write_bytes(encoded("PNG"))
    with (origin / "huge.jpg").open("wb") as file:
        file.write(encoded("JPEG"))
        file.truncate(Rules.max_bytes + 1)
    (origin / "routes.json").write_text(json.dumps(ROUTES))
    urls, captions, _, _ = zip(*rows(), strict=True)
    table = pa.table({"image_url": urls, "text": captions, "licence": [f"L{i}" for i in range(len(urls))]})
    pq.write_table(table, specs / "urls.parquet")


def job(folder, root, *, workers=1, progress=print):
    specs = folder / "specs"
    args = {
        "url_column": "image_url",
        "caption_column": "text",
        "extra_columns": ["licence"],
        "timeout_s": 2,
        "max_side_px": 128,
        "origin": "origin",
        "origin_host": "images.example.test",
    }
    asked = {
        "source": "web",
        "revision": "sha256:" + acquire.content_sha256(specs / "urls.parquet"),
        "acquire": {
            "location": "urls.parquet",
            "adapter": "url_list.download",
            "args": args,
            "samples_per_shard": 50,
        },
    }
    return Job("acquire", "web", acquire.VERSION, asked, {}, folder / root, specs, workers, progress)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {path!r}
from test_download import job
from solo.acquire import part as acquire
from solo.acquire import distributor
from solo.artifact import make
os.environ["SOLO_IMAGES"] = "file://" + {folder!r} + "/elsewhere"
distributor.POLL_S[True] = 0.1
def progress(line):
    if "1 shards done" in line:
        os.kill(os.getpid(), signal.SIGKILL)
make(job(Path({folder!r}), "killed", progress=progress), acquire.run)
"""


def killed_run(folder):
    """An acquire killed by SIGKILL, alone, when one of its two img2dataset shards is there; its exit code.

    Its images go to a URL; the attempt after it is not told so and finds them there.
    """
    path = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = KILLED.format(path=path, folder=str(folder))
    return subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("download")
    build(path / "specs")
    return path


@pytest.fixture(scope="module")
def runs(folder):
    """The undisturbed artifact, and the exit code of the killed run."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        killed = pool.submit(killed_run, folder)
        artifact, _ = make(job(folder, "root", workers=2), acquire.run)
        return artifact, killed.result()


@pytest.fixture(scope="module")
def outcomes(runs):
    table = pq.read_table(runs[0].path / "outcomes.parquet").to_pylist()
    return {row["identity"]: row for row in table}


def test_one_row_per_input_with_its_exact_status(runs, outcomes):
    wanted = {f"row {i}": row[2:] for i, row in enumerate(rows())}
    assert {name: (row["status"], row["http_status"]) for name, row in outcomes.items()} == wanted
    counts = runs[0].manifest.counts
    assert counts["in"] == len(rows()) == counts["kept"] + sum(counts["dropped"].values())
    assert counts["kept"] == sum(row[2] == "ok" for row in rows())
    assert set(counts["dropped"]) >= {"refused_address", "refused_scheme", "timeout", "undecodable"}


def test_samples_are_image_then_caption_with_their_columns(runs, outcomes):
    row = outcomes["row 7"]
    sample = read_sample(runs[0].path / f"raw/{row['raw_shard']:05d}.tar", row["offset"], row["length"])
    assert sample.messages == ({"role": "assistant", "content": [IMAGE, text("picture 7")]},)
    assert sample.meta == {"id": "row 7", "url": f"{HOST}/7.jpg", "licence": "L7"}
    assert sample.images == (encoded("JPEG", shade=7),)  # the bytes as served
    assert (row["width"], row["height"], row["bytes"]) == (40, 30, len(sample.images[0]))


def test_large_images_are_shrunk_and_other_formats_become_jpeg(runs, outcomes):
    by_url = {row["url"]: row for row in outcomes.values()}
    for name, size in (("large.jpg", (128, 43)), ("picture.png", (40, 30))):
        row = by_url[f"{HOST}/{name}"]
        sample = read_sample(runs[0].path / f"raw/{row['raw_shard']:05d}.tar", row["offset"], row["length"])
        image = Image.open(io.BytesIO(sample.images[0]))
        assert (image.format, image.size) == ("JPEG", size) == ("JPEG", (row["width"], row["height"]))


def test_headers_and_times_are_kept_apart(runs):
    entry = next(f for f in runs[0].manifest.files if f["path"] == "fetch.parquet")
    assert entry["volatile"]
    table = pq.read_table(runs[0].path / "fetch.parquet").to_pylist()
    by_url = {row["url"]: row for row in table}
    noai = by_url[f"{HOST}/noai.jpg"]
    assert dict(noai["headers"])["x-robots-tag"] == "noai" and noai["evidence"] == "x-robots-tag: noai"
    assert noai["robots"] == "none (404)"
    assert by_url[f"{HOST}/moved.jpg"]["redirects"] == [f"{HOST}/0.jpg"]
    assert by_url[f"{HOST}/private.jpg"]["redirects"] == ["http://127.0.0.1:9/x.jpg"]
    assert all(row["fetched_at"] for row in table if row["url"].startswith(HOST))


def test_killed_and_run_again_is_the_same_bytes(runs, folder):
    artifact, exit_code = runs
    assert exit_code == -signal.SIGKILL
    half = job(folder, "killed")
    done = sorted(p.name for p in (half.work / "seen").iterdir())
    assert done == ["00000_stats.json"] and not (half.out / "outcomes.parquet").exists()
    [elsewhere] = (folder / "elsewhere").iterdir()
    assert elsewhere.name == f"acquire-web-{half.fingerprint}" and (elsewhere / "00000.tar").exists()
    deadline = time.monotonic() + 5
    while (left := orphans(half.work)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left  # the guard and its workers died with the process that started them
    lines = []
    again, _ = make(job(folder, "killed", progress=lines.append), acquire.run)
    assert "img2dataset: attempt 1, 1 of 2 shards are there" in lines
    assert again.manifest.digest == artifact.manifest.digest and not elsewhere.exists()
    for name in ("outcomes.parquet", "raw/00000.tar", "raw/00001.tar", "raw/00002.tar"):
        assert (again.path / name).read_bytes() == (artifact.path / name).read_bytes()


def orphans(work):
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(work) in word for word in process.info["cmdline"] or []):
            found.append(process)
    return found


def test_rows_img2dataset_loses_are_said(folder, tmp_path):
    listed = tmp_path / ".work/list.parquet"
    listed.parent.mkdir()
    row = {"row": 3, "key": "web-1", "url": "u", "caption": "c", "extra": "{}"}
    pq.write_table(pa.Table.from_pylist([row]), listed)
    lost = Job("acquire", "web", 1, {}, {}, tmp_path, tmp_path, 1)
    spec = url_rows.UrlList("web", listed, "url", "caption", RULES)
    items = list(download._shard_items(spec, lost, listed, 0))
    assert [(item.identity, item.status) for item in items] == [("row 3", "lost")]


def test_a_missing_environment_is_one_line_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("SOLO_IMG2DATASET", str(tmp_path / "python"))
    with pytest.raises(ValueError, match="make setup") as error:
        download.environment()
    assert "\n" not in str(error.value) and "SOLO_IMG2DATASET" in str(error.value)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("192.168.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::5db8:d822", True),
    ],
)
def test_public_addresses(address, public):
    assert addresses.is_public(address) is public


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_lists_of_each_format_give_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"list.{suffix}"
    values = [("http://a/1.jpg", "one"), ("http://a/1.jpg", "one"), ("", "two"), ("http://a/3.jpg", "")]
    if suffix == "csv":
        path.write_text("u,c\n" + "".join(f"{u},{c}\n" for u, c in values))
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps({"u": u, "c": c}) + "\n" for u, c in values))
    else:
        pq.write_table(pa.table({"u": [u for u, _ in values], "c": [c for _, c in values]}), path)
    spec = url_rows.UrlList("s", path, "u", "c", RULES)
    url_rows.write_rows(spec, tmp_path / "rows.parquet", Listed(()))
    table = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [(r["row"], r["fault"]) for r in table] == [(0, None), (1, None), (2, "bad_record"), (3, "empty")]
    assert table[0]["key"] == table[1]["key"] != table[2]["key"]


def test_an_absent_column_is_named_with_those_there(tmp_path):
    pq.write_table(pa.table({"u": ["x"]}), tmp_path / "list.parquet")
    spec = url_rows.UrlList("s", tmp_path / "list.parquet", "url", "c", RULES)
    with pytest.raises(ValueError, match=r"no column \['url', 'c'\]; it has \['u'\]"):
        url_rows.write_rows(spec, tmp_path / "rows.parquet", Listed(()))


def test_the_origin_serves_nothing_outside_its_folder(folder):
    with Origin(folder / "specs/origin") as origin:
        for path, status in (("/0.jpg", 200), ("/../urls.parquet", 404), ("/%2e%2e/urls.parquet", 404)):
            client = http.client.HTTPConnection(origin.address)
            client.request("GET", path)
            assert client.getresponse().status == status
            client.close()
    assert (folder / "specs/origin/../urls.parquet").exists()


def test_a_page_of_bad_urls_never_raises_anything_but_failed(tmp_path):
    guest = Guest(replace(RULES, shared=str(tmp_path)))
    wanted = {
        "http://127.1/": "refused_address",
        "https://localhost/x": "refused_address",
        "http://0/": "refused_address",
        "http://[::ffff:127.0.0.1]/": "refused_address",
        "http:///nohost": "bad_record",
        "http://a b/": "bad_record",
        "http://127.0.0.1:port/": "bad_record",
        f"http://{'x' * 70}.test/": "bad_record",
        "gopher://x/": "refused_scheme",
        "javascript:alert(1)": "refused_scheme",
    }
    assert {url: guest.visit(url).failed.status for url in wanted} == wanted
