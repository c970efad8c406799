"""bench train: both ways train the same function, and the figures are what their definitions say."""

import json
from dataclasses import replace

import pytest
from tiny_stage import joined

from solo import bench_train
from solo.bench_train import PROFILES, WAYS, model_of

TOY = replace(PROFILES["toy"], steps=2, batch_packs=1, n_packs=1)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("bench")
    bench_train.prepare(TOY, folder)
    with joined():
        for way in WAYS:
            (folder / f"{way}.json").write_text(json.dumps(bench_train.measure(TOY, way, folder)))
    return bench_train.result(TOY, folder)


def test_hugging_face_and_solo_are_one_function(found: dict) -> None:
    assert found["loss_difference"]["after"] == 2 and found["loss_difference"]["most"] < 1e-4
    a, b = (found[way]["loss"] for way in WAYS)
    assert a[0] > 10 and a[1] < a[0] - 1e-3 and b[1] < b[0] - 1e-3  # the guard: it trained


def test_the_figures_are_there(found: dict) -> None:
    assert found["ratio"] > 0 and found["memory_plan_gib"] is None
    assert found["graphs"] == {"loss": 0, "all": 0, "breaks": 0}  # nothing is compiled on a CPU
    ours = found["solo"]
    assert ours["tokens_per_s"] > 0 and ours["tflops"] > 0 and ours["mfu"] is None
    assert (
        0 <= ours["input_stall_share"] < 1
        and ours["checkpoint_s"] > 0 <= ours["checkpoint_stall_steps"]
        and ours["step_s"] > ours["update_s"] > 0
    )


def test_mfu_counts_as_the_anchor_did() -> None:
    """48,449 tokens/s of 56 documents in one pack of 32,768 were 56.0 % of 989.4 TFLOP/s."""
    model = model_of(PROFILES["h100-slice"])
    flops = bench_train.flops(model, 32, [585] * 56)
    assert flops / 32_760 * 48_449 / 989.4e12 == pytest.approx(0.56, abs=0.005)
    whole = bench_train.flops(model, 32, [32_768])
    assert whole / 32_768 * 19_296 / 989.4e12 == pytest.approx(0.346, abs=0.004)  # one document: attention counts


def test_an_unknown_profile_and_a_missing_gpu_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="profile is 'tyo'; choose one of toy, h100-slice, h100-7b-offload"):
        bench_train.run("tyo")
    small = bench_train.find("h100-7b-offload-toy")
    assert (small.deepspeed, small.precision, small.steps, small.ways) == ("offload.json", "fp32", 20, WAYS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match="h100-slice needs a GPU, none is visible; add --toy"):
        bench_train.run("h100-slice")
