"""hosts: what a host that joins is told, and every way in which it is not the head's equal; no rank is started."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_stage import make_job, make_plan

from solo import artifact
from solo.artifact import Job
from solo.spec import Stage
from solo.train import hosts, join
from solo.train import part as train
from solo.train.watch import GONE, Watch


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("hosts")
    return make_job(folder, make_plan(folder, 2))


@pytest.fixture
def asked(job: Job, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    """What the head of two hosts sends to the other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        head = probe.getsockname()
    monkeypatch.setenv("SOLO_HEAD", f"127.0.0.1:{head[1]}")
    monkeypatch.setenv("SOLO_RECOMPUTE", "full")
    monkeypatch.setattr(join, "SHARED_S", 0.0)
    told: list[dict] = []

    def other() -> None:
        deadline = time.monotonic() + 10
        while (connection := join._connect(head, "127.0.0.3")) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        with connection, connection.makefile("rb") as messages:
            connection.sendall(b'{"host":"b"}\n')
            told.append(json.loads(messages.readline()))

    thread = threading.Thread(target=other)
    thread.start()
    gang = hosts.gather(2, 10.0, lambda said: None)
    task = train._task(job, Stage.model_validate(job.spec["stage"]), device="cpu", ranks=2)
    artifact.write_atomic(job.work / "job.json", artifact.canonical(task))
    own = gang.launch(job.work / "job.json", ranks=1, device="cpu", root=job.root)
    thread.join()
    assert (own.index, own.n_hosts, own.address) == (0, 2, "127.0.0.1")
    yield told[0]
    gang.close()


def test_a_host_like_the_head_is_accepted_and_told_its_place(asked: dict) -> None:
    join.check(asked)
    place = hosts.Place(**asked["place"])
    assert (place.index, place.master, place.address) == (1, "127.0.0.1", "127.0.0.3")
    assert asked["settings"] == {"SOLO_RECOMPUTE": "full"}
    assert hosts.interface_of("127.0.0.3") == "lo"


def test_every_difference_from_the_head_is_named(asked: dict, job: Job, tmp_path: Path) -> None:
    def refused(says: str, **change: object) -> None:
        with pytest.raises(join.Refused, match=says):
            join.check(asked | change)

    code = asked["code"]
    refused(
        r"its code is not the head's: commit .* \(sources \w{12}\) != c0ffee \(sources 0\); check out one commit",
        code=code | {"sources": "0", "commit": "c0ffee"},
    )
    refused(r"torch is 2\S+, on the head 1\.0; install one of them", code=code | {"torch": "1.0"})
    refused(r"/nowhere/job\.json is not there; the data root .* must be one shared folder", job="/nowhere/job.json")
    refused(r"job\.json is not the head's; the data root", sha256="0" * 64)
    refused(r"0 GPUs are visible, the head has 1 ranks a host; set SOLO_RANKS", device="cuda")
    manifest = job.one("pack").path / artifact.MANIFEST
    raw = manifest.read_bytes()
    try:
        manifest.write_text(json.dumps(json.loads(raw) | {"digest": "9" * 64}))
        refused(r"the pack plan is not the head's, its digest is 9{12}, on the head 1{12}; the data root")
    finally:
        manifest.write_bytes(raw)


def test_what_a_rank_elsewhere_says_is_the_reason_with_its_host(tmp_path: Path) -> None:
    job = make_job(tmp_path, {})
    job.work.mkdir(parents=True)
    watch = Watch(job, 10, None, first_step=0)
    ours, theirs = socket.socketpair()
    gang = hosts.Gang([hosts.Other("b (10.0.0.2)", ours)])
    said = {"event": "failed", "host": "b (10.0.0.2)", "rank": 3, "error": "ValueError: no such colour"}
    echo = {"event": "failed", "host": "a (10.0.0.1)", "rank": 0, "error": f"{GONE} (Connection reset by peer)"}
    with watch.log.open("ab") as log:
        log.write(artifact.canonical(echo) + b"\n")
        theirs.sendall(b"Traceback (most recent call last):\n" + artifact.canonical(said)[:20])
        gang.read(log)
        assert not gang.over and watch.log.read_text().endswith("last):\n")  # whole lines alone
        theirs.sendall(artifact.canonical(said)[20:] + b'\n{"event":"ended","host":"b (10.0.0.2)","code":1}\n')
        assert gang.drained(log) and gang.failed
    watch.read()
    assert watch.failure == "host b (10.0.0.2), rank 3: ValueError: no such colour"
    theirs.close()
    gang.others[0].code = None
    with watch.log.open("ab") as log:
        gang.read(log)
    assert gang.failed and '"error":"gone, the connection to it ended' in watch.log.read_text()
    gang.close()


