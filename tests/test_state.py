"""state: any number of ranks at any ZeRO stage goes on from what others wrote, with the same numbers."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ranks import task_of, train_on
from safetensors import safe_open
from test_sick import FLAT, ODD_STEP, SPIKES
from tiny_stage import make_job, make_plan

from solo.artifact import CHECKOUT, Artifact, Job, file_sha256
from solo.train import checkpoint, sick, trained
from solo.train import part as train

N_STEPS, AT = 4, 2  # stages of so many steps, gone on with after this one
FIELDS = {"checkpoint_every_steps": AT, "learning_rate": 3e-3, "clip_norm": 1.0}
SAME = {"loss": 1e-5, "grad_norm": 1e-4}  # relative: sums over ranks are taken in another order
HERE = {"bf16": {"precision": "bf16"}, "fp32": {}}


def zero(stage: int, **keys: object) -> dict:
    return {"zero_optimization": {"stage": stage} | keys}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def calm(
    alone: Callable[..., list[dict]], inputs: dict[str, Artifact], folder: Path
) -> dict[str, tuple[Job, list[dict]]]:
    """One rank from the first step to the last."""
    jobs = {name: make_job(folder / f"calm-{name}", inputs, **FIELDS, **fields) for name, fields in HERE.items()}
    return {name: (job, alone(job)) for name, job in jobs.items()}


TWO = {  # on two ranks: a DeepSpeed configuration, a precision, and whether it goes on from one rank's checkpoint
    "zero 0": (zero(0), "fp32", False),
    "zero 3": (zero(3, stage3_param_persistence_threshold=40), "fp32", False),  # norms are kept whole, nothing else
    "zero 3 in bf16": (zero(3), "bf16", False),
    "zero 2 from one": (zero(2), "fp32", True),
    "zero 1 in bf16 from one": (zero(1), "bf16", True),
}


@pytest.fixture(scope="module")
def two(
    calm: dict[str, tuple[Job, list[dict]]], inputs: dict[str, Artifact], folder: Path
) -> dict[str, tuple[Job, list[dict]]]:
    """All of `TWO`, in one launch."""
    jobs, tasks = {}, []
    for name, (config, precision, resumed) in TWO.items():
        jobs[name] = job = make_job(folder / name, inputs, **FIELDS, **HERE[precision])
        if resumed:
            take_checkpoints(calm[precision][0], job)
        tasks.append(task_of(job, n_ranks=2, deepspeed=config))
        assert bool(tasks[-1]["resume"]) == resumed
    odd = make_plan(folder / "odd", 14, odd=4 * ODD_STEP - 2)
    jobs["spike"] = make_job(folder / "spike", odd, **FLAT, **SPIKES, on_spike="quarantine")
    tasks.append(task_of(jobs["spike"], n_ranks=2))
    return dict(zip(jobs, zip(jobs.values(), train_on(2, tasks, folder), strict=True), strict=True))


def take_checkpoints(source: Job, job: Job) -> None:
    job.work.mkdir(parents=True)
    shutil.copytree(source.work / "checkpoints", job.work / "checkpoints")


def same(rows: list[dict], expected: list[dict], *, loose: float = 1.0) -> None:
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for key, tolerance in SAME.items():
            assert row[key] == pytest.approx(other[key], rel=tolerance * loose), (row["step"], key)
        assert (row["tokens"], row["loss_tokens"]) == (other["tokens"], other["loss_tokens"])


def ledger(job: Job) -> list[dict]:
    """What was trained, but for the losses; and that it is the plan."""
    table = pq.read_table(job.out / "trained.parquet")
    trained.check("tiny", table, pq.read_table(job.one("pack").path / "packs.parquet"))
    return table.drop_columns(["loss", "sources"]).to_pylist()


def numbers(folder: Path) -> dict[tuple[str, str], list]:
    """Every parameter's weight and moments as a checkpoint has them, whoever wrote which part."""
    parts: dict[tuple[str, str], dict[int, list]] = {}
    for path in folder.glob("state-*.safetensors"):
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"updates": str(AT)}
            for key in file.keys():  # noqa: SIM118
                kind, name = key.split("/")
                name, begin = name.split("@")
                parts.setdefault((kind, name), {})[int(begin)] = file.get_tensor(key).tolist()
    return {key: [x for begin in sorted(found) for x in found[begin]] for key, found in parts.items()}


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_train_as_one(
    name: str, two: dict[str, tuple[Job, list[dict]]], calm: dict[str, tuple[Job, list[dict]]]
) -> None:
    _, precision, resumed = TWO[name]
    (job, rows), (one, expected) = two[name], calm[precision]
    same(rows, expected[AT if resumed else 0 :], loose=1.0 if precision == "fp32" else 300)
    assert ledger(job) == ledger(one)


def test_two_ranks_go_back_together(two: dict[str, tuple[Job, list[dict]]]) -> None:
    job, rows = two["spike"]
    assert [row["step"] for row in rows] == [*range(1, ODD_STEP + 1), 11, 13, 14]  # back to the checkpoint of 10
    assert rows[10]["loss"] == rows[12]["loss"] < rows[11]["loss"] > 2 > rows[-1]["loss"]
    assert [event["done"] for event in sick.read(job.out)] == ["quarantined"]
    assert {r["reason"] for row in ledger(job)[44:48] for r in row["left_out"]} == {"quarantined"}


@pytest.mark.parametrize("name", ["zero 0", "zero 3", "zero 3 in bf16"])
def test_one_rank_goes_on_from_two(
    name: str,
    two: dict[str, tuple[Job, list[dict]]],
    alone: Callable[..., list[dict]],
    inputs: dict[str, Artifact],
    tmp_path: Path,
) -> None:
    (source, rows), precision = two[name], TWO[name][1]
    job = make_job(tmp_path, inputs, **FIELDS, **HERE[precision])
    take_checkpoints(source, job)
    assert checkpoint.newest(job.work / "checkpoints").world_size == 2
    same(alone(job), rows[AT:], loose=1.0 if precision == "fp32" else 300)
    assert ledger(job) == ledger(source)


