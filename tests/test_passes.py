"""A URL list asked again: passes over one list, each an img2dataset run against an origin that changes meanwhile."""

from __future__ import annotations

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hostile import Server, answer, encoded, hang
from raw import filtered

from solo import line
from solo.acquire import location, passes, retry
from solo.acquire import part as acquire
from solo.artifact import Job
from solo.line import Settings
from solo.lineage import erase, removal, takedown
from solo.report import pages
from solo.sample import read_sample
from solo.spec import SourceSpec, load

PATHS = {
    "kept": "ok",
    "changing": "ok",
    "dying": "ok",
    "closing": "ok",
    "sick": "http_5xx",
    "slow": "timeout",
    "gone": "http_404",
}
ARGS = {
    **{"url_column": "u", "caption_column": "c", "timeout_s": 1, "max_side_px": 64},
    "user_agent": "testbot/1 (bot@example.org)",
}


PLACE = dict.fromkeys(("offset", "length"))  # of a sample whose tar was written anew


def build(specs, port):
    (specs / "sources").mkdir(parents=True)
    urls = [f"http://{name}.test/{name}.jpg" for name in PATHS] + ["http://kept.test/kept.jpg"]
    pq.write_table(pa.table({"u": urls, "c": ["caption"] * len(urls)}), specs / "urls.parquet")
    args = ARGS | {"loopback_ports": {f"{name}.test": port for name in PATHS}}
    spec = {
        **{"name": "web", "title": "t", "revision": "0" * 40, "modality": "image-text"},
        "licence": {"id": "CC0-1.0", "url": "https://example.org"},
        "acquire": {"location": "urls.parquet", "adapter": "url_list.download", "args": args, "samples_per_shard": 2},
        "filter": {"signals": ["image.size"], "keep": {"decodes": "decodes"}},
        "shard": {"samples_per_shard": 10, "template": "plain"},
    }
    (specs / "sources/web.yaml").write_text(yaml.safe_dump(spec))


def acquired(settings):
    """What a run of the line would make of the source now."""
    spec = load(SourceSpec, "web", settings.specs)
    asked = passes.identity(settings.root, acquire.VERSION, location.identity(spec))
    asked = erase.identity(settings.root, acquire.VERSION, asked, takedown.read(settings.specs))
    job = Job("acquire", "web", acquire.VERSION, asked, {}, settings.root, settings.specs, 1)
    return acquire.made(job, acquire.run)[0]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """The first run, a retry after which `sick` is well, a re-crawl after which much has changed."""
    folder = tmp_path_factory.mktemp("passes")
    routes = {f"/{name}.jpg": answer(encoded(seed=i)) for i, name in enumerate(PATHS)}
    routes |= {"/sick.jpg": answer(status="502 No"), "/slow.jpg": hang, "/gone.jpg": answer(status="404 No")}
    with Server(routes, {}) as server:
        build(folder / "specs", server.port)
        settings = Settings(folder / "root", folder / "specs", 1)
        told = {"settings": settings, "server": server, "first": acquired(settings)}
        told["filtered"] = filtered(settings.root, told["first"], signals=["image.size"])
        routes["/sick.jpg"] = answer(encoded(seed=40))
        server.asked.clear()
        told["said"] = list(retry.run("web", ["http_5xx"], False, settings))
        told["asked"] = dict(server.asked)
        told["second"] = acquired(settings)
        told["refiltered"] = filtered(settings.root, told["second"], signals=["image.size"])
        routes["/changing.jpg"] = answer(encoded(seed=99))
        routes["/dying.jpg"] = answer(status="410 No")
        routes["/closing.jpg"] = answer(encoded(), ["X-Robots-Tag: noai"])
        told["recrawled"] = list(retry.run("web", [], True, settings))
        told["third"] = acquired(settings)
        for name in ("root", "specs"):
            shutil.copytree(folder / name, folder / "later" / name)
        settings = Settings(folder / "later/root", folder / "later/specs", 1)
        (settings.specs / "takedown.csv").write_text(
            "kind,value,reason,date,reference\n"
            "host,dying.test,asked,2026-01-31,t\nurl,https://sick.test/sick.jpg,asked,2026-01-31,t\n"
        )
        removal.apply(settings)
        told["taken"] = acquired(settings)
        told["proof"] = removal.look(settings)
        routes["/slow.jpg"] = answer(encoded(seed=41))
        server.asked.clear()
        told["said_again"] = list(retry.run("web", ["timeout"], False, settings))
        told["asked_again"] = dict(server.asked)
        told["fourth"] = acquired(settings)
    return told


def rows(artifact):
    return {row["identity"]: row for row in pq.read_table(artifact.path / "outcomes.parquet").to_pylist()}


def test_a_retry_asks_for_its_cause_alone(story):
    found = rows(story["first"])
    assert [found[f"row {i}"]["status"] for i in range(8)] == [*PATHS.values(), "duplicate_row"]
    assert set(story["asked"]) == {("sick.test", "/sick.jpg"), ("sick.test", "/robots.txt")}
    assert "asked for 1 URLs: 1 ok" in story["said"][0]


def test_the_new_artifact_differs_in_what_came_and_nothing_else(story):
    before, after = rows(story["first"]), rows(story["second"])
    assert {name for name in before if before[name] != after[name]} == {"row 4"}
    row = after["row 4"]
    path = story["second"].path / f"raw/{row['raw_shard']:05d}.tar"
    assert read_sample(path, row["offset"], row["length"]).images == (encoded(seed=40),)
    for tar in (story["first"].path / "raw").iterdir():
        assert (story["second"].path / "raw" / tar.name).read_bytes() == tar.read_bytes()
    counts = story["second"].manifest.counts
    assert (counts["in"], counts["kept"]) == (8, 5) and counts["in"] == 5 + sum(counts["dropped"].values())
    n_tars = len(list((story["first"].path / "raw").iterdir()))
    assert story["filtered"].manifest.stats["n_shards_measured"] == n_tars == 2
    assert story["refiltered"].manifest.stats["n_shards_measured"] == 1


