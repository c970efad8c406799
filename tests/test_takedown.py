"""Takedown: the list is strict, what it means is gone from every file, and nothing else is touched."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny
import yaml
from finished import trained_rows

from solo import artifact, line
from solo.acquire import copies, location, url_rows
from solo.acquire.part import content_sha256
from solo.acquire.url_rows import UrlList
from solo.artifact import CHECKOUT, Artifact, Job, Result
from solo.isolated.rules import Rules
from solo.line import Settings
from solo.lineage import removal, takedown
from solo.lineage.takedown import Listed, canonical_url
from solo.pack import part as pack
from solo.sample import Sample, read_samples
from solo.spec import SourceSpec, SpecError, load

HEAD = "kind,value,reason,date,reference\n"


def listed(folder: Path, *lines: str) -> Path:
    """A spec folder with this list."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / takedown.FILE).write_text(HEAD + "".join(f"{line},asked,2026-01-31,ticket 7\n" for line in lines))
    return folder


def test_a_list_reads_past_comments_a_byte_order_mark_and_other_line_ends(tmp_path: Path) -> None:
    text = (
        "\ufeff# people\r\n\r\n"
        + HEAD
        + 'url,"https://x.org/a,b?c#d",asked,2026-01-31,"a, b"\n  # more\nhost,*.X.org,r,2026-02-01,t'
    )
    (tmp_path / takedown.FILE).write_bytes(text.encode())
    one, two = takedown.read(tmp_path)
    assert (one.kind, one.value, one.written, one.reference) == ("url", "x.org/a,b?c", "https://x.org/a,b?c#d", "a, b")
    assert (two.value, two.row, two.date.isoformat()) == ("*.x.org", 6, "2026-02-01")
    assert "x.org" not in one.id and len(one.id) == 16
    assert takedown.read(tmp_path / "none") == ()


@pytest.mark.parametrize(
    ("text", "row", "words"),
    [
        ("kind,value,reason,date\n", 1, "it must be 'kind,value,reason,date,reference'"),
        (HEAD + "url,https://x.org/,r,2026-01-31\n", 2, "4 fields, not 5"),
        (HEAD + "uri,https://x.org/,r,2026-01-31,t\n", 2, "kind: 'uri' is not one of url, host, sha256, key"),
        (HEAD + "url,x.org/a,r,2026-01-31,t\n", 2, "value: 'x.org/a' is no http or https URL"),
        (HEAD + "host,https://x.org,r,2026-01-31,t\n", 2, "value: 'https://x.org' is no host name"),
        (HEAD + "host,x.*.org,r,2026-01-31,t\n", 2, "is no host name"),
        (HEAD + "sha256,abc,r,2026-01-31,t\n", 2, "value: 'abc' is no SHA-256"),
        (HEAD + "key,web-12,r,2026-01-31,t\n", 2, "value: 'web-12' is no key"),
        (HEAD + "host,x.org,r,31.1.2026,t\n", 2, "date: '31.1.2026' is no date"),
        (HEAD + "host,x.org,,2026-01-31,t\n", 2, "reason: '' is empty"),
        (HEAD + "host, x.org,r,2026-01-31,t\n", 2, "has spaces around it"),
        (HEAD + 'host,"x.org,r,2026-01-31,t\n', 2, "not a CSV line"),
        (HEAD + "# c\nhost,x.org,r,2026-01-31,t\nhost,X.ORG.,r,2026-01-31,t\n", 4, "is row 3 again"),
        (HEAD + "url,https://x.org/a,r,2026-01-31,t\nurl,http://X.org:80/a#f,r,2026-01-31,t\n", 3, "is row 2 again"),
        (HEAD + "host,x\u200b.org,r,2026-01-31,t\n", 2, r"invisible character U\+200B"),
        (HEAD + "host,x.org,r\x00,2026-01-31,t\n", 2, r"invisible character U\+0000"),
        (HEAD.encode() + b"host,\xff.org,r,2026-01-31,t\n", 2, "byte 6 is no UTF-8"),
    ],
)
def test_what_is_wrong_is_named_by_file_row_and_field(tmp_path: Path, text: str | bytes, row: int, words: str) -> None:
    path = tmp_path / takedown.FILE
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SpecError, match=words) as error:
        takedown.read(tmp_path)
    assert str(error.value).startswith(f"{path}:{row}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("http://x.org/a", "https://X.ORG.:443/a#b", True),
        ("http://x.org", "http://x.org/", True),
        ("http://b\u00fccher.example/\u00e9", "http://xn--bcher-kva.example/%c3%A9", True),
        ("http://u:p@x.org/a", "http://x.org/a", True),
        ("http://x.org/a", "http://x.org/A", False),
        ("http://x.org/a?b=1", "http://x.org/a?b=2", False),
        ("http://x.org:8080/a", "http://x.org/a", False),
        ("http://[2001:DB8::1]/a", "https://[2001:db8::1]/a", True),
    ],
)
def test_urls_that_ask_for_one_thing_are_one(one: str, other: str, is_same: bool) -> None:
    assert (canonical_url(one) == canonical_url(other)) is is_same


