"""report: truth on hand-written manifests, and every kind of lost count is noticed by the equation that names it."""

import json
import re

import finished
import manifests
import pytest

from solo import artifact
from solo.artifact import Manifest
from solo.report import part as report
from solo.report.html import html

SPEC = {"recipe": "toy", "title": "A toy", "licences": {"pictures": "CC0-1.0"}}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> finished.Recipe:
    return finished.make(tmp_path_factory.mktemp("recipe"))


def failing(found: list[Manifest]) -> list[str]:
    return [c["name"] for c in report.summarise(found, spec=SPEC)["checks"] if not c["ok"]]


def test_summary_of_a_recipe_that_closes() -> None:
    summary = report.summarise(manifests.line(), spec=SPEC)
    assert summary["closes"] is True
    assert summary["recipe"] == "toy"
    first = summary["parts"][0]
    assert {k: first[k] for k in ("part", "name", "in", "kept", "dropped", "seconds")} == {
        "part": "acquire",
        "name": "pictures",
        "in": 12,
        "kept": 10,
        "dropped": {"http_404": 2},
        "seconds": 1.5,
    }
    assert [s["name"] for s in summary["stages"]] == ["zebra", "apple"]  # in the order trained
    stage = summary["stages"][0]
    assert {k: stage[k] for k in ("packs", "steps", "tokens", "loss_first", "loss_last")} == {
        "packs": 4,
        "steps": 2,
        "tokens": 500,
        "loss_first": 5.0,
        "loss_last": 3.0,
    }
    assert stage["sources"]["pictures"] == {"tokens": 400, "patches": 300, "share": 0.8}
    score = summary["scores"][0]
    assert (score["benchmark"], score["score"], score["chance"], score["blind"]) == ("digits", 0.5, 0.1, 0.125)
    assert score["checkpoint"] == "digest of train/apple"
    assert set(score["mixes"]) == {"mix-1", "mix-2"}
    assert score["data"]["pictures"] == {"revision": "sha256:pictures", "licence": "CC0-1.0"}


def test_parts_of_the_line_keep_their_order_whatever_order_they_come_in() -> None:
    found = manifests.line()
    forward, backward = (report.summarise(list(m), spec=SPEC) for m in (found, found[::-1]))
    assert [s["name"] for s in forward["stages"]] == [s["name"] for s in backward["stages"]]
    assert forward["closes"] and backward["closes"]


@pytest.mark.parametrize(
    ("node", "fields", "equation"),
    [
        ("acquire/text", {"counts": {"kept": 9}}, "acquire/text: in = kept + dropped"),
        ("filter/text", {"counts": {"in": 9, "kept": 7}}, "filter/text: in = kept by acquire/text"),
        ("shard/text", {"counts": {"in": 7, "kept": 7}}, "shard/text: in = kept by filter/text"),
        ("shard/text", {"stats": {"n_text_tokens": 99}}, "shard/text: tokens = text tokens + patches"),
        (
            "shard/text",
            {"stats": {"n_user_tokens": 11}},
            "shard/text: text tokens = system + user + assistant + markup",
        ),
        (
            "shard/pictures",
            {"stats": {"n_images_png": 1}},
            "shard/pictures: images = as they came + without metadata + as JPEG + as PNG",
        ),
        ("curate/mix-1", {"counts": {"in": 15, "kept": 15}}, "curate/mix-1: in = kept by its 2 shard parts"),
        ("pack/mix-1", {"counts": {"in": 15, "kept": 15}}, "pack/mix-1: in = exposures of curate/mix-1"),
        ("pack/mix-2", {"stats": {"n_tokens": 499}}, "pack/mix-2: tokens placed + dropped = tokens of curate/mix-2"),
        ("train/zebra", {"stats": {"n_tokens": 499}}, "train/zebra: tokens trained + left out = tokens of pack/mix-1"),
        (
            "train/zebra",
            {"stats": {"n_loss_tokens": 1}},
            "train/zebra: loss tokens trained + left out = those of pack/mix-1",
        ),
        (
            "train/zebra",
            {"stats": {"left_out": {"documents": 1, "tokens": 9, "loss_tokens": 0}}},
            "train/zebra: tokens trained + left out = tokens of pack/mix-1",
        ),
        ("train/apple", {"counts": {"in": 3, "kept": 3}}, "train/apple: in = kept by pack/mix-2"),
        ("train/apple", {"stats": {"n_packs": 3}}, "train/apple: packs trained = packs of pack/mix-2"),
        (
            "evaluate/digits",
            {"stats": {"checkpoint_digest": "of another run"}},
            "evaluate/digits: checkpoint asked = checkpoint trained",
        ),
    ],
)
def test_a_lost_count_is_named(node: str, fields: dict, equation: str) -> None:
    assert failing(manifests.line()) == []
    broken = manifests.changed(manifests.line(), node, **fields)
    assert equation in failing(broken)
    summary = report.summarise(broken, spec=SPEC)
    assert summary["closes"] is False
    assert "The counts do not close" in report.markdown(summary)
    assert re.sub(r"&#\d+;|\W", "", equation) in re.sub(r"&#\d+;|\W", "", report.markdown(summary))


