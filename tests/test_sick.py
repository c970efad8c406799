"""sick: a loss that is not finite changes no weight, a spike names its documents and can be passed over."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_stage import MODEL, STAGE, TOKENS, make_job, make_plan, one_rank

from solo.artifact import Artifact, Job, file_sha256
from solo.report import run_pages
from solo.spec import ModelSpec, Stage
from solo.train import part as train
from solo.train import sick, suspects

ODD_STEP = 12  # of a stage in which the step's third pack alone has the odd texts
FLAT = {
    "warmup_steps": 0,
    "learning_rate": 4e-2,
    "min_learning_rate": 4e-2,
    "checkpoint_every_steps": 5,
}  # so that steps can be left out
SPIKES = {"spike_mads": 4.0, "spike_window": 4}


@pytest.fixture(scope="module")
def alone() -> Iterator[Callable[..., list[dict]]]:
    with one_rank() as run:
        yield run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return make_plan(tmp_path_factory.mktemp("plan"), 14, odd=4 * ODD_STEP - 2)


def odd_keys(inputs: dict[str, Artifact]) -> set[str]:
    plan = pq.read_table(inputs["pack/tiny"].path / "plan.parquet").to_pylist()
    return {row["key"] for row in plan if row["pack"] == 4 * ODD_STEP - 2}


@pytest.fixture(scope="module")
def poisoned(inputs: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model to start from in which the embedding of a token of the odd texts alone is infinite."""
    from solo.model.causal_lm import SoloForCausalLM
    from solo.sequence.tokenizer import Tokenizer

    model = SoloForCausalLM.from_spec(ModelSpec.model_validate(MODEL), TOKENS, 3)
    (*_, last) = Tokenizer(TOKENS).encode("zinc")
    model.model.embed_tokens.weight.data[last] = math.inf
    folder = tmp_path_factory.mktemp("poisoned")
    model.save_pretrained(folder)
    return str(folder)


def weights(job: Job) -> str:
    return file_sha256(job.out / "checkpoint" / "model.safetensors")


def losses(rows: list[dict], *, without: int | None = None) -> list[float]:
    return [row["loss"] for row in rows if row["step"] != without]


def without_the_odd_step(inputs: dict[str, Artifact], folder: Path) -> dict[str, Artifact]:
    """The same plan where the odd step's packs are not there."""
    from tiny_stage import made

    gone = range(4 * ODD_STEP - 4, 4 * ODD_STEP)
    folder.mkdir()
    packs = [r for r in pq.read_table(inputs["pack/tiny"].path / "packs.parquet").to_pylist() if r["pack"] not in gone]
    plan = [r for r in pq.read_table(inputs["pack/tiny"].path / "plan.parquet").to_pylist() if r["pack"] not in gone]
    number = {row["pack"]: i for i, row in enumerate(packs)}
    plan = [row | {"pack": number[row["pack"]]} for row in plan]
    packs = [row | {"pack": i, "first_row": sum(p["n_rows"] for p in packs[:i])} for i, row in enumerate(packs)]
    for name, rows in (("plan", plan), ("packs", packs)):
        schema = pq.read_schema(inputs["pack/tiny"].path / f"{name}.parquet")
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"{name}.parquet")
    return inputs | {"pack/tiny": made(folder, "pack/tiny", len(plan))}


def test_a_loss_that_is_not_finite_changes_no_weight(
    alone: Callable[..., list[dict]], inputs: dict[str, Artifact], poisoned: str, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"tiny: step 12, packs 44 to 47: loss or gradient not finite, max_skipped is 0"
    ):
        alone(make_job(tmp_path / "strict", inputs, **FLAT), init=poisoned)
    job = make_job(tmp_path / "kept", inputs, **FLAT, max_skipped=1)
    rows = alone(job, init=poisoned)
    assert [row["step"] for row in rows if row["loss"] is None] == [ODD_STEP]
    calm = make_job(tmp_path / "calm", without_the_odd_step(inputs, tmp_path / "cut"), **FLAT)
    assert losses(rows, without=ODD_STEP) == losses(alone(calm, init=poisoned))
    assert weights(job) == weights(calm)
    (event,) = sick.read(job.out)
    assert (event["step"], event["kind"], event["packs"]) == (ODD_STEP, "skipped", [44, 45, 46, 47])
    assert odd_keys(inputs) <= {d["key"] for d in event["documents"]} and event["sources"] == ["caption", "prose"]
    assert event["worst"][0]["loss"] is None and event["worst"][0]["key"] in odd_keys(inputs)
    done = train.run(job)
    assert done.stats["sick"] == {"skipped": 1, "recorded": 0, "quarantined": 0} and done.dropped == {"damaged": 0}


