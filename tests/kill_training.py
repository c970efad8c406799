"""SIGKILL a stage at random moments and inside its saves, run it again, compare bytes and ledger with a calm one.

    .venv/bin/python tests/kill_training.py --kills 56

Each rank is a process forked from this one, which has loaded what they need, so a kill costs two seconds and not ten;
the launcher's and the supervisor's death is tests/test_train.py's. Prints one line a kill and one JSON line at the end;
exit code 1 if a byte of the weights or of trained.parquet differs, a checkpoint is damaged, or training went back
behind one that was complete.
"""

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pyarrow.parquet as pq
from tiny_stage import make_job, make_plan

from solo.artifact import Job, canonical, file_sha256, write_atomic
from solo.spec import Stage
from solo.train import checkpoint, launch, trained
from solo.train import part as train

N_STEPS, EVERY = 24, 2
LIMIT_S = 120.0
OUTCOME = ("checkpoint/model.safetensors", "checkpoint/config.json", "trained.parquet")
KINDS = ("any moment", "begun", "files", "manifest", "sealed", "one rank", "told to stop")


def fork_ranks(job: Job, n_ranks: int) -> list[int]:
    """Ranks that train the job, from its newest checkpoint on."""
    job.work.mkdir(parents=True, exist_ok=True)
    file = job.work / "job.json"
    task = train._task(job, Stage.model_validate(job.spec["stage"]), device="cpu", ranks=n_ranks)
    write_atomic(file, canonical(task))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in range(n_ranks):
        child = os.fork()
        if child:
            ranks.append(child)
            continue
        code = 1
        try:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n_ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(n_ranks)}
            log = os.open(job.out / "train.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            from solo.train import rank as process
            from solo.train import trainer

            trainer.torch.set_num_threads(1)
            code = process.main(file)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return ranks


def wait(ranks: list[int]) -> list[int]:
    """Exit codes of ranks, negative for the signal that ended one."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    ranks.clear()
    return codes


def until(job: Job, kind: str, rng: random.Random, ranks: list[int], step: int) -> bool:
    """Wait for the moment of a kind; False where the ranks ended before."""
    root, log = job.work / "checkpoints", job.out / "train.log"
    n_files, delay_s = rng.randrange(1, 6), rng.uniform(0, 1.5)
    began, size = time.monotonic(), log.stat().st_size if log.is_file() else 0
    while time.monotonic() - began < LIMIT_S:
        if os.waitpid(ranks[0], os.WNOHANG)[0]:
            ranks.pop(0)
            return False
        half = [p.name for folder in root.glob(".step-*.tmp") for p in folder.glob("*")]
        begun = bool(half) or any(root.glob(".step-*.tmp"))
        newest = max((int(p.name[5:]) for p in root.glob("step-??????")), default=0)
        if (
            (kind == "begun" and begun)
            or (kind == "files" and len(half) >= n_files)
            or (kind == "manifest" and "manifest.json" in half)
            or (kind == "sealed" and newest > step)
        ):
            return True
        if kind in ("any moment", "one rank", "told to stop") and log.is_file() and log.stat().st_size > size:
            time.sleep(delay_s / 4)  # a step takes 20 ms
            return True
        time.sleep(0.0005)
    raise TimeoutError(f"{kind} did not come within {LIMIT_S} s; see {log}")


def kill(kind: str, ranks: list[int], rng: random.Random) -> list[int]:
    """End the ranks in the way of a kind; their exit codes."""
    if kind == "one rank":
        os.kill(rng.choice(ranks), signal.SIGKILL)
        time.sleep(0.2)  # what the others make of it, until their launcher ends them
    elif kind == "told to stop":
        for rank in ranks:
            os.kill(rank, signal.SIGTERM)
        return wait(ranks)
    for rank in ranks:
        os.kill(rank, signal.SIGKILL)
    return wait(ranks)


def ledger(job: Job) -> list[str]:
    """What was trained is the plan: as many documents and tokens, pack by pack; then the files' hashes."""
    table = pq.read_table(job.out / "trained.parquet")
    trained.check("train/tiny", table, pq.read_table(job.one("pack").path / "packs.parquet"))
    return [file_sha256(job.out / name) for name in OUTCOME]


def run(folder: Path, *, kills: int, ranks: int, seed: int, kinds: tuple[str, ...]) -> dict:
    """Kill so often; what came of it."""
    rng, inputs = random.Random(seed), make_plan(folder / "plan", N_STEPS)
    calm = make_job(folder / "calm", inputs, checkpoint_every_steps=EVERY)
    assert not any(wait(fork_ranks(calm, ranks))), (calm.out / "train.log").read_text()[-3000:]
    truth = ledger(calm)
    found = {"kills": 0, "inside_a_save": 0, "by_kind": dict.fromkeys(kinds, 0), "stages": 0, "failures": []}
    while found["kills"] < kills:
        job = make_job(folder / f"job-{found['stages']}", inputs, checkpoint_every_steps=EVERY)
        found["stages"] += 1
        finish(job, found, kills=kills, ranks=ranks, rng=rng)
        if ledger(job) != truth:
            found["failures"].append(f"stage {found['stages']}: other bytes")
    return found


def finish(job: Job, found: dict, *, kills: int, ranks: int, rng: random.Random) -> None:
    """Train a job to its end, killed on the way as often as is left."""
    root, step = job.work / "checkpoints", 0
    while not (job.out / "checkpoint").is_dir():
        own = fork_ranks(job, ranks)
        if found["kills"] == kills:
            wait(own)
            continue
        kind = min(found["by_kind"], key=lambda k: (found["by_kind"][k], rng.random()))
        came = until(job, kind, rng, own, step)
        codes = kill(kind, own, rng) if came else wait(own)
        if not came:
            continue  # the stage ended first
        half = any(root.glob(".step-*.tmp"))
        newest = checkpoint.newest(root)
        after = newest.step if newest else 0
        wrong = after < step or any(root.glob("*.damaged")) or (kind == "told to stop") != (set(codes) <= {143, 0})
        found["kills"] += 1
        found["by_kind"][kind] += 1
        found["inside_a_save"] += half
        found["failures"] += [f"kill {found['kills']}: {kind}, step {step} -> {after}, {codes}"] if wrong else []
        sys.stdout.write(f"{found['kills']:3d} {kind:<12} step {step:2d} -> {after:2d} inside={half} {codes}\n")
        sys.stdout.flush()
        step = after


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=56)
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--kinds", nargs="*", default=list(KINDS))
    asked = options.parse_args()
    os.environ.update(launch.environment(asked.ranks, "cpu"))
    del os.environ["SOLO_SUPERVISED"]
    import solo.train.rank  # noqa: F401 - once, for all ranks to come

    with tempfile.TemporaryDirectory(prefix="solo-kill-") as folder:
        found = run(Path(folder), kills=asked.kills, ranks=asked.ranks, seed=asked.seed, kinds=tuple(asked.kinds))
    sys.stdout.write(json.dumps(found) + "\n")
    sys.exit(1 if found["failures"] else 0)


if __name__ == "__main__":
    main()
