"""train: what ends a stage, or lets none begin, is one line with a name; on a plan of a few tiny packs."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stage_runs import children_of, start, wait_for_step, wait_until_gone
from tiny_stage import EVERY, STAGE, made, make_job

from solo import artifact
from solo.artifact import CHECKOUT, Artifact
from solo.spec import Stage
from solo.train import checkpoint
from solo.train import part as train

N_STEPS = 48


def test_a_host_that_is_gone_ends_the_stage_with_its_name(
    inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hosts are those of a hostfile; what stands in for ssh runs the command here, and says under which number."""
    ssh, listed, pid = tmp_path / "ssh", tmp_path / "hostfile", tmp_path / "pid"
    ssh.write_text(f'#!/bin/bash\n[ "$1" = b ] && echo $$ > {pid} && exec bash -c "$2"\n')
    ssh.chmod(0o755)
    listed.write_text("# two hosts\na slots=1\n\nb slots=1\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        head = f"127.0.0.1:{probe.getsockname()[1]}"
    for name, value in {"SOLO_HOSTFILE": str(listed), "SOLO_SSH": str(ssh), "SOLO_HEAD": head}.items():
        monkeypatch.setenv(name, value)
    job = make_job(tmp_path / "root", inputs)
    process = start(job, tmp_path)
    wait_for_step(job, process, EVERY + 1)
    began = time.monotonic()
    os.kill(int(pid.read_text()), signal.SIGKILL)
    process.wait(20)
    assert process.returncode == 1 and time.monotonic() - began < 20
    name = re.escape(f"host {socket.gethostname()} (127.0.0.1)")
    says = rf"RuntimeError: train/tiny: {name}: gone, the connection to it ended .*train\.log"
    assert re.search(says, (tmp_path / "run.log").read_text())
    wait_until_gone(job)
    assert checkpoint.newest(job.work / "checkpoints").step % EVERY == 0  # where it goes on


def test_a_gpu_without_a_compiler_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train.check_compiler()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"no C compiler, none of \['gcc', 'clang'\]; .*install gcc"):
        train.check_compiler()


def test_a_failing_rank_names_its_error_and_the_log(
    inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLO_RANKS", "1")
    broken = tmp_path / "broken"
    (broken / "shards").mkdir(parents=True)
    (broken / "shards" / "00000.tar").write_bytes(b"no tar")
    job = make_job(tmp_path / "root", inputs | {"shard/prose": made(broken, "shard/prose")})
    says = r"rank 0: DamagedSampleError: prose-\w+: no sample at 00000.tar.*train\.log"
    with pytest.raises(RuntimeError, match=says):
        artifact.make(job, train.run)
    assert not children_of(job)


def test_a_rank_that_stands_still_ends_the_stage_with_its_name(
    inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLO_RANKS", "2")
    monkeypatch.setenv("SOLO_TIMEOUT_S", "5")
    job, stopped = make_job(tmp_path, inputs), []

    def stop(row: dict) -> None:
        """SIGSTOP the second rank, at the first step."""
        ranks = [p for p in children_of(job) if p.environ().get("RANK") == "1"]
        stopped.extend(p.suspend() for p in ranks[: 1 - len(stopped)])
        began.append(time.monotonic())

    began: list[float] = []
    with pytest.raises(RuntimeError, match=r"rank 0: a collective .* within 5 s, rank 1 is stuck \(.*train\.log"):
        artifact.make(job, lambda j: train.run(j, stop))
    assert len(stopped) == 1 and time.monotonic() - began[0] < 60
    assert "rank 0:\nTraceback" in (job.out / "train.log").read_text()
    wait_until_gone(job)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_batch_size": 8}, r"'train_batch_size' does not belong here, the stage's batch_packs says that"),
        ({"gradient_clipping": 1.0}, r"'gradient_clipping'.*clip_norm"),
        ({"optimizer": {"type": "Lion"}}, r"'optimizer'.*learning_rate, betas, eps and weight_decay"),
        ({"prescale_gradients": True}, r"'prescale_gradients' does not belong here, it may change the weights"),
        ({"zero_optimization": {"stage": 4}}, r"zero_optimization.stage is 4; use 0, 1, 2 or 3"),
    ],
)
def test_a_deepspeed_file_cannot_change_the_result(given: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(given))
    with pytest.raises(ValueError, match=message):
        train.deepspeed_config(path, Stage.model_validate(STAGE), 2)


def test_our_deepspeed_files_leave_the_result_to_the_stage() -> None:
    for name in train.DEEPSPEED.values():
        config = train.deepspeed_config(CHECKOUT / name, Stage.model_validate(STAGE), 2)
        assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (4, 2)


def test_a_batch_that_ranks_cannot_share_is_refused(
    inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLO_RANKS", "3")
    with pytest.raises(ValueError, match=r"batch_packs = 4 = 1 x 3 ranks \+ 1; .* SOLO_RANKS to one of \[1, 2, 4\]"):
        train.run(make_job(tmp_path, inputs))
    monkeypatch.setenv("SOLO_RANKS", "two")
    with pytest.raises(ValueError, match=r"SOLO_RANKS: 'two' is not a number"):
        train.run(make_job(tmp_path, inputs))


def test_the_supervisor_does_not_load_torch() -> None:
    code = "import solo.train, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
