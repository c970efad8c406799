"""checkpoint: what counts, what does not, and which one a run goes on from."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from solo import checkpoint
from solo.artifact import MANIFEST, file_sha256


def save(root: Path, step: int, world_size: int = 2) -> checkpoint.Checkpoint:
    aside = checkpoint.begin(root, step)
    (aside / "state").mkdir()
    (aside / "state" / "weights.pt").write_bytes(os.urandom(1000) + bytes([step]))
    (aside / "rows.parquet").write_bytes(b"rows %d" % step)
    return checkpoint.seal(aside, loader={"step": step, "seed": 3}, world_size=world_size, facts={"stage": "tiny"})


def truncate(folder: Path) -> None:
    os.truncate(folder / "state" / "weights.pt", 500)


def flip(folder: Path) -> None:
    path = folder / "state" / "weights.pt"
    raw = bytearray(path.read_bytes())
    raw[7] ^= 1
    path.write_bytes(raw)


def lose_a_file(folder: Path) -> None:
    (folder / "rows.parquet").unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def halve_the_manifest(folder: Path) -> None:
    os.truncate(folder / MANIFEST, 40)


def forge_the_step(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"loader": {"step": 10}}))


def test_the_manifest_holds_every_file_and_its_hash(tmp_path: Path) -> None:
    saved = save(tmp_path, 10)
    assert saved.path == tmp_path / "step-000010"
    files = json.loads((saved.path / MANIFEST).read_bytes())["files"]
    assert [f["path"] for f in files] == ["rows.parquet", "state/weights.pt"]
    assert [f["sha256"] for f in files] == [file_sha256(saved.path / f["path"]) for f in files]
    assert checkpoint.newest(tmp_path) == saved and saved.loader == {"step": 10, "seed": 3}


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000020", "step-000030"]
    assert checkpoint.newest(tmp_path).step == 30


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (truncate, "state/weights.pt has 500 bytes, its manifest says 1001"),
        (flip, "state/weights.pt does not match its sha256"),
        (lose_a_file, "rows.parquet is missing"),
        (lose_the_manifest, "manifest.json is missing"),
        (halve_the_manifest, "manifest.json cannot be read (JSONDecodeError"),
        (forge_the_step, "its manifest is that of step 10"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_is_used(
    harm: Callable[[Path], None], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 10)
    last = save(tmp_path, 20)
    harm(last.path)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(tmp_path).step == 10
    assert f"{last.path}: {said}" in caplog.text
    caplog.clear()
    assert checkpoint.newest(tmp_path).step == 10 and not caplog.text  # set aside, so said once
    save(tmp_path, 20)  # trained again
    assert checkpoint.newest(tmp_path).step == 20
    assert sorted(p.name for p in tmp_path.glob("step-??????")) == ["step-000010", "step-000020"]


def test_one_that_was_being_written_does_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10)
    half = checkpoint.begin(tmp_path, 20)
    (half / "weights.pt").write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(tmp_path).step == 10
    assert str(half) in caplog.text and not half.exists()


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "nowhere") is None
    flip(save(tmp_path, 10).path)
    assert checkpoint.newest(tmp_path) is None
