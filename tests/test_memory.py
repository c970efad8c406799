"""memory: the arithmetic against what was measured on an H100 and against what a CPU keeps; what is refused."""

import gc
import os
from pathlib import Path

import pytest
import torch
from tiny_stage import MODEL, STAGE, TOKENS, make_job, make_plan, one_rank

from solo.artifact import CHECKOUT
from solo.spec import ModelSpec, Stage
from solo.train import engine, memory
from solo.train import part as train
from solo.train.memory import GIB, Machine

ZERO1 = {"zero_optimization": {"stage": 1}}
BF16 = ZERO1 | {"bf16": {"enabled": True}}
SUMMED = BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}
SLICE = ModelSpec.model_validate(
    MODEL
    | {"hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32, "num_key_value_heads": 8}
    | {"num_hidden_layers": 8, "vocab_size": 33_031, "head_dim": None}
)
PACK = {"patch_px": 32, "n_tokens": 32_768}
STAGE_BF16 = STAGE | {"precision": "bf16"}
H100 = Machine(int(79.1 * GIB))


@pytest.mark.parametrize(
    ("config", "recomputed", "measured_gib"), [(BF16, 0, 67.9), (SUMMED, 2, 66.5), (BF16, 8, 41.7)]
)
def test_peak_is_within_5_percent_of_one_h100(config: dict, recomputed: int, measured_gib: float) -> None:
    """Torch 2.11, DeepSpeed 0.19.8, one pack a step, all tokens supervised."""
    use = memory.predict(SLICE, config, recompute_layers=recomputed, **PACK)
    assert use.peak / GIB == pytest.approx(measured_gib, rel=0.05)


def real(spec: ModelSpec):
    from solo.model.causal_lm import SoloForCausalLM

    return SoloForCausalLM.from_spec(spec, TOKENS, 1)


@pytest.mark.parametrize(
    "fields", [{}, {"qkv_bias": True}, {"qk_norm": True, "head_dim": 24}, {"tie_word_embeddings": True}]
)
def test_parameters_are_counted_as_the_model_has_them(fields: dict) -> None:
    spec = ModelSpec.model_validate(MODEL | fields)
    assert sum(memory.n_parameters(spec, TOKENS.patch_px).values()) == sum(p.numel() for p in real(spec).parameters())


@pytest.mark.parametrize("recomputed", [0, 1, 3])
def test_activations_are_those_that_a_cpu_keeps(recomputed: int) -> None:
    """Bytes of different storages that autograd saves between embedding and head, parameters left out."""
    from solo.model.attention import lay_out

    shape = {"hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": 3, "num_attention_heads": 8}
    spec = ModelSpec.model_validate(MODEL | shape | {"num_key_value_heads": 2})
    decoder, n = real(spec).train().model, 256
    decoder.recompute_layers = recomputed
    own = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    seen: dict[int, torch.UntypedStorage] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return t

    x = torch.randn(n, 128, requires_grad=True)
    documents = torch.arange(n, dtype=torch.int32) // 64
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        decoder(x, torch.arange(n) % 64, lay_out(documents, None))
    saved = sum(s.nbytes() for s in seen.values())
    use = memory.predict(spec, ZERO1, patch_px=0, n_tokens=n, recompute_layers=recomputed)
    assert use.activations == pytest.approx(saved, rel=0.1)


def test_as_few_layers_are_recomputed_as_fit() -> None:
    config = train.deepspeed_config(CHECKOUT / "infra/deepspeed/zero1.json", Stage.model_validate(STAGE_BF16), 1)
    full = memory.choose("s", SLICE, config, H100, asked="full", **PACK)
    uses = [memory.choose("s", SLICE, config, H100, asked="selective", n_targets=n, **PACK) for n in (15_000, 32_768)]
    uses.append(memory.choose("s", SLICE, config, Machine(int(62 * GIB)), asked="selective", **PACK))
    assert [(u.recompute_layers, u.lean) for u in (*uses, full)] == [(0, False), (0, True), (3, True), (8, False)]
    assert all(u.peak <= H100.budget for u in (*uses, full))
    assert memory.choose("s", SLICE, config, H100, asked="lean", **PACK) == uses[1]
    less = memory.predict(SLICE, config, recompute_layers=0, **PACK)
    assert less.peak > H100.budget  # the guard: what is less lean would not have fitted
    less = memory.predict(SLICE, config, recompute_layers=2, lean=True, **PACK)
    assert less.peak > Machine(int(62 * GIB)).budget  # nor one layer fewer


def test_one_gibibyte_and_a_third_of_each_layer_is_made_again_where_it_is_lean() -> None:
    """What torch 2.11's partitioner keeps of a compiled layer of this width, in bytes of its graph's outputs."""
    assert [2 * 32_768 * memory.kept(SLICE, compiled=True, lean=lean) / GIB for lean in (False, True)] == [4.25, 2.875]


def test_the_whole_model_fits_eight_gpus_or_one_with_its_optimizer_on_the_host() -> None:
    whole = SLICE.model_copy(update={"num_hidden_layers": 32})
    stage = Stage.model_validate(STAGE_BF16)
    zero1, offload = (
        train.deepspeed_config(CHECKOUT / f"infra/deepspeed/{name}.json", stage, 1) for name in ("zero1", "offload")
    )
    assert memory.choose("s", whole, zero1, Machine(H100.gpu_bytes, 8), asked="selective", **PACK).host == 0
    host = Machine(H100.gpu_bytes, 1, 128 * GIB)
    used = memory.choose("s", whole, offload, host, asked="selective", **PACK)
    assert used.states == 0 and 100 < used.host / GIB < 116
    with pytest.raises(ValueError, match=r"^s: peak memory of a GPU is predicted as 1\d\d\.\d GiB .*SOLO_DEEPSPEED="):
        memory.choose("s", whole, zero1, H100, asked="selective", **PACK)
    with pytest.raises(
        ValueError, match=r"the optimizer's 108\.\d GiB > 60\.8 usable of the host's 64\.0; use more memory"
    ):
        memory.choose("s", whole, offload, Machine(H100.gpu_bytes, 1, 64 * GIB), asked="selective", **PACK)
    with pytest.raises(ValueError, match=r"with 0 of 32 layers recomputed .*unset SOLO_RECOMPUTE"):
        memory.choose("s", whole, offload, host, asked="none", **PACK)


def test_zero_shares_what_its_stage_says() -> None:
    """Of 8 GPUs; without ZeRO a rank has the whole of everything."""
    n = sum(memory.n_parameters(SLICE, PACK["patch_px"]).values())
    uses = {}
    for stage in (0, 1, 2, 3):
        config = {"zero_optimization": {"stage": stage, "stage3_max_live_parameters": n // 4}}
        use = memory.predict(SLICE, config, n_gpus=8, **PACK)
        uses[stage] = [round(x / n, 3) for x in (use.weights, use.gradients, use.states)]
    assert uses == {0: [4, 4, 8], 1: [4, 4, 1.5], 2: [4, 0.5, 1.5], 3: [1.5, 0.5, 1.5]}


@pytest.mark.parametrize(("name", "precision"), [("cpu", "fp32"), ("cpu", "bf16"), ("offload", "bf16")])
def test_weights_gradients_and_states_are_those_that_an_engine_holds(
    name: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of different storages when the second update begins; on a CPU the host's are beside the GPU's."""
    monkeypatch.setenv("SOLO_DEEPSPEED", str(CHECKOUT / f"infra/deepspeed/{name}.json"))
    kept = tensors()  # else the address of one that goes could be that of a new one, which would not be counted
    before = storages()
    with one_rank() as run:
        job, held = make_job(tmp_path, make_plan(tmp_path, 2), precision=precision), []
        config = train.deepspeed_config(train.deepspeed_file("cpu"), Stage.model_validate(job.spec["stage"]), 1)
        started = engine.start

        def start(*args: object) -> object:
            made = started(*args)
            update = made.optimizer.step
            made.optimizer.step = lambda *given: (held.append(storages().items() - before.items()), update(*given))
            return made

        monkeypatch.setattr(engine, "start", start)
        run(job)
    use = memory.predict(ModelSpec.model_validate(MODEL), config, patch_px=TOKENS.patch_px, n_tokens=64)
    summed_apart = use.weights if precision == "bf16" else 0  # gradients in bf16 and their fp32 sum
    planned = use.weights + use.gradients + use.states + summed_apart + use.host
    assert sum(n for _, n in held[-1]) == pytest.approx(planned, rel=0.1), len(kept)


def storages() -> dict[int, int]:
    """Address and bytes of the storage of every tensor."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors()}


def tensors() -> list[torch.Tensor]:
    """All there are."""
    gc.collect()
    return [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("8x80", Machine(80 * GIB, 8)),
        ("8xH100", Machine(int(79.1 * GIB), 8)),
        ("2x4xa100-40+512", Machine(int(39.4 * GIB), 8, 512 * GIB, 2)),
    ],
)
def test_a_machine_in_a_word(text: str, found: Machine) -> None:
    assert Machine.parse(text) == found


@pytest.mark.parametrize("text", ["80", "0x80", "8x0", "8xtpu", "8x80GB", "0x8x80", "8x1.2.3"])
def test_a_machine_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"machine is '.*'; give \[HOSTSx\]GPUSxGPU\[\+GIB\], .*h100.*: 8x80, "):
        Machine.parse(text)


def test_a_stage_that_cannot_fit_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's memory is that of a program which is found where nvidia-smi would be."""
    job = make_job(tmp_path, make_plan(tmp_path, 2))
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 81559\necho 1100\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    says = (
        r"^train/tiny: peak memory of a GPU .* > 0\.0 usable of 1\.1 on each of 2; set SOLO_DEEPSPEED=.*zero3.json, use"
    )
    with pytest.raises(ValueError, match=says):
        train.run(job)
    assert not job.work.exists()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("SOLO_GPU_GIB", "80GB", "SOLO_GPU_GIB is '80GB'; give a number"), ("SOLO_GPU_GIB", "-1", "above 0")],
)
def test_a_machine_is_told_in_numbers(name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=says):
        Machine.from_env()


def test_the_policy_is_one_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.policy() == "selective"
    monkeypatch.setenv("SOLO_RECOMPUTE", "some")
    with pytest.raises(ValueError, match="'some' is not known; choose one of none, lean, selective, full"):
        memory.policy()


def test_a_plan_says_what_each_stage_takes_and_refuses_what_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from solo.artifact import CHECKOUT
    from solo.spec import RecipeSpec, load

    recipe = load(RecipeSpec, "sample", CHECKOUT / "datasets_spec")
    monkeypatch.setenv("SOLO_GPU_GIB", "80")
    machine = Machine.from_env()
    uses = memory.of_recipe(recipe, machine)
    told = memory.lines(uses, machine)
    assert list(uses) == [s.name for s in recipe.stages] and len(told) == len(uses)
    assert told[0].startswith("train/stage-1: ") and " of 74.2 GiB of each GPU (weights " in told[0]
    with pytest.raises(ValueError, match=r"train/stage-1: peak memory of a GPU .* with 4 of 4 layers recomputed > "):
        memory.of_recipe(recipe, Machine(int(1.5 * GIB)))