def test_no_number_is_lost_on_the_way(
    alone: Callable[..., list[dict]],
    inputs: dict[str, Artifact],
    two: dict[str, tuple[Job, list[dict]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Read from two ranks at ZeRO 3 and written at once by one at ZeRO 1: the same, to the bit."""
    from solo.train import trainer

    source = two["zero 3"][0]
    job = make_job(tmp_path, inputs, **FIELDS)
    take_checkpoints(source, job)
    task = task_of(job, n_ranks=1, deepspeed=zero(1))
    one = trainer.Trainer(task | {"work": str(tmp_path / "again")})
    one.save()
    one.saver.drain()
    roots = (job.work / "checkpoints", tmp_path / "again" / "checkpoints")
    given, written = (numbers(root / f"step-{AT:06d}") for root in roots)
    assert given == written and len(given) == 3 * len(list(one.engine.module.parameters()))
    moments = [values for (kind, _), values in given.items() if kind != "weight"]
    assert sum(any(values) for values in moments) > len(moments) / 2  # the guard: there was something to lose


@pytest.mark.parametrize("precision", HERE)
def test_the_same_rank_goes_on_to_the_bit(
    precision: str,
    calm: dict[str, tuple[Job, list[dict]]],
    alone: Callable[..., list[dict]],
    inputs: dict[str, Artifact],
    tmp_path: Path,
) -> None:
    source, rows = calm[precision]
    job = make_job(tmp_path, inputs, **FIELDS, **HERE[precision])
    take_checkpoints(source, job)
    again = [(row["step"], row["loss"], row["grad_norm"]) for row in alone(job)]
    assert again == [(row["step"], row["loss"], row["grad_norm"]) for row in rows[AT:]]
    for name in ("checkpoint/model.safetensors", "trained.parquet"):
        assert file_sha256(job.out / name) == file_sha256(source.out / name)


def test_weights_gathered_from_parts_are_a_checkpoint_like_any(
    two: dict[str, tuple[Job, list[dict]]], calm: dict[str, tuple[Job, list[dict]]]
) -> None:
    """Of a stage at ZeRO 3, whose ranks have a part of each tensor."""
    whole, gathered = (job.out / "checkpoint/model.safetensors" for job in (calm["fp32"][0], two["zero 3"][0]))
    with safe_open(whole, "np") as a, safe_open(gathered, "np") as b:
        assert list(a.keys()) == list(b.keys()) and a.metadata() == b.metadata()
        for name in a.keys():  # noqa: SIM118
            assert a.get_tensor(name).shape == b.get_tensor(name).shape
            assert abs(a.get_tensor(name) - b.get_tensor(name)).max() < 1e-5


def test_a_part_that_is_not_there_is_named(
    calm: dict[str, tuple[Job, list[dict]]], inputs: dict[str, Artifact], tmp_path: Path, alone: object
) -> None:
    from solo.train import state, trainer

    one = trainer.Trainer(task_of(make_job(tmp_path, inputs, **FIELDS), n_ranks=1))
    with pytest.raises(ValueError, match=r"0 states in state-\*\.safetensors, not 1; delete it"):
        state.restore(one.engine, tmp_path)
    slices = [s for s in state.held(one.engine) if s.name != "model.norm.weight"]
    state.write(tmp_path / "state-00000-00000.safetensors", slices, 3)
    with pytest.raises(ValueError, match=r"model\.norm\.weight \[0:32\] is not all there"):
        state.restore(one.engine, tmp_path)


def test_files_have_a_size_at_which_several_are_written_at_once(tmp_path: Path) -> None:
    import torch

    from solo.train.state import Slice, in_files

    slices = [Slice(str(n), 0, {"weight": torch.zeros(n)}) for n in (10, 10, 10, 100, 1)]
    assert [[len(s) for s in file] for file in in_files(slices, 80)] == [[10, 10], [10], [100], [1]]


@pytest.mark.parametrize(
    ("given", "precision", "message"),
    [
        (zero(4), "fp32", r"zero_optimization.stage is 4; use 0, 1, 2 or 3"),
        ({}, "bf16", r"zero_optimization.stage is 0 and tiny's precision is bf16; use 1, 2 or 3"),
        (zero(3), "fp8", r"zero_optimization.stage is 3 and tiny's precision is fp8; use 1 or 2"),
        (zero(3, zero_quantized_weights=True), "bf16", r"zero_quantized_weights does not belong here, it rounds"),
        (zero(3, offload_param={"device": "cpu"}), "bf16", r"offload_param does not belong here, .* offload_optimizer"),
        (zero(2, offload_optimizer={"device": "cpu"}), "bf16", r"offload_optimizer needs zero_optimization.stage 1"),
    ],
)
def test_what_would_change_the_result_is_refused(given: dict, precision: str, message: str, tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", make_plan(tmp_path / "plan", 1), precision=precision)
    with pytest.raises(ValueError, match=message):
        task_of(job, n_ranks=1, deepspeed=given)


def test_our_deepspeed_files_are_accepted(tmp_path: Path) -> None:
    from solo.spec import Stage

    stage = Stage.model_validate(make_job(tmp_path, {}, precision="bf16").spec["stage"])
    for path in (CHECKOUT / "infra" / "deepspeed").glob("*.json"):
        assert train.deepspeed_config(path, stage, 2)["zero_optimization"]["stage"] in (1, 2, 3)