def test_a_spike_is_passed_over_and_trains_as_if_it_had_not_been(
    alone: Callable[..., list[dict]], inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    noted = make_job(tmp_path / "noted", inputs, **FLAT, **SPIKES)
    rows = alone(noted)
    (event,) = sick.read(noted.out)
    assert (event["step"], event["kind"], event["done"]) == (ODD_STEP, "spike", "recorded")
    assert event["loss"] == rows[ODD_STEP - 1]["loss"] > event["limit"] > rows[ODD_STEP - 2]["loss"]

    job = make_job(tmp_path / "passed", inputs, **FLAT, **SPIKES, on_spike="quarantine")
    rows = alone(job)
    assert [row["step"] for row in rows] == [*range(1, ODD_STEP + 1), 11, 13, 14]  # back to the checkpoint of 10
    calm = make_job(tmp_path / "calm", without_the_odd_step(inputs, tmp_path / "cut"), **FLAT)
    expected = losses(alone(calm))
    again = {row["step"]: row["loss"] for row in rows}
    assert [again[step] for step in sorted(again) if step != ODD_STEP] == expected
    assert weights(job) == weights(calm) != weights(noted)

    (job.out / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:10] + rows[ODD_STEP:]))
    done = train.run(job)
    table = pq.read_table(job.out / "trained.parquet").to_pylist()
    assert [r["pack"] for r in table if {d["reason"] for d in r["left_out"]} == {"quarantined"}] == [44, 45, 46, 47]
    n_out = sum(len(r["left_out"]) for r in table)
    assert done.dropped == {"damaged": 0, "quarantined": n_out} and done.stats["sick"]["quarantined"] == 1
    assert done.n_kept == done.n_in - n_out
    page = "".join(run_pages.train_page([Artifact(job.out, _manifest(job, done))], {}))
    assert "Sick steps" in page and "| 12" in page and "quarantined" in page
    check_suspects(inputs, job, page)

    with pytest.raises(ValueError, match=r"step 12, packs 44 to 47: loss \d\.\d+ > \d\.\d+, max_quarantined is 0"):
        alone(make_job(tmp_path / "none", inputs, **FLAT, **SPIKES, on_spike="quarantine", max_quarantined=0))


