"""saver: checkpoints are written beside the training, and a disk that is full for a while costs nothing else."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_stage import make_job, make_plan

from solo.artifact import Job, file_sha256
from solo.train import checkpoint

LARGEST = 300_000  # bytes of a file that can still be written while the disk is "full"; the optimizer's has 25 MB


def test_a_full_disk_leaves_the_training_going_with_the_older_checkpoint(
    alone: Callable[..., list[dict]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = make_plan(tmp_path / "plan", 9)
    calm = make_job(tmp_path / "calm", inputs, checkpoint_every_steps=100)
    alone(calm)
    job = make_job(tmp_path / "full", inputs, checkpoint_every_steps=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    seen: dict[int, list[str]] = {}

    def fill(row: dict) -> None:
        """Full from step 3 to step 6, and what lies there as each step ends."""
        if "step" in row:
            wait_for_writers()
            limit = LARGEST if 3 <= row["step"] < 6 else soft
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            seen[row["step"]] = sorted(p.name for p in (job.work / "checkpoints").glob("*step-*"))

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with caplog.at_level(logging.INFO, logger="solo"):
            alone(job, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    # As step n ends, its checkpoint is not begun: those of 3, 4 and 5 fail, 6 is the next.
    assert seen[3] == seen[4] == seen[5] == seen[6] == ["step-000001", "step-000002"]
    assert seen[7] == ["step-000002", "step-000006"] and seen[8] == ["step-000006", "step-000007"]
    said = [record.getMessage() for record in caplog.records if "no checkpoint of step" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith(
        "tiny: no checkpoint of step 3, training goes on with those before it: "
    )
    assert "checkpoints are written again, from step 6 on; 3 were not" in caplog.text
    assert checkpoint.newest(job.work / "checkpoints").step == 8
    assert weights(job) == weights(calm)


def test_training_goes_on_while_a_checkpoint_is_written(
    alone: Callable[..., list[dict]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that takes no flush until step 4 has ended; the checkpoint of step 4 waits for that of step 2."""
    fsync, free = os.fsync, threading.Event()
    job = make_job(tmp_path / "job", make_plan(tmp_path / "plan", 6), checkpoint_every_steps=2)
    seen: dict[int, list[str]] = {}

    def look(row: dict) -> None:
        seen[row["step"]] = sorted(p.name for p in (job.work / "checkpoints").glob("*step-*"))
        if row["step"] == 4:
            threading.Timer(0.3, free.set).start()

    monkeypatch.setattr(os, "fsync", lambda handle: (free.wait(), fsync(handle))[1])
    rows = alone(job, look)
    assert seen[3] == seen[4] == [".step-000002.tmp"]
    stalls = [row["checkpoint_stall_s"] for row in rows]
    assert stalls[4] > 0.2 > max(stalls[:4])  # the line after step 4 tells of the wait before it
    assert sorted(p.name for p in (job.work / "checkpoints").glob("*step-*")) == ["step-000002", "step-000004"]


def test_a_host_without_room_for_a_copy_writes_the_same(
    alone: Callable[..., list[dict]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the weights lie still until they are written: the update that comes next waits."""
    import psutil

    inputs = make_plan(tmp_path / "plan", 4)
    jobs = [make_job(tmp_path / name, inputs, checkpoint_every_steps=1) for name in ("copied", "not")]
    alone(jobs[0])
    none = psutil.virtual_memory()._replace(available=0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: none)
    alone(jobs[1])
    copied, not_copied = (
        {p.relative_to(job.work): file_sha256(p) for p in sorted((job.work / "checkpoints").rglob("state-*"))}
        for job in jobs
    )
    assert copied == not_copied and len(copied) == 2


def test_a_kill_inside_a_save_costs_no_byte() -> None:
    """`tests/kill_training.py`, which kills at more moments and more often where it is run by hand."""
    command = [sys.executable, str(Path(__file__).with_name("kill_training.py")), "--ranks", "1", "--kills", "3"]
    done = subprocess.run(
        [*command, "--kinds", "files", "manifest", "sealed"], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stdout + done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == 3 and found["inside_a_save"] and not found["failures"]


def wait_for_writers() -> None:
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def weights(job: Job) -> str:
    return file_sha256(job.out / "checkpoint" / "model.safetensors")
