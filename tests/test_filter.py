import shutil
from collections import Counter

import pytest
from raw import acquired, filtered, picture, rows, same_files, sample

from solo.artifact import LedgerError
from solo.spec import SpecError

A, B, C = (picture(64, 48, seed=i) for i in range(3))


def verdicts(artifact):
    return {int(row["key"].split("-")[1], 16): row["reason"] for row in rows(artifact.path / "verdicts.parquet")}


def test_predicates_and_reasons(root):
    source = acquired(
        root,
        [
            sample(1, images=[picture(64, 64, seed=1)]),
            sample(2, images=[picture(16, 64, seed=2)]),
            sample(3, images=[picture(64, 64, seed=3)[:-50]]),
            sample(4, caption="text only, and long enough"),
            sample(5, images=[picture(64, 64, seed=5)], caption="short"),
            sample(6, images=[picture(16, 64, seed=6)], caption="short"),
        ],
    )
    keep = {"decodes": "decodes", "wide": "width_px >= 32", "long": "n_chars > 10"}
    made = filtered(root, source, keep=keep)
    # 4 has no width: NULL is not true. 6 fails two predicates: the first in the order of the YAML is the reason.
    assert verdicts(made) == {1: None, 2: "wide", 3: "decodes", 4: "wide", 5: "long", 6: "wide"}
    assert made.manifest.counts == {"in": 6, "kept": 1, "dropped": {"decodes": 1, "long": 1, "wide": 3}}
    assert made.manifest.stats["reasons"] == made.manifest.counts["dropped"]
    turned = filtered(root, source, keep=dict(reversed(keep.items())))
    assert verdicts(turned) == {1: None, 2: "wide", 3: "wide", 4: "wide", 5: "long", 6: "long"}


def test_no_predicate_keeps_all(root):
    made = filtered(root, acquired(root, [sample(1), sample(2)]))
    assert verdicts(made) == {1: None, 2: None}


def test_unique_keeps_the_smallest_key_that_passes(root):
    source = acquired(
        root,
        [
            sample(9, images=[A], caption="nine is long enough"),
            sample(5, images=[A], caption="five is long enough"),
            sample(2, images=[A], caption="two"),  # the smallest key, but it fails a predicate
            sample(7, caption="no image here, so no hash"),
            sample(8, caption="no image here, so no hash?"),
        ],
        per_shard=2,
    )
    made = filtered(root, source, keep={"long": "n_chars > 5"}, unique=["image_sha256"])
    assert verdicts(made) == {2: "long", 5: None, 7: None, 8: None, 9: "duplicate_image_sha256"}


def test_every_repeat_has_a_kept_twin(root):
    """y repeats x's image, z repeats y's text: y goes, so z is the only one left with that text and stays."""
    x, y, z = sample(1, images=[A], caption="one"), sample(2, images=[A], caption="two"), sample(3, caption="two")
    w = sample(4, images=[B], caption="two")
    made = filtered(root, acquired(root, [x, y, z, w]), unique=["image_sha256", "text_sha256"])
    assert verdicts(made) == {1: None, 2: "duplicate_image_sha256", 3: None, 4: "duplicate_text_sha256"}


def test_two_samples_of_one_number_in_a_unique_number_column(root):
    made = filtered(root, acquired(root, [sample(1, caption="abc"), sample(2, caption="xyz")]), unique=["n_chars"])
    assert verdicts(made) == {1: None, 2: "duplicate_n_chars"}


def test_signals_table(root):
    samples = [sample(3, images=[A], label="cat"), sample(1, url="u"), sample(2, caption=None, images=[B, C])]
    made = filtered(root, acquired(root, samples, per_shard=2), signals=["text.size", "image.size"])
    table = rows(made.path / "signals.parquet")
    assert [row["key"][-1] for row in table] == ["1", "2", "3"]
    assert [row["raw_shard"] for row in table] == [0, 1, 0]
    assert [row["n_images"] for row in table] == [0, 2, 1]
    assert [(row["meta_label"], row["meta_url"]) for row in table] == [(None, "u"), (None, None), ("cat", None)]
    names = list(table[0])
    assert names[:3] == ["key", "raw_shard", "n_chars"]
    assert names[-3:] == ["image_format", "meta_label", "meta_url"]


