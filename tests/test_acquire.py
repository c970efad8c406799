"""acquire on a labelled archive: counts, byte ranges, repeats, kills, and what it refuses."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from solo import spec
from solo.acquire import part as acquire
from solo.artifact import Job, make
from solo.sample import Rejected, read_sample, read_samples

N_GOOD = 10


def build(folder):
    """Ten pictures of two classes in two tars; one repeated name, one without label, one empty."""
    folder.mkdir(parents=True)
    members = [[], []]
    for i in range(N_GOOD):
        out = io.BytesIO()
        Image.new("RGB", (8 + i, 6)).save(out, "PNG")
        members[i % 2].append((f"n0{i % 2}_{i}.png", out.getvalue()))
    members[1] += [members[0][0], ("n07_1.png", b"x"), ("n01_99.png", b"")]
    for shard, part in enumerate(members):
        with tarfile.open(folder / f"train-{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data in part:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (folder / "mapping.txt").write_text("n00 cup\nn01 sea_lion\n")


def job(tmp_path, root="root", *, revision=None, progress=print, **fields):
    specs = tmp_path / "specs"
    if not specs.exists():
        build(specs / "data")
    acquired = {
        "location": "data",
        "adapter": "webdataset_labels.read",
        "args": {"mapping": "mapping.txt"},
        "samples_per_shard": 4,
    } | fields
    if revision is None:
        revision = "sha256:" + acquire.content_sha256(specs / "data")
    asked = {"source": "pics", "revision": revision, "acquire": acquired}
    return Job("acquire", "pics", acquire.VERSION, asked, {}, tmp_path / root, specs, 2, progress)


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*") if p.suffix != ".json"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("acquire")
    artifact, _ = make(job(tmp_path), acquire.run)
    return artifact


def test_counts_close_with_the_written_truth(made):
    assert made.manifest.counts == {
        "in": N_GOOD + 3,
        "kept": N_GOOD,
        "dropped": {"duplicate_row": 1, "empty": 1, "no_label": 1},
    }
    stats = made.manifest.stats
    assert stats["n_shards"] == 3 and stats["n_images"] == N_GOOD
    assert stats["bytes"] == sum(p.stat().st_size for p in (made.path / "raw").iterdir())
    assert sum(stats["by_status"].values()) == made.manifest.counts["in"]


def test_every_kept_row_finds_its_sample(made):
    rows = pq.read_table(made.path / "outcomes.parquet").to_pylist()
    assert [r["key"] for r in rows] == sorted(r["key"] for r in rows)
    kept = [r for r in rows if r["status"] == "ok"]
    for row in kept:
        sample = read_sample(made.path / f"raw/{row['raw_shard']:05d}.tar", row["offset"], row["length"])
        assert (sample.key, sample.meta["id"]) == (row["key"], row["identity"])
        assert sum(map(len, sample.images)) == row["bytes"]
    order = sorted(kept, key=lambda r: (r["raw_shard"], r["offset"]))
    tars = sorted((made.path / "raw").glob("*.tar"))
    assert [r["key"] for r in order] == [s.key for tar in tars for s in read_samples(tar)]
    assert [r["identity"] for r in order][:3] == ["n00_0", "n00_2", "n00_4"]  # upstream's order


def test_a_repeated_key_is_a_row_not_a_sample(made):
    rows = pq.read_table(made.path / "outcomes.parquet").to_pylist()
    twice = [r for r in rows if r["identity"] == "n00_0"]
    assert sorted(r["status"] for r in twice) == ["duplicate_row", "ok"]
    assert len({r["key"] for r in twice}) == 1


def test_run_twice_is_the_same_digest(made, tmp_path):
    again, worked = make(job(tmp_path), acquire.run)
    assert worked and again.manifest.digest == made.manifest.digest


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {path!r}
from test_acquire import job
from solo.acquire import part as acquire
from solo.artifact import make
left = [{n}]
def progress(line):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
make(job(Path({tmp!r}), progress=progress), acquire.run)
"""


@pytest.mark.parametrize("n", [1, 3])
def test_killed_and_run_again_is_the_same_bytes(made, tmp_path, n):
    here = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = KILLED.format(path=here, tmp=str(tmp_path), n=n)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    half = job(tmp_path)
    tars = sorted((half.out / "raw").glob("*.tar"))
    assert len(tars) == n and not (half.out / "outcomes.parquet").exists()
    written = [tar.stat().st_mtime_ns for tar in tars]
    artifact, worked = make(half, acquire.run)
    assert worked and content(artifact.path) == content(made.path)
    assert [tar.stat().st_mtime_ns for tar in tars] == written  # what was finished was not written again


def test_tars_without_their_scratch_are_not_trusted(made, tmp_path):
    half = job(tmp_path)
    (half.out / "raw").mkdir(parents=True)
    (half.out / "raw/00000.tar").write_bytes(b"of another download")
    artifact, _ = make(half, acquire.run)
    assert content(artifact.path) == content(made.path)


def test_data_that_is_not_the_pinned_data_is_refused(tmp_path):
    pinned = job(tmp_path)
    (tmp_path / "specs/data/mapping.txt").write_text("n00 mug\n")
    with pytest.raises(ValueError, match="revision is sha256") as error:
        acquire.run(pinned)
    assert acquire.content_sha256(tmp_path / "specs/data") in str(error.value)
    assert pinned.spec["revision"] in str(error.value)


def test_a_commit_hash_is_taken_as_it_is(tmp_path):
    artifact, _ = make(job(tmp_path, revision="0" * 40), acquire.run)
    assert artifact.manifest.counts["kept"] == N_GOOD


def test_an_fsspec_location_is_copied_first(made, tmp_path):
    job(tmp_path)
    url = f"file://{tmp_path}/specs/data"
    artifact, _ = make(job(tmp_path, location=url), acquire.run)
    assert content(artifact.path) == content(made.path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"args": {"maping": "m.txt"}}, ["maping", "mapping", "shards"]),
        ({"adapter": "webdataset_labels.raed"}, ["raed", "read"]),
        ({"location": "elsewhere"}, ["elsewhere", "acquire.location"]),
    ],
)
def test_what_a_user_got_wrong_is_one_line(tmp_path, fields, words):
    with pytest.raises(ValueError) as error:
        acquire.run(job(tmp_path, **fields))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_status_outside_the_closed_list_is_a_bug(tmp_path, monkeypatch):
    from solo.adapters import webdataset_labels

    monkeypatch.setattr(webdataset_labels, "_sample", lambda *_: Rejected("x", "odd", "?"))
    with pytest.raises(AssertionError, match="odd"):
        acquire.run(job(tmp_path))


def test_content_sha256_sees_names_and_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    first = acquire.content_sha256(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    second = acquire.content_sha256(tmp_path)
    (tmp_path / "b").write_bytes(b"2")
    assert len({first, second, acquire.content_sha256(tmp_path)}) == 3
    assert spec.PINNED.fullmatch(f"sha256:{first}")