def test_a_host_is_itself_alone_and_a_star_all_below_it(tmp_path: Path) -> None:
    found = Listed.of(listed(tmp_path, "host,x.org", "host,*.y.org", "host,[2001:db8::1]"))
    urls = ["http://x.org/1", "http://a.x.org/1", "http://y.org/1", "https://A.b.Y.org:81/1", "http://[2001:db8::1]/a"]
    assert [bool(found.first(urls=[url])) for url in urls] == [True, False, False, True, True]
    assert not found.first(urls=["not a url", "http://[", "ftp://x.org/"])


# The line on real files: documents of the web with one or two pictures, and texts that have nothing to do with them.


@dataclass
class Line:
    """A data root with every part of a small recipe to training, and what made it."""

    specs: Path
    root: Path
    origin: Path = Path()
    ran: list[str] = field(default_factory=list)

    @property
    def settings(self) -> Settings:
        return Settings(self.root, self.specs, 1)

    def nodes(self) -> list[line.Node]:
        """The line up to training."""
        return line.nodes("toy", self.specs, self.root)

    def acquired(self) -> Artifact:
        """The acquire artifact of the documents, made where it is not there."""
        (node,) = [n for n in self.nodes() if n.id == "acquire/toy-web"]
        return line.make_node(node, {}, self.settings)[0].open(self.root)

    def made(self) -> dict[str, Artifact]:
        """All parts, made where they are not there; `ran` says which were."""
        refs: dict[str, line.Ref] = {}
        self.ran = []
        for node in self.nodes():
            if node.part == "evaluate":
                continue
            if node.part in BY_HAND:
                inputs = {i: refs[i].open(self.root) for i in node.inputs if not i.startswith("evaluate/")}
                job = Job(node.part, node.name, node.version, node.spec, inputs, self.root, self.specs, 1)
                made, ran = artifact.make(job, BY_HAND[node.part])
                refs[node.id] = line.Ref(node.id, made.manifest.fingerprint, made.manifest.digest)
            else:
                refs[node.id], ran = line.make_node(node, refs, self.settings)
            self.ran += [node.id] if ran else []
        return {node: ref.open(self.root) for node, ref in refs.items()}

    def listed(self, *lines: str) -> None:
        listed(self.specs, *lines)

    def documents(self) -> dict[str, Sample]:
        """The samples that acquire gave, by URL."""
        tars = sorted(self.root.glob("acquire/toy-web/*/raw/*.tar"))
        return {s.meta["url"]: s for tar in tars for s in read_samples(tar)}


def train(job: Job) -> Result:
    plan = pq.read_table(job.one("pack").path / "plan.parquet").to_pylist()
    pq.write_table(trained_rows(plan), job.out / "trained.parquet")
    return Result(1, 1, {}, {})


def report(job: Job) -> Result:
    """A page with a picture of the first document: its bytes are its own, and it names nothing."""
    (job.out / "report.html").write_text("<img src='data:image/jpeg;base64,AAAA'>")
    return Result(1, 1, {}, {})


