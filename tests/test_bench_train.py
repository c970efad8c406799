"""bench train: both ways train the same function, and the figures are what their definitions say."""

import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_stage import joined
from torch._dynamo.utils import counters

from solo.bench import stage as bench_stage
from solo.bench import train as bench_train
from solo.bench.stage import model_of
from solo.bench.train import PROFILES, WAYS

TOY = replace(PROFILES["toy"], steps=2, batch_packs=1, n_packs=1)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("bench")
    bench_stage.prepare(TOY, folder)
    with joined():
        torch._dynamo.reset()  # another file's test may have compiled the loss in this process
        counters.clear()
        for way in WAYS:
            bench_stage.measure(TOY, way, folder, trace=folder)
    return bench_stage.result(TOY, folder) | {"folder": folder}


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


def test_a_trace_says_where_a_step_goes(found: dict) -> None:
    for way in WAYS:
        assert "aten::" in (found["folder"] / f"toy-{way}.txt").read_text()
        with gzip.open(found["folder"] / f"toy-{way}.json.gz") as file:
            assert len(json.load(file)["traceEvents"]) > 100


def test_a_way_that_failed_leaves_the_others_figures(tmp_path: Path, found: dict) -> None:
    """Its figures are not there; a folder with those of one is told as that one."""
    for name in ("mix.json", "solo.json"):
        (tmp_path / name).write_bytes((found["folder"] / name).read_bytes())
    (tmp_path / "mix").symlink_to(found["folder"] / "mix")
    alone = bench_stage.result(TOY, tmp_path)
    assert alone["solo"] == found["solo"] and alone["machine"] == found["machine"]
    assert not {"hugging_face", "ratio", "loss_difference"} & set(alone)


LACKS = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in ("deepspeed", "duckdb") else real(name, *a)
sys.modules |= {"deepspeed": None, "duckdb": None}
sys.argv = ["bench_train", "h100-slice"]
from solo.bench import train as bench_train
sys.exit(bench_train.main())
"""


def test_all_missing_packages_are_told_at_once_with_the_remedy() -> None:
    done = subprocess.run([sys.executable, "-c", LACKS], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1 and not done.stdout
    assert "lacks deepspeed, duckdb; " in done.stderr and "-d wheels duckdb; pip wheel --no-deps -w" in done.stderr, (
        done.stderr
    )
    assert "Traceback" not in done.stderr


def test_mfu_counts_as_the_anchor_did() -> None:
    """48,449 tokens/s of 56 documents in one pack of 32,768 were 56.0 % of 989.4 TFLOP/s."""
    model = model_of(PROFILES["h100-slice"])
    flops = bench_stage.flops(model, 32, [585] * 56)
    assert flops / 32_760 * 48_449 / 989.4e12 == pytest.approx(0.56, abs=0.005)
    whole = bench_stage.flops(model, 32, [32_768])
    assert whole / 32_768 * 19_296 / 989.4e12 == pytest.approx(0.346, abs=0.004)  # one document: attention counts


def test_an_unknown_profile_and_a_missing_gpu_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="profile is 'tyo'; choose one of toy, gpu-toy, h100-slice, h100-7b-offload"):
        bench_train.run("tyo")
    small = bench_train.find("h100-7b-offload-toy")
    assert (small.deepspeed, small.precision, small.steps, small.ways) == ("offload.json", "fp32", 20, WAYS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match="h100-slice needs a GPU, none is visible; add --toy"):
        bench_train.run("h100-slice")
