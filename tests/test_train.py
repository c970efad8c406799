"""train: schedule, a whole stage on two ranks, kills, stops, other plans; on a plan of a few tiny packs."""

import json
import math
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from stage_runs import (
    children_of,
    compare_with_plain_loop,
    metrics,
    outcome,
    start,
    start_in_slurm,
    two_hosts,
    wait_for_save,
    wait_for_step,
    wait_until_gone,
)
from tiny_stage import EVERY, STAGE, TOKENS, make_job

from solo import artifact
from solo.artifact import CHECKOUT, Artifact, Job, LedgerError
from solo.spec import Stage
from solo.train import checkpoint
from solo.train import part as train

N_STEPS = 48


@pytest.fixture(scope="module")
def undisturbed(inputs: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Artifact, list]:
    told = []
    job = make_job(tmp_path_factory.mktemp("calm"), inputs)
    job = replace(job, spec=job.spec | {"held_out_every_steps": 16})  # which changes no byte of what is trained
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOLO_RANKS", "2")
        done, _ = artifact.make(job, lambda j: train.run(j, told.append))
    return job, done, told


def test_learning_rate_truth_table() -> None:
    from solo.train.engine import learning_rate

    stage = Stage.model_validate(STAGE | {"learning_rate": 1.0, "min_learning_rate": 0.1, "warmup_steps": 4})
    cosine = [learning_rate(s, stage, 12) for s in range(1, 13)]
    assert cosine[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert cosine[7] == pytest.approx(0.55)  # half-way
    assert cosine[5] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert cosine[11] == pytest.approx(0.1)
    linear = [learning_rate(s, stage.model_copy(update={"schedule": "linear"}), 12) for s in range(1, 13)]
    assert linear[3:] == pytest.approx([1.0, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125, 0.1])
    assert learning_rate(3, stage, 3) == pytest.approx(0.75)  # a stage shorter than its warm-up
    assert learning_rate(1, stage.model_copy(update={"warmup_steps": 0}), 1) == pytest.approx(0.1)


def test_a_stage_trains_every_token_of_its_plan(undisturbed: tuple[Job, Artifact, list]) -> None:
    job, done, told = undisturbed
    plan = pq.read_table(job.one("pack").path / "packs.parquet").to_pylist()
    stats = done.manifest.stats
    n = sum(p["n_rows"] for p in plan)
    assert done.manifest.counts == {"in": n, "kept": n, "dropped": {"damaged": 0}}
    assert stats["n_packs"] == 4 * N_STEPS and stats["left_out"]["documents"] == 0
    for count in ("n_tokens", "n_loss_tokens"):
        total = sum(p[count] for p in plan)
        assert stats[count] == total == sum(s[count] for s in stats["sources"].values())
        assert total == sum(m[{"n_tokens": "tokens"}.get(count, "loss_tokens")] for m in told)
    assert (stats["n_steps"], stats["ranks"]) == (N_STEPS, 2)
    assert told[1]["loss"] > 9
    assert 0 < stats["loss_last"] == told[-1]["loss"] < 4
    assert [m["step"] for m in told] == list(range(1, N_STEPS + 1)) == [m["step"] for m in metrics(job)]
    assert {"lr", "grad_norm", "tokens_per_s", "input_stall_s", "step_s", "eta_s"} <= told[0].keys()
    assert set(told[0]["sources"]) == {"caption", "prose"} and set(told[0]["modalities"]) == {"image", "text"}
    start, *table = pq.read_table(done.path / "metrics.parquet").to_pylist()
    assert [(r["step"], r["loss"], dict(r["sources"])) for r in table] == [
        (m["step"], m["loss"], m["sources"]) for m in told
    ]
    assert [m["step"] for m in told if "held_out" in m] == [16, 32, 48]
    assert (start["step"], start["loss"], start["held_out"]) == (0, None, told[0]["held_out_before"]["loss"])
    assert start["held_out"] > 9 > table[15]["held_out"] > table[-1]["held_out_image"]
    assert stats["held_out"]["after"]["sources"] == dict(table[-1]["held_out_sources"])
    rows = pq.read_table(done.path / "trained.parquet").to_pylist()
    assert [(r["pack"], r["step"]) for r in rows] == [(i, i // 4 + 1) for i in range(4 * N_STEPS)]
    assert rows[1]["loss"] is None and rows[1]["n_loss_tokens"] == 0 < rows[1]["n_tokens"]  # the pack without target
    assert told[0]["loss"] == pytest.approx(sum(r["loss"] or 0 for r in rows[:4]) / 4)
    assert not children_of(job)


def test_no_path_of_this_machine_is_in_the_checkpoint(undisturbed: tuple[Job, Artifact, list]) -> None:
    folder = undisturbed[1].path / "checkpoint"
    assert {p.name for p in folder.iterdir()} >= {"config.json", "model.safetensors", "solo.json"}
    for path in folder.iterdir():
        assert str(undisturbed[0].root).encode() not in path.read_bytes()
        assert str(CHECKOUT).encode() not in path.read_bytes()


def test_the_checkpoint_can_be_talked_to(undisturbed: tuple[Job, Artifact, list]) -> None:
    from transformers import AutoModelForCausalLM, AutoProcessor

    from solo.model.causal_lm import SoloForCausalLM
    from solo.model.processor import SoloProcessor

    folder = undisturbed[1].path / "checkpoint"
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert processor.tokenizer.tokens == TOKENS.model_copy(update={"tokenizer": processor.tokenizer.tokens.tokenizer})
    assert isinstance(processor, SoloProcessor) and isinstance(model, SoloForCausalLM)
    given = processor(text=["the cat 1 sat on"])
    assert model.generate(**given, max_new_tokens=3).shape[1] > given["input_ids"].shape[1]


def test_two_ranks_on_deepspeed_equal_a_plain_loop(undisturbed: tuple[Job, Artifact, list]) -> None:
    compare_with_plain_loop(undisturbed[0], 12)


def test_the_saved_weights_are_the_trained_ones(undisturbed: tuple[Job, Artifact, list]) -> None:
    import torch

    from solo.model.causal_lm import SoloForCausalLM
    from solo.sequence.loader import PackLoader

    job, done, told = undisturbed
    model = SoloForCausalLM.from_pretrained(done.path / "checkpoint")
    shards = {name: a.path for name, a in job.of("shard").items()}
    packs = PackLoader(job.one("pack").path, shards, TOKENS, STAGE["pack_tokens"])
    with torch.no_grad():
        loss = sum(float(model.pack_losses(packs.load(i)).mean()) for i in range(4, 8)) / 4
    assert told[-1]["loss"] * 0.9 < loss < told[-1]["loss"]


def test_stopped_damaged_killed_and_run_again_gives_the_same_bytes(
    undisturbed: tuple[Job, Artifact, list], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path / "root", undisturbed[0].inputs)
    process = start_in_slurm(job, tmp_path)
    wait_for_step(job, process, EVERY + 1)
    began = time.monotonic()
    process.send_signal(signal.SIGUSR1)  # the time limit is near
    process.wait(15)
    assert process.returncode == 0 and time.monotonic() - began < 15
    assert (tmp_path / "queue").read_text() == "requeue 4711\n"
    options = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--relative=1"]
    assert (tmp_path / "srun").read_text().split() == options
    assert "Interrupted: train/tiny: stopped on request, checkpoint step-" in (tmp_path / "run.log").read_text()
    assert not children_of(job)
    folders = sorted((job.work / "checkpoints").glob("step-*"))
    assert [checkpoint.damage(folder) for folder in folders] == [None, None]
    kept, stopped_at = (int(folder.name.removeprefix("step-")) for folder in folders)
    assert kept % EVERY == 0 and kept < stopped_at == metrics(job)[-1]["step"] < N_STEPS - 20

    refuses_other_plans(job, tmp_path)

    victim = next(folders[1].glob("state-*.safetensors"))
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 1
    victim.write_bytes(raw)
    process = start(job, tmp_path)
    wait_for_step(job, process, random.randrange(stopped_at + 1, N_STEPS - 16))
    wait_for_save(job, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_until_gone(job)  # launcher and ranks follow, though nobody could tell them
    assert not (job.out / "checkpoint").exists() and list((job.work / "checkpoints").glob("*.damaged"))
    fault = f"{folders[1]}: {victim.relative_to(folders[1])} does not match its sha256; not used"
    assert fault in (tmp_path / "run.log").read_text()

    said = []
    with two_hosts(tmp_path):
        done, _ = artifact.make(replace(job, progress=said.append), train.run)
    assert said[1].startswith("waits for 1 more hosts to `solo join 127.0.0.1:")
    said = said[:1]
    resumed_at = int(said[0].removeprefix("goes on after step ").partition("/")[0])
    assert resumed_at % EVERY == 0 and resumed_at >= kept
    assert outcome(job) == outcome(undisturbed[0])
    assert done.manifest.digest == undisturbed[1].manifest.digest
    calm = [(m["step"], m["loss"], m["grad_norm"]) for m in metrics(undisturbed[0])]
    assert [(m["step"], m["loss"], m["grad_norm"]) for m in metrics(job)] == calm
    assert not children_of(job)


def refuses_other_plans(job: Job, folder: Path) -> None:
    """A stage with checkpoints does not go on with the same packs under another seed, batch size or mix lock."""
    for name, (change, says) in {
        "seed": ({"spec": {"seed": 2}}, "the seed 1, not 2"),
        "batch": ({"spec": {"batch_packs": 8}}, "the packs of a step 4, not 8"),
        "lock": ({"inputs": {"curate/tiny": "3" * 64}}, "the mix lock 22222222, not 33333333"),
    }.items():
        pack = job.one("pack")
        shutil.copytree(pack.path, folder / name)
        own = json.loads((pack.path / artifact.MANIFEST).read_bytes())
        (folder / name / artifact.MANIFEST).write_text(json.dumps(own | {k: own[k] | v for k, v in change.items()}))
        other = replace(job, inputs=job.inputs | {"pack/tiny": replace(pack, path=folder / name)})
        with pytest.raises(ValueError, match=rf"the saved state of step \d+ counts in {says}; go on with the plan"):
            train.run(other)


def test_tokens_that_were_not_trained_break_the_ledger(undisturbed: tuple[Job, Artifact, list], tmp_path: Path) -> None:
    job = make_job(tmp_path / "root", undisturbed[0].inputs)
    job.work.mkdir(parents=True)
    (job.out / "checkpoint").mkdir()
    rows = pq.read_table(undisturbed[1].path / "trained.parquet")
    pq.write_table(rows.slice(1), job.out / "trained.parquet")
    with pytest.raises(LedgerError, match=rf"trained {4 * N_STEPS - 1} packs.* != planned {4 * N_STEPS} packs"):
        train.run(job)
