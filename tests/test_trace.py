"""Trace: what is told of a sample is what a full scan of every artifact finds, and back from a step to its URLs."""

import hashlib
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finished import trained_rows
from test_takedown import BY_HAND, N_DOCUMENTS, Line, build, listed, shown, url
from typer.testing import CliRunner

from solo.artifact import Artifact, Job, Result
from solo.cli import app as cli
from solo.lineage import trace
from solo.lineage.keyed import Keyed
from solo.lineage.named import Unknown


def train(job: Job) -> Result:
    """A stage that left its first document out."""
    plan = pq.read_table(job.one("pack").path / "plan.parquet").to_pylist()
    pq.write_table(trained_rows(plan, plan[:1]), job.out / "trained.parquet")
    return Result(1, 1, {}, {})


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Line:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BY_HAND, "train", train)
        built = build(tmp_path_factory.mktemp("trace"))
        built.made()
    return built


@pytest.fixture(scope="module")
def made(toy: Line) -> dict[str, Artifact]:
    return toy.made()


def rows(made: Artifact, file: str, key: str) -> list[dict]:
    """The rows of a key in all matching files, by a full scan."""
    tables = [pq.read_table(path) for path in sorted(made.path.glob(file))]
    return [row for table in tables for row in table.to_pylist() if row["key"] == key]


def test_every_sample_of_both_sources_is_told_as_a_full_scan_finds_it(toy: Line, made: dict[str, Artifact]) -> None:
    n_documents = 0
    for source in ("toy-web", "toy-text"):
        for key in pq.read_table(made[f"filter/{source}"].path / "verdicts.parquet")["key"].to_pylist():
            (s,) = trace.trace(toy.root, key)["samples"]
            assert s["acquire"]["outcomes"] == rows(made[f"acquire/{source}"], "outcomes.parquet", key)
            assert [s["filter"]["verdict"]] == rows(made[f"filter/{source}"], "verdicts.parquet", key)
            ledger = rows(made[f"shard/{source}"], "shards/*.parquet", key)
            assert ([s["shard"]["row"]] if s["shard"]["row"] else []) == ledger
            (lock,) = s["locks"]
            assert ([lock["row"]] if lock["row"] else []) == rows(made["curate/toy"], "lock.parquet", key)
            planned = rows(made["pack/toy"], "plan.parquet", key)
            documents = s["packs"][0]["documents"] if s["packs"] else []
            assert [(d["pack"], d["slot"], d["begin"]) for d in documents] == [
                (p["pack"], p["slot"], p["begin"]) for p in planned
            ]
            (stage,) = s["trained"]
            assert [(d["pack"], d["slot"]) for d in stage["documents"]] == [(p["pack"], p["slot"]) for p in planned]
            assert not any("stale" in part for part in (s["acquire"], s["filter"], s["shard"], lock, stage))
            n_documents += len(documents)
    assert n_documents == pq.read_metadata(made["pack/toy"].path / "plan.parquet").num_rows > 0


def test_what_was_left_out_is_not_called_trained(toy: Line, made: dict[str, Artifact]) -> None:
    first = pq.read_table(made["pack/toy"].path / "plan.parquet").to_pylist()[0]
    (s,) = trace.trace(toy.root, first["key"])["samples"]
    found = {(d["pack"], d["slot"]): d for d in s["trained"][0]["documents"]}
    assert found[0, 0]["left_out"] == "damaged"
    assert all(d["left_out"] is None and d["loss_of_pack"] == 1.0 for place, d in found.items() if place != (0, 0))


def test_a_url_a_hash_or_the_beginning_of_a_key_names_it(toy: Line, made: dict[str, Artifact]) -> None:
    document = toy.documents()[url(1)]
    ledger = rows(made["shard/toy-web"], "shards/*.parquet", document.key)[0]
    picture = hashlib.sha256(shown(1)[0]).hexdigest()
    digits = document.key.rpartition("-")[2]
    names = [url(1), "HTTP://HOST1.example/page/1?q=a&b#there", picture, f"sha256:{picture.upper()}", ledger["sha256"]]
    for name in [*names, document.key, document.key[:-3], digits, digits[:12], f"  {document.key}\n"]:
        found = trace.trace(toy.root, name)
        assert [s["key"] for s in found["samples"]] == [document.key], name
    both = hashlib.sha256(b"".join(shown(4))).hexdigest()
    assert trace.trace(toy.root, both)["samples"][0]["acquire"]["outcomes"][0]["url"] == url(4)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("toy-web-", r"is no URL, no SHA-256 and no key .*\(did you mean toy-web"),
        ("toy-wbe-0123456789abcdef", "did you mean toy-web"),
        ("toy-web-0000000000000000", "no sample 'toy-web-0000000000000000'; the nearest are toy-web-"),
        ("toy-web-00000", "no key begins with 'toy-web-00000'; the nearest are toy-web-"),
        ("https://host1.example/page/77", r"the nearest are https://host1.example/page/\d+"),
        ("https://elsewhere.example/", "none is of host 'elsewhere.example'"),
        ("0" * 64, "no sample has the SHA-256 0000"),
        ("\u2603", "is no URL"),
        ("' OR 1=1 --", "is no URL"),
    ],
)
def test_what_is_not_there_is_said_with_what_is_near(toy: Line, asked: str, words: str) -> None:
    with pytest.raises(Unknown, match=words) as error:
        trace.trace(toy.root, asked)
    assert "\n" not in str(error.value)


