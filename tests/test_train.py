"""train: schedule, a whole stage on two ranks, kills, stops, refusals; on a plan of a few tiny packs."""

import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from tiny_stage import EVERY, MODEL, STAGE, TOKENS, made, make_job, make_plan

from solo import artifact, checkpoint, train
from solo.artifact import Artifact, Job, LedgerError, file_sha256
from solo.spec import ModelSpec, Stage

N_STEPS = 48
RUN = """
import pickle, sys
from solo import artifact, train
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
    own = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "PYTHONPATH": str(train.REPOSITORY), "SOLO_RANKS": "1"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        own["SOLO_HEAD"] = f"127.0.0.1:{probe.getsockname()[1]}"
    log = (folder / "run.log").open("ab")
    script = ["bash", str(train.REPOSITORY / "infra/slurm/recipe.sbatch"), "tiny"]
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


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return make_plan(tmp_path_factory.mktemp("plan"), N_STEPS)


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
    from solo.engine import learning_rate

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
        assert str(train.REPOSITORY).encode() not in path.read_bytes()


def test_the_checkpoint_can_be_talked_to(undisturbed: tuple[Job, Artifact, list]) -> None:
    from transformers import AutoModelForCausalLM, AutoProcessor

    from solo.model import SoloForCausalLM
    from solo.processor import SoloProcessor

    folder = undisturbed[1].path / "checkpoint"
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert processor.tokenizer.tokens == TOKENS.model_copy(update={"tokenizer": processor.tokenizer.tokens.tokenizer})
    assert isinstance(processor, SoloProcessor) and isinstance(model, SoloForCausalLM)
    given = processor(text=["the cat 1 sat on"])
    assert model.generate(**given, max_new_tokens=3).shape[1] > given["input_ids"].shape[1]


def compare_with_plain_loop(job: Job, n_compared: int) -> None:
    """The stage's first steps in twenty lines of torch: same losses, same gradient norms."""
    import torch

    torch.set_num_threads(1)
    from solo.engine import learning_rate
    from solo.engine import optimizer as make_optimizer
    from solo.loader import PackLoader
    from solo.model import SoloForCausalLM

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


def test_two_ranks_on_deepspeed_equal_a_plain_loop(undisturbed: tuple[Job, Artifact, list]) -> None:
    compare_with_plain_loop(undisturbed[0], 12)


def test_the_saved_weights_are_the_trained_ones(undisturbed: tuple[Job, Artifact, list]) -> None:
    import torch

    from solo.loader import PackLoader
    from solo.model import SoloForCausalLM

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


def test_tokens_that_were_not_trained_break_the_ledger(undisturbed: tuple[Job, Artifact, list], tmp_path: Path) -> None:
    job = make_job(tmp_path / "root", undisturbed[0].inputs)
    job.work.mkdir(parents=True)
    (job.out / "checkpoint").mkdir()
    rows = pq.read_table(undisturbed[1].path / "trained.parquet")
    pq.write_table(rows.slice(1), job.out / "trained.parquet")
    with pytest.raises(LedgerError, match=rf"trained {4 * N_STEPS - 1} packs.* != planned {4 * N_STEPS} packs"):
        train.run(job)


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
        config = train.deepspeed_config(train.REPOSITORY / name, Stage.model_validate(STAGE), 2)
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
