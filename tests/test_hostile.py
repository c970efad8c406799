"""Over 300 hostile rows through the real img2dataset with our guard in one run, and one row of each class without."""

from __future__ import annotations

import os
import subprocess
import tarfile
import threading
from base64 import b64encode

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import Canary, Drip, Endless, Server, answer, chunk, encoded, png, zipped
from hostile_answers import HASHES, OK
from hostile_cases import GOOD, MAX_BYTES, MAX_PIXELS, build
from hostile_hosts import HOSTS

from solo.acquire import download
from solo.acquire import part as acquire
from solo.artifact import Job, make

SOCKETS_BYTES = 8 << 20  # what the kernel takes from a sender that nobody reads


class Memory:
    """The largest resident size of any process that is begun below this one while the block lasts."""

    def __enter__(self):
        self._others = {child.pid for child in psutil.Process().children()}  # servers of other tests
        self.peak, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self):
        while not self._done.wait(0.1):
            for child in psutil.Process().children():
                try:
                    family = [] if child.pid in self._others else [child, *child.children(recursive=True)]
                    self.peak = max([self.peak, *(process.memory_info().rss for process in family)])
                except psutil.Error:
                    continue

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()


def rows(canary):
    cases, routes, robots = build(canary.port)
    listed = [(*case, None) for case in cases]
    listed += [("hash", f"{GOOD}/ok.jpg", f"hash {i}", status, digest) for i, (digest, status) in enumerate(HASHES)]
    return listed, routes, robots


def job(folder, listed, port):
    kinds, urls, captions, _, hashes = zip(*listed, strict=True)
    sizes = pa.array([float("nan"), float("inf")] * len(urls), pa.float64()).slice(0, len(urls))
    table = pa.table({"u": urls, "c": captions, "h": pa.array(hashes, pa.string()), "size": sizes, "kind": kinds})
    (folder / "specs").mkdir()
    pq.write_table(table, folder / "specs/urls.parquet")
    args = {
        "url_column": "u",
        "caption_column": "c",
        "hash_column": "h",
        "extra_columns": ["size", "kind"],
        "user_agent": "TestBot/1.0 (+https://example.org/bot; bot@example.org)",
        "timeout_s": 1,
        "deadline_s": 2.5,
        "max_side_px": 128,
        "max_bytes": MAX_BYTES,
        "max_pixels": MAX_PIXELS,
        "host_concurrency": 32,
        "host_requests_per_s": 10_000,
        "loopback_ports": dict.fromkeys(["good.test", *HOSTS], port),
    }
    spec = {"location": "urls.parquet", "adapter": "url_list.download", "args": args, "samples_per_shard": 1_000}
    asked = {"source": "web", "revision": "0" * 40, "acquire": spec}
    return Job("acquire", "web", acquire.VERSION, asked, {}, folder / "root", folder / "specs", 2)


PLAIN = [  # class, path on the origin (or a URL), and what plain img2dataset makes of it
    ("ssrf", "http://2130706433:{port}/ok.jpg", "success"),
    ("ssrf", "http://0177.0.0.1:{port}/ok.jpg", "success"),
    ("ssrf", "http://[::ffff:127.0.0.1]:{port}/ok.jpg", "success"),
    ("scheme", "file://{folder}/secret.jpg", "success"),
    ("scheme", "data:image/jpeg;base64,{base64}", "success"),
    ("scheme", "ftp://127.0.0.1:{canary}/x.jpg", "failed_to_download"),  # the canary was asked
    ("redirect", "/plain/inward", "success"),
    ("redirect", "/chain/7", "success"),
    ("slow", "/plain/slow", "success"),
    ("endless", "/plain/endless", "success"),
    ("length", "/plain/declared", "success"),
    ("coding", "/plain/gzip", "failed_to_resize"),  # the sample is lost, ours is kept
    ("bomb", "/plain/bomb", "success"),
    ("bomb", "/plain/chunks", "success"),
    ("bomb", "/plain/frames", "success"),
    ("label", "/plain/bmp", "success"),
    ("opt-out", "/plain/none", "success"),
    ("opt-out", "/plain/tdm", "success"),
    ("opt-out", "/plain/bot", "success"),
    ("robots", "/private/x.jpg", "success"),
    ("hash", "/ok.jpg", "success"),
    ("repeat", "/ok.jpg", "success"),
    ("unicode", "/\u00fc.jpg", "failed_to_download"),  # never asked for
]


