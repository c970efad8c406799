"""checkpoint: what counts, what does not, and which one a run goes on from."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from solo import artifact
from solo.artifact import MANIFEST, file_sha256
from solo.train import checkpoint


def save(root: Path, step: int, keep: checkpoint.Keep | None = None) -> checkpoint.Checkpoint:
    aside = checkpoint.begin(root, step)
    (aside / "state").mkdir()
    (aside / "state" / "weights.pt").write_bytes(os.urandom(1000) + bytes([step]))
    (aside / "state" / "optim_states.pt").write_bytes(os.urandom(1000) + bytes([step]))
    (aside / "rows-00000.parquet").write_bytes(b"PAR1 rows %d" % step)
    (aside / "sick.json").write_bytes(b'{"losses":[%d]}' % step)
    return checkpoint.seal(aside, loader={"step": step, "seed": 3}, world_size=2, facts={"stage": "tiny"}, keep=keep)


def latest(root: Path) -> str:
    return (root / checkpoint.LATEST).read_text().strip()


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_bytes())


def forge(folder: Path, change: Callable[[dict], object], *, resealed: bool) -> None:
    """Change the manifest; `resealed`: and make it match its own hash again, as a copy from elsewhere would."""
    manifest = manifest_of(folder)
    manifest.pop("sha256")
    old = checkpoint._own(manifest)
    change(manifest)
    (folder / MANIFEST).write_bytes(
        artifact.canonical(manifest | {"sha256": checkpoint._own(manifest) if resealed else old})
    )


def flip(path: Path, at: float) -> None:
    raw = bytearray(path.read_bytes())
    raw[min(int(at * len(raw)), len(raw) - 1)] ^= 1
    path.write_bytes(raw)


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


FILES = ("state/weights.pt", "state/optim_states.pt", "rows-00000.parquet", "sick.json")
HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "emptied": (lambda path: os.truncate(path, 0), "has 0 bytes, its manifest says"),
    "halved": (lambda path: os.truncate(path, path.stat().st_size // 2), "bytes, its manifest says"),
    "a byte short": (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes, its manifest says"),
    "a byte long": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes, its manifest says"),
    "first bit flipped": (lambda path: flip(path, 0), "does not match its sha256"),
    "middle bit flipped": (lambda path: flip(path, 0.5), "does not match its sha256"),
    "last bit flipped": (lambda path: flip(path, 1), "does not match its sha256"),
    "zeroed": (lambda path: path.write_bytes(bytes(path.stat().st_size)), "does not match its sha256"),
    "deleted": (lambda path: path.unlink(), "is missing"),
    "a folder": (to_folder, "is missing"),
    "a link": (to_link, "is missing"),
    "of the step before": (
        lambda path: path.write_bytes((Path(str(path).replace("step-000020", "step-000010"))).read_bytes()),
        "does not match its sha256",
    ),
}
OF_FILES = {
    f"{file} {name}": (
        lambda folder, harm=harm, file=file: harm(folder / file),
        f"{file} {said}" if "bytes" not in said else said,
    )
    for file in FILES
    for name, (harm, said) in HARMS.items()
}
OF_MANIFESTS = {
    f"manifest {name}": (lambda folder, harm=harm: harm(folder / MANIFEST), MANIFEST)
    for name, (harm, _) in HARMS.items()
    if name not in ("a link", "a byte long", "of the step before")
}
OF_FIELDS = {
    **{f"no {name}": (lambda m, name=name: m.pop(name), "") for name in ("loader", "world_size", "facts", "files")},
    "other world_size": (lambda m: m.update(world_size=4), "manifest.json does not match its own sha256"),
    "other seed": (lambda m: m["loader"].update(seed=4), "manifest.json does not match its own sha256"),
    "other facts": (lambda m: m.update(facts={}), "manifest.json does not match its own sha256"),
    "other hash of a file": (lambda m: m["files"][0].update(sha256="0" * 64), "does not match its own sha256"),
    "a file fewer": (lambda m: m["files"].pop(), "does not match its own sha256"),
    "files as text": (lambda m: m.update(files="weights.pt"), "cannot be read (TypeError"),
    "a step that is no number": (lambda m: m["loader"].update(step="ten"), "cannot be read (ValueError"),
}
RESEALED = {
    "the step before's": (lambda m: m["loader"].update(step=10), "its manifest is that of step 10"),
    "a file fewer, resealed": (lambda m: m["files"].pop(0), "rows-00000.parquet is not in its manifest"),
    "a file more, resealed": (lambda m: m["files"].append({"path": "x", "bytes": 1, "sha256": ""}), "x is missing"),
    "a file outside": (
        lambda m: m["files"].append({"path": "../step-000010/sick.json", "bytes": 9, "sha256": ""}),
        "sick.json has",
    ),
}


def swap(folder: Path) -> None:
    """Exchange two checkpoints' names."""
    other = folder.with_name("step-000010")
    folder.rename(folder.with_name("aside"))
    other.rename(folder)
    folder.with_name("aside").rename(other)


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    **OF_FILES,
    **OF_MANIFESTS,
    **{name: (lambda f, c=change: forge(f, c, resealed=False), said) for name, (change, said) in OF_FIELDS.items()},
    **{name: (lambda f, c=change: forge(f, c, resealed=True), said) for name, (change, said) in RESEALED.items()},
    "a file more": (
        lambda folder: (folder / "state" / "extra.pt").write_bytes(b"x"),
        "extra.pt is not in its manifest",
    ),
    "two files exchanged": (
        lambda folder: [
            (folder / "x").write_bytes((folder / FILES[0]).read_bytes()),
            (folder / FILES[0]).write_bytes((folder / FILES[1]).read_bytes()),
            (folder / FILES[1]).write_bytes((folder / "x").read_bytes()),
            (folder / "x").unlink(),
        ],
        "does not match its sha256",
    ),
    "an empty folder": (lambda folder: [shutil.rmtree(folder), folder.mkdir()], "manifest.json is missing"),
    "a manifest that is a list": (lambda folder: (folder / MANIFEST).write_text("[]"), "cannot be read (TypeError"),
    "a manifest of nothing but depth": (
        lambda folder: (folder / MANIFEST).write_text("[" * 100_000),
        "cannot be read (RecursionError",
    ),
    "a manifest of other bytes": (
        lambda folder: (folder / MANIFEST).write_bytes(b"\xff" * 90),
        "cannot be read (Unicode",
    ),
}


