"""objective: what learns and at which rate, what a stage starts from, what is held out and measured."""

import importlib.util
import itertools
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tiny_stage import MODEL, RECIPE, STAGE, TOKENS, make_job

from solo.artifact import CHECKOUT, Artifact, Job, file_sha256
from solo.spec import ModelSpec, RecipeSpec, Stage
from solo.train import fp8, memory, start, trained
from solo.train import part as train

N_STEPS = 6
ALL = ("projection", "embeddings", "backbone")


@pytest.fixture(scope="module")
def calm(alone: Callable[..., list[dict]], inputs: dict[str, Artifact], tmp_path_factory) -> tuple[Job, list[dict]]:
    job = make_job(tmp_path_factory.mktemp("calm"), inputs)
    return job, alone(job)


def weights(job: Job) -> dict:
    return load_file(job.out / "checkpoint" / "model.safetensors")


def digest(job: Job) -> str:
    return file_sha256(job.out / "checkpoint" / "model.safetensors")


def recipe(**changes: object) -> dict:
    return RECIPE | changes


def stages(i: int, **fields: object) -> list[dict]:
    return [stage | (fields if n == i else {}) for n, stage in enumerate(RECIPE["stages"])]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"stages": stages(0, groups={name: {"frozen": True} for name in ALL})},
            "groups: projection, embeddings, backbone are all frozen",
        ),
        ({"stages": stages(0, groups={"projection": {}})}, "give exactly one of learning_rate and frozen: true"),
        ({"stages": stages(0, groups={"projection": {"frozen": True, "learning_rate": 1.0}})}, "give exactly one of"),
        ({"stages": stages(0, groups={"head": {"frozen": True}})}, "'projection', 'embeddings' or 'backbone'"),
        ({"stages": stages(0, schedule_start="continue")}, "no stage is before it; use restart"),
        (
            {"stages": stages(1, schedule_start="continue")},
            "learning_rate is 0.003 and stage stage-1 ends at 0.0003; make them equal, or use restart",
        ),
        (
            {"stages": stages(1, schedule_start="continue", learning_rate=3e-4)},
            "warmup_steps is 4: a rate that goes on is not warmed up; give 0, or use restart",
        ),
        (
            {"model": RECIPE["model"] | {"init_projection": "checkpoint"}},
            "init is random and has none; name its folder",
        ),
        ({"held_out": {"one_in": 1, "tokens_per_source": 1, "every_steps": 1}}, "greater than 1"),
    ],
)
def test_a_choice_that_cannot_be_is_told(changes: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RecipeSpec.model_validate(recipe(**changes))


def test_what_is_off_is_not_identity() -> None:
    found = RecipeSpec.model_validate(RECIPE).model_dump(mode="json")
    assert not {"groups", "schedule_start"} & found["stages"][0].keys()
    assert "init_projection" not in found["model"]
    given = {"groups": {"embeddings": {"frozen": True}, "projection": {"learning_rate": 0.1}}}
    used = RecipeSpec.model_validate(recipe(stages=stages(0, **given))).model_dump(mode="json")
    assert used["stages"][0]["groups"] == given["groups"]  # of a group too, only what is said


def test_a_rate_that_continues_begins_where_the_stage_before_ended() -> None:
    from solo.train.engine import learning_rate

    own = {"schedule_start": "continue", "learning_rate": 3e-4, "min_learning_rate": 0.0, "warmup_steps": 0}
    before, stage = RecipeSpec.model_validate(recipe(stages=stages(1, **own))).stages[:2]
    rates = [learning_rate(40, before, 40), *(learning_rate(step, stage, 40) for step in range(1, 41))]
    assert rates[0] == pytest.approx(3e-4) and rates[-1] == 0.0
    assert all(a > b for a, b in itertools.pairwise(rates)) and rates[1] > 0.99 * rates[0]


def test_what_is_frozen_has_no_gradient_and_no_state(
    alone: Callable[..., list[dict]], inputs: dict[str, Artifact], calm: tuple[Job, list[dict]], tmp_path: Path
) -> None:
    from solo.model.causal_lm import SoloForCausalLM
    from solo.train import engine, trainer

    groups = {"backbone": {"frozen": True}, "projection": {"learning_rate": 4e-2}}
    job, kept = make_job(tmp_path / "own", inputs, groups=groups), []
    made = engine.start

    def keep(*args: object) -> object:
        kept.append(made(*args))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.engine, "start", keep)
        rows = alone(job)
    drawn = SoloForCausalLM.from_spec(ModelSpec.model_validate(MODEL), TOKENS, 3).state_dict()
    same = {name for name, value in weights(job).items() if bool((value == drawn[name]).all())}
    assert same == {name for name in weights(job) if "layers" in name or "model.norm" in name}
    named = dict(kept[0].module.solo.named_parameters())
    assert all(named[name].grad is None and not named[name].requires_grad for name in same)
    states = kept[0].optimizer.optimizer.state.values()
    n_states = sum(state["exp_avg"].numel() for state in states)
    assert n_states == sum(p.numel() for name, p in named.items() if name not in same)
    assert rows[3]["lr_groups"] == {"backbone": 0.0, "projection": pytest.approx(4 * rows[3]["lr"])}
    assert [row["loss"] for row in rows][1] != calm[1][1]["loss"] and "lr_groups" not in calm[1][0]

    again = {name: file_sha256(job.out / name) for name in ("checkpoint/model.safetensors", "trained.parquet")}
    shutil.rmtree(job.out / "checkpoint")
    assert [row["step"] for row in alone(job)] == [5, 6]  # goes on from the checkpoint of 4
    assert {name: file_sha256(job.out / name) for name in again} == again


