"""engine: gradients summed where they arise, with the optimizer on the host, train as DeepSpeed's own accumulation."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_stage import make_job, make_plan, one_rank

from solo import train


@pytest.fixture(scope="module")
def alone() -> Iterator[Callable[..., list[dict]]]:
    with one_rank() as run:
        yield run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_offload_trains_the_same(
    alone: Callable[..., list[dict]], precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_plan(tmp_path / "plan", 2)
    rows = {}
    for name in ("cpu", "offload"):
        monkeypatch.setenv("SOLO_DEEPSPEED", str(train.REPOSITORY / f"infra/deepspeed/{name}.json"))
        rows[name] = alone(make_job(tmp_path / name, inputs, precision=precision, clip_norm=0.5))
    # A batch of four packs, so a wrong factor or a lost pack would be another gradient.
    for a, b in zip(rows["cpu"], rows["offload"], strict=True):
        assert a["grad_norm"] > 0.5 and b["grad_norm"] == pytest.approx(
            a["grad_norm"], rel=1e-4 if precision == "fp32" else 5e-3
        )
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5 if precision == "fp32" else 1e-2)
