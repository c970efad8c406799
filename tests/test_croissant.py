"""Card of a mix: every reference inside the Croissant document resolves, and its numbers are the lock's."""

import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_curate import ledger, run, shard

from solo.artifact import Artifact
from solo.curate import croissant
from solo.curate import part as curate
from solo.curate.croissant import Origin

ORIGINS = {"a": Origin("CC0-1.0", "https://example.test/cc0", "sha256:1", "All of a | <b>", "https://example.test/a")}


@pytest.fixture
def lock(root: Path) -> Artifact:
    mix = [{"source": "a", "epochs": 2, "where": {"long": "n_tokens > 5"}}, {"source": "b", "epochs": 1}]
    return run(root, mix, {s: shard(root, s, ledger(s, [5, 7, 9])) for s in "ab"})


def references(node: object) -> list[str]:
    """Every `{"@id": x}` that points at something."""
    if isinstance(node, list):
        return [r for item in node for r in references(item)]
    if not isinstance(node, dict):
        return []
    return [node["@id"]] if node.keys() == {"@id"} else [r for v in node.values() for r in references(v)]


def defined(node: object) -> list[str]:
    if isinstance(node, list):
        return [r for item in node for r in defined(item)]
    if not isinstance(node, dict):
        return []
    own = [node["@id"]] if "@id" in node and "@type" in node else []
    return own + [r for v in node.values() for r in defined(v)]


def test_the_document_is_whole(lock: Artifact, tmp_path: Path) -> None:
    path, _ = croissant.write(tmp_path / "cards", lock, ORIGINS)
    found = json.loads(path.read_text())
    body = {k: v for k, v in found.items() if k != "@context"}
    assert set(references(body)) <= set(defined(body)) and len(defined(body)) == len(set(defined(body)))
    assert {"name", "description", "license", "url", "version", "datePublished", "conformsTo"} <= body.keys()
    assert [f["name"] for f in body["recordSet"][0]["field"]] == pq.read_schema(lock.path / "lock.parquet").names
    assert set(croissant.MEANING) == set(curate.LOCK.names)
    for entry in body["distribution"]:
        data = (path.parent / entry["contentUrl"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"] and entry["contentSize"] == f"{len(data)} B"
    assert body["license"] == ["https://example.test/cc0", "unknown"]
    assert [b["name"] for b in body["isBasedOn"]] == ["a", "b"]
    assert str(tmp_path) not in path.read_text(), "a card names no machine path"


def test_the_datasheet_tells_the_counts_and_what_is_unknown(lock: Artifact, tmp_path: Path) -> None:
    text = croissant.write(tmp_path, lock, ORIGINS)[1].read_text()
    assert f"{lock.manifest.stats['n_tokens']:,} tokens" in text
    assert "| long | 1 |" in text and "Unknown for: b." in text
    assert "<b>" not in text
    rows = [line for line in text.splitlines() if line.startswith("| a |")]
    assert len(rows) == 3 and len({line.count("|") for line in rows[:1]}) == 1


@pytest.fixture
def limited(root: Path) -> Artifact:
    """A lock with a file of what was left out, too."""
    text = ledger("b", [5, 7, 9]).set_column(5, "n_images", [[0, 0, 0]])
    mix = [{"source": "a", "epochs": 2, "category": "x", "quotas": {"size": {"by": "n_tokens > 5", "samples": 1}}}]
    mix.append({"source": "b", "epochs": 1})
    shards = {"a": shard(root, "a", ledger("a", [5, 7, 9])), "b": shard(root, "b", text)}
    return run(root, mix, shards, quotas={"x": {"tokens": 12}}, text_share={"most": 0.8})


def test_the_datasheet_tells_the_limits(limited: Artifact, tmp_path: Path) -> None:
    text = croissant.write(tmp_path, limited, ORIGINS)[1].read_text()
    for row in ("| size | a | n_tokens &#62; 5 | 1 samples |", "| quota | category x |", "0 ... 0.8 of the tokens"):
        assert row in text, text


@pytest.mark.optional
@pytest.mark.parametrize("which", ["lock", "limited"])
def test_mlcroissant_accepts_and_loads_it(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    import mlcroissant

    lock = request.getfixturevalue(which)
    path, _ = croissant.write(tmp_path / "cards", lock, ORIGINS)
    dataset = mlcroissant.Dataset(path)
    assert not dataset.metadata.issues.errors and not dataset.metadata.issues.warnings
    records = list(dataset.records("lock"))
    assert len(records) == lock.manifest.stats["n_samples"]
