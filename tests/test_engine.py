"""engine: gradients summed where they arise, with the optimizer on the host, train as DeepSpeed's own accumulation."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_stage import make_job, make_plan

from solo.artifact import CHECKOUT
from solo.train import engine, launch


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_offload_trains_the_same(
    alone: Callable[..., list[dict]], precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_plan(tmp_path / "plan", 3)
    rows = {}
    for name in ("cpu", "offload"):
        monkeypatch.setenv("SOLO_DEEPSPEED", str(CHECKOUT / f"infra/deepspeed/{name}.json"))
        rows[name] = alone(make_job(tmp_path / name, inputs, precision=precision, clip_norm=0.5))
    # A batch of four packs, so a wrong factor or a lost pack would be another gradient.
    for a, b in zip(rows["cpu"], rows["offload"], strict=True):
        assert a["grad_norm"] > 0.5 and b["grad_norm"] == pytest.approx(
            a["grad_norm"], rel=1e-4 if precision == "fp32" else 5e-3
        )
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5 if precision == "fp32" else 1e-2)


def test_gradients_are_summed_as_deepspeed_does_bit_for_bit(
    alone: Callable[..., list[dict]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four packs a step in bf16, of which one supervises nothing; no gradient outlives its backward pass."""
    inputs = make_plan(tmp_path / "plan", 3)
    rows, kept = {}, []
    for name, sums in (("ours", engine._sum_at_once), ("deepspeed", lambda zero: None)):

        def start(zero: object, sums: Callable[[object], None] = sums) -> None:
            assert type(zero).__name__ == "BF16_Optimizer"  # else nothing is compared
            sums(zero)
            ended = zero.backward_epilogue  # type: ignore[attr-defined]

            def look(**given: object) -> None:
                ended(**given)
                kept.append(any(p.grad is not None for group in zero.bf16_groups for p in group))  # type: ignore[attr-defined]

            zero.backward_epilogue = look  # type: ignore[attr-defined]

        monkeypatch.setattr(engine, "_sum_at_once", start)
        rows[name] = alone(make_job(tmp_path / name, inputs, precision="bf16", clip_norm=0.5))
    told = [[(row["loss"], row["grad_norm"]) for row in rows[name]] for name in ("ours", "deepspeed")]
    assert told[0] == told[1] and len(told[0]) == 3
    assert kept == [False] * 12 + [True] * 12


STUCK = """
import os, socket, sys, time
import torch
from solo.train import engine

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = str(probe.getsockname()[1])
rank = 0 if (child := os.fork()) else 1
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": str(rank)}
os.environ |= {"LOCAL_RANK": str(rank)}
engine.connect("cpu")
if rank:
    time.sleep(60)
    os._exit(0)
try:
    torch.distributed.all_reduce(torch.ones(1))
except Exception as error:
    print(engine.explained(error))
os.kill(child, 9)
os._exit(0)
"""


def test_a_stuck_rank_ends_the_others_with_a_named_error() -> None:
    env = launch.environment(1, "cpu") | {"SOLO_TIMEOUT_S": "2"}
    done = subprocess.run(
        [sys.executable, "-c", STUCK], env=env, capture_output=True, text=True, timeout=50, check=False
    )
    assert "a collective was not reached by every rank within 2 s, rank 1 is stuck (" in done.stdout, done.stderr[
        -2000:
    ]


def test_the_time_to_wait_is_whole_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLO_TIMEOUT_S", "2m")
    with pytest.raises(ValueError, match="SOLO_TIMEOUT_S is '2m'; give whole seconds"):
        launch.timeout_s()
