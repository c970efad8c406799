"""Loss averages: `pack` and `token` are those of one plain process, for every number of ranks and of packs each."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import test_trained
import tiny_stage
from tiny_stage import MODEL, TOKENS

from solo.artifact import Artifact
from solo.spec import ModelSpec, Stage
from solo.train import launch
from solo.train import part as train

RANKS = (1, 2, 4)
ACCUMULATIONS = (1, 2, 3, 4)
AVERAGES = ("pack", "token")
DAMAGED_AT = 2  # packs of a rank in the cases with a damaged document, which one rank leaves out and all must count
N_STEPS = 1  # more are in test_train
# A step of size learning_rate whatever the gradient would hide a wrong factor, so the norms are compared as well.
FIELDS = {"warmup_steps": 0, "learning_rate": 1e-3, "clip_norm": 1e9}

# One process imports what every rank needs and forks them, for each line of its input: five seconds a rank less.
RANKS_OF = """
import json, os, socket, sys
from pathlib import Path
import torch
from solo.train import trainer

torch.set_num_threads(1)


def rank(paths):
    trainer.engine.connect("cpu")
    for path in paths:
        rows = []
        trainer.emit = rows.append
        assert trainer.Trainer(json.loads(Path(path).read_text())).run()
        if os.environ["RANK"] == "0":
            Path(path).with_suffix(".rows").write_text(json.dumps([r for r in rows if "step" in r]))


for line in sys.stdin:
    n_ranks, paths = json.loads(line)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n_ranks)}
    children = []
    for i in range(n_ranks):
        os.environ |= {"RANK": str(i), "LOCAL_RANK": str(i)}
        if not (child := os.fork()):
            try:
                rank(paths)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        children.append(child)
    failed = [os.waitpid(child, 0)[1] for child in children]
    assert not any(failed), failed
"""


def first_packs(inputs: dict[str, Artifact], folder: Path, n: int) -> dict[str, Artifact]:
    """The same inputs with a plan of the first n packs."""
    folder.mkdir(parents=True)
    for name in ("plan.parquet", "packs.parquet"):
        table = pq.read_table(inputs["pack/tiny"].path / name)
        pq.write_table(table.filter(pc.less(table["pack"], n)), folder / name)
    return inputs | {"pack/tiny": tiny_stage.made(folder, "pack/tiny")}


def damage(inputs: dict[str, Artifact], folder: Path) -> dict[str, Artifact]:
    """The first document of pack 0, and of every pack like it, cannot be read."""
    key = pq.read_table(inputs["pack/tiny"].path / "plan.parquet")["key"][0].as_py()
    return test_trained.damage(inputs, folder, "caption", key)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, str], tuple[train.Job, list[dict]]]:
    """Every case; the ranks of one number of them train its cases one after the other."""
    root = tmp_path_factory.mktemp("averages")
    inputs = tiny_stage.make_plan(root / "all", N_STEPS * max(RANKS) * max(ACCUMULATIONS) // 4)
    jobs, lines = {}, []
    for ranks in RANKS:
        for n in ACCUMULATIONS:
            own = first_packs(inputs, root / f"plan-{ranks}-{n}", N_STEPS * ranks * n)
            broken = damage(own, root / f"shards-{ranks}-{n}") if n == DAMAGED_AT else {}
            for average, given in [*((a, own) for a in AVERAGES), *((f"{a}-damaged", broken) for a in AVERAGES)]:
                if not given:
                    continue
                where = root / f"{ranks}-{n}-{average}"
                fields = FIELDS | {"batch_packs": ranks * n, "loss_average": average.removesuffix("-damaged")}
                job = tiny_stage.make_job(where, given, **fields, max_damaged=9 if given is broken else 0)
                job.work.mkdir(parents=True)
                task = train._task(job, Stage.model_validate(job.spec["stage"]), device="cpu", ranks=ranks)
                (where / "task.json").write_text(json.dumps(task))
                jobs[ranks, n, average] = job, where / "task.json"
        lines.append(json.dumps([ranks, [str(path) for case, (_, path) in jobs.items() if case[0] == ranks]]))
    ended = subprocess.run(
        [sys.executable, "-c", RANKS_OF],
        input="\n".join(lines),
        env=launch.environment(1, "cpu"),
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert not ended.returncode, ended.stderr[-3000:]
    return {case: (job, json.loads(path.with_suffix(".rows").read_text())) for case, (job, path) in jobs.items()}


@pytest.mark.parametrize(
    ("ranks", "n", "average"),
    [(r, n, a) for r in RANKS for n in ACCUMULATIONS for a in AVERAGES]
    + [(r, DAMAGED_AT, f"{a}-damaged") for r in RANKS for a in AVERAGES],
)
def test_it_is_the_average_of_one_process(
    trained: dict[tuple[int, int, str], tuple[train.Job, list[dict]]], ranks: int, n: int, average: str
) -> None:
    import torch

    torch.set_num_threads(1)
    from safetensors.torch import load_file

    from solo.model.causal_lm import SoloForCausalLM
    from solo.sequence.loader import PackLoader
    from solo.train.engine import learning_rate
    from solo.train.engine import optimizer as make_optimizer

    job, rows = trained[ranks, n, average]
    stage = Stage.model_validate(job.spec["stage"])
    shards = {name: a.path for name, a in job.of("shard").items()}
    packs = PackLoader(job.one("pack").path, shards, TOKENS, stage.pack_tokens, max_damaged=stage.max_damaged)
    model = SoloForCausalLM.from_spec(ModelSpec.model_validate(MODEL), TOKENS, 3).train()
    optimizer = make_optimizer(model, stage)
    batch = ranks * n
    assert len(rows) == N_STEPS == len(packs) // batch
    for step, row in enumerate(rows, 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage, N_STEPS)
        losses = [model.pack_losses(packs.load(i)) for i in range(batch * (step - 1), batch * step)]
        if stage.loss_average == "pack":
            # As upstream: the mean of each pack, then of the packs; one without targets counts as 0.
            loss = sum(x.mean() if len(x) else x.sum() for x in losses) / batch
        else:
            loss = torch.cat(losses).sum() / max(sum(len(x) for x in losses), 1)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        optimizer.step()
        planned = [r["n_loss_tokens"] for i in range(len(packs)) for r in packs.rows(i)]
        assert (row["loss_tokens"], row["left_out"] > 0) == (sum(map(len, losses)), average.endswith("-damaged"))
        assert (row["loss_tokens"] < sum(planned)) == average.endswith("-damaged"), "the guard: the plan says more"
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    saved = load_file(job.out / "checkpoint" / "model.safetensors")
    for name, parameter in model.named_parameters():
        # Adam's first steps are +-learning_rate by the sign of the gradient, so a gradient of 0 up to rounding may
        # land on either side; the mean over a tensor may not.
        assert (saved[name] - parameter.detach()).abs().mean() < 0.01 * FIELDS["learning_rate"], name


def test_the_packs_differ_so_the_averages_do(
    trained: dict[tuple[int, int, str], tuple[train.Job, list[dict]]],
) -> None:
    """The guard: averages of packs with equal numbers of targets would agree whatever the trainer does."""
    for ranks, n in ((1, 4), (2, 2), (4, 1), (4, 4)):
        by_pack, by_token = (trained[ranks, n, average][1][0] for average in ("pack", "token"))
        assert abs(by_pack["loss"] - by_token["loss"]) > 0.01
        assert abs(by_pack["grad_norm"] / by_token["grad_norm"] - 1) > 0.01