def test_hosts_that_do_not_come_are_waited_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLO_HEAD", "127.0.0.1:0")
    with pytest.raises(ValueError, match=r"SOLO_HEAD is '127.0.0.1:0'; give the head's HOST or HOST:PORT"):
        hosts.gather(2, 0.1, lambda said: None)
    monkeypatch.setenv("SOLO_HEAD", "192.0.2.1:29400")
    with pytest.raises(ValueError, match=r"cannot listen on 192.0.2.1:29400 .*; give an address of this host"):
        hosts.gather(2, 0.1, lambda said: None)
    monkeypatch.setenv("SOLO_HEAD", "127.0.0.4:29400")
    said: list[str] = []
    with pytest.raises(
        ValueError, match=r"0 of 1 other hosts joined 127.0.0.4:29400 within 0 s \(none\); run `solo join"
    ):
        hosts.gather(2, 0.1, said.append)
    assert hosts._listened("127.0.0.4") == "127.0.0.4" and hosts._listened("localhost") == "localhost"
    with pytest.MonkeyPatch.context() as patch:  # as Debian names a host
        patch.setattr(socket, "gethostbyname", {"node-0": "127.0.1.1", "node-1": "10.0.0.1"}.__getitem__)
        assert hosts._listened("node-0") == "" and hosts._listened("node-1") == "node-1"
    assert said == ["waits for 1 more hosts to `solo join 127.0.0.4:29400`; here: none"]


def test_settings_of_several_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage.model_validate(make_job(Path(), {}).spec["stage"])  # batches of four packs
    assert hosts.count() == 1 and train.rank_count(2, stage, 2) == 4
    monkeypatch.setenv("SOLO_RANKS", "3")
    says = r"batch_packs = 4 = 0 x 6 ranks on 2 hosts \+ 4; .* SOLO_RANKS to one of \[1, 2\] or change SOLO_HOSTS"
    with pytest.raises(ValueError, match=says):
        train.rank_count(4, stage, 2)
    monkeypatch.setenv("SOLO_HOSTS", "two")
    with pytest.raises(ValueError, match="SOLO_HOSTS is 'two'; give the number of hosts"):
        hosts.count()
    monkeypatch.setenv("SOLO_HOSTS", "2")
    with pytest.raises(ValueError, match="SOLO_HOSTS=2 needs SOLO_HEAD=HOST:PORT"):
        hosts.count()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a slots=2\nb\n", r":2: 'b' is not a line `HOST slots=N` with a host of its own"),
        ("a slots=2\na slots=2\n", r":2: 'a slots=2' is not a line"),
        ("a slots=0\n", r":1: 'a slots=0' is not a line"),
        ("a slots=2\nb slots=4  # bigger\n", r": \{'a': 2, 'b': 4\}; give every host as many slots"),
        ("# none\n", r": no host; give every host as many slots, one host at least"),
    ],
)
def test_a_hostfile_that_is_none_is_refused(
    text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hostfile"
    path.write_text(text)
    monkeypatch.setenv("SOLO_HOSTFILE", str(path))
    with pytest.raises(ValueError, match=f"^{path}{says}"):
        hosts.count()


def test_a_host_that_ssh_does_not_reach_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hostfile"
    path.write_text("127.0.0.5 slots=4\nb slots=4\n")
    monkeypatch.setenv("SOLO_HOSTFILE", str(path))
    monkeypatch.setenv("SOLO_SSH", "bash -c 'echo no route to $0 >&2; exit 255'")
    stage = Stage.model_validate(make_job(Path(), {}).spec["stage"]).model_copy(update={"batch_packs": 16})
    assert hosts.count() == 2 and train.rank_count(8, stage, 2) == 8
    with pytest.raises(ValueError, match="host b: `solo join` could not be started by ssh, code 255: no route to b"):
        hosts.gather(2, 20.0, lambda said: None)
