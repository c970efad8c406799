"""devices: a GPU has one training, told who holds it; free when the last process that holds it is gone."""

import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from tiny_stage import make_job, make_plan

from solo.artifact import Job
from solo.evaluate import part as evaluate
from solo.train import devices
from solo.train import part as train

# A supervisor that holds GPUs, and its launcher, which holds them too and lives until its input closes.
HOLD = """
import subprocess, sys, time
from solo.train import devices
from solo.train import launch
with devices.held("train/first", sys.argv[1].split(","), print) as locks:
    child = launch.start([sys.executable, "-c", "import sys; sys.stdin.read()"], None, subprocess.DEVNULL, locks)
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLO_LOCKS", str(tmp_path / "locks"))
    monkeypatch.delenv("SOLO_GPU_WAIT_S", raising=False)


def hold(gpus: str) -> tuple[subprocess.Popen, int]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, gpus], stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


def test_a_gpu_in_use_is_refused_by_name_waited_for_and_freed_by_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, launcher = hold("1,0")
    try:
        says = rf"^train/second: GPU 1 is held by train/first, pid {process.pid}, since 20\d\d-.*; stop that, choose "
        with pytest.raises(ValueError, match=says), devices.held("train/second", ["2", "1"], print):
            pass
        with devices.held("train/third", ["2", "3"], print) as locks:  # others are free, also 2, that was let go
            assert len(locks) == 2
        os.kill(launcher, signal.SIGSTOP)  # it has not noticed the end of its supervisor yet
        process.kill()
        process.wait()
        with pytest.raises(ValueError, match="GPU 0 is held by train/first"), devices.held("x", ["0"], print):
            pass
        monkeypatch.setenv("SOLO_GPU_WAIT_S", "20")
        monkeypatch.setattr(devices, "WAIT_S", 0.05)
        said: list[str] = []

        def say(text: str) -> None:
            said.append(text)
            os.kill(launcher, signal.SIGCONT)

        began = time.monotonic()
        with devices.held("train/second", ["0", "1"], say):
            assert time.monotonic() - began < 10
        assert len(said) == 1 and said[0].startswith("train/second: waits, GPU 0 is held by train/first, pid ")
    finally:
        process.kill()
        process.wait()
        os.kill(launcher, signal.SIGCONT) if Path(f"/proc/{launcher}").exists() else None


def test_a_stage_does_not_begin_on_a_gpu_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path, make_plan(tmp_path, 2))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    job.work.mkdir(parents=True)
    with devices.held("train/first", devices.names(), print):
        says = rf"^train/tiny: GPU 7 is held by train/first, pid {os.getpid()}, "
        with pytest.raises(ValueError, match=says):
            train.run(job)
    assert not (job.out / "train.log").read_bytes()


def test_training_and_evaluation_share_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before a model is loaded: there is none here."""
    stage = make_job(tmp_path, make_plan(tmp_path, 2))
    stage.work.mkdir(parents=True)
    (tmp_path / "questions.jsonl").write_text('{"question_id": "a", "image": "a.png", "question": "?", "answer": "x"}')
    with tarfile.open(tmp_path / "images.tar", "w"):
        pass
    spec = {"location": str(tmp_path), "adapter": "questions.read", "template": "inst", "scorer": "exact.match"}
    spec |= {"name": "toy", "title": "Toy", "licence": {"id": "CC0-1.0", "url": "none"}, "revision": "1" * 40}
    benchmark = {"benchmark": spec | {"max_new_tokens": 1, "chance": 0.5}, "tokens": stage.spec["tokens"]}
    trained = stage.one("pack")
    asked = Job("evaluate", "toy", evaluate.VERSION, benchmark, {"train/last": trained}, tmp_path / "root", tmp_path, 1)
    asked.work.mkdir(parents=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with (
        devices.held("train/first", devices.names(), print),
        pytest.raises(ValueError, match=rf"^evaluate/toy: GPU 7 is held by train/first, pid {os.getpid()}, "),
    ):
        evaluate.run(asked)
    with (
        evaluate.gpus(asked),
        pytest.raises(ValueError, match=rf"^train/tiny: GPU 7 is held by evaluate/toy, pid {os.getpid()}, "),
    ):
        train.run(stage)
    with devices.held("train/second", ["7"], print):  # free again
        pass


@pytest.mark.parametrize(
    ("visible", "found"), [("0,1", ["0", "1"]), ("", []), ("-1", []), ("GPU-6e3f, GPU-70a1", ["GPU-6e3f", "GPU-70a1"])]
)
def test_the_gpus_are_those_that_are_visible(visible: str, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.names() == found


def test_the_wait_is_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLO_GPU_WAIT_S", "1h")
    with pytest.raises(ValueError, match="SOLO_GPU_WAIT_S is '1h'; give whole seconds"):
        devices.wait_s()
