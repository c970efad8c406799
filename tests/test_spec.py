"""Specs refuse what a user may get wrong, in one line that names file, field and remedy."""

from pathlib import Path

import pytest
import yaml

from solo.artifact import CHECKOUT
from solo.line import nodes
from solo.spec import FOLDERS, BenchmarkSpec, MixSpec, RecipeSpec, SourceSpec, SpecError, load

SPECS = CHECKOUT / "datasets_spec"
SOURCE = {
    "name": "toy",
    "title": "Toy",
    "licence": {"id": "CC0-1.0", "url": "x"},
    "revision": "sha256:" + "0" * 64,
    "modality": "text",
    "acquire": {"location": "x", "adapter": "jsonl_text.read", "samples_per_shard": 10},
    "filter": {"signals": ["text.size"], "keep": {"length": "n_chars > 3"}},
    "shard": {"samples_per_shard": 10, "template": "plain"},
}


def write(tmp_path: Path, content: object, name: str = "toy") -> Path:
    folder = tmp_path / "sources"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return tmp_path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"revison": "x"}, ["unknown key 'revison'", "revision", "sources/toy.yaml"]),
        ({"revision": "main"}, ["revision 'main' is not pinned", "sha256:"]),
        ({"filter": {"signals": [], "keep": {}, "uniqe": []}}, ["unknown key 'filter.uniqe'", "unique"]),
        (
            {"shard": {"samples_per_shard": 0, "template": "plain"}},
            ["shard.samples_per_shard", "greater than 0"],
        ),
        ({"shard": {"samples_per_shard": 5, "template": "chat"}}, ["shard.template", "'plain' or 'inst'"]),
        ({"name": "other"}, ["name is 'other'", "toy.yaml"]),
        ({"title": None}, ["title"]),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, change: dict, says: list[str]) -> None:
    with pytest.raises(SpecError) as error:
        load(SourceSpec, "toy", write(tmp_path, SOURCE | change))
    message = str(error.value)
    assert all(s in message for s in says), message
    assert "\n" not in message


def test_a_missing_file_lists_what_exists(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"toyy.yaml: no such file; .*\['toy'\]"):
        load(SourceSpec, "toyy", write(tmp_path, SOURCE))


@pytest.mark.parametrize("content", ["a: [1", "- 1", "", "x: !!python/object/apply:os.system ['true']"])
def test_what_is_not_a_mapping_of_fields_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(SpecError, match=r"toy\.yaml"):
        load(SourceSpec, "toy", write(tmp_path, content))


def test_a_mix_source_has_one_amount() -> None:
    with pytest.raises(ValueError, match="exactly one of weight, epochs, samples"):
        MixSpec(name="m", title="m", seed=1, sources=[{"source": "a", "epochs": 1.0, "samples": 3}])
    with pytest.raises(ValueError, match="is needed exactly when"):
        MixSpec(name="m", title="m", seed=1, sources=[{"source": "a", "weight": 1.0}])


def test_a_typo_in_a_plug_in_is_found_before_anything_runs(tmp_path: Path) -> None:
    for folder in FOLDERS.values():
        (tmp_path / folder).symlink_to(SPECS / folder) if folder != "sources" else (tmp_path / folder).mkdir()
    for path in (SPECS / "sources").glob("*.yaml"):
        (tmp_path / "sources" / path.name).write_text(path.read_text().replace("text.size", "text.sise"))
    with pytest.raises(SpecError, match=r"sources/.*filter\.signals: 'text\.sise' is not in .* it has \[.*'size'"):
        nodes("sample", tmp_path)


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_committed_spec_is_valid(kind: type) -> None:
    names = [p.stem for p in (SPECS / FOLDERS[kind]).glob("*.yaml")]
    assert names
    for name in names:
        load(kind, name, SPECS)


def test_every_recipe_resolves() -> None:
    for path in (SPECS / FOLDERS[RecipeSpec]).glob("*.yaml"):
        ids = [n.id for n in nodes(path.stem, SPECS)]
        assert len(set(ids)) == len(ids)
        assert ids[-1] == f"report/{path.stem}"


def test_benchmarks_pin_their_data() -> None:
    with pytest.raises(ValueError, match="not pinned"):
        BenchmarkSpec.model_validate(
            load(BenchmarkSpec, "sample-digits", SPECS).model_dump(mode="json") | {"revision": "latest"}
        )