def test_meta_columns_in_predicates(root):
    source = acquired(root, [sample(1, label="cat"), sample(2, label="dog"), sample(3)])
    made = filtered(root, source, keep={"cat": "meta_label = 'cat'"}, unique=["meta_label"])
    assert verdicts(made) == {1: None, 2: "cat", 3: "cat"}
    with pytest.raises(SpecError, match=r"filter\.keep\.x: Binder Error.*meta_lable.*columns are .*'meta_label'"):
        filtered(root, source, keep={"x": "meta_lable = 'cat'"})
    with pytest.raises(SpecError, match=r"filter\.unique: no column 'meta_lable'; columns are .*'meta_label'"):
        filtered(root, source, unique=["meta_lable"])


def test_a_column_that_is_null_everywhere_keeps_its_type(root):
    made = filtered(root, acquired(root, [sample(1)]), keep={"png": "image_format = 'PNG' OR n_images = 0"})
    assert verdicts(made) == {1: None}


def test_decodes_are_counted_and_signals_kept_apart_from_decisions(root):
    samples = [sample(i, images=[picture(40, 40 + i, seed=i)]) for i in range(6)]
    samples.append(sample(6, images=[A, B]))
    source = acquired(root, samples, per_shard=3)

    def files():
        return {p: p.stat().st_mtime_ns for p in (root / "signals").rglob("*.parquet")}

    first = filtered(root, source, signals=["image.size"], keep={"high": "height_px >= 42"})
    assert first.manifest.stats["n_decodes"] == 8
    measured = files()
    assert {p.parent.name for p in measured} == {"image.size-v1", "sample.meta-v1"}
    tars = [f["sha256"] for f in source.manifest.files if f["path"].endswith(".tar")]
    assert {p.stem for p in measured} == {sha256[:16] for sha256 in tars} and len(tars) == 3

    moved = filtered(root, source, signals=["image.size"], keep={"high": "height_px >= 44"})
    assert (moved.manifest.stats["n_decodes"], moved.manifest.stats["n_shards_measured"]) == (0, 0)
    assert (first.manifest.counts["kept"], moved.manifest.counts["kept"]) == (5, 3)
    assert files() == measured

    added = filtered(root, source, signals=["image.size", "image.hashes"], keep={"high": "height_px >= 44"})
    assert added.manifest.stats["n_decodes"] == 7  # phash is the first image's
    new = files()
    assert {p.parent.name for p in new.keys() - measured.keys()} == {"image.hashes-v1"}
    assert {p: new[p] for p in measured} == measured

    text = filtered(root, source, signals=["image.size", "image.hashes", "text.size"])
    assert (text.manifest.stats["n_decodes"], text.manifest.stats["n_shards_measured"]) == (0, 3)

    both = filtered(root / "other", source, signals=["image.size", "image.hashes"])
    assert both.manifest.stats["n_decodes"] == 8


def test_bytes_do_not_depend_on_workers_or_on_an_interrupted_run(root, tmp_path):
    samples = [sample(i, images=[picture(30 + i % 7, 30, seed=i % 7)], label=f"l{i % 3}") for i in range(30)]
    samples[4] = sample(4, images=[A[:-30]])
    how = {
        "signals": ["image.size", "image.hashes", "text.size", "text.language"],
        "keep": {"decodes": "decodes", "wide": "width_px > 31"},
        "unique": ["image_sha256"],
    }
    truth = filtered(root, acquired(root, samples, per_shard=8), **how)
    assert set(Counter(verdicts(truth).values())) == {None, "decodes", "wide", "duplicate_image_sha256"}
    two = filtered(tmp_path / "two", acquired(tmp_path / "two", samples, per_shard=8), workers=2, **how)
    assert same_files(truth, two)

    # A run killed after some signals, with half a file of others: what is whole stays, the rest is made.
    cache = root / "signals/web"
    name = next(f["sha256"][:16] for f in acquired(root, samples, per_shard=8).manifest.files if "00001" in f["path"])
    (cache / "image.hashes-v1" / f"{name}.parquet").unlink()
    (cache / "image.hashes-v1" / f"{name}.parquet.tmp").write_bytes(b"PAR1")
    shutil.rmtree(cache / "text.size-v1")
    shutil.rmtree(truth.path)
    (truth.path / ".work" / "beside").mkdir(parents=True)
    (truth.path / ".work" / "beside" / "00000.parquet").write_bytes(b"half")
    (truth.path / "signals.parquet.tmp").write_bytes(b"half")
    again = filtered(root, acquired(root, samples, per_shard=8), **how)
    assert same_files(truth, again)
    assert again.manifest.stats["n_decodes"] == 8
    assert not list(again.path.rglob("*.tmp"))