def test_the_manifest_holds_every_file_and_its_hash(tmp_path: Path) -> None:
    saved = save(tmp_path, 10)
    assert saved.path == tmp_path / "step-000010"
    files = json.loads((saved.path / MANIFEST).read_bytes())["files"]
    assert [f["path"] for f in files] == [
        "rows-00000.parquet",
        "sick.json",
        "state/optim_states.pt",
        "state/weights.pt",
    ]
    assert [f["sha256"] for f in files] == [file_sha256(saved.path / f["path"]) for f in files]
    assert checkpoint.newest(tmp_path) == saved and saved.loader == {"step": 10, "seed": 3}


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000020", "step-000030"]
    assert checkpoint.newest(tmp_path).step == 30


def test_which_stay_is_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLO_KEEP_LAST", "1")
    monkeypatch.setenv("SOLO_KEEP_EVERY", "20")
    keep = checkpoint.Keep.from_env()
    for step in range(10, 80, 10):
        save(tmp_path, step, keep=keep)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [f"step-0000{step}" for step in (20, 40, 60, 70)]
    for value in ("0", "-1", "two"):
        monkeypatch.setenv("SOLO_KEEP_LAST", value)
        with pytest.raises(ValueError, match=f"SOLO_KEEP_LAST is '{value}'; give a whole number"):
            checkpoint.Keep.from_env()


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_one_is_named_and_the_one_before_is_used(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harm, said = CASES[case]
    save(tmp_path, 10)
    last = save(tmp_path, 20)
    harm(last.path)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(tmp_path).step == 10
    assert f"{last.path}: " in caplog.text and said in caplog.text and latest(tmp_path) == "step-000010"
    caplog.clear()
    assert checkpoint.newest(tmp_path).step == 10 and not caplog.text  # set aside, so said once
    save(tmp_path, 20)  # trained again
    assert checkpoint.newest(tmp_path).step == 20
    assert sorted(p.name for p in tmp_path.glob("step-??????")) == ["step-000010", "step-000020"]


def test_there_are_many_cases_and_an_undamaged_one_is_none(tmp_path: Path) -> None:
    assert len(CASES) >= 75
    assert checkpoint.damage(save(tmp_path, 10).path) is None


def test_two_with_each_other_s_names_are_both_refused(tmp_path: Path) -> None:
    save(tmp_path, 10)
    swap(save(tmp_path, 20).path)
    assert checkpoint.newest(tmp_path) is None


def test_one_that_was_being_written_does_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10)
    half = checkpoint.begin(tmp_path, 20)
    (half / "weights.pt").write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(tmp_path).step == 10
    assert str(half) in caplog.text and not half.exists()


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "nowhere") is None
    flip(save(tmp_path, 10).path / FILES[0], 0.5)
    assert checkpoint.newest(tmp_path) is None and not (tmp_path / checkpoint.LATEST).exists()


def test_latest_names_the_newest_also_after_a_kill_between_the_two(tmp_path: Path) -> None:
    save(tmp_path, 10)
    before = (tmp_path / checkpoint.LATEST).read_bytes()
    save(tmp_path, 20)
    assert (before.strip(), latest(tmp_path)) == (b"step-000010", "step-000020")
    (tmp_path / checkpoint.LATEST).write_bytes(before)  # as such a kill leaves it
    assert checkpoint.newest(tmp_path).step == 20 and latest(tmp_path) == "step-000020"