def test_a_group_at_the_rate_of_the_stage_changes_nothing(
    alone: Callable[..., list[dict]], inputs: dict[str, Artifact], calm: tuple[Job, list[dict]], tmp_path: Path
) -> None:
    job = make_job(tmp_path, inputs, groups={"embeddings": {"learning_rate": STAGE["learning_rate"]}})
    alone(job)
    assert digest(job) == digest(calm[0])


def test_the_memory_plan_knows_what_is_frozen() -> None:
    model = ModelSpec.model_validate(MODEL)
    config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    pack = {"patch_px": 32, "n_tokens": 64}
    whole, part = (memory.predict(model, config, frozen=frozen, **pack) for frozen in ((), ("backbone",)))
    counts = memory.n_parameters(model, 32)
    assert whole.states - part.states == 12 * (counts["layers"] + counts["norm"])
    assert whole.weights == part.weights and whole.gradients > part.gradients


def test_the_projection_is_from_where_the_recipe_says(tmp_path: Path) -> None:
    import torch

    from solo.model.causal_lm import SoloForCausalLM

    name = "model.embed_vision_patch.weight"
    spec = ModelSpec.model_validate(MODEL)
    drawn = SoloForCausalLM.from_spec(spec, TOKENS, 3)
    other = SoloForCausalLM.from_spec(spec, TOKENS, 4)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "dproj").mkdir()
    save_file({name: torch.full_like(drawn.state_dict()[name], 0.5)}, tmp_path / "dproj" / "model.safetensors")

    def made(**fields: object) -> dict:
        return SoloForCausalLM.from_spec(spec.model_copy(update=fields), TOKENS, 3).state_dict()

    init = str(tmp_path / "other")
    for choice, expected in ((None, other), ("checkpoint", other), ("random", drawn)):
        found = made(init=init, init_projection=choice)
        assert torch.equal(found[name], expected.state_dict()[name]), choice
        assert torch.equal(found["lm_head.weight"], other.state_dict()["lm_head.weight"])
    for init_of_all in ("random", init):
        assert bool((made(init=init_of_all, init_projection=str(tmp_path / "dproj"))[name] == 0.5).all())
    del (without := other.state_dict())[name]
    (tmp_path / "text").mkdir()
    save_file(without, tmp_path / "text" / "model.safetensors")
    with pytest.raises(ValueError, match=r"no model.embed_vision_patch.weight there; give another folder as init_proj"):
        made(init=str(tmp_path / "text"), init_projection="checkpoint")
    job = make_job(tmp_path, {})
    job = replace(job, spec=job.spec | {"model": MODEL | {"init_projection": "../gone"}})
    with pytest.raises(ValueError, match=r"model.init_projection is '../gone', but .*gone has no \*.safetensors"):
        start.of(job)


