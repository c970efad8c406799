"""The line of a recipe: order, fields each part reads, plans with reasons. No part runs here."""

from pathlib import Path

import pytest
import tiny

from solo import line
from solo.artifact import Job, Result, make
from solo.line import Settings, differences, nodes, plan, select


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_specs(tmp_path_factory.mktemp("specs"))


def made_by_hand(recipe_nodes: list, settings: Settings) -> None:
    """Artifacts with one line of content each, at the fingerprints the line asks for: enough for a plan."""
    refs: dict[str, line.Ref] = {}
    for node in recipe_nodes:
        inputs = {i: refs[i].open(settings.root) for i in node.inputs}
        job = Job(node.part, node.name, node.version, node.spec, inputs, settings.root, settings.specs, 1)

        def run(j: Job) -> Result:
            (j.out / "x").write_text(j.name)
            return Result(1, 1, {}, {})

        made, _ = make(job, run)
        refs[node.id] = line.Ref(node.id, made.manifest.fingerprint, made.manifest.digest)


def test_inputs_come_before_their_readers(specs: Path) -> None:
    seen: set[str] = set()
    for node in nodes("toy", specs):
        assert set(node.inputs) <= seen
        seen.add(node.id)
    assert {i.split("/")[0] for i in seen} == set(line.PARTS)


def test_fingerprints_do_not_know_where_they_run(specs: Path, tmp_path: Path) -> None:
    copy = tiny.write_specs(tmp_path / "elsewhere")
    first = [line.fingerprint(n, {}) for n in nodes("toy", specs) if not n.inputs]
    assert first == [line.fingerprint(n, {}) for n in nodes("toy", copy) if not n.inputs]


def test_a_plan_names_the_field_that_changed_and_what_waits_for_it(specs: Path, root: Path, tmp_path: Path) -> None:
    settings = Settings(root, specs, 1)
    before = nodes("toy", specs)
    assert {p.action for p in plan(before, settings)} == {"run", "unknown"}
    made_by_hand(before, settings)
    assert {p.action for p in plan(before, settings)} == {"reuse"}

    changed = tiny.write_specs(tmp_path / "changed")
    tiny.edit(changed, "sources/toy-text.yaml", filter__keep__length="n_chars >= 25")
    rows = {f"{p.part}/{p.name}": p for p in plan(nodes("toy", changed), settings)}
    assert rows["filter/toy-text"].action == "run"
    assert rows["filter/toy-text"].because == 'filter.keep.length: "n_chars >= 10" -> "n_chars >= 25"'
    waiting = {i for i, p in rows.items() if p.action == "unknown"}
    assert waiting == {
        "shard/toy-text",
        "curate/toy",
        "pack/toy",
        "train/toy-stage",
        "evaluate/toy-colours",
        "report/toy",
    }
    assert "filter/toy-text" in rows["shard/toy-text"].because


@pytest.mark.parametrize(
    ("file", "field", "value", "parts"),
    [
        ("sources/toy-text.yaml", "title", "Another title", set()),
        ("sources/toy-text.yaml", "shard__samples_per_shard", 10, {"shard/toy-text"}),
        ("mixes/toy.yaml", "seed", 2, {"curate/toy"}),
        ("recipes/toy.yaml", "seed", 2, {"pack/toy", "train/toy-stage"}),
        ("benchmarks/toy-colours.yaml", "max_new_tokens", 3, {"evaluate/toy-colours"}),
        ("recipes/toy.yaml", "title", "T", {"report/toy"}),
    ],
)
def test_an_edit_touches_only_the_parts_that_read_it(
    specs: Path, tmp_path: Path, file: str, field: str, value: object, parts: set[str]
) -> None:
    changed = tiny.write_specs(tmp_path / "changed")
    tiny.edit(changed, file, **{field: value})
    old = {n.id: n.spec for n in nodes("toy", specs)}
    new = {n.id: n.spec for n in nodes("toy", changed)}
    touched = {i for i in old if old[i] != new[i]}
    if field == "title" and file.startswith(("sources", "mixes")):
        assert not touched
    else:
        assert touched == parts


def test_missing_files_and_force_are_reasons(specs: Path, root: Path) -> None:
    settings = Settings(root, specs, 1)
    line_ = nodes("toy", specs)
    made_by_hand(line_, settings)
    victim = next(p for p in plan(line_, settings) if p.part == "pack").ref
    assert victim is not None
    (victim.path(root) / "x").unlink()
    rows = {p.part: p for p in plan(line_, settings, ["evaluate"])}
    assert (rows["pack"].action, rows["pack"].because) == ("run", "x is missing")
    assert rows["curate"].action == "reuse"
    made_by_hand(line_, settings)
    rows = {p.part: p for p in plan(line_, settings, ["evaluate"])}
    assert (rows["evaluate"].action, rows["evaluate"].because) == ("run", "force=evaluate")
    assert rows["report"].action == "unknown"


def test_only_refuses_a_stale_part_it_leaves_out(specs: Path, root: Path) -> None:
    settings = Settings(root, specs, 1)
    until_curate = select(nodes("toy", specs), "curate")
    made_by_hand(select(until_curate, "shard"), settings)
    line.check_only(plan(until_curate, settings), ["curate"])
    line.check_only(plan(until_curate, settings), None)
    with pytest.raises(ValueError, match=r"only=curate reads shard/.*stale \(force=shard\); add shard to only"):
        line.check_only(plan(until_curate, settings, ["shard"]), ["curate"])


def test_until_is_checked(specs: Path) -> None:
    with pytest.raises(ValueError, match="until is 'shards'; choose one of acquire, filter, shard"):
        select(nodes("toy", specs), "shards")


def test_differences_are_leaves() -> None:
    assert differences({"a": {"b": [1, 2]}, "c": 1}, {"a": {"b": [1, 3]}, "d": 2}) == [
        "a.b[1]: 2 -> 3",
        "c: 1 -> (removed)",
        "d: (absent) -> 2",
    ]
    assert differences({"keep": {"a": 1, "b": 2}}, {"keep": {"b": 2, "a": 1}}) == ["keep: order of its keys"]
