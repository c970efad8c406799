"""Runs of the tiny stage in processes: started, waited for, on two hosts, in Slurm, and held against plain torch."""

import json
import os
import pickle
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from tiny_stage import MODEL, TOKENS

from solo.artifact import CHECKOUT, Job, file_sha256
from solo.spec import ModelSpec, Stage

RUN = """
import pickle, sys
from solo import artifact
from solo.train import part as train
artifact.make(pickle.load(open(sys.argv[1], "rb")), train.run)
"""


def outcome(job: Job) -> tuple[str, str, str]:
    names = ("checkpoint/model.safetensors", "checkpoint/config.json", "trained.parquet")
    return tuple(file_sha256(job.out / name) for name in names)


def metrics(job: Job) -> list[dict]:
    path = job.out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def children_of(job: Job) -> list[psutil.Process]:
    """Launchers and ranks of this job, whoever is their parent now."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        ours = str(job.work) in " ".join(process.info["cmdline"] or [])
        if ours and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def start(job: Job, folder: Path) -> subprocess.Popen:
    pickled = folder / "job.pickle"
    pickled.write_bytes(pickle.dumps(job))
    log = (folder / "run.log").open("ab")
    return subprocess.Popen([sys.executable, "-c", RUN, str(pickled)], stderr=log, start_new_session=True)


# What stands in for Slurm: a node for each process, all of them this one; what is asked of the queue, in a file.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> {folder}/srun; shift; done
exec "$@"
"""
SOLO = """#!/bin/bash
[ "$1" != down ] || exit 0
[ "$1" = join ] && exec {python} -m solo.cli "$@"
[ "$*" = "run tiny" ] && exec {python} -c {code} {folder}/job.pickle
"""


def start_in_slurm(job: Job, folder: Path) -> subprocess.Popen:
    """The batch script on two nodes of one rank each, the recipe being the job."""
    (folder / "bin").mkdir()
    (folder / "job.pickle").write_bytes(pickle.dumps(job))
    queue = f'#!/bin/bash\necho "$@" > {folder}/queue\n'
    given = {"folder": folder, "python": sys.executable, "code": shlex.quote(RUN)}
    for name, text in {"srun": SRUN.format(**given), "scontrol": queue, "solo": SOLO.format(**given)}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_SUBMIT_DIR": str(folder)}
    own = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "PYTHONPATH": str(CHECKOUT), "SOLO_RANKS": "1"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        own["SOLO_HEAD"] = f"127.0.0.1:{probe.getsockname()[1]}"
    log = (folder / "run.log").open("ab")
    script = ["bash", str(CHECKOUT / "infra/slurm/recipe.sbatch"), "tiny"]
    return subprocess.Popen(script, env=os.environ | slurm | own, stdout=log, stderr=log, start_new_session=True)


def wait_for_step(job: Job, process: subprocess.Popen, step: int) -> None:
    deadline = time.monotonic() + 150
    while not [m for m in metrics(job) if m["step"] >= step]:
        assert process.poll() is None and time.monotonic() < deadline, (job.out / "train.log").read_text()[-2000:]
        time.sleep(0.02)


def wait_for_save(job: Job, process: subprocess.Popen) -> None:
    """Until a checkpoint has been begun and is not complete."""
    while not list((job.work / "checkpoints").glob(".step-*.tmp")):
        assert process.poll() is None
        time.sleep(0.001)


def wait_until_gone(job: Job) -> None:
    deadline = time.monotonic() + 10
    while children_of(job):
        assert time.monotonic() < deadline, children_of(job)
        time.sleep(0.05)


@contextmanager
def two_hosts(folder: Path) -> Iterator[subprocess.Popen]:
    """Settings of a stage on two hosts, each one address of the loopback and half of the cores; the other's `join`."""
    cores = sorted(os.sched_getaffinity(0))
    own, others = cores[: max(1, len(cores) // 2)], cores[len(cores) // 2 :]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        head = f"127.0.0.1:{probe.getsockname()[1]}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"SOLO_RANKS": "1", "SOLO_HOSTS": "2", "SOLO_HEAD": head}.items():
            patch.setenv(name, value)
        command = [sys.executable, "-m", "solo.cli", "join", head, "--address", "127.0.0.2"]
        os.sched_setaffinity(0, others)
        joined = subprocess.Popen(command, stderr=(folder / "join.log").open("ab"))
        os.sched_setaffinity(0, own)
        try:
            yield joined
        finally:
            os.sched_setaffinity(0, cores)
            joined.terminate()
            joined.wait(30)


def compare_with_plain_loop(job: Job, n_compared: int) -> None:
    """The stage's first steps in twenty lines of torch: same losses, same gradient norms."""
    import torch

    torch.set_num_threads(1)
    from solo.model.causal_lm import SoloForCausalLM
    from solo.sequence.loader import PackLoader
    from solo.train.engine import learning_rate
    from solo.train.engine import optimizer as make_optimizer

    stage = Stage.model_validate(job.spec["stage"])
    shards = {name: a.path for name, a in job.of("shard").items()}
    packs = PackLoader(job.one("pack").path, shards, TOKENS, stage.pack_tokens, max_damaged=stage.max_damaged)
    model = SoloForCausalLM.from_spec(ModelSpec.model_validate(MODEL), TOKENS, 3).train()
    optimizer = make_optimizer(model, stage)
    rows = metrics(job)
    for step, row in enumerate(rows[:n_compared], 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage, len(rows))
        losses = [model.pack_losses(packs.load(i)) for i in range(4 * step - 4, 4 * step)]
        means = [x.mean() for x in losses if len(x)]
        loss = sum(means) / 4 if stage.loss_average == "pack" else torch.cat(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), stage.clip_norm)
        optimizer.step()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-3)
        assert row["grad_norm"] == pytest.approx(float(norm), rel=2e-2)