def plain_routes(port):
    return {
        "/ok.jpg": answer(OK),
        "/private/x.jpg": answer(OK),
        "/plain/inward": answer(status="302 Go", headers=[f"Location: http://0x7f.1:{port}/ok.jpg"]),
        **{f"/chain/{n}": answer(status="302 Go", headers=[f"Location: /chain/{n - 1}"]) for n in range(1, 8)},
        "/chain/0": answer(OK),
        "/plain/slow": Drip(answer(OK)[: -len(OK)], OK, len(OK) // 30, 0.1),  # 3 s at a time-out of 1 s
        "/plain/endless": Endless(answer(OK, length=False), b"\0"),
        "/plain/declared": Endless(answer(OK, [f"Content-Length: {len(OK) + (24 << 20)}"], length=False), b"\0"),
        "/plain/gzip": answer(zipped(OK), ["Content-Encoding: gzip"]),
        "/plain/bomb": answer(png(8_000, 8_000, rows=8_000)),
        "/plain/chunks": answer(png(64, 64, rows=64, extra=[chunk(b"tEXt", b"a\0b")] * 9_000)),
        "/plain/frames": answer(png(64, 64, rows=64, extra=[chunk(b"acTL", b"\0\x01\x86\xa0\0\0\0\0")])),
        "/plain/bmp": answer(encoded("BMP"), ["Content-Type: image/jpeg"]),
        "/plain/none": answer(OK, ["X-Robots-Tag: none"]),
        "/plain/tdm": answer(OK, ["TDM-Reservation: 1"]),
        "/plain/bot": answer(OK, ["X-Robots-Tag: otherbot: all, *: noai"]),
    }


def plain_run(folder, canary):
    """Plain img2dataset on one row of each class: its statuses in the order of PLAIN, and the server."""
    (folder / "secret.jpg").write_bytes(OK)
    robots = {"127.0.0.1": answer(b"User-agent: *\nDisallow: /private/\n")}
    with Server({}, robots) as server:
        server.routes = plain_routes(server.port)
        words = {"port": server.port, "canary": canary.port, "folder": folder, "base64": b64encode(OK).decode()}
        urls = [url.format(**words) for _, url, _ in PLAIN]
        urls = [f"http://127.0.0.1:{server.port}{url}" if url.startswith("/") else url for url in urls]
        pq.write_table(
            pa.table({"url": urls, "n": range(len(urls)), "x": [float("nan")] * len(urls)}), folder / "plain.parquet"
        )
        python = [str(download.environment()), "-I", "-m", "img2dataset.main"]
        options = {
            **{"url_list": folder / "plain.parquet", "input_format": "parquet", "output_folder": folder / "plain"},
            **{"output_format": "webdataset", "processes_count": 1, "thread_count": 32, "timeout": 1},
            **{"image_size": 128, "resize_mode": "keep_ratio_largest", "resize_only_if_bigger": True},
            **{"skip_reencode": True, "save_additional_columns": "['n','x']", "enable_wandb": False},
        }
        env = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}
        given = [f"--{name}={value}" for name, value in options.items()]
        subprocess.run([*python, *given], check=True, capture_output=True, env=env, timeout=120)
    table = sorted(pq.read_table(folder / "plain/00000.parquet").to_pylist(), key=lambda row: row["n"])
    with tarfile.open(folder / "plain/00000.tar") as tar:
        beside = [tar.extractfile(name).read() for name in tar.getnames() if name.endswith(".json")]
    assert all(b"NaN" in text for text in beside)  # which JSON has no word for
    return [row["status"] for row in table], server


@pytest.fixture(scope="module")
def plain(run, tmp_path_factory):
    canary = Canary()
    found = plain_run(tmp_path_factory.mktemp("plain"), canary)
    canary.close()
    return *found, canary.n_connections


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, canary = tmp_path_factory.mktemp("hostile"), Canary()
    listed, routes, robots = rows(canary)
    with Server(routes, robots) as server, Memory() as memory:
        artifact, _ = make(job(folder, listed, server.port), acquire.run)
    canary.close()
    table = pq.read_table(artifact.path / "outcomes.parquet").to_pylist()
    by_row = {int(row["identity"].removeprefix("row ")): row for row in table}
    return {
        "artifact": artifact,
        "listed": listed,
        "server": server,
        "canary": canary,
        "memory": memory,
        "rows": by_row,
    }


def test_each_hostile_row_ends_with_its_one_status(run):
    listed, found = run["listed"], run["rows"]
    assert len(listed) >= 300 and sorted(found) == list(range(len(listed)))
    wrong = [
        (kind, url[:80], status, found[i]["status"], found[i]["error"])
        for i, (kind, url, _, status, _) in enumerate(listed)
        if found[i]["status"] not in ((status,) if isinstance(status, str) else status)
    ]
    assert not wrong, "\n".join(map(str, wrong))
    counts = run["artifact"].manifest.counts
    assert counts["in"] == len(listed) == counts["kept"] + sum(counts["dropped"].values())
    assert set(counts["dropped"]) <= set(acquire.STATUSES)


def test_nobody_reached_the_canary(run):
    assert run["canary"].n_connections == 0
    inward = [row for row in run["rows"].values() if row["status"] == "refused_address"]
    assert len(inward) > 60  # so many tried


def test_memory_and_bytes_stay_bounded(run):
    assert run["memory"].peak < 400 << 20
    endless = {path: n for path, n in run["server"].sent.items() if path.startswith("/endless/")}
    assert len(endless) == 12 and max(endless.values()) < MAX_BYTES + SOCKETS_BYTES


def test_what_opts_out_is_not_read_and_says_why(run):
    refused = [row for row in run["rows"].values() if row["status"] == "disallowed"]
    assert all(row["evidence"] and row["served_sha256"] is None for row in refused)
    spelled = {row["evidence"].partition(":")[0] for row in refused}
    assert spelled == {"x-robots-tag", "tdm-reservation", "content-usage", "robots.txt"}
    asked = run["server"].asked
    assert not asked["all.test", "/x.jpg"] and not asked["broken.test", "/x.jpg"]
    assert asked["good.test", "/robots.txt"] <= 4  # once per worker, not per URL
    assert run["server"].agents == {"TestBot/1.0 (+https://example.org/bot; bot@example.org)"}


@pytest.mark.parametrize("i", range(len(PLAIN)), ids=[f"{kind}-{i}" for i, (kind, _, _) in enumerate(PLAIN)])
def test_without_the_guard_each_class_does_harm(plain, i):
    statuses, server, n_canary = plain
    kind, url, status = PLAIN[i]
    assert statuses[i] == status
    if kind in ("endless", "length"):
        assert server.sent[url] > 20 << 20
    if kind == "robots":
        assert not server.asked["127.0.0.1", "/robots.txt"]
    if url.startswith("ftp:"):
        assert n_canary == 1
    if kind == "unicode":
        assert not any(path.endswith("C.jpg") for _, path in server.asked)
