"""Store: manifest last wherever it stops, bytes as they were said to be, and machines that share nothing else."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from tiny_stage import EVERY, make_job, make_plan, one_rank

from solo import artifact, line
from solo.acquire import patience, transfer
from solo.artifact import Artifact, Job, Result
from solo.line import Node, Ref, Settings
from solo.lineage import removal
from solo.store import handover, mirror
from solo.store.folders import COMING, Damaged, Store, Unreachable
from solo.train import checkpoint
from solo.train import part as train

PLACE = "shard/toy/01234567"


@pytest.fixture
def s3(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Store:
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").mkdir(f"store-{(bucket := uuid.uuid4().hex)}")
    return Store(f"s3://store-{bucket}/solo")


def made(root: Path, files: dict[str, bytes], name: str = "toy") -> Artifact:
    def run(job: Job) -> Result:
        for path, data in files.items():
            (job.out / path).parent.mkdir(parents=True, exist_ok=True)
            (job.out / path).write_bytes(data)
        return Result(1, 1, {}, {}, volatile=("*.log",))

    return artifact.make(Job("shard", name, 1, {}, {}, root, root, 1), run)[0]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


FILES = {"shards/00000.tar": b"tar" * 500, "shards/00000.parquet": b"rows", "empty": b"", "run.log": b"said"}


@pytest.mark.parametrize("kind", ["s3", "file"])
def test_what_is_put_is_got_and_costs_one_request_the_second_time(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = request.getfixturevalue("s3") if kind == "s3" else Store(f"file://{tmp_path}/store")
    own = made(tmp_path / "a", FILES)
    store.check()
    assert store.put(own.path, PLACE) == sum(map(len, FILES.values()))
    assert set(store.listed(PLACE)) == {*FILES, "manifest.json"}
    assert store.get(PLACE, tmp_path / "b" / "toy") == store.get(PLACE, tmp_path / "b" / "toy") > 0
    assert bytes_of(tmp_path / "b" / "toy") == bytes_of(own.path)
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["toy"]
    files, asked = store._opened[0], []
    for name in ("cat_file", "pipe_file", "put_file", "find", "rm_file", "info"):
        real = getattr(files, name)
        monkeypatch.setattr(files, name, lambda *a, real=real, name=name, **k: (asked.append(name), real(*a, **k))[1])
    assert store.put(own.path, PLACE) == 0 and asked == ["cat_file"]
    store.remove(PLACE)
    assert store.manifest(PLACE) is None and not store.listed(PLACE)


class Power(BaseException):
    """It is cut."""


def test_wherever_a_put_stops_what_has_a_manifest_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another content with files of the same sizes lay there before, whole or half."""
    kind = fsspec.get_filesystem_class("memory")
    monkeypatch.setattr(kind, "store", {})
    left = [10**9]
    for name in ("pipe_file", "put_file", "rm_file"):
        real = getattr(kind, name)

        def cut(self: Any, *args: Any, real: Any = real, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Power
            return real(self, *args, **options)

        monkeypatch.setattr(kind, name, cut)
    store = Store("memory://cut")
    old, new, other = (made(tmp_path / f, {f"{n}.bin": f[:1].encode() * 9 for n in "xyz"}) for f in ("old", "new", "q"))
    wanted = {made.manifest.digest: bytes_of(made.path) for made in (old, new, other)}
    stops = 0
    for first in (old, other):
        for n in range(20):
            left[0] = 10**9
            store.put(old.path, PLACE)
            for content, cut_at in ((first, n), (new, n // 2)):
                left[0] = cut_at
                try:
                    store.put(content.path, PLACE)
                except Power:
                    stops += 1
                left[0] = 10**9
                if found := store.manifest(PLACE):
                    store.get(PLACE, tmp_path / "got")
                    assert bytes_of(tmp_path / "got") == wanted[found["digest"]]
            store.put(new.path, PLACE)
            store.get(PLACE, tmp_path / "got")
            assert bytes_of(tmp_path / "got") == wanted[new.manifest.digest]
            assert COMING not in store.listed(PLACE)
    assert stops > 40


DO = "import sys; from pathlib import Path; from solo.store.folders import Store; s = Store(sys.argv[1]); "


def killed(store: Store, action: str, folder: Path, ready: Callable[[], bool]) -> None:
    """Do it in a process that is killed once `ready`."""
    process = subprocess.Popen([sys.executable, "-c", DO + action, store.url, str(folder), PLACE])
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_killed_while_putting_or_getting_the_next_one_ends_with_all_of_it(s3: Store, tmp_path: Path) -> None:
    own = made(tmp_path / "a", {f"{i:03d}.bin": os.urandom(20_000) for i in range(160)})
    killed(s3, "s.put(Path(sys.argv[2]), sys.argv[3])", own.path, lambda: len(s3.listed(PLACE)) > 4)
    there = len(s3.listed(PLACE))
    assert there < 160 and s3.manifest(PLACE) is None
    with pytest.raises(Damaged, match=rf"^{s3.where(PLACE)}: no manifest that can be read"):
        s3.get(PLACE, tmp_path / "got")
    assert 0 < s3.put(own.path, PLACE) < 160 * 20_000  # what was there is not sent again
    folder, aside = tmp_path / "b" / "got", tmp_path / "b" / ".got.coming"
    killed(s3, "s.get(sys.argv[3], Path(sys.argv[2]))", folder, lambda: len(list(aside.glob("*.bin"))) > 4)
    assert not folder.exists()
    before = {p.name: p.stat().st_ino for p in aside.glob("*.bin")}
    (aside / max(before)).write_bytes(b"\0" * 20_000)  # and what the kill left is looked at
    (aside / "999.bin.part").write_bytes(b"of another time")
    s3.get(PLACE, folder)
    assert bytes_of(folder) == bytes_of(own.path)
    assert sum((folder / name).stat().st_ino == inode for name, inode in before.items()) >= len(before) - 1


def test_an_object_that_is_not_what_its_manifest_says_is_named(s3: Store, tmp_path: Path) -> None:
    own = made(tmp_path / "a", FILES)
    files, root = s3._opened
    name = "shards/00000.tar"
    for harmed, says in (
        (b"tar" * 499 + b"rat", r"it has sha256 [0-9a-f]{64}, [0-9a-f]{64} is pinned"),
        (b"tar" * 499, "its server announces 1497 bytes, 1500 are listed"),
        (None, "it is not there"),
    ):
        s3.put(own.path, PLACE)
        files.rm_file(f"{root}/{PLACE}/{name}")
        if harmed is not None:
            files.pipe_file(f"{root}/{PLACE}/{name}", harmed)
        remedy = f"delete {s3.where(PLACE)}/manifest.json and it is put there again by who made it"
        with pytest.raises(Damaged, match=f"^{s3.where(f'{PLACE}/{name}')}: {says}; {remedy}$"):
            s3.get(PLACE, tmp_path / "got")
        assert not (tmp_path / "got").exists()
        files.rm_file(f"{root}/{PLACE}/manifest.json")
        s3.put(own.path, PLACE)
        s3.get(PLACE, tmp_path / "got")
        assert bytes_of(tmp_path / "got") == bytes_of(own.path)
        artifact.remove(tmp_path / "got")
    s3.write(f"{PLACE}/manifest.json", (own.path / "manifest.json").read_bytes().replace(b"shards/", b"../../"))
    with pytest.raises(ValueError, match=r"'../../00000.parquet' is no name below a folder"):
        s3.get(PLACE, tmp_path / "got")


def test_a_store_or_a_disk_that_cannot_take_it_is_one_line_with_the_remedy(
    s3: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "FIRST_WAIT_S", 0.001)
    s3.put(made(tmp_path, FILES).path, PLACE)
    monkeypatch.setattr(transfer, "SPARE_BYTES", 1 << 62)
    with pytest.raises(ValueError, match=rf"^{s3.where(PLACE)}: 1.51 kB are to come.*set SOLO_ROOT to a larger disk$"):
        s3.get(PLACE, tmp_path / "got")
    with pytest.raises(Unreachable, match=r"^s3://nobody-made-it/x: it is not there; make the bucket, or"):
        Store("s3://nobody-made-it/x").check()
    kind = fsspec.get_filesystem_class("s3")
    kind.clear_instance_cache()  # it would keep the endpoint
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(Unreachable, match=r"^s3://b/x/\.solo: the store failed .*; .*correct AWS_ENDPOINT_URL$"):
            Store("s3://b/x").check()
    finally:
        kind.clear_instance_cache()
    for url, says in (
        ("/data/solo", "SOLO_STORE is '/data/solo'; give a URL"),
        ("s3://me:secret@bucket/x", "SOLO_STORE holds a password"),
        ("nowhere://x", "nowhere://x: .*use a folder or a URL"),
    ):
        monkeypatch.setenv("SOLO_STORE", url)
        with pytest.raises(ValueError, match=f"^{says}"):
            Settings.from_env()
    monkeypatch.setenv("SOLO_STORE", "")
    assert Settings.from_env().store is None


def test_what_a_takedown_removes_here_it_removes_there(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "root", tmp_path, 1, Store(f"file://{tmp_path}/store"))
    own, other = (made(settings.root, FILES, name) for name in ("toy", "other"))
    handover.give({"shard/toy": ref_of(own), "shard/other": ref_of(other)}, settings)
    assert removal._remove(settings, f"shard/toy/{own.manifest.fingerprint}", []) == "removed"
    assert not own.path.exists() and other.path.exists()
    assert {path.parts[-3] for path in (tmp_path / "store").glob("shard/*/*/manifest.json")} == {"other"}


def stage(root: Path, store: Store) -> Job:
    job = Job("train", "toy", 1, {}, {}, root, root, 1, store=store)
    job.work.mkdir(parents=True)
    (job.out / "train.log").write_text("step 1\nstep 2\nhalf a li")
    return job


def saved(job: Job, step: int) -> Path:
    aside = checkpoint.begin(job.work / "checkpoints", step)
    (aside / "state-0.safetensors").write_bytes(bytes([step]) * 5000)
    sealed = checkpoint.seal(aside, loader={"step": step}, world_size=1, facts={}, keep=checkpoint.Keep.from_env())
    return sealed.path


def test_checkpoints_are_kept_as_here_and_the_newest_whole_one_is_brought(
    s3: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mirror, "POLL_S", 0.02)
    monkeypatch.setattr(patience, "FIRST_WAIT_S", 0.001)
    a = stage(tmp_path / "a", s3)
    place = mirror._place(a)
    s3.write(f"{place}/step-000001/state-0.safetensors", b"half, of a machine that was killed")

    def there() -> list[int]:
        return mirror._whole(s3.listed(place))

    def wait(steps: list[int]) -> None:
        deadline = time.monotonic() + 20
        while there() != steps:
            assert time.monotonic() < deadline, there()
            time.sleep(0.02)

    with mirror.kept(a):
        for step, kept in ((2, [2]), (4, [2, 4]), (6, [4, 6])):
            saved(a, step)
            wait(kept)
        (a.work / "checkpoints" / ".step-000008.tmp").mkdir()  # not complete
        saved(a, 7)  # and then it is told to stop
    assert there() == [6, 7]
    assert {n.split("/")[0] for n in s3.listed(place)} == {"step-000006", "step-000007", "train.log"}

    b = stage(tmp_path / "b", s3)
    (b.out / "train.log").unlink()
    mirror.bring(b)
    for name in ("step-000007", "latest"):
        own, got = (job.work / "checkpoints" / name for job in (a, b))
        assert (own.read_text() == got.read_text()) if own.is_file() else (bytes_of(own) == bytes_of(got) != {})
    assert (b.out / "train.log").read_text() == "step 1\nstep 2\n"
    saved(b, 9)
    mirror.bring(b)
    assert sorted(p.name for p in (b.work / "checkpoints").glob("step-*")) == ["step-000007", "step-000009"]

    s3.write(f"{place}/step-000007/state-0.safetensors", bytes([8]) * 5000)
    c = stage(tmp_path / "c", s3)
    mirror.bring(c)
    found = checkpoint.newest(c.work / "checkpoints")
    assert found is not None and found.step == 6
    assert "step-000007/state-0.safetensors: it has sha256" in caplog.text
    assert sorted(p.name for p in (c.work / "checkpoints").glob("*step-*")) == ["step-000006"]

    gone = replace(c, store=Store("s3://nobody-made-it/x"))
    caplog.clear()
    with mirror.kept(gone):
        time.sleep(0.3)
    assert caplog.text.count("training goes on, its checkpoints are here alone") == 1


# The rest is machines that have the checkout and a bucket, and no folder in common.
N_STEPS = 24
TRAIN = """
import json, sys
from pathlib import Path
from solo import line
from solo.store import mirror
from solo.line import Node, Ref, Settings
mirror.POLL_S = 0.05
asked = json.loads(Path(sys.argv[1]).read_text())
line.make_node(Node(**asked["node"]), {i: Ref(**r) for i, r in asked["inputs"].items()}, Settings.from_env())
"""


def copied(root: Path, own: Artifact) -> Artifact:
    """A plan or shards made by hand, as an artifact of this root."""

    def run(job: Job) -> Result:
        ignore = shutil.ignore_patterns("manifest.json")
        shutil.copytree(own.path, job.out, ignore=ignore, dirs_exist_ok=True)
        n = own.manifest.counts["in"]
        return Result(n, n, {}, {})

    m = own.manifest
    return artifact.make(Job(m.part, m.name, 1, m.spec, {}, root, root, 1), run)[0]


def ref_of(made: Artifact) -> Ref:
    return Ref(made.manifest.id, made.manifest.fingerprint, made.manifest.digest)


def test_a_stage_killed_on_one_machine_goes_on_at_another_with_the_same_bytes(
    s3: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = Settings(tmp_path / "recipe", tmp_path, 1, s3)
    inputs = {i: copied(recipe.root, own) for i, own in make_plan(tmp_path / "plan", N_STEPS).items()}
    job, refs = make_job(tmp_path / "calm", inputs), {i: ref_of(own) for i, own in inputs.items()}
    with one_rank() as run:
        run(job)
    truth = artifact.make(job, train.run)[0]  # its ranks have done all
    node = Node("train", "tiny", train.VERSION, job.spec, tuple(inputs))
    fingerprint = line.fingerprint(node, refs)
    monkeypatch.setenv("SOLO_RANKS", "1")
    there = replace(recipe, root=tmp_path / "there")
    with pytest.raises(ValueError, match=r"/\w+/\w+: is not there, nor is it in .*; set SOLO_STORE where"):
        line.make_node(node, refs, there)
    assert not handover.take(node, fingerprint, recipe)
    handover.give(refs, recipe)

    asked, log = tmp_path / "asked.json", tmp_path / "log"
    asked.write_text(json.dumps({"node": asdict(node), "inputs": {i: asdict(ref) for i, ref in refs.items()}}))
    env = os.environ | {"SOLO_STORE": s3.url, "SOLO_SPECS": str(tmp_path), "SOLO_ROOT": str(there.root)}
    command = [sys.executable, "-c", TRAIN, str(asked)]
    process = subprocess.Popen(command, env=env, stderr=log.open("wb"), start_new_session=True)
    place, deadline = f"train/tiny/{fingerprint}", time.monotonic() + 90
    while len(mirror._whole(s3.listed(f"{place}/.work/checkpoints"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert s3.manifest(place) is None
    assert not (there.root / "shard").exists() and list(there.root.glob("pack/tiny/*/packs.parquet"))

    caplog.set_level(logging.INFO, "solo")
    again = replace(there, root=tmp_path / "again")
    ref, ran = line.make_node(node, refs, again)
    done = ref.open(again.root)
    assert ran and ref.digest == truth.manifest.digest and artifact.damage(done.path, deep=True) is None
    steps = [json.loads(row)["step"] for row in (done.path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, N_STEPS + 1))
    assert done.manifest.stats["loss_first"] == truth.manifest.stats["loss_first"]
    (went_on,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("goes on after step ")]
    assert int(went_on.removeprefix("goes on after step ").partition("/")[0]) >= EVERY
    assert set(s3.listed(place)) == {*(f["path"] for f in done.manifest.files), "manifest.json"}

    # Where the recipe runs it comes whole, as it does to a machine that is asked for a score; nothing is trained twice.
    assert handover.take(node, fingerprint, recipe) and line.intact(node, refs, recipe)
    scores = Node("evaluate", "tiny", 1, {}, (ref.id,))
    before = handover.opened(scores, ref, replace(there, root=tmp_path / "third"))
    assert artifact.damage(before.path, deep=True) is None and bytes_of(before.path) == bytes_of(done.path)
    assert line.make_node(node, refs, replace(there, root=tmp_path / "fourth")) == (ref, False)
    assert [p.action for p in line.plan([node], again)] == ["unknown"]  # shards in the store alone are not here
