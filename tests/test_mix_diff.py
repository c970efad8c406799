"""diff mix: hand-counted changes, sums that close whatever the mixes, and a page without markup of the data."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_curate import ledger, run, shard

from solo import artifact
from solo.artifact import Artifact, Job, LedgerError, Result
from solo.curate import locks, mix_diff
from solo.sample import IMAGE, Message, Sample, text, write_sample


def by(rows: list[dict]) -> dict[str, dict]:
    return {r["group"]: r for r in rows}


def two_locks(root: Path) -> tuple[Artifact, Artifact]:
    """`a` is drawn three times instead of once, `b` goes, `c` comes."""
    a = ledger("a", [5, 7], meta_category=["x", "y"], language=["en", "de"], width_px=[10, 30], height_px=[20, 20])
    shards = {
        "a": shard(root, "a", a),
        "b": shard(root, "b", ledger("b", [11])),
        "c": shard(root, "c", ledger("c", [4])),
    }
    one = [{"source": "a", "epochs": 1}, {"source": "b", "epochs": 1}]
    two = [{"source": "a", "epochs": 3}, {"source": "c", "epochs": 2}]
    before = run(root, one, {s: shards[s] for s in "ab"})
    return before, run(root, two, {s: shards[s] for s in "ac"})


def test_changes_counted_by_hand(root: Path) -> None:
    found = mix_diff.difference(root, *two_locks(root))
    total = found["total"]
    assert (total["samples_a"], total["samples_b"], total["added"], total["removed"]) == (3, 3, 1, 1)
    assert (total["repeated_more"], total["repeated_less"]) == (2, 0)
    assert total["tokens_delta"] == 3 * 12 + 2 * 4 - (12 + 11)
    assert total["loss_tokens_delta"] == 3 * (2 + 4) + 2 * 1 - (6 + 8)
    assert by(found["by_source"])["b"]["tokens_delta"] == -11
    assert {c: r["tokens_delta"] for c, r in by(found["by_category"]).items()} == {"x": 10, "y": 14, "(none)": -3}
    assert found["shift"]["n_tokens"] | {"largest_gap": 0} == {
        "mean_a": 7.67, "mean_b": 5.5, "p10_a": 5, "p10_b": 4, "p50_a": 7, "p50_b": 5, "p90_a": 11, "p90_b": 7,
        "largest_gap": 0,
    }  # fmt: skip
    assert found["shift"]["width_px"]["largest_gap"] == 0
    assert {r["language"]: (r["share_a"], r["share_b"]) for r in found["language"]} == {
        "en": (0.3333, 0.375), "de": (0.3333, 0.375), "(none)": (0.3333, 0.25),
    }  # fmt: skip
    assert found["ledger_gone"] == []


def test_a_category_that_the_mix_gives_a_source_is_that_of_all_its_samples(root: Path) -> None:
    a = ledger("a", [5, 7], meta_category=["x", "y"])
    shards = {"a": shard(root, "a", a), "b": shard(root, "b", ledger("b", [11]))}
    mixes = [[{"source": "a", "epochs": n, "category": "z"}, {"source": "b", "epochs": 1}] for n in (1, 2)]
    found = mix_diff.difference(root, *(run(root, mix, shards) for mix in mixes))
    assert {c: r["tokens_delta"] for c, r in by(found["by_category"]).items()} == {"z": 12, "(none)": 0}
    assert "By category" in "\n".join(mix_diff.lines(found))


def test_the_other_way_round_is_the_opposite(root: Path) -> None:
    a, b = two_locks(root)
    there, back = mix_diff.difference(root, a, b)["total"], mix_diff.difference(root, b, a)["total"]
    for name in ("tokens_delta", "loss_tokens_delta", "exposures_delta"):
        assert there[name] == -back[name]
    assert (there["added"], there["repeated_more"]) == (back["removed"], back["repeated_less"])


def test_a_lock_against_itself_changes_nothing(root: Path) -> None:
    a, _ = two_locks(root)
    found = mix_diff.difference(root, a, a)
    assert all(found["total"][n] == 0 for n in ("added", "removed", "repeated_more", "tokens_delta"))
    assert all(s["largest_gap"] == 0 for s in found["shift"].values())


amounts = st.fixed_dictionaries({s: st.sampled_from([0, 0.5, 1, 2.3]) for s in "ab"}).filter(lambda d: any(d.values()))


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(amounts, amounts)
def test_every_sum_closes(tmp_path_factory: pytest.TempPathFactory, one: dict, two: dict) -> None:
    root = tmp_path_factory.mktemp("mixes")
    shards = {s: shard(root, s, ledger(s, [9, 8, 7, 6, 5])) for s in "ab"}
    made = [
        run(
            root,
            [{"source": s, "epochs": e} for s, e in epochs.items() if e],
            {s: shards[s] for s in epochs if epochs[s]},
        )
        for epochs in (one, two)
    ]
    found = mix_diff.difference(root, *made)  # checks itself
    n = [m.manifest.stats["n_tokens"] for m in made]
    assert found["total"]["tokens_delta"] == n[1] - n[0]
    assert sum(r["loss_tokens_delta"] for r in found["by_source"]) == found["total"]["loss_tokens_delta"]


def test_a_sum_that_does_not_close_is_an_error(root: Path) -> None:
    found = mix_diff.difference(root, *two_locks(root))
    found["by_source"][0]["added"] += 1
    with pytest.raises(LedgerError, match=r"diff mix: source a: 1 added - 0 removed != 2 - 2"):
        mix_diff.check(found)


def test_locks_are_named_by_mix_and_fingerprint(root: Path) -> None:
    a, b = two_locks(root)
    assert [x.path for x in locks.pair(root, "toy", None)] == [a.path, b.path]
    assert [x.path for x in locks.pair(root, f"toy@{b.path.name}", f"toy@{a.path.name}")] == [b.path, a.path]
    with pytest.raises(ValueError, match=r"^toy: no lock 12345678; there are \['"):
        locks.one(root, "toy@12345678")
    with pytest.raises(ValueError, match=r"^tiy: no finished lock under .*; there are \['toy'\]"):
        locks.one(root, "tiy")


def test_without_its_ledger_a_source_keeps_its_counts(root: Path) -> None:
    a, b = two_locks(root)
    for made in (root / "shard" / "a").glob("*/manifest.json"):
        made.unlink()
    found = mix_diff.difference(root, a, b)
    assert found["ledger_gone"] == ["a"] and by(found["by_source"])["a"]["tokens_delta"] == 24
    assert "Ledgers that are gone" in "\n".join(mix_diff.lines(found))


def shard_with_pictures(root: Path) -> Artifact:
    made = io.BytesIO()
    Image.new("RGB", (40, 20), (9, 200, 9)).save(made, "PNG")

    def write(job: Job) -> Result:
        (job.out / "shards").mkdir()
        said = Message(role="user", content=[IMAGE, text("<b>![x](http://evil.test)</b>")])
        with (job.out / "shards" / "00000.tar").open("wb") as tar:
            length = write_sample(tar, Sample("p-0", "p", (made.getvalue(),), (said,), {}))
        table = ledger("p", [6]).drop(["offset", "length", "key"])
        place = {"key": ["p-0"], "offset": [0], "length": [length]}
        columns = {name: table[name] for name in table.column_names} | place
        pq.write_table(pa.table(columns), job.out / "shards" / "00000.parquet")
        return Result(1, 1, {}, {})

    return artifact.make(Job("shard", "p", 1, {}, {}, root, root, 1), write)[0]


def test_the_page_shows_what_came(root: Path) -> None:
    shards = {"a": shard(root, "a", ledger("a", [5])), "p": shard_with_pictures(root)}
    before = run(root, [{"source": "a", "epochs": 1}], {"a": shards["a"]})
    after = run(root, [{"source": s, "epochs": 1} for s in "ap"], shards)
    ((mix, page),) = mix_diff.changed(root, {"curate/toy": before.path.name}, [after])
    assert mix == "toy" and page.startswith("# Mix toy") and "data:image/jpeg" in page
    assert "http://" not in page and "<b>" not in page and "evil" in page
    for last in ({}, {"curate/toy": after.path.name}, {"curate/toy": "00000000"}):
        assert not list(mix_diff.changed(root, last, [after]))
