"""track: figures reach the trackers a machine asks for; a tracker that fails ends no training."""

import importlib.util
import sys
from pathlib import Path

import pytest
from tiny_stage import make_job

from solo.train import track

HELD = {"loss": 3.0, "text": 2.5, "image": None, "sources": {"a": 3.0}, "seconds": 0.1}
ROWS = [
    {"step": 1, "n_steps": 2, "loss": 9.0, "lr": 1e-3, "mfu": None, "sources": {"a": 9.5}, "held_out_before": HELD},
    {"step": 2, "n_steps": 2, "loss": None, "lr": 5e-4, "mfu": 0.5, "sources": {}, "held_out": HELD | {"loss": 2.0}},
]
LIBRARY = """
class Run:
    def log(self, values, step):
        raise ConnectionError("no route to the dashboard")
    def finish(self):
        raise AssertionError("it had failed before")

def init(**given):
    assert given["resume"] == "allow" and given["project"] == "mine" and given["config"]["stage"]["name"] == "tiny"
    return Run()
"""


def test_rows_become_flat_figures() -> None:
    found = [one for row in ROWS for one in track.figures(row)]
    assert [step for step, _ in found] == [0, 1, 2]
    assert found[0][1] == {
        "held_out/loss": 3.0,
        "held_out/text": 2.5,
        "held_out/sources/a": 3.0,
        "held_out/seconds": 0.1,
    }
    assert found[1][1] == {"loss": 9.0, "lr": 1e-3, "sources/a": 9.5}
    assert found[2][1].items() >= {"lr": 5e-4, "mfu": 0.5, "held_out/loss": 2.0}.items() and "loss" not in found[2][1]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("tensorbord:x", r"SOLO_TRACK: 'tensorbord' is not known; give tensorboard:DIR, wandb\[:PROJECT\], mlflow"),
        ("tensorboard", "tensorboard needs a folder; give tensorboard:DIR"),
        ("mlflow", r"SOLO_TRACK asks for mlflow, which is not installed .*; pip install '.\[mlflow\]'"),
    ],
)
def test_what_cannot_be_is_told_before_the_stage(
    asked: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if asked == "mlflow" and importlib.util.find_spec("mlflow"):
        pytest.skip("mlflow is installed")
    monkeypatch.setenv("SOLO_TRACK", asked)
    with pytest.raises(ValueError, match=says), track.follow(make_job(tmp_path, {}), None):
        pass


def test_a_tracker_that_fails_is_said_once_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "wandb.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("SOLO_TRACK", "wandb:mine,")
    told: list[dict] = []
    with track.follow(make_job(tmp_path, {}), told.append) as tell:
        for row in ROWS:
            tell(row)
    assert told == ROWS
    assert [r.getMessage() for r in caplog.records] == [
        "wandb: no more figures go there: ConnectionError: no route to the dashboard"
    ]


@pytest.mark.optional
def test_tensorboard_reads_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    monkeypatch.setenv("SOLO_TRACK", f"tensorboard:{tmp_path / 'tb'}")
    job = make_job(tmp_path, {})
    with track.follow(job, None) as tell:
        for row in ROWS:
            tell(row)
    events = EventAccumulator(str(tmp_path / "tb" / f"tiny-{job.fingerprint}")).Reload()
    assert [(e.step, float(make_ndarray(e.tensor_proto))) for e in events.Tensors("held_out/loss")] == [(0, 3), (2, 2)]
    assert [e.step for e in events.Tensors("loss")] == [1]
