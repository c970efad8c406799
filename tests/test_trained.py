"""trained: documents that cannot be read are left out up to a number, named, counted, and no part of an average."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stage_runs import compare_with_plain_loop
from tiny_stage import made, make_job, make_plan

from solo.artifact import Artifact, Job, LedgerError
from solo.report import run_pages
from solo.train import checkpoint, trained
from solo.train import part as train


def damage(inputs: dict[str, Artifact], root: Path, source: str, key: str) -> dict[str, Artifact]:
    """The same inputs with the bytes of one document overwritten."""
    plan = pq.read_table(inputs["pack/tiny"].path / "plan.parquet").to_pylist()
    row = next(r for r in plan if r["key"] == key)
    shutil.copytree(inputs[f"shard/{source}"].path, root)
    with (root / "shards" / "00000.tar").open("r+b") as tar:
        tar.seek(row["offset"])
        tar.write(b"x" * row["length"])
    return inputs | {f"shard/{source}": made(root, f"shard/{source}")}


def test_documents_left_out_are_counted_and_the_token_average_is_of_the_others(
    alone: Callable[[Job], list[dict]], tmp_path: Path
) -> None:
    whole = make_plan(tmp_path / "plan", 3)
    plan = pq.read_table(whole["pack/tiny"].path / "plan.parquet").to_pylist()
    lost = next(r for r in plan if r["pack"] == 2)  # a text of packs 2, 6, 10
    inputs = damage(whole, tmp_path / "damaged", "prose", lost["key"])
    job = make_job(tmp_path, inputs, loss_average="token", max_damaged=3)
    rows = alone(job)
    assert [row["left_out"] for row in rows] == [1, 1, 1]
    compare_with_plain_loop(job, 3)
    done = train.run(job)
    assert (done.n_in, done.n_kept, done.dropped) == (len(plan), len(plan) - 3, {"damaged": 3})
    out = {"documents": 3, "tokens": 3 * lost["n_tokens"], "loss_tokens": 3 * lost["n_loss_tokens"]}
    lost_of_source = {name: out[name.removeprefix("n_")] for name in ("n_tokens", "n_loss_tokens")}
    assert done.stats["left_out"] == out | {"sources": {"prose": lost_of_source}}
    for name in ("n_tokens", "n_loss_tokens"):
        assert done.stats[name] + out[name.removeprefix("n_")] == sum(r[name] for r in plan)
    page = "".join(run_pages.train_page([Artifact(job.out, replace(job.one("pack").manifest, stats=done.stats))], {}))
    assert page.count(lost["key"]) == 3
    rows = pq.read_table(job.out / "trained.parquet")
    with pytest.raises(
        LedgerError, match=r"train/tiny: pack 2: 1 n_documents trained \+ 0 left out != 2 planned, and 2"
    ):
        trained.check("train/tiny", hide_left_out(rows), pq.read_table(whole["pack/tiny"].path / "packs.parquet"))


def test_a_resumed_stage_has_no_new_allowance_of_damage(alone: Callable[[Job], list[dict]], tmp_path: Path) -> None:
    whole = make_plan(tmp_path / "plan", 3)
    plan = pq.read_table(whole["pack/tiny"].path / "plan.parquet").to_pylist()
    inputs = damage(whole, tmp_path / "damaged", "prose", next(r["key"] for r in plan if r["pack"] == 2))
    job = make_job(tmp_path, inputs, max_damaged=2, checkpoint_every_steps=1)
    for _ in range(2):  # the second goes on after step 2, with both documents spent
        with pytest.raises(ValueError, match=r"\(damaged document 3, max_damaged is 2\)"):
            alone(job)
        assert checkpoint.newest(job.work / "checkpoints").step == 2


def hide_left_out(rows: pa.Table) -> pa.Table:
    return pa.Table.from_pylist([r | {"left_out": []} for r in rows.to_pylist()], trained.ROW)
