"""realised: what was trained closes with what was asked, by source; a difference stops the stage."""

from pathlib import Path

import manifests
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finished import trained_rows
from test_curate import ledger, run, shard

from solo import artifact
from solo.artifact import Artifact, Job, LedgerError, Result
from solo.pack import plan_files as pack_plan
from solo.report import part as report
from solo.train import realised, trained


def plan_of(lock: Artifact) -> list[dict]:
    """Every sample of a lock in packs of two, but the last one: it is in an incomplete batch."""
    rows = pq.read_table(lock.path / "lock.parquet").to_pylist()
    exposures = [r | {"exposure": e} for r in rows for e in range(r["n_repeats"])][:-1]
    extra = [{"pack": i // 2, "slot": i % 2, "begin": 0, "end": r["n_tokens"]} for i, r in enumerate(exposures)]
    return [{f: (r | x)[f] for f in pack_plan.PLAN.names} for r, x in zip(exposures, extra, strict=True)]


def sums(rows: list[dict], out: list[dict]) -> dict:
    rows = [r for r in rows if r not in out]
    names = ("n_tokens", "n_loss_tokens")
    sources = {s: {n: sum(r[n] for r in rows if r["source"] == s) for n in names} for s in {r["source"] for r in rows}}
    return {"sources": sources} | {n: sum(r[n] for r in rows) for n in names}


def stage(root: Path, *, n_missing: int = 0) -> tuple[Artifact, dict[str, Artifact]]:
    """A mix, its plan and what was trained of it, without the first rows of the plan."""
    table = ledger("a", [5, 7, 9], meta_category=["x", "x", "y"])
    inputs = {f"shard/{s}": shard(root, s, t) for s, t in (("a", table), ("b", ledger("b", [20, 30])))}
    lock = run(
        root, [{"source": "a", "epochs": 2}, {"source": "b", "epochs": 1}], {s: inputs[f"shard/{s}"] for s in "ab"}
    )
    plan = plan_of(lock)
    missing = plan[:n_missing]

    def pack(job: Job) -> Result:
        pq.write_table(pa.Table.from_pylist(plan, pack_plan.PLAN), job.out / "plan.parquet")
        return Result(1, 1, {}, sums(plan, []))

    def train(job: Job) -> Result:
        pq.write_table(trained_rows(plan, missing), job.out / "trained.parquet")
        return Result(1, 1, {}, sums(plan, missing) | {"left_out": trained.left_out(trained_rows(plan, missing))})

    packed = artifact.make(Job("pack", "toy", 1, {}, {}, root, root, 1), pack)[0]
    inputs |= {"curate/toy": lock, "pack/toy": packed}
    job = Job("train", "first", 1, {"n": n_missing}, {"pack/toy": packed}, root, root, 1)
    return artifact.make(job, train)[0], inputs


@pytest.mark.parametrize("n_missing", [0, 1, 3])
def test_what_was_trained_and_left_out_is_what_was_planned(root: Path, n_missing: int) -> None:
    made, inputs = stage(root, n_missing=n_missing)
    plan = inputs["pack/toy"].path / "plan.parquet"
    realised.check("train/first", made.path / "trained.parquet", plan)
    rows = {r["source"]: r for r in realised.by_source(made, inputs["pack/toy"], inputs["curate/toy"])}
    for r in rows.values():
        assert r["in the mix"] == r["not packed"] + r["left out"] + r["realised"]
    assert (rows["a"]["in the mix"], rows["b"]["in the mix"], rows["b"]["not packed"]) == (42, 50, 30)
    assert rows["a"]["left out"] == {0: 0, 1: 5, 3: 17}[n_missing]
    assert rows["a"]["asked"] == "epochs 2"


def test_a_source_that_got_less_than_planned_stops_the_stage(root: Path) -> None:
    made, inputs = stage(root)
    rows = pq.read_table(made.path / "trained.parquet").to_pylist()
    rows[0]["sources"][0]["n_tokens"] -= 1
    pq.write_table(pa.Table.from_pylist(rows, trained.ROW), root / "less.parquet")
    with pytest.raises(
        LedgerError, match=r"train/first: a: 41 n_tokens delivered != 42 planned without those left out"
    ):
        realised.check("train/first", root / "less.parquet", inputs["pack/toy"].path / "plan.parquet")


def test_one_source_in_the_place_of_another_stops_the_stage(root: Path) -> None:
    """All totals agree, only the mix is another."""
    made, inputs = stage(root)
    rows = pq.read_table(made.path / "trained.parquet").to_pylist()
    rows[0]["sources"][0]["source"] = "b"
    pq.write_table(pa.Table.from_pylist(rows, trained.ROW), root / "other.parquet")
    with pytest.raises(LedgerError, match="train/first: a: "):
        realised.check("train/first", root / "other.parquet", inputs["pack/toy"].path / "plan.parquet")


def test_shares_by_modality_and_category(root: Path) -> None:
    made, inputs = stage(root)
    ledgers = {i: a for i, a in inputs.items() if i.startswith("shard/")}
    rows = realised.by_kind(made, inputs["pack/toy"], inputs["curate/toy"], ledgers)
    found = {(r["by"], r[""]): (r["in the mix"], r["realised"]) for r in rows}
    # Every sample of the ledger has two patches; 8 exposures are in the mix, 7 in the plan.
    assert found == {
        ("modality", "text tokens"): (92 - 16, 62 - 14),
        ("modality", "patches"): (16, 14),
        ("category", "x"): (24, 24),
        ("category", "y"): (18, 18),
        ("category", "(none)"): (50, 20),
    }


def test_the_page_shows_it_where_the_mix_is_known(root: Path) -> None:
    made, inputs = stage(root, n_missing=1)
    page = "\n\n".join(realised.blocks([made], inputs))
    assert "share realised" in page and "epochs 2" in page
    assert not list(realised.blocks([made], {}))


def test_the_report_does_not_close_when_sources_were_swapped() -> None:
    line = manifests.line()
    name = "train/zebra: tokens of text realised + left out = planned"
    assert [ok for n, *sides in report.equations(line) if n == name for ok in [sides[0] == sides[1]]] == [True]
    per_source = next(m for m in line if m.id == "train/zebra").stats["sources"]
    (one, two) = sorted(per_source)
    swapped = {one: per_source[two], two: per_source[one]}
    assert per_source[one]["n_tokens"] != per_source[two]["n_tokens"]
    broken = manifests.changed(line, "train/zebra", stats={"sources": swapped})
    failing = [n for n, left, right in report.equations(broken) if left != right]
    assert failing and all("realised + left out = planned" in n for n in failing)
