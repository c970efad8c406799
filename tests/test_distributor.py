"""Settings of a machine that say who fetches and where the pictures go; what they may not change is the result."""

import dataclasses
import os
import subprocess
import time

import pytest
from hostile import Canary, Server, answer, encoded
from test_hostile import job, rows

from solo.acquire import download
from solo.acquire import part as acquire
from solo.acquire.distributor import Crew, Images, crew, remove_images
from solo.acquire.url_rows import UrlList
from solo.artifact import Job, make
from solo.isolated.rules import Rules
from solo.isolated.web import Guest

RULES = Rules("test/1 (test@example.org)", "", "", host_concurrency=4, host_requests_per_s=10.0)


def a_job(folder, name="web"):
    made = Job("acquire", name, 1, {}, {}, folder, folder, 3)
    made.work.mkdir(parents=True, exist_ok=True)
    return made


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"SOLO_DISTRIBUTOR": "dask"}, "SOLO_DISTRIBUTOR is 'dask'; choose one of multiprocessing, ray, pyspark"),
        ({"SOLO_DISTRIBUTOR": "ray", "SOLO_MACHINES": "many"}, "SOLO_MACHINES is 'many'; give the number"),
        ({"SOLO_DISTRIBUTOR": "ray", "SOLO_MACHINES": "0"}, "SOLO_MACHINES is '0'; give the number"),
        ({"SOLO_MACHINES": "3"}, "which is one machine; set SOLO_DISTRIBUTOR to ray or pyspark"),
    ],
)
def test_a_wrong_setting_is_named_with_its_remedy(monkeypatch, settings, message):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        crew()


def test_machines_share_a_host_s_budget(monkeypatch):
    assert crew() == Crew() and crew().share(RULES) is RULES
    monkeypatch.setenv("SOLO_DISTRIBUTOR", "pyspark")
    monkeypatch.setenv("SOLO_MACHINES", "8")
    one = crew().share(RULES)
    assert (one.host_concurrency, one.host_requests_per_s, one.n_machines) == (1, 1.25, 8)
    free = crew().share(Rules("test/1 (test@example.org)", "", ""))
    assert (free.host_concurrency, free.host_requests_per_s) == (None, None)  # a loopback origin has none to share


def test_a_crawl_delay_holds_over_all_machines(tmp_path):
    rules = Rules("TestBot/1.0 (bot@example.org)", "", str(tmp_path), n_machines=3, timeout_s=2)
    routes = {"/x.jpg": answer(encoded())}
    with Server(routes, {"good.test": answer(b"User-agent: *\nCrawl-delay: 0.1\n")}) as server:
        guest = Guest(dataclasses.replace(rules, mapped=(("good.test", "127.0.0.1", server.port),)))
        began = time.monotonic()
        assert [guest.visit("http://good.test/x.jpg").failed for _ in range(3)] == [None] * 3
        assert time.monotonic() - began >= 2 * 3 * 0.1


def test_the_distributor_is_img2dataset_s_own(monkeypatch, tmp_path):
    urls = UrlList("web", tmp_path, "u", "c", RULES)
    assert "--distributor=multiprocessing" in download.command(urls, a_job(tmp_path), "out", 5)
    monkeypatch.setenv("SOLO_DISTRIBUTOR", "ray")
    given = download.command(urls, a_job(tmp_path), "s3://bucket/images", 5)
    assert {"--distributor=ray", "--processes_count=3", "--output_folder=s3://bucket/images"} <= set(given)


def test_images_go_where_the_setting_says_and_stay_where_they_began(monkeypatch, tmp_path):
    assert Images(a_job(tmp_path)).url == str(a_job(tmp_path).work / "images")
    monkeypatch.setenv("SOLO_IMAGES", "memory://images/")
    assert Images(a_job(tmp_path)).url == str(a_job(tmp_path).work / "images")  # its first attempt was before
    other = a_job(tmp_path, "other")
    images = Images(other)
    assert images.url == f"memory://images/acquire-other-{other.fingerprint}" and images.stats() == []
    for name in ("00000.tar", "00000.parquet", "00000_stats.json", "00001_stats.json"):
        images._files.pipe_file(f"{images._path}/{name}", name.encode())
    monkeypatch.delenv("SOLO_IMAGES")
    again = Images(other)
    assert again.stats() == ["00000_stats.json", "00001_stats.json"]
    again.drop("00001_stats.json")
    assert images.stats() == ["00000_stats.json"]
    with again.shard(0) as (table, tar):
        assert (table.read_bytes(), tar.read_bytes()) == (b"00000.parquet", b"00000.tar")
    assert not table.exists() and not tar.exists()
    remove_images(other)
    assert not again._files.exists(again._path)


def test_images_go_nowhere_else(monkeypatch, tmp_path):
    monkeypatch.setenv("SOLO_IMAGES", str(tmp_path))
    with pytest.raises(ValueError, match=r"SOLO_IMAGES is .*; give an fsspec URL, such as s3://bucket/images"):
        Images(a_job(tmp_path))


TWIN = """
import sys
sys.modules["wandb"] = type(sys)("wandb")
import ray
from img2dataset import downloader
def refused(*_, **__):
    raise RuntimeError
downloader.download_image_with_retry = refused
@ray.remote
def ask(url):
    from img2dataset import downloader
    return downloader.download_image_with_retry((0, url), 2, 0, None, None)[2]
ray.init(num_cpus=1, include_dashboard=False)
print(ray.get(ask.remote(sys.argv[1])))
"""


def has(package):
    found = subprocess.run([str(download.environment()), "-I", "-c", f"import {package}"], check=False)
    return found.returncode == 0


@pytest.mark.optional
@pytest.mark.timeout(1200)
def test_each_cluster_is_guarded_and_makes_the_same_bytes(tmp_path, monkeypatch, s3_server):
    """With $SOLO_IMG2DATASET an environment that has infra/img2dataset-cluster.txt; S3 is where Ray writes."""
    fsspec = pytest.importorskip("fsspec")
    canary, digests = Canary(), {}
    listed, routes, robots = rows(canary)
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    files.mkdir("images")
    with Server(routes, robots) as server:
        for distributor in ("multiprocessing", *(name for name in ("ray", "pyspark") if has(name))):
            folder = tmp_path / distributor
            folder.mkdir()
            with monkeypatch.context() as patch:
                patch.setenv("SOLO_DISTRIBUTOR", distributor)
                if distributor == "ray":
                    patch.setenv("SOLO_IMAGES", "s3://images/acquired")
                digests[distributor] = make(job(folder, listed, server.port), acquire.run)[0].manifest.digest
    files.invalidate_cache()
    assert len(digests) > 1 and len(set(digests.values())) == 1
    assert canary.n_connections == 0 and not files.find("images")
    if "ray" in digests:  # what a worker does that was not sent the guard
        url = f"http://127.0.0.1:{canary.port}/x.jpg"
        command = [str(download.environment()), "-I", "-c", TWIN, url]
        env = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}
        assert subprocess.run(command, check=True, capture_output=True, env=env, timeout=120).stdout.strip() == b"None"
        assert canary.n_connections == 1
    canary.close()
