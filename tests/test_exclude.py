"""Across sources and against benchmarks: who wins, what is found, what is read, and that nothing else moves."""

import json
import tarfile

import pytest
import tiny
from raw import picture, rows, same_files, sample, sharded
from test_curate import ledger, replay, shard

from solo import artifact, line
from solo.acquire.part import content_sha256
from solo.artifact import Job
from solo.curate import part as curate
from solo.filter import decontaminate
from solo.sample import Sample
from solo.spec import MixSpec, SpecError

SIGNALS = ["image.size", "image.hashes", "image.colours", "text.size", "text.minhash"]
ITEM = "how many of the seven small green bottles on the left wall are still full of water"
SHORT = "who wrote the first book about the northern lighthouse"  # 9 words


def made_of(root, name, samples, **how):
    """A shard artifact of one source, by the real parts."""
    own = [Sample(s.key.replace("web-", f"{name}-"), name, s.images, s.messages, s.meta) for s in samples]
    return sharded(root / name, own, signals=SIGNALS, **how)


def curated(root, sources, *, order=None, workers=1, benchmarks=None, **mix):
    wanted = [{"source": name, "epochs": 1} | mix.pop(name, {}) for name in order or sources]
    fields = MixSpec.model_validate({"name": "toy", "title": "Toy", "seed": 7, "sources": wanted} | mix)
    spec = {"mix": fields.model_dump(mode="json")} | ({"benchmarks": benchmarks} if benchmarks else {})
    inputs = {f"shard/{name}": made for name, made in sources.items()}
    return artifact.make(Job("curate", "toy", curate.VERSION, spec, inputs, root, root, workers), curate.run)[0]


def lock(made):
    return {short(row["key"]) for row in rows(made.path / "lock.parquet")}


def short(key):
    source, _, number = key.partition("-")
    return f"{source}{int(number, 16)}"


def excluded(made):
    found = rows(made.path / "excluded.parquet")
    return {short(r["key"]): (r["reason"], r["winner"] and short(r["winner"])) for r in found}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Sources a and b: b1 is a1's picture saved again, b2 has a2's bytes, b3 has a3's words; a4 and a5 repeat."""
    root = tmp_path_factory.mktemp("two")
    big, small = picture(128, 96, seed=1), picture(96, 72, seed=1, kind="JPEG", quality=70)
    same, again = picture(64, 64, seed=2), picture(64, 64, seed=3)
    words = " ".join(f"word{i}" for i in range(60))
    a = [sample(1, images=[big], caption="one"), sample(2, images=[same], caption="two"), sample(3, caption=words)]
    a += [sample(4, images=[again], caption="four"), sample(5, images=[again], caption="five")]
    b = [sample(1, images=[small], caption="uno"), sample(2, images=[same], caption="dos")]
    b += [sample(3, caption=words.upper() + " end"), sample(4, images=[picture(64, 64, seed=9)], caption="cuatro")]
    return {"a": made_of(root, "a", a), "b": made_of(root, "b", b)}


ALIKE = {"unique": ["image_sha256"], "near": {"image": 3, "colour": 16, "text": 0.8}}


def test_the_source_listed_first_wins_and_its_own_repeats_stay(root, two):
    made = curated(root, two, **ALIKE)
    assert excluded(made) == {
        "b1": ("near_image", "a1"),
        "b2": ("duplicate_image_sha256", "a2"),
        "b3": ("near_text", "a3"),
    }
    assert lock(made) == {"a1", "a2", "a3", "a4", "a5", "b4"}
    assert made.manifest.counts["dropped"] == {
        "duplicate_image_sha256": 1,
        "near_image": 1,
        "near_text": 1,
        "not_drawn": 0,
    }
    turned = curated(root, two, order=["b", "a"], **ALIKE)
    assert {k: w for k, (_, w) in excluded(turned).items()} == {"a1": "b1", "a2": "b2", "a3": "b3"}
    assert {r["source"]: r["samples"] for r in turned.manifest.stats["excluded"] if r["reason"] == "near_text"} == {
        "a": 1
    }


def test_what_a_predicate_drops_is_nobodys_twin(root, two):
    made = curated(root, two, a={"where": {"text": "n_images = 0"}}, **ALIKE)
    assert excluded(made) == {"b3": ("near_text", "a3")}
    assert lock(made) == {"a3", "b1", "b2", "b4"}


def test_a_mix_that_compares_nothing_writes_nothing_more(root, two):
    made = curated(root, two)
    assert {f["path"] for f in made.manifest.files} == {"lock.parquet", "mix.sql"}
    assert "excluded" not in (made.path / "mix.sql").read_text()
    # What one source gives does not depend on another where they hold no twins.
    alone = curated(root, {"a": two["a"]})
    of_a = [r for r in rows(made.path / "lock.parquet") if r["key"].startswith("a-")]
    assert of_a == rows(alone.path / "lock.parquet")
    compared = curated(root, two, **ALIKE)
    assert [r for r in rows(compared.path / "lock.parquet") if r["key"].startswith("a-")] == of_a


