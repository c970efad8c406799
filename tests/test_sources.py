"""Every source of the paper: its published layout through acquire, filter and shard, against a hand-written truth."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import raw
from raw import TOKENS
from source_cases import CASES, Case, Said

from solo import acquire, measure
from solo import filter as filter_part
from solo import shard as shard_part
from solo.artifact import Artifact, Job, make
from solo.line import CHECKOUT
from solo.sample import Sample, read_samples
from solo.spec import SourceSpec, load

SPECS = CHECKOUT / "datasets_spec"
NAMES = sorted(p.stem for p in (SPECS / "sources").glob("*.yaml") if not p.stem.startswith("sample-"))


def through(name: str, case: Case, base: Path) -> list[Artifact]:
    """The artifacts of the three parts, made of the committed spec and the fixture at the place it names."""
    specs = base / "specs"
    specs.mkdir()
    spec = load(SourceSpec, name, SPECS)
    location = specs / spec.acquire.location
    location.parent.mkdir(parents=True)
    case.write((specs / spec.acquire.location).resolve())
    fetched = spec.acquire.model_dump(mode="json")
    fetched["args"] |= case.args
    revision = "sha256:" + acquire.content_sha256(location)
    fields = {
        "acquire": {"source": name, "revision": revision, "acquire": fetched},
        "filter": {"filter": spec.filter.model_dump(mode="json"), "signals": measure.versions(spec.filter.signals)},
        "shard": {"shard": spec.shard.model_dump(mode="json"), "tokens": TOKENS},
    }
    made: list[Artifact] = []
    for part, module in (("acquire", acquire), ("filter", filter_part), ("shard", shard_part)):
        inputs = {a.manifest.id: a for a in made}
        job = Job(part, name, module.VERSION, fields[part], inputs, base / "root", specs, 1)
        made.append(make(job, module.run)[0])
    return made


def said(sample: Sample) -> Said:
    """Roles and contents, an image as None."""
    return [(m["role"], [None if i["type"] == "image" else i["text"] for i in m["content"]]) for m in sample.messages]


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[list[Artifact]]]]:
    """The sources that start img2dataset, all at once: it takes seconds to import and waits most of its time."""
    names = [name for name, case in CASES.items() if "origin" in case.args]
    with ThreadPoolExecutor(len(names)) as pool:
        yield {name: pool.submit(through, name, CASES[name], tmp_path_factory.mktemp(name)) for name in names}


@pytest.mark.parametrize("name", sorted(NAMES, key=lambda name: "origin" in CASES[name].args))
def test_published_layout_becomes_these_messages_and_tokens(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    case = CASES[name]
    if "origin" not in case.args:
        acquired, filtered, sharded = through(name, case, tmp_path)
    elif (CHECKOUT / ".img2dataset").exists():
        acquired, filtered, sharded = request.getfixturevalue("fetched")[name].result()
    else:
        pytest.skip("img2dataset's environment is not installed (make setup)")
    assert acquired.manifest.counts["dropped"] == case.dropped
    assert filtered.manifest.counts["dropped"] == {} and sharded.manifest.counts["dropped"] == {}
    rows = {row["key"]: row for path in (sharded.path / "shards").glob("*.parquet") for row in raw.rows(path)}
    found = []
    for sample in (s for path in (sharded.path / "shards").glob("*.tar") for s in read_samples(path)):
        row = rows[sample.key]
        found.append((said(sample), (row["n_patches"], row["n_text_tokens"], row["n_loss_tokens"])))
    assert sorted(found, key=repr) == sorted(case.kept, key=repr)
