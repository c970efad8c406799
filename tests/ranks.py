"""Several stages one after the other on the same ranks: a launch costs five seconds, so many share one.

`train_on(n, tasks, folder)` starts `python tests/ranks.py FOLDER/tasks.json` on n ranks; each task's metrics lie beside
its `out` as `metrics.jsonl`, as the supervisor would have left them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from solo.artifact import Job
from solo.spec import Stage
from solo.train import launch
from solo.train import part as train


def task_of(job: Job, *, n_ranks: int, deepspeed: dict | None = None) -> dict:
    """The task of a job on so many ranks, with this DeepSpeed configuration where one is given."""
    job.work.mkdir(parents=True, exist_ok=True)
    stage = Stage.model_validate(job.spec["stage"])
    task = train._task(job, stage, device="cpu", ranks=n_ranks)
    if deepspeed is not None:
        path = job.work / "deepspeed.json"
        path.write_text(json.dumps(deepspeed))
        task["deepspeed"] = train.deepspeed_config(path, stage, n_ranks)
    return task


def train_on(n_ranks: int, tasks: list[dict], folder: Path) -> list[list[dict]]:
    """Train the tasks on new ranks; the metrics of each."""
    file = folder / "tasks.json"
    file.write_text(json.dumps(tasks))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(n_ranks), str(Path(__file__)), str(file)]
    env = launch.environment(n_ranks, "cpu") | {"SOLO_SUPERVISED": ""}
    with (folder / "ranks.log").open("ab") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=env, timeout=3000, check=False)
    assert not done.returncode, (folder / "ranks.log").read_text()[-4000:]
    return [read(Path(task["out"])) for task in tasks]


def read(out: Path) -> list[dict]:
    """The metrics of a task."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def main(file: Path) -> None:
    """One rank."""
    import torch

    from solo.train import engine, trainer

    torch.set_num_threads(1)
    engine.connect("cpu")
    for task in json.loads(file.read_text()):
        rows: list[dict] = []
        trainer.emit = rows.append
        assert trainer.Trainer(task).run()
        if not int(os.environ["RANK"]):
            lines = [json.dumps(row) + "\n" for row in rows if "loss" in row]
            (Path(task["out"]) / "metrics.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)