BY_HAND = {"pack": pack.make_plan, "train": train, "report": report}
N_DOCUMENTS = 12


def url(i: int) -> str:
    return f"https://host{i % 3}.example/page/{i}?q=a&b"


def shown(i: int) -> list[bytes]:
    """The pictures of a document; every fourth has a second."""
    return [tiny.picture((7 * i, 90, 200), i), *([tiny.picture((5, 9 * i, 30), 50 + i)] if i % 4 == 0 else [])]


def build(base: Path) -> Line:
    specs = tiny.write_specs(base / "specs")
    home = specs / "data" / "web"
    members = {f"{i}-{j}.png": data for i in range(N_DOCUMENTS) for j, data in enumerate(shown(i))}
    tiny.write_tar(home / "images.tar", members)
    records = [
        {
            "url": url(i),
            "text_list": [f"document number {i}", "and a second line of it"],
            "image_info": [{"image_name": f"{i}-{j}.png", "matched_text_index": j} for j in range(len(shown(i)))],
        }
        for i in range(N_DOCUMENTS)
    ]
    records.append(records[3])  # a repeat upstream
    (home / "docs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    web = yaml.safe_load((specs / "sources" / "toy-pictures.yaml").read_text()) | {"name": "toy-web"}
    web["acquire"] = {"location": "data/web", "adapter": "mmc4.read", "args": {"images": "images.tar"}}
    web["acquire"] |= {"samples_per_shard": 5}
    web["shard"]["samples_per_shard"] = 3
    web["revision"] = "sha256:" + content_sha256(home)
    (specs / "sources" / "toy-web.yaml").write_text(yaml.safe_dump(web, sort_keys=False))
    drawn = [{"source": "toy-web", "epochs": 2.0}, {"source": "toy-text", "epochs": 1.0}]
    tiny.edit(specs, "mixes/toy.yaml", sources=drawn)
    return Line(specs, base / "root")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Line:
    built = build(tmp_path_factory.mktemp("takedown"))
    built.made()
    return built


@pytest.fixture
def copied(finished: Line, tmp_path: Path) -> Line:
    shutil.copytree(finished.specs, tmp_path / "specs")
    shutil.copytree(finished.root, tmp_path / "root")
    return Line(tmp_path / "specs", tmp_path / "root", finished.root)


def holding(root: Path, *needles: bytes) -> list[str]:
    """Every file in which one of these bytes lies, Parquet read as rows."""
    found = []
    for path in (p for p in root.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if path.suffix == ".parquet":
            data += repr(pq.read_table(path).to_pylist()).encode()
        if any(needle in data for needle in needles):
            found.append(path.relative_to(root).as_posix())
    return found


WEB = ["acquire/toy-web", "filter/toy-web", "shard/toy-web", "curate/toy", "pack/toy", "train/toy-stage", "report/toy"]


def entry(documents: dict[str, Sample], kind: str, i: int) -> str:
    """A line that lists document i: by its URL spelt otherwise, its key, its host, or its last picture."""
    pictures = [hashlib.sha256(data).hexdigest() for data in documents[url(i)].images]
    spelt = {"url": url(i).replace("https", "HTTP") + "#top", "key": documents[url(i)].key, "host": "HOST2.example"}
    return f"{kind},{spelt.get(kind, pictures[-1])}"


@pytest.mark.parametrize(
    ("entries", "gone"), [([("url", 1), ("key", 3)], [1, 3]), ([("sha256", 4), ("host", 2)], [2, 4, 5, 8, 11])]
)
def test_what_is_listed_is_in_no_file_and_only_what_it_reaches_runs_again(
    copied: Line, entries: list[tuple[str, int]], gone: list[int]
) -> None:
    before, documents = copied.made(), copied.documents()
    keys = {documents[url(j)].key for j in gone}
    needles = [x for j in gone for x in (documents[url(j)].key.encode(), url(j).encode(), *shown(j))]
    old_files = holding(copied.root, *needles)
    copied.listed(*(entry(documents, kind, i) for kind, i in entries))
    (planned,) = [p for p in line.plan(copied.nodes(), copied.settings) if p.action == "run"]
    multi = any(kind == "sha256" for kind, _ in entries)  # of two pictures: a plan reads no tar
    assert f"{planned.part}/{planned.name}" == WEB[0] and planned.because.startswith("takedown: (absent) -> ")
    assert multi or len(planned.because.split(",")) == 2

    old = removal.look(copied.settings)
    held = {h.place.rsplit("/", 1)[0] for h in old.held}
    assert set(WEB) - {"train/toy-stage"} <= held and not any("toy-text" in place for place in held)
    assert {f"{h.place}/{h.file}" for h in old.held} >= set(old_files) and not old.is_clean
    plan = pq.read_table(before["pack/toy"].path / "plan.parquet").to_pylist()
    (saw,) = old.saw
    steps = {r["pack"] // 2 + 1 for r in plan if r["key"] in keys}
    assert {step for e in saw["entries"].values() for step in e["steps"]} == steps
    assert sum(e["documents"] for e in saw["entries"].values()) == sum(r["key"] in keys for r in plan)

    removal.apply(copied.settings)
    found = removal.look(copied.settings)
    assert found.is_clean and found.saw == [saw]
    assert holding(copied.root, *needles) == []
    after = copied.made()
    assert copied.ran == WEB[1:]
    assert removal.look(copied.settings).is_clean
    assert holding(copied.root, *needles) == []
    untouched = {n for n in before if "text" in n}
    assert all(before[n].manifest == after[n].manifest for n in untouched) and untouched
    counts = after["acquire/toy-web"].manifest.counts
    n_taken = len(gone) + (3 in gone)  # document 3 is there twice
    assert counts["dropped"] == {"taken_down": n_taken} | ({"duplicate_row": 1} if 3 not in gone else {})
    assert counts["in"] == N_DOCUMENTS + 1 == counts["kept"] + sum(counts["dropped"].values())
    assert set(copied.documents()) == {url(j) for j in range(N_DOCUMENTS) if j not in gone}

    for name in ("shard/*/*/shards/*.tar", "curate/*/*/lock.parquet", "signals/toy-web/*/*.parquet"):
        back = next(f for f in old_files if Path(f).match(name))
        (copied.root / back).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(copied.origin / back, copied.root / back)
        assert {f"{h.place}/{h.file}" for h in removal.look(copied.settings).held} == {back}
        (copied.root / back).unlink()


def test_an_entry_that_means_nothing_changes_no_fingerprint(copied: Line) -> None:
    before = copied.nodes()
    copied.listed(
        "host,elsewhere.example", "url,https://host1.example/", f"sha256,{'0' * 64}", "key,web-0123456789abcdef"
    )
    assert copied.nodes() == before
    tiny.write_tar(copied.root / "downloads/pin/theirs.tar", {"x.json": b"[]", "y.json": b"{}", "y.0.png": b"z"})
    assert {p.action for p in line.plan(line.select(before, "curate"), copied.settings)} == {"reuse"}
    removal.apply(copied.settings)
    assert {p.action for p in line.plan(line.select(before, "curate"), copied.settings)} == {"reuse"}


def test_read_anew_or_changed_once_or_twice_the_artifact_is_one(copied: Line, finished: Line, tmp_path: Path) -> None:
    documents = copied.documents()
    lines = [entry(documents, kind, i) for kind, i in (("host", 2), ("sha256", 4), ("url", 1))]
    copied.listed(lines[0])
    (one,) = [p for p in line.plan(copied.nodes(), copied.settings) if p.action == "run"]
    removal.apply(copied.settings)
    copied.listed(*lines)
    removal.apply(copied.settings)
    twice = copied.acquired()
    shutil.copytree(finished.root / "acquire", tmp_path / "once" / "acquire")
    once, anew = replace(copied, root=tmp_path / "once"), replace(copied, root=tmp_path / "anew")
    removal.apply(once.settings)
    assert one.name == "toy-web" and len(twice.manifest.spec["takedown"]) == 3
    assert once.acquired().manifest.digest == anew.acquired().manifest.digest == twice.manifest.digest
    assert once.acquired().path.name == anew.acquired().path.name == twice.path.name
    assert not (anew.root / "acquire" / "toy-web" / finished.acquired().path.name).exists()
    assert anew.acquired().path.name == twice.path.name  # and a second run finds it
    copied.listed()
    assert copied.nodes()[0].spec == finished.nodes()[0].spec  # what is listed no more is asked for again


def test_killed_while_it_removes_it_goes_on(copied: Line) -> None:
    documents = copied.documents()
    copied.listed(entry(documents, "url", 1))
    env = os.environ | {"SOLO_ROOT": str(copied.root), "SOLO_SPECS": str(copied.specs), "SOLO_WORKERS": "1"}
    env["SOLO_PREFECT_HOME"] = str(copied.root.parent / "prefect")  # no server of the user is asked
    command = [sys.executable, "-m", "solo.cli", "takedown", "--apply", "--prove"]
    with subprocess.Popen(command, env=env, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
        assert child.stderr is not None
        for text in child.stderr:
            if b"removed" in text:
                break
        child.kill()
    assert not removal.look(copied.settings).is_clean
    ended = subprocess.run(command, env=env, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and "no file holds anything listed" in ended.stdout, ended.stderr
    assert removal.look(copied.settings).is_clean and len(copied.documents()) == N_DOCUMENTS - 1


def test_a_listed_url_of_a_list_is_not_asked_for(tmp_path: Path) -> None:
    urls = [url(0), url(1), "https://a.b.gone.example/x", url(2)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"u": u, "c": "text"}) + "\n" for u in urls))
    specs = listed(tmp_path, f"url,{url(1)}", "host,*.gone.example")
    rules = Rules(user_agent="bot/1 (x@example.org)", log="", shared="")
    spec = UrlList("web", tmp_path / "list.jsonl", "u", "c", rules)
    url_rows.write_rows(spec, tmp_path / "rows.parquet", Listed.of(specs))
    rows = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [r["fault"] for r in rows] == [None, "taken_down", "taken_down", None]


def test_a_benchmark_that_asks_it_is_named(copied: Line) -> None:
    with tarfile.open(copied.specs / "data/bench/images.tar") as tar:
        data = tar.extractfile(tar.next()).read()
    copied.listed(f"sha256,{hashlib.sha256(data).hexdigest()}")
    (held,) = removal.look(copied.settings).held
    assert (held.place, held.file) == ("benchmarks/toy-colours.yaml", "item 0")


def test_a_fetched_copy_of_what_a_source_is_published_as_goes_as_a_whole(copied: Line) -> None:
    documents, home = copied.documents(), copied.specs / "sources" / "toy-web.yaml"
    copied.listed(entry(documents, "key", 1))
    spec = yaml.safe_load(home.read_text())
    spec["acquire"]["location"] = "https://published.example/web"
    spec["acquire"]["files"] = ["docs.jsonl", "images.tar"]
    home.write_text(yaml.safe_dump(spec, sort_keys=False))
    copy = copies.place(location.asked(load(SourceSpec, "toy-web", copied.specs)), copied.root)
    store = copied.root / "downloads" / "files"
    for folder in (copy, store):
        folder.mkdir(parents=True)
    for name in ("docs.jsonl", "images.tar"):
        shutil.copy(copied.specs / "data" / "web" / name, copy / name)
        os.link(copy / name, store / f"{name}-digest")
    (store / "other").write_text("of another source")
    held = {h.place for h in removal.look(copied.settings).held if h.place.startswith("downloads/")}
    assert held == {copy.parent.relative_to(copied.root).as_posix()}
    removal.apply(copied.settings)
    assert [p.name for p in (copied.root / "downloads").rglob("*") if p.is_file()] == ["other"]
    assert removal.look(copied.settings).is_clean