def test_a_plan_would_say_that_a_pass_made_it_run(story):
    (reason,) = line.differences(story["first"].manifest.spec, story["second"].manifest.spec)
    assert reason.startswith("passes: (absent) -> ") and "retry" in reason


def test_a_recrawl_compares_and_changes_no_sample(story):
    assert story["third"].manifest.digest == story["second"].manifest.digest
    assert story["third"].manifest.fingerprint != story["second"].manifest.fingerprint
    rot = story["third"].manifest.stats["link_rot"]
    found = {name: rot[name] for name in ("urls", "same", "changed", "gone", "withdrawn", "unknown")}
    assert found == {"urls": 5, "same": 2, "changed": 1, "gone": 1, "withdrawn": 1, "unknown": 0}
    worst = rot["hosts"][0]
    assert (worst["host"], worst["gone"]) == ("dying.test", 1)
    assert "of 5 URLs on 5 hosts: 2 same, 1 changed, 1 gone, 1 withdrawn" in story["recrawled"][1]
    page = pages.page("acquire", [story["third"]])
    assert "Link rot" in page and "dying.test" in page and "60.0%" in page


def test_what_each_pass_saw_is_kept(story):
    seen = pq.read_table(story["third"].path / "fetch.parquet").to_pylist()
    sick = [row for row in seen if row["url"].endswith("sick.jpg")]
    assert [(row["pass"], row["http_status"]) for row in sick] == [(0, 502), (1, 200), (2, 200)]


def test_what_is_taken_down_leaves_the_passes_and_is_never_asked_again(story):
    found, taken = rows(story["third"]), rows(story["taken"])
    gone = {name for name in found if found[name]["url"].endswith(("dying.jpg", "sick.jpg"))}
    assert {name for name in taken if taken[name]["status"] == "taken_down"} == gone == {"row 2", "row 4"}
    assert all(taken[name]["key"] is taken[name]["url"] is None for name in gone)
    assert all(taken[name] | PLACE == found[name] | PLACE for name in set(found) - gone)
    counts = story["taken"].manifest.counts
    assert counts["in"] == counts["kept"] + sum(counts["dropped"].values()) == 8
    assert counts["dropped"]["taken_down"] == 2 and story["proof"].is_clean
    seen = pq.read_table(story["taken"].path / "fetch.parquet").to_pylist()
    assert not [row for row in seen if "sick" in row["url"] or "dying" in row["url"]]
    assert "dying.test" not in [h["host"] for h in story["taken"].manifest.stats["link_rot"]["hosts"]]
    assert len(story["taken"].manifest.spec["passes"]) == 2  # one of them is gone, what it gave is not
    assert set(story["asked_again"]) == {("slow.test", "/slow.jpg"), ("slow.test", "/robots.txt")}
    fourth = rows(story["fourth"])
    assert {name for name in fourth if fourth[name] != taken[name]} == {"row 5"} and fourth["row 5"]["status"] == "ok"
    path = story["fourth"].path / f"raw/{fourth['row 5']['raw_shard']:05d}.tar"
    assert read_sample(path, fourth["row 5"]["offset"], fourth["row 5"]["length"]).images == (encoded(seed=41),)


@pytest.mark.parametrize(
    ("causes", "recrawl", "words"),
    [
        (["http_404"], False, "is final and is not asked again; choose from timeout"),
        (["timeuot"], False, "is no status; choose from timeout"),
        ([], False, "--recrawl"),
        (["dns"], True, "not both"),
    ],
)
def test_what_a_user_got_wrong_is_one_line(story, causes, recrawl, words):
    with pytest.raises(ValueError, match=words) as error:
        list(retry.run("web", causes, recrawl, story["settings"]))
    assert "\n" not in str(error.value)


def test_nothing_to_ask_makes_no_pass(story):
    (said,) = retry.run("web", ["dns"], False, story["settings"])
    assert "nothing was asked" in said
    settings = Settings(story["settings"].root / "elsewhere", story["settings"].specs, 1)
    with pytest.raises(ValueError, match="acquire has not run"):
        list(retry.run("web", ["dns"], False, settings))


def test_a_list_of_questions_can_be_asked_again_too(tmp_path):
    build(tmp_path / "specs", 1)
    path = tmp_path / "specs/sources/web.yaml"
    settings = Settings(tmp_path / "root", tmp_path / "specs", 1)
    for adapter, words in (
        ("url_questions", "acquire has not run"),
        ("jsonl_text", "only lists of url_list.download and"),
    ):
        raw = yaml.safe_load(path.read_text())
        raw["acquire"]["adapter"] = f"{adapter}.{'read' if adapter == 'jsonl_text' else 'download'}"
        path.write_text(yaml.safe_dump(raw))
        with pytest.raises(ValueError, match=words):
            list(retry.run("web", ["dns"], False, settings))


def test_a_list_of_the_open_web_needs_a_contact(tmp_path):
    build(tmp_path / "specs", 1)
    path = tmp_path / "specs/sources/web.yaml"
    for agent in (None, "Mozilla/5.0", "bot", "bot/1 (+https://e.org)\n"):
        raw = yaml.safe_load(path.read_text())
        raw["acquire"]["args"]["user_agent"] = agent
        path.write_text(yaml.safe_dump(raw))
        with pytest.raises(ValueError, match=r"acquire.args.user_agent is .* give a robot's name and a contact"):
            acquired(Settings(tmp_path / "root", tmp_path / "specs", 1))