def test_what_is_held_out_is_measured_and_moves_nothing(
    alone: Callable[..., list[dict]], inputs: dict[str, Artifact], calm: tuple[Job, list[dict]], tmp_path: Path
) -> None:
    from solo.model.causal_lm import SoloForCausalLM

    job = make_job(tmp_path, inputs)
    job = replace(job, spec=job.spec | {"held_out_every_steps": 4})
    rows = alone(job)
    assert digest(job) == digest(calm[0]) and [r["loss"] for r in rows] == [r["loss"] for r in calm[1]]
    assert [row["step"] for row in rows if "held_out" in row] == [4, N_STEPS]  # every 4, and after the last
    before, after = rows[0]["held_out_before"], rows[-1]["held_out"]
    assert set(before) == {"loss", "text", "image", "sources", "seconds"} and before["loss"] > 9
    assert before["sources"] == {"caption": before["image"], "prose": before["text"]}  # here each kind is one source
    assert after["image"] < before["image"] - 0.5  # captions are like those trained
    measured = held_loss(job)
    trained_model = SoloForCausalLM.from_pretrained(job.out / "checkpoint")
    sums = {"prose": [0.0, 0], "caption": [0.0, 0]}
    for pack in map(measured.loader.load, range(2)):
        losses = trained_model.pack_losses(pack).detach()
        for source, _, a, b in pack.loss_ranges():
            sums[source][0] += float(losses[a:b].double().sum())
            sums[source][1] += b - a
    for source, (loss, n) in sums.items():
        assert after["sources"][source] == pytest.approx(loss / n, abs=2e-6)
    assert after["loss"] == pytest.approx(sum(s[0] for s in sums.values()) / sum(s[1] for s in sums.values()), abs=2e-6)
    assert trained.held_out(rows)["held_out"]["after"]["text"] == after["text"]
    assert trained.held_out(calm[1]) == {}


def held_loss(job: Job):
    from solo.sequence.shards import Shards
    from solo.train.held_loss import HeldLoss

    shards = Shards({name: a.path for name, a in job.of("shard").items()})
    return HeldLoss(job.one("pack").path, shards, TOKENS, Stage.model_validate(STAGE), every_steps=4)


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_every_number_of_ranks_measures_the_same_with_the_same_calls(
    calm: tuple[Job, list[dict]], n_ranks: int
) -> None:
    from solo.model.causal_lm import SoloForCausalLM

    measured = held_loss(calm[0])
    model = SoloForCausalLM.from_pretrained(calm[0].out / "checkpoint")
    calls: list[int] = []

    def losses(pack):
        calls[-1] += 1
        return model.pack_losses(pack)

    def measure(total, rank: int, n: int) -> dict:
        calls.append(0)
        return {k: v for k, v in measured.measure(losses, total, rank=rank, n_ranks=n).items() if k != "seconds"}

    one = measure(lambda own: own, 0, 1)
    parts: list[np.ndarray] = []
    for rank in range(n_ranks):
        measure(lambda own: (parts.append(own), own)[1], rank, n_ranks)
    assert measure(lambda own: np.sum(parts, axis=0), 0, n_ranks) == one
    assert len(set(calls[1:])) == 1 and calls[1] == math.ceil(2 / n_ranks)


def test_fp8_is_refused_where_it_cannot_be(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"precision is fp8, which needs a GPU and none is visible; use bf16 or fp32"):
        train.run(make_job(tmp_path, inputs, precision="fp8"))
    stage = Stage.model_validate(STAGE | {"precision": "fp8"})
    assert train.deepspeed_config(CHECKOUT / train.DEEPSPEED["cpu"], stage, 1)["bf16"] == {"enabled": True}
    if importlib.util.find_spec("torchao") is None:
        with pytest.raises(ValueError, match=r"precision is fp8, which needs torchao; pip install '.\[fp8\]'"):
            fp8.check_machine(stage, n_gpus=1)


@pytest.mark.optional
def test_fp8_trains_like_bf16(alone: Callable[..., list[dict]], inputs: dict[str, Artifact], tmp_path: Path) -> None:
    """Emulated, on a CPU."""
    from solo.train import engine, trainer

    losses = {}
    for name in ("bf16", "fp8"):
        job = make_job(tmp_path / name, inputs, precision="bf16")
        kinds: set[str] = set()

        def wrap(model, name=name, kinds=kinds):
            if name == "fp8":
                fp8.convert(model, emulate=True)
            kinds |= {type(m).__name__ for m in model.model.layers.modules()}
            return engine.PackLoss(model)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer.Trainer.__init__, "__defaults__", (wrap,))
            losses[name] = [row["loss"] for row in alone(job)]
        assert ("Float8Linear" in kinds) == (name == "fp8")
        assert set(weights(job)) == {"lm_head.weight"} | {n for n in weights(job) if n.startswith("model.")}
    assert losses["fp8"] != losses["bf16"]
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.03) and losses["fp8"][-1] < losses["fp8"][1] - 1