def test_an_artifact_of_another_run_is_noticed() -> None:
    stale = manifests.changed(manifests.line(), "shard/text", digest="made again since")
    assert any(name.startswith("curate/mix-1: inputs") for name in failing(stale))


def test_dropped_tokens_close_the_pack() -> None:
    lost = {"dropped_tokens": {"over_long": 40}, "dropped_loss_tokens": {"over_long": 10}, "split_boundaries": 2}
    sources = {"text": {"n_tokens": 460, "n_loss_tokens": 148}}
    packed = {"n_tokens": 460, "n_loss_tokens": 148, "sources": sources}
    found = manifests.changed(manifests.line(), "pack/mix-1", stats=lost | packed)
    assert not [name for name in failing(found) if name.startswith("pack/")]


def test_closing_rows_say_what_was_reused() -> None:
    found = manifests.line()
    rows = report.closing_rows(found, {m.id: "ran" if m.part == "train" else "reused" for m in found})
    assert {row["state"] for row in rows if row["part"] == "train"} == {"ran"}
    assert {(row["state"], row["seconds"]) for row in rows if row["part"] == "filter"} == {("reused", 0.0)}
    assert rows[2]["dropped"] == "2 too_small"
    assert len({tuple(row) for row in rows}) == 1  # one set of columns, as the terminal's table needs


def test_html_is_self_contained_and_shows_tags_as_text() -> None:
    hostile = "<script>alert(1)</script>"
    summary = report.summarise(manifests.line(), spec={"recipe": "toy", "title": hostile})
    page = html(summary, report.markdown(summary), {"overview": f"# x\n\n{hostile} <img src=http://x.test/y>"})
    assert "<script" not in page and "<img" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)


def test_part_writes_three_forms(recipe: finished.Recipe) -> None:
    done = recipe.made["report/toy"]
    summary = json.loads((done.path / "report.json").read_text())
    assert summary["closes"] is True and done.manifest.stats["closes"] is True
    assert summary["data"][0]["licence"] == "CC0-1.0"
    n_nodes = len(recipe.made) - 1
    assert done.manifest.counts == {"in": n_nodes, "kept": n_nodes, "dropped": {}}
    page = (done.path / "report.html").read_text()
    assert page.count("<details") == 9  # overview, seven parts, equations
    assert "data:image/png;base64," in page


def test_part_gives_equal_bytes_twice(recipe: finished.Recipe) -> None:
    before = recipe.made["report/toy"]
    text = (before.path / "report.md").read_bytes()
    again, _ = artifact.make(recipe.job("report/toy"), report.run, force=True)
    assert (again.path / "report.md").read_bytes() == text
    assert again.manifest.digest == before.manifest.digest