def check_suspects(inputs: dict[str, Artifact], job: Job, page: str) -> None:
    """The documents of the highest loss, which are the odd texts, are shown with words or picture."""
    (event,) = sick.read(job.out)
    rows = pq.read_table(job.out / suspects.FILE).to_pylist()
    losses = [row["loss"] for row in rows]
    assert len(rows) == sick.N_WORST and losses == sorted(losses, reverse=True)
    assert {row["key"] for row in rows[:2]} == odd_keys(inputs)
    assert [(row["key"], row["begin"]) for row in rows] == [(d["key"], d["begin"]) for d in event["worst"]]
    assert all((row["thumbnail"] is not None) is (row["source"] == "caption") for row in rows)
    assert all(row["text"] in page and row["error"] is None for row in rows) and "data:image/jpeg" in page

    shards = {name: inputs[f"shard/{name}"].path for name in ("caption", "prose")}
    gone = shards | {"caption": job.out / "gone"}
    suspects.write(job.out, [event], inputs["pack/tiny"].path, gone)
    again = pq.read_table(job.out / suspects.FILE).to_pylist()
    assert all(("FileNotFoundError" in (row["error"] or "")) is (row["source"] == "caption") for row in again)
    suspects.write(job.out, [], inputs["pack/tiny"].path, shards)
    assert not (job.out / suspects.FILE).exists() and not list(suspects.blocks(job.out))


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_every_rank_finds_the_highest_losses_of_all(n_ranks: int) -> None:
    rng = np.random.default_rng(n_ranks)
    every = [sick.Loss(i // 5, i % 5, float(loss)) for i, loss in enumerate(rng.normal(3, 1, 40))]
    every[7] = replace(every[7], mean=math.inf)
    every[21] = replace(every[21], mean=math.nan)
    tables: list[np.ndarray] = []

    def add(own: np.ndarray) -> list[float]:
        tables.append(own)
        return sum(tables).tolist()

    for rank in range(n_ranks):  # the last one's sum is that of all
        found = sick.worst(every[rank::n_ranks], add, rank=rank, n_ranks=n_ranks)
    assert [(loss.pack, loss.slot) for loss in found[:2]] == [(1, 2), (4, 1)]
    finite = [loss.mean for loss in every if math.isfinite(loss.mean)]
    assert [loss.mean for loss in found[2:]] == sorted(finite, reverse=True)[: sick.N_WORST - 2]


def _manifest(job: Job, done):
    return replace(job.one("pack").manifest, stats=done.stats)


def test_a_resumed_stage_knows_the_sick_steps_before(
    alone: Callable[..., list[dict]], inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    fields = FLAT | SPIKES | {"on_spike": "quarantine", "checkpoint_every_steps": 1}
    job = make_job(tmp_path, inputs, **fields)
    alone(job)
    whole = weights(job), (job.out / sick.FILE).read_bytes(), file_sha256(job.out / "trained.parquet")
    for name in (sick.FILE, "trained.parquet"):
        (job.out / name).unlink()
    shutil.rmtree(job.out / "checkpoint")
    rows = alone(job)  # goes on from the newest checkpoint, which is after the spike
    assert [row["step"] for row in rows] == [14]
    assert (weights(job), (job.out / sick.FILE).read_bytes(), file_sha256(job.out / "trained.parquet")) == whole


def test_a_spike_is_many_deviations_above_the_median_of_a_full_window() -> None:
    health = sick.Health(Stage.model_validate(STAGE | {"spike_mads": 5.0, "spike_window": 4}))
    verdicts = [health.judge(loss, applied=True) for loss in (9.0, 2.0, 2.1, 1.9, 2.0, 2.24, 2.26, 2.0)]
    # 9 is no spike, as nothing is known yet; of (2.0, 2.1, 1.9, 2.0) the median is 2.0 and the MAD 0.05.
    assert verdicts == [None] * 5 + [None, None, None]
    assert health.judge(9.0, applied=True) == "spike" and health.losses[-1] == 9.0
    assert health.judge(math.nan, applied=True) == health.judge(2.0, applied=False) == "skipped"
    assert health.losses[-1] == 9.0  # a skipped one is no loss to compare with
    flat = sick.Health(Stage.model_validate(STAGE | {"spike_mads": 5.0, "spike_window": 4}))
    assert [flat.judge(loss, applied=True) for loss in (2.0, 2.0, 2.0, 2.0, 2.004, 2.006)] == [None] * 5 + ["spike"]
    off = sick.Health(Stage.model_validate(STAGE))
    assert [off.judge(loss, applied=True) for loss in (*[2.0] * 60, 99.0)] == [None] * 61


def test_metrics_are_of_the_steps_that_count(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    """As the supervisor reads them: a stage that went back tells some steps twice."""
    from solo.train.watch import Watch

    job, told = make_job(tmp_path, inputs, **FLAT), list[int]()
    job.work.mkdir(parents=True)
    watch = Watch(job, 14, lambda row: told.append(row["step"]), first_step=0)
    row = {"n_steps": 14, "loss": 2.0, "lr": 0.1, "tokens_per_s": 1.0, "eta_s": 1.0}
    lines = [row | {"step": step} for step in range(1, ODD_STEP + 1)]
    lines += [{"event": "restarted", "step": 10}, *(row | {"step": step} for step in (11, 13, 14))]
    (job.out / "train.log").write_text("".join(json.dumps(line) + "\n" for line in lines))
    watch.read()
    assert told == [*range(1, ODD_STEP + 1), 11, 13, 14]
    steps = [json.loads(line)["step"] for line in (job.out / "metrics.jsonl").read_bytes().splitlines()]
    assert steps == [*range(1, ODD_STEP), 13, 14]
