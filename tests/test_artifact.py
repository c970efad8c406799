"""Artifacts: identity, reuse, damage, the ledger's sum, and kills, on files this test writes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from solo import artifact
from solo.artifact import Job, LedgerError, Result, damage, latest, make, read_manifest


def job(root: Path, **change: object) -> Job:
    base = Job("filter", "toy", 1, {"a": 1}, {}, root=root, specs=root, workers=1)
    return replace(base, **change)


def write_one(j: Job) -> Result:
    (j.out / "data.txt").write_text("x" * j.spec["a"])
    (j.out / "log.txt").write_text(str(os.getpid()))
    return Result(5, 3, {"short": 2}, {"n": 3}, volatile=("log.txt",))


def test_identity_ignores_where_and_depends_on_what(tmp_path: Path) -> None:
    here = job(tmp_path / "a")
    assert here.fingerprint == job(tmp_path / "b", workers=8, specs=tmp_path).fingerprint
    made, _ = make(job(tmp_path / "up", part="acquire"), write_one)
    other, _ = make(job(tmp_path / "up", part="acquire", spec={"a": 2}), write_one)
    changed = [
        job(tmp_path, spec={"a": 2}),
        job(tmp_path, version=2),
        job(tmp_path, name="toys"),
        job(tmp_path, inputs={"acquire/toy": made}),
        job(tmp_path, inputs={"acquire/toy": other}),
        job(tmp_path, spec={"keep": {"x": "1", "y": "2"}}),
        job(tmp_path, spec={"keep": {"y": "2", "x": "1"}}),
    ]
    assert len({here.fingerprint, *(c.fingerprint for c in changed)}) == len(changed) + 1


def test_made_once_then_reused_and_digest_leaves_volatile_files_out(tmp_path: Path) -> None:
    first, ran = make(job(tmp_path), write_one)
    again, ran_again = make(job(tmp_path), write_one)
    assert (ran, ran_again) == (True, False)
    assert again.manifest == first.manifest
    code = "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); import test_artifact as t\n"
    code += "t.make(t.job(Path(sys.argv[1])), t.write_one)"
    subprocess.run([sys.executable, "-c", code, tmp_path / "other", Path(__file__).parent], check=True)
    other = read_manifest(job(tmp_path / "other").out)
    assert other is not None
    assert other.digest == first.manifest.digest
    assert [f["sha256"] for f in other.files] != [f["sha256"] for f in first.manifest.files]


def test_a_sum_that_does_not_close_is_refused_with_its_equation(tmp_path: Path) -> None:
    def lossy(j: Job) -> Result:
        return replace(write_one(j), n_in=6)

    with pytest.raises(LedgerError, match=r"6 in != 3 kept \+ 2 short = 5"):
        make(job(tmp_path), lossy)
    assert damage(job(tmp_path).out) == "not made yet"


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda p: (p / "data.txt").unlink(), "data.txt is missing"),
        (lambda p: (p / "data.txt").write_text("xx"), "data.txt has 2 bytes"),
        (lambda p: (p / "manifest.json").write_text("{"), "not made yet"),
        (lambda p: (p / "manifest.json").write_text("[]"), "not made yet"),
        (lambda p: (p / "manifest.json").unlink(), "not made yet"),
    ],
)
def test_damage_is_seen_and_mended_to_the_same_bytes(tmp_path: Path, harm, says: str) -> None:
    made, _ = make(job(tmp_path), write_one)
    harm(made.path)
    assert says in (damage(made.path) or "")
    mended, ran = make(job(tmp_path), write_one)
    assert ran
    assert mended.manifest.digest == made.manifest.digest


def test_a_flipped_byte_is_seen_by_the_deep_check_alone(tmp_path: Path) -> None:
    made, _ = make(job(tmp_path), write_one)
    (made.path / "data.txt").write_text("y")
    assert damage(made.path) is None
    assert damage(made.path, deep=True) == "data.txt does not match its sha256"


def test_force_starts_from_nothing_and_resume_does_not(tmp_path: Path) -> None:
    seen = []

    def look(j: Job) -> Result:
        seen.append((j.work / "half").exists())
        (j.work / "half").write_text("")
        if len(seen) == 1:
            raise OSError("stop")
        return write_one(j)

    with pytest.raises(OSError, match="stop"):
        make(job(tmp_path), look)
    make(job(tmp_path), look)
    make(job(tmp_path), look, force=True)
    assert seen == [False, True, False]
    assert not job(tmp_path).work.exists()


def test_a_wait_for_another_run_is_said_and_its_kill_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        import test_artifact as t
        def stuck(j):
            print("in", flush=True)
            time.sleep(60)
        t.make(t.job(Path(sys.argv[1])), stuck)
    """)
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path, Path(__file__).parent], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"in\n"
    monkeypatch.setattr(artifact, "SAY_S", 0.1)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        child.send_signal(signal.SIGKILL)
        child.wait()

    _, ran = make(replace(job(tmp_path), progress=say), write_one)
    assert ran and said == ["filter/toy: another run is making it; waits for that one to end"]


def test_latest_is_the_one_made_last(tmp_path: Path) -> None:
    make(job(tmp_path), write_one)
    newer, _ = make(job(tmp_path, spec={"a": 2}), write_one)
    found = latest(tmp_path, "filter", "toy")
    assert found is not None
    assert found.fingerprint == newer.manifest.fingerprint
    assert json.loads((newer.path / "manifest.json").read_text())["spec"] == {"a": 2}
