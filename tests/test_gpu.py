"""gpu: a stage as a GPU trains it, at every ZeRO stage and with the optimizer on the host."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_stage import EVERY, make_job, make_plan

from solo.artifact import CHECKOUT
from solo.bench import stage as bench_stage
from solo.bench.train import PROFILES
from solo.train import launch
from solo.train import part as train

TOY = PROFILES["gpu-toy"]
LIMIT_S = 300.0  # most of it is the compiler's


@pytest.mark.gpu
@pytest.mark.parametrize("file", ["zero1", "zero2", "zero3", "offload"])
def test_a_stage_trains_and_its_loss_is_one_graph(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLO_DEEPSPEED", str(CHECKOUT / f"infra/deepspeed/{file}.json"))
    profile = replace(TOY, ways=("solo",), deepspeed=f"{file}.json")
    bench_stage.prepare(profile, tmp_path)
    command = [sys.executable, "-m", "solo.bench.train", TOY.name, "--way", "solo", "--folder", str(tmp_path)]
    env = launch.environment(1, "cuda") | {"SOLO_SUPERVISED": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    row = json.loads((tmp_path / "solo.json").read_bytes())
    assert row["losses"][-1] < row["losses"][0] and row["checkpoint"]["whole_s"] > 0
    assert row["graphs"]["breaks"] == 0 and row["graphs"]["loss"] == (0 if file == "zero3" else 1)


@pytest.mark.gpu
def test_a_stage_told_to_stop_goes_on_as_one_undisturbed(tmp_path: Path) -> None:
    """By the launcher, in bf16; losses, not bits: the rows of ids sum their gradients in any order on a GPU."""
    inputs = make_plan(tmp_path / "plan", 8)
    losses = {}
    for name in ("whole", "stopped"):
        job = make_job(tmp_path / name, inputs, precision="bf16")
        job.work.mkdir(parents=True)
        if name == "stopped":
            with pytest.raises(launch.Interrupted):
                train.run(job, lambda told: os.kill(os.getpid(), signal.SIGTERM) if told["step"] == EVERY else None)
        train.run(job)
        rows = [json.loads(line) for line in (job.out / "metrics.jsonl").read_bytes().splitlines()]
        losses[name] = {row["step"]: row["loss"] for row in rows}
    assert list(losses["stopped"]) == list(range(1, 9))
    assert losses["stopped"] == pytest.approx(losses["whole"], rel=0.02)


@pytest.mark.gpu
def test_numbers_come_to_the_host_as_they_are() -> None:
    import torch

    from solo.train import state

    for n in (1, state.CHUNK_BYTES // 4, state.CHUNK_BYTES // 4 + 3):
        numbers = torch.randn(n, device="cuda")
        copied = state.on_host(numbers)
        assert not copied.is_cuda and torch.equal(copied, numbers.cpu())