def test_equal_bytes_on_one_and_four_threads(root, tmp_path, two):
    made = [curated(r, two, workers=n, **ALIKE) for r, n in ((root, 1), (tmp_path / "four", 4))]
    assert same_files(*made)


def test_the_sql_kept_gives_the_lock(root, two):
    made = curated(root, two, **ALIKE)
    text = (made.path / "mix.sql").read_text()
    assert str(root) not in text
    text = text.replace("$excluded", f"'{made.path}/excluded.parquet'")
    for name in "ab":
        text = text.replace(f"$files_{name}", f"'{two[name].path}/shards/*.parquet'")
    assert replay(text) == rows(made.path / "lock.parquet")


def benchmark(folder, items):
    """A question set as `questions.read` takes it: (question, answer, picture or None)."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "images.tar", "w") as tar, (folder / "questions.jsonl").open("w") as lines:
        for i, (question, answer, data) in enumerate(items):
            record = {"question_id": f"q{i}", "question": question, "answer": answer}
            if data is not None:
                (folder / "x").write_bytes(data)
                tar.add(folder / "x", f"{i}.png")
                (folder / "x").unlink()
                record["image"] = f"{i}.png"
            lines.write(json.dumps(record) + "\n")
    pin = f"sha256:{content_sha256(folder)}"
    return {"location": str(folder), "revision": pin, "adapter": "questions.read", "args": {}}


def hits(made):
    return {(r["benchmark"], r["item"], short(r["key"]), r["how"]) for r in rows(made.path / "contamination.parquet")}


def test_items_of_a_benchmark_are_found_by_bytes_by_sight_and_by_words(root, tmp_path):
    seen, other = picture(128, 96, seed=1), picture(128, 96, seed=2)
    a = [
        sample(1, images=[seen], caption="a picture"),
        sample(2, images=[picture(96, 72, seed=1, kind="JPEG", quality=70)], caption="the same, smaller"),
        sample(3, images=[other], caption="what is it"),  # an item's question, asked of another picture
        sample(4, caption=f"and then: {ITEM.upper()}? nobody knows"),
        sample(5, caption=" ".join(ITEM.split()[:12])),  # 12 of its words are no evidence
        sample(6, caption=f"{SHORT}? Somebody did."),
        sample(7, caption="who wrote the first book"),
        sample(8, caption="nothing of it"),
    ]
    bench = {
        "sight": benchmark(
            tmp_path / "sight", [("what is it", "a bottle", seen), (f"{SHORT} here", "yes", picture(64, 64, seed=5))]
        ),
        "words": benchmark(
            tmp_path / "words", [(ITEM, "four", None), (SHORT, "somebody did", None), ("hm", "x", None)]
        ),
    }
    made = curated(root, {"a": made_of(tmp_path, "a", a)}, benchmarks=bench, decontaminate=list(bench))
    assert hits(made) == {
        ("sight", "q0", "a1", "image_bytes"),
        ("sight", "q0", "a2", "image_near"),
        ("words", "q0", "a4", "text"),
        ("words", "q1", "a6", "text"),
    }
    assert lock(made) == {"a3", "a5", "a7", "a8"}
    assert made.manifest.counts["dropped"] == {"contaminated": 4, "not_drawn": 0}
    assert set(excluded(made).values()) == {("contaminated", None)}
    stats = made.manifest.stats["contamination"]
    assert stats["words"] == {
        "items": 3,
        "by_image": 0,
        "by_text": 2,
        "neither": 1,
        "items_hit": 2,
        "samples": 2,
        "samples_by_text": 2,
    }
    assert stats["sight"]["samples_by_image_near"] == 1
    evidence = {r["key"][-1]: r["evidence"] for r in rows(made.path / "contamination.parquet")}
    assert evidence["6"] == f"{SHORT} somebody did"
    assert evidence["4"] == " ".join(ITEM.split()[:13])


def test_a_benchmark_and_a_text_are_read_once(root, tmp_path, monkeypatch):
    reads = []
    read, scan = decontaminate._signature, decontaminate.scan
    monkeypatch.setattr(decontaminate, "_signature", lambda name, *rest: reads.append(name) or read(name, *rest))
    monkeypatch.setattr(
        decontaminate, "scan", lambda unit: reads.append((unit.tar.stem, *(b.name for b in unit.targets))) or scan(unit)
    )
    one, two_ = (benchmark(tmp_path / n, [(f"{n} {ITEM}", "four", None)]) for n in ("one", "two"))
    source = {"a": made_of(tmp_path, "a", [sample(i, caption=f"one {ITEM}" if i == 3 else "no") for i in range(6)])}
    curated(root, source, benchmarks={"one": one}, decontaminate=["one"])
    assert reads == ["one", ("00000", "one"), ("00001", "one")]
    made = curated(root, source, benchmarks={"one": one, "two": two_}, decontaminate=["one", "two"], seed=8)
    assert reads[3:] == ["two", ("00000", "two"), ("00001", "two")]
    assert {h[0] for h in hits(made)} == {"one", "two"}  # 13 of the 16 words that both share


def test_wording_that_many_items_share_is_no_evidence(root, tmp_path):
    asked = "answer the question about the picture with a single word or with a short phrase please"
    items = [(f"{asked} {'of' * (i + 1)}", f"number{i}", None) for i in range(12)]
    bench = {"many": benchmark(tmp_path / "many", items)}
    a = [sample(1, caption=asked), sample(2, caption=f"{asked} {'of' * 3} number2")]
    made = curated(root, {"a": made_of(tmp_path, "a", a)}, benchmarks=bench, decontaminate=["many"])
    assert hits(made) == {("many", "q2", "a2", "text")}


def test_equal_scans_on_one_and_two_processes(root, tmp_path):
    bench = {"b": benchmark(tmp_path / "b", [(ITEM, "four", None), (SHORT, "me", None)])}
    source = {
        "a": made_of(
            tmp_path, "a", [sample(i, caption=ITEM if i % 3 else SHORT + " me") for i in range(9)] + [sample(9)]
        )
    }
    source |= {"c": made_of(tmp_path, "c", [sample(1, caption="no")])}
    made = [
        curated(r, source, workers=n, benchmarks=bench, decontaminate=["b"])
        for r, n in ((root, 1), (tmp_path / "other", 2))
    ]
    assert same_files(*made)
    assert made[0].manifest.counts["dropped"]["contaminated"] == 9


def test_mistakes_are_named(root, tmp_path):
    toy = {"a": shard(root, "a", ledger("a", [5, 6])), "b": shard(root, "b", ledger("b", [7]))}
    with pytest.raises(
        SpecError, match=r"mixes/toy\.yaml: it compares by 'phash'.* filter\.signals in sources/a\.yaml"
    ):
        curated(root, toy, near={"image": 3})
    with pytest.raises(SpecError, match=r"sources\.b\.where\.near_text: that is a reason the mix gives itself"):
        curated(root, toy, b={"where": {"near_text": "true"}}, near={"text": 0.8})
    source = {"a": made_of(tmp_path, "a", [sample(1)])}
    bench = benchmark(tmp_path / "b", [(ITEM, "four", None)])
    with pytest.raises(SpecError, match=r"benchmarks/b\.yaml: .*is sha256:.*, not revision sha256:00"):
        curated(root, source, benchmarks={"b": bench | {"revision": "sha256:" + "0" * 64}}, decontaminate=["b"])
    with pytest.raises(SpecError, match=r"benchmarks/b\.yaml: location .*gone does not exist"):
        curated(root, source, benchmarks={"b": bench | {"location": str(tmp_path / "gone")}}, decontaminate=["b"])


def test_a_source_without_pictures_has_none_to_compare(root, two, tmp_path):
    texts = sharded(tmp_path / "t", [sample(1, caption="only words")], signals=["text.size", "text.minhash"])
    made = curated(root, {**two, "web": texts}, **ALIKE)
    assert len(excluded(made)) == 3


def test_a_mix_knows_its_benchmarks_and_nothing_else_of_them(tmp_path):
    """A title or a scorer reruns no mix; a benchmark that a mix does not name is not in it at all."""
    specs = tiny.write_specs(tmp_path / "specs")
    mix = (specs / "mixes" / "toy.yaml").read_text()

    def node(edit=""):
        (specs / "mixes" / "toy.yaml").write_text(mix + edit)
        return next(n for n in line.nodes("toy", specs) if n.id == "curate/toy")

    assert "benchmarks" not in node().spec
    before = node("decontaminate: [toy-colours]\n")
    assert set(before.spec["benchmarks"]["toy-colours"]) == {"revision", "location", "adapter", "args"}
    bench = specs / "benchmarks" / "toy-colours.yaml"
    text = bench.read_text()
    assert "max_new_tokens: 2" in text
    bench.write_text(text.replace("max_new_tokens: 2", "max_new_tokens: 5"))
    assert node("decontaminate: [toy-colours]\n") == before
    with pytest.raises(SpecError, match=r"no-such\.yaml: no such file"):
        node("decontaminate: [no-such]\n")
