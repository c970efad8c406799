"""Quotas, budgets in samples and packs, shares of text: hand-written draws, and nothing else moves."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_curate import SEED, hash_order, ledger, lengths, repeats, replay, rows, run, shard

from solo.artifact import Artifact
from solo.curate import amounts
from solo.spec import MixSpec, SpecError


def labelled(n: int = 40, seed: int = 3) -> object:
    return ledger("a", lengths(n, seed), label=["cat", "dog", "cat", None] * (n // 4))


def kept(table: object, most: int, *, tokens: bool = False) -> set[str]:
    """Of each label the longest prefix in hash order, written without SQL."""
    used: dict[object, int] = {}
    found = set()
    for row in hash_order(table):
        used[row["label"]] = used.get(row["label"], 0) + (row["n_tokens"] if tokens else 1)
        if used[row["label"]] <= most:
            found.add(row["key"])
    return found


@pytest.mark.parametrize(("limit", "most"), [({"samples": 4}, 4), ({"tokens": 90}, 90)])
def test_of_each_class_the_first_in_hash_order_stay(root: Path, limit: dict, most: int) -> None:
    table = labelled()
    mix = [{"source": "a", "epochs": 2, "quotas": {"label": {"by": "label -- class"} | limit}}]
    made = run(root, mix, {"a": shard(root, "a", table)})
    want = kept(table, most, tokens="tokens" in limit)
    assert repeats(made, "a") == dict.fromkeys(sorted(want), 2) and 3 < len(want) < 40
    left_out = 40 - len(want)
    assert made.manifest.counts["dropped"] == {"label": left_out, "not_drawn": 0}
    (told,) = made.manifest.stats["class_quotas"]
    assert told["left_out"] == left_out and told["source"] == "a"
    assert {r["key"] for r in rows_of(made, "excluded")} == {r["key"] for r in table.to_pylist()} - want


def rows_of(made: Artifact, name: str) -> list[dict]:
    return pq.read_table(made.path / f"{name}.parquet").to_pylist()


def test_quotas_apply_in_order_after_predicates_and_twins_and_move_no_other_source(root: Path) -> None:
    a = labelled().append_column("image_sha256", [[f"{i:064x}" for i in range(40)]])
    b = ledger("b", lengths(9, 1), image_sha256=[f"{i:064x}" for i in range(36, 45)])
    shards = {"a": shard(root, "a", a), "b": shard(root, "b", b)}
    quotas = {"label": {"by": "label", "samples": 6}, "size": {"by": "n_tokens // 10", "samples": 2}}
    asked = {"source": "a", "epochs": 1, "where": {"long": "n_tokens > 9"}, "quotas": quotas}
    made = run(root, [{"source": "b", "epochs": 1}, asked], shards, unique=["image_sha256"])
    used: dict[object, int] = {}
    want = set()
    for row in hash_order(a):
        if row["n_tokens"] > 9 and int(row["key"][2:], 16) < 36:
            used[row["label"]] = used.get(row["label"], 0) + 1
            if used[row["label"]] <= 6:
                size = row["n_tokens"] // 10
                used[size] = used.get(size, 0) + 1
                want |= {row["key"]} if used[size] <= 2 else set()
    assert set(repeats(made, "a")) == want
    alone = run(root, [{"source": "b", "epochs": 1}], {"b": shards["b"]})
    assert [r for r in rows(made) if r["source"] == "b"] == rows(alone)
    text = (made.path / "mix.sql").read_text()
    assert str(root) not in text
    for name, value in {"files_a": shards["a"].path, "files_b": shards["b"].path}.items():
        text = text.replace(f"${name}", f"'{value}/shards/*.parquet'")
    text = text.replace("$excluded", f"'{made.path}/excluded.parquet'").replace("$seed", f"'{SEED}'")
    assert replay(text) == rows(made)


def test_equal_bytes_on_one_and_four_threads(root: Path, tmp_path: Path) -> None:
    mix = [{"source": "a", "epochs": 0.7, "quotas": {"label": {"by": "label", "samples": 900}}}]
    table = labelled(4_000)
    made = [run(r, mix, {"a": shard(r, "a", table)}, workers=n) for r, n in ((root, 1), (tmp_path / "four", 4))]
    assert made[0].manifest.digest == made[1].manifest.digest


@pytest.mark.parametrize(
    ("mix", "says"),
    [
        ({"quotas": {"q": {"by": "lable", "samples": 1}}}, r"sources\.a\.quotas\.q\.by: Binder Error"),
        ({"quotas": {"q": {"by": "count(*)", "samples": 1}}}, r"sources\.a\.quotas\.q\.by: .*aggregate"),
        ({"quotas": {"q": {"by": "key, shard", "samples": 1}}}, r"sources\.a\.quotas\.q\.by: "),
        ({"quotas": {"q": {"by": "CAST(key AS INT)", "samples": 1}}}, r"quotas\.q\.by: Conversion Error.*try_cast"),
        ({"quotas": {"not_drawn": {"by": "key", "samples": 1}}}, r"quotas\.not_drawn: that is another reason"),
        ({"where": {"q": "true"}, "quotas": {"q": {"by": "key", "samples": 1}}}, "that is another reason"),
    ],
)
def test_a_bad_quota_is_named_with_its_place(root: Path, mix: dict, says: str) -> None:
    with pytest.raises(SpecError, match=rf"mixes/toy\.yaml: .*{says}") as caught:
        run(root, [{"source": "a", "epochs": 1} | mix], {"a": shard(root, "a", labelled())})
    assert "\n" not in str(caught.value)


def spec(sources: list[dict], **mix: object) -> MixSpec:
    return MixSpec.model_validate({"name": "toy", "title": "Toy", "seed": SEED, "sources": sources} | mix)


def drawn(mix: MixSpec, eligible: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {source: (d.whole, d.rest) for source, d in amounts.of(mix, eligible)[0].items()}


def test_a_category_over_its_quota_takes_the_same_share_of_each_of_its_sources() -> None:
    sources = [{"source": s, "epochs": e, "category": c} for s, e, c in (("a", 3, "x"), ("b", 1, "x"), ("c", 1, "y"))]
    mix = spec(sources, quotas={"x": {"tokens": 200}, "y": {"tokens": 999}})
    found, quotas = amounts.of(mix, {"a": (9, 100), "b": (9, 100), "c": (9, 100)})
    assert {s: (d.whole, d.rest, d.cut) for s, d in found.items()} == {
        "a": (1, 50, 150),
        "b": (0, 50, 50),
        "c": (1, 0, 0),
    }
    assert quotas["x"] == {"unit": "tokens", "most": 200, "asked": 400} and quotas["y"]["asked"] == 100
    with pytest.raises(SpecError, match=r"quotas\.x is in samples, but a is drawn in tokens; give both in one unit"):
        amounts.of(spec(sources, quotas={"x": {"samples": 2}}), {s: (9, 100) for s in "abc"})


def test_weights_may_be_shares_of_samples_or_of_whole_packs() -> None:
    sources = [{"source": "a", "weight": 0.7}, {"source": "b", "weight": 0.3, "max_epochs": 0.5}]
    eligible = {"a": (10, 999), "b": (10, 999)}
    assert drawn(spec(sources, budget_samples=20), eligible) == {"a": (1, 4), "b": (0, 5)}
    # 7 packs: 4.9 and 2.1, so 5 and 2; b is short of its 200 tokens by none, of 0.5 epochs it has 499.
    assert drawn(spec(sources, budget_packs=7, pack_tokens=100), eligible) == {"a": (0, 500), "b": (0, 200)}
    thirds = spec([{"source": s, "weight": 1 / 3} for s in "abc"], budget_packs=8, pack_tokens=10)
    assert sum(amounts.whole_packs(thirds).values()) == 8


def test_a_mix_by_samples_draws_them_and_says_so(root: Path) -> None:
    shards = {s: shard(root, s, ledger(s, lengths(30, i))) for i, s in enumerate("ab")}
    mix = [{"source": "a", "weight": 0.75, "category": "x"}, {"source": "b", "weight": 0.25, "category": "x"}]
    made = run(root, mix, shards, budget_samples=40, quotas={"x": {"samples": 20}})
    assert {s: v["n_exposures"] for s, v in made.manifest.stats["sources"].items()} == {"a": 15, "b": 5}
    assert made.manifest.stats["quotas"] == {"x": {"unit": "samples", "most": 20, "asked": 40, "drawn": 20}}


def test_the_share_of_text_is_kept_or_refused_with_the_equation(root: Path) -> None:
    text = ledger("t", [10] * 6).set_column(5, "n_images", [[0] * 6])
    shards = {"a": shard(root, "a", ledger("a", [10] * 4)), "t": shard(root, "t", text)}
    mix = [{"source": "a", "epochs": 1}, {"source": "t", "epochs": 1}]
    made = run(root, mix, shards, text_share={"least": 0.6, "most": 0.6})
    assert made.manifest.stats["n_text_only_tokens"] == 60
    says = r"mixes/toy\.yaml: text_share: \(60 \(t\)\) / 100 tokens = 0\.6000, not between 0 and 0\.5; change the"
    with pytest.raises(SpecError, match=says):
        run(root, mix, shards, text_share={"most": 0.5})


@pytest.mark.parametrize(
    ("mix", "says"),
    [
        ({"quotas": {"x": {"tokens": 1, "samples": 1}}}, "a quota is in samples or in tokens"),
        ({"quotas": {"x": {}}}, "a quota is in samples or in tokens"),
        ({"quotas": {"z": {"tokens": 1}}}, r"no source has category 'z'; categories are \['x'\]"),
        ({"text_share": {"least": 0.5, "most": 0.4}}, r"least 0\.5 is over most 0\.4"),
        ({"budget_packs": 3}, "is needed exactly when a source has a weight"),
        ({"pack_tokens": 3}, "budget_packs and pack_tokens are given together"),
        ({"sql": "SELECT 1"}, "sql says how much, so epochs cannot"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(mix: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        spec([{"source": "a", "epochs": 1, "category": "x"}], **mix)


def test_what_is_off_is_not_in_the_identity_of_a_mix() -> None:
    dump = spec([{"source": "a", "epochs": 1}]).model_dump(mode="json")
    assert set(dump) == {"name", "title", "seed", "budget_tokens", "unique", "near", "decontaminate", "sources"}
    assert set(dump["sources"][0]) == {"source", "weight", "epochs", "samples", "max_epochs", "where"}