def test_a_beginning_of_several_lists_them(toy: Line, made: dict[str, Artifact]) -> None:
    keys = [r["key"] for r in pq.read_table(made["acquire/toy-text"].path / "outcomes.parquet").to_pylist()]
    digit = next(d for d in "0123456789abcdef" if sum(k.startswith(f"toy-text-{d}") for k in keys) > 1)
    with pytest.raises(Unknown, match=rf"begins \d+ keys: toy-text-{digit}.*, toy-text-{digit}.*; give another digit"):
        trace.trace(toy.root, f"toy-text-{digit}")


def test_back_from_a_step_or_a_pack_to_the_urls(toy: Line, made: dict[str, Artifact]) -> None:
    plan = pq.read_table(made["pack/toy"].path / "plan.parquet").to_pylist()
    urls = {s.key: u for u, s in toy.documents().items()}
    n_steps = made["pack/toy"].manifest.stats["n_packs"] // 2
    seen = [d for step in range(1, n_steps + 1) for d in trace.of_step(toy.root, "toy-stage", step)["documents"]]
    assert [(d["pack"], d["slot"], d["key"]) for d in seen] == [(r["pack"], r["slot"], r["key"]) for r in plan]
    assert [d["url"] for d in seen] == [urls.get(r["key"]) for r in plan] and len(set(urls)) == N_DOCUMENTS
    assert [d["left_out"] for d in seen][:2] == ["damaged", None]
    assert trace.of_pack(toy.root, "toy", 1)["documents"][0]["key"] == next(r["key"] for r in plan if r["pack"] == 1)
    for ask, words in (
        (lambda: trace.of_step(toy.root, "toy-stage", 0), rf"steps 1 to {n_steps}, not 0"),
        (lambda: trace.of_step(toy.root, "stage-9", 1), r"no stage 'stage-9' .* there are \['toy-stage'\]"),
        (lambda: trace.of_pack(toy.root, "toy", 9_999), r"packs 0 to \d+, not 9999"),
        (lambda: trace.of_pack(toy.root, "mix-9", 0), r"no packs of mix 'mix-9'"),
    ):
        with pytest.raises(Unknown, match=words):
            ask()


def test_the_command(toy: Line, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOLO_ROOT", str(toy.root))
    monkeypatch.setenv("SOLO_SPECS", str(toy.specs))
    runner = CliRunner()
    said = runner.invoke(cli.app, ["trace", url(4)])
    assert said.exit_code == 0 and f"url: {url(4)}" in said.output and "toy: drawn 2 times" in said.output
    found = json.loads(runner.invoke(cli.app, ["trace", url(4), "--json"]).output)
    assert found["kind"] == "url" and found["samples"][0]["shard"]["tar"].startswith("shards/")
    step = runner.invoke(cli.app, ["trace", "--stage", "toy-stage", "--step", "1"])
    assert step.output.startswith("stage toy-stage, step 1 of mix toy: ") and "left out: damaged" in step.output
    for arguments in ([], ["x", "--step", "1"], ["--stage", "s"], ["--stage", "s", "--pack", "1"]):
        assert "give a key, URL or SHA-256" in str(runner.invoke(cli.app, ["trace", *arguments]).exception)
    monkeypatch.setenv("SOLO_SPECS", str(listed(tmp_path, "host,gone.example")))
    gone = runner.invoke(cli.app, ["trace", "https://gone.example/a"])
    assert "takedown.csv:2 (asked, 2026-01-31, ticket 7)" in str(gone.exception)


def test_keyed_rows_are_those_of_a_full_scan_in_any_order(tmp_path: Path) -> None:
    rng = random.Random(3)
    keys = [f"s-{rng.randrange(64):016x}" if rng.random() < 0.9 else None for _ in range(500)]
    for name, order in {"sorted": sorted(keys, key=lambda k: (k is None, k or "")), "mixed": keys}.items():
        path = tmp_path / f"{name}.parquet"
        table = pa.table({"l": [[1, 2]] * 500, "key": pa.array(order, pa.string()), "n": range(500)})
        pq.write_table(table, path, row_group_size=37)
        file, every = Keyed(path), table.to_pylist()
        for key in [f"s-{i:016x}" for i in range(70)]:
            assert file.rows(key) == [r for r in every if r["key"] == key]
        some = {f"s-{i:016x}" for i in (1, 5, 99)}
        assert file.many(some, ["n"]) == [{"n": r["n"]} for r in every if r["key"] in some]
        first = file.beginning("s-000000000000001", 1000)
        assert first == [r for r in every if r["key"] and r["key"].startswith("s-000000000000001")]