def test_an_empty_source(root):
    made = filtered(root, acquired(root, []), keep={"decodes": "decodes"}, unique=["text_sha256"])
    assert made.manifest.counts == {"in": 0, "kept": 0, "dropped": {}}
    assert rows(made.path / "signals.parquet") == []


@pytest.mark.parametrize(
    ("predicate", "message"),
    [
        ("widht_px > 3", r'Binder Error: Referenced column "widht_px" not found.*columns are \[.*width_px'),
        ("width_px >", "Parser Error"),
        ("1) OR (1", "Parser Error"),
        ("n_chars > 1, decodes", "single expression"),
        ("n_chars > 1; DROP TABLE x", "Parser Error"),
        ("", "Parser Error"),
        ("n_chars", "is BIGINT, not one BOOLEAN; write a comparison"),
        ("count(*) > 3", "aggregates"),
        ("row_number() OVER () > 3", "a window is not a fixed function of one sample"),
        ("COLUMNS('_px') > 3", "is BOOLEAN, BOOLEAN, BOOLEAN, not one BOOLEAN"),
        ("n_chars > (SELECT avg(n_chars) FROM signals)", "a subquery is not a fixed function of one sample"),
        ("(SELECT count(*) FROM read_csv('/etc/passwd')) > 0", "subquery"),
        ("random() < 0.5", r"random\(\) is not a fixed function"),
        ("current_date > '2020-01-01'", r"current_date\(\) is not a fixed function"),
    ],
)
def test_a_predicate_that_cannot_work_is_named_before_anything_is_measured(root, predicate, message):
    source = acquired(root, [sample(1, images=[A])])
    with pytest.raises(SpecError, match=rf"^sources/web\.yaml: filter\.keep\.bad: .*{message}") as caught:
        filtered(root, source, keep={"good": "decodes", "bad": predicate})
    assert "\n" not in str(caught.value)
    assert not (root / "signals").exists()


@pytest.mark.parametrize("predicate", ["decodes -- why", "decodes;", "decodes AS d", "(decodes)"])
def test_comments_and_the_like_do_no_harm(root, predicate):
    made = filtered(root, acquired(root, [sample(1)]), keep={"decodes": predicate, "text": "n_chars > 0"})
    assert verdicts(made) == {1: None}


def test_a_predicate_that_fails_on_the_data_is_named(root):
    source = acquired(root, [sample(1, year="1999"), sample(2, year="long ago")])
    with pytest.raises(
        SpecError, match=r"filter\.keep\.new: Conversion Error.*long ago.*try_cast gives NULL"
    ) as caught:
        filtered(root, source, keep={"text": "n_chars > 0", "new": "meta_year::INT > 1990"})
    assert "\n" not in str(caught.value)
    made = filtered(root, source, keep={"new": "try_cast(meta_year AS INT) > 1990"})
    assert verdicts(made) == {1: None, 2: "new"}


def test_other_mistakes_in_a_spec(root):
    source = acquired(root, [sample(1)])
    with pytest.raises(SpecError, match=r"no column 'imgae_sha256'; columns are"):
        filtered(root, source, unique=["imgae_sha256"])
    with pytest.raises(SpecError, match=r"'image.sise' is not in"):
        filtered(root, source, signals=["image.sise"])
    with pytest.raises(SpecError, match=r"duplicate_phash: that is the reason given by filter\.unique"):
        filtered(root, source, keep={"duplicate_phash": "decodes"}, unique=["phash"])


def test_a_lost_sample_breaks_the_sum(root):
    """Guard: counts are compared with what acquire kept, not with what filter saw."""
    source = acquired(root, [sample(1), sample(2)], per_shard=1)
    (source.path / "raw" / "00001.tar").unlink()
    with pytest.raises(LedgerError, match="2 in != 1 kept"):
        filtered(root, source)
