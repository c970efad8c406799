import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import webdataset
from PIL import Image
from raw import TOKENS, picture, rows, same_files, sample, sharded

from solo.artifact import CHECKOUT
from solo.report import data_pages
from solo.sample import IMAGE, Sample, parse_samples, read_sample, read_samples, text
from solo.sequence.patches import grid, image_size, open_rgb, patchify
from solo.sequence.tokens import Tokenizer, tokenize
from solo.shard import exif
from solo.spec import SpecError, Tokens

BY_ROLE = ("n_system_tokens", "n_user_tokens", "n_assistant_tokens", "n_markup_tokens")
COUNTS = ("n_images", "n_patches", "n_text_tokens", *BY_ROLE, "n_loss_tokens", "n_tokens")
FORMS = ("n_images_as_came", "n_images_bare", "n_images_jpeg", "n_images_png")


def ledger(artifact):
    return [row for path in sorted((artifact.path / "shards").glob("*.parquet")) for row in rows(path)]


def numbers(artifact):
    return [int(row["key"].split("-")[1], 16) for row in ledger(artifact)]


def many(n=23):
    """Samples of all kinds, in an order that is not that of their keys; none is dropped by shard."""
    made = [sample(1000 - 7 * i, images=[picture(20 + 9 * i, 60, seed=i)], label=f"l{i}") for i in range(n - 3)]
    two = [picture(64, 64, seed=90), picture(33, 64, seed=91, kind="JPEG")]
    return [*made, sample(3, images=two), sample(2), sample(1, images=[picture(40, 40, seed=99)], question="what?")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An artifact for the tests that only read it."""
    return sharded(tmp_path_factory.mktemp("made"), many())


def test_ledger_equals_the_tars_and_the_tokeniser(made):
    table = ledger(made)
    assert len(table) == 23
    tokenizer = Tokenizer(Tokens.model_validate(TOKENS))
    for row in table:
        tar = made.path / "shards" / f"{row['shard']:05d}.tar"
        one = read_sample(tar, row["offset"], row["length"])
        assert one.key == row["key"]
        assert (
            hashlib.sha256(tar.read_bytes()[row["offset"] : row["offset"] + row["length"]]).hexdigest() == row["sha256"]
        )
        grids = [grid(*image_size(data), patch_px=32, max_side_px=128) for data in one.images]
        document = tokenize(one, grids, tokenizer, row["template"])
        assert row["n_images"] == len(one.images)
        assert row["n_tokens"] == len(document.ids) == row["n_patches"] + row["n_text_tokens"]
        assert row["n_patches"] == (document.patch_index >= 0).sum() == sum(r * c for r, c in grids)
        assert row["n_loss_tokens"] == document.is_target.sum() > 0
        assert sum(row[name] for name in BY_ROLE) == row["n_text_tokens"]
        said = {role: n["n_tokens"] for role, n in document.by_role().items()}
        assert {role: row[f"n_{role}_tokens"] for role in said} == said
        assert [row[name] for name in FORMS] == [len(one.images), 0, 0, 0] and row["psnr_db"] is None
        assert row["image_bytes_in"] == row["image_bytes"] == sum(map(len, one.images))


def test_samples_and_images_come_through_unchanged(made):
    samples = many()
    tars = sorted((made.path / "shards").glob("*.tar"))
    found = {one.key: one for tar in tars for one in read_samples(tar)}
    assert found == {one.key: one for one in samples}


def test_order_and_sizes(made):
    samples = many()
    expected = [
        int(s.key.split("-")[1], 16) for i in range(0, 23, 5) for s in sorted(samples[i : i + 5], key=lambda s: s.key)
    ]
    assert numbers(made) == expected
    sizes = [json.loads(p.read_bytes())["n_samples"] for p in sorted((made.path / "shards").glob("*.json"))]
    assert sizes == [4, 4, 4, 4, 4, 3]


def test_counts_written_beside_the_tar(made):
    table = ledger(made)
    for path in (made.path / "shards").glob("*.json"):
        done = json.loads(path.read_bytes())
        data = path.with_suffix(".tar").read_bytes()
        assert (done["bytes"], done["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        mine = [row for row in table if row["shard"] == done["shard"]]
        summed = (*COUNTS, *FORMS, "image_bytes_in", "image_bytes")
        assert {c: done[c] for c in summed} == {c: sum(row[c] for row in mine) for c in summed}
    stats = made.manifest.stats
    assert {c: stats[c] for c in summed} == {c: sum(row[c] for row in table) for c in summed}
    assert stats["psnr_db"] is None
    assert (stats["n_shards"], stats["n_samples"]) == (6, 23)
    assert stats["bytes"] == sum(p.stat().st_size for p in (made.path / "shards").glob("*.tar"))


def test_columns_of_the_ledger(root):
    base = ["key", "source", "shard", "offset", "length", *COUNTS, "template", "sha256"]
    base += [*FORMS, "image_bytes_in", "image_bytes", "psnr_db"]
    made = sharded(root, [sample(1, images=[picture(40, 40)], label="cat", url="u"), sample(2)])
    carried = ["image_sha256", "phash", "text_sha256", "width_px", "height_px", "n_chars"]
    assert list(ledger(made)[0]) == [*base, *carried, "meta_label"]
    assert [(row["width_px"], row["meta_label"]) for row in ledger(made)] == [(40, "cat"), (None, None)]
    bare = sharded(root, [sample(1, category="x"), sample(2)], signals=["text.language"])
    assert list(ledger(bare)[0]) == [*base, "language", "meta_category"]


def test_no_place_reaches_a_shard(root):
    placed = Image.Exif()
    placed[0x0112] = 6
    placed.get_ifd(0x8825).update({1: "N", 2: (48.0, 8.0, 1.0)})
    given = [picture(40, 30, kind=kind, exif=placed.tobytes()) for kind in ("JPEG", "PNG", "WEBP")]
    one = sample(1, images=[*given, picture(40, 30)])
    made = sharded(root, [one])
    (row,) = ledger(made)
    (stored,) = parse_samples(io.BytesIO((made.path / "shards" / "00000.tar").read_bytes()))
    assert [exif.read(data)[0] for data in one.images] == [True, True, True, False]
    assert [exif.read(data)[0] for data in stored.images] == [False] * 4
    assert [open_rgb(a).tobytes() for a in one.images] == [open_rgb(b).tobytes() for b in stored.images]
    assert (row["n_images_bare"], row["n_images_as_came"]) == (3, 1)


def test_tars_are_plain_tars_and_webdatasets(made):
    samples = many()
    tars = sorted((made.path / "shards").glob("*.tar"))
    by_key = {one.key: one for one in samples}
    seen = [record for tar in tars for record in webdataset.WebDataset(str(tar), shardshuffle=False)]
    assert [record["__key__"] for record in seen] == [row["key"] for row in ledger(made)]
    for record in seen:
        one = by_key[record["__key__"]]
        assert json.loads(record["json"])["key"] == one.key
        images = [record[name] for name in sorted(record) if name[0].isdigit()]
        assert tuple(images) == one.images
    for tar in tars:
        with tarfile.open(tar) as members:
            assert all(member.isfile() for member in members.getmembers())
        assert [one.key for one in parse_samples(io.BytesIO(tar.read_bytes()))]


def test_what_cannot_be_used_is_counted_by_reason(root):
    system = ({"role": "tool", "content": [text("x")]}, {"role": "assistant", "content": [text("y")]})
    short = ({"role": "assistant", "content": [IMAGE, IMAGE, text("one image only")]},)
    a = picture(40, 40, seed=1)
    samples = [
        sample(1, images=[a]),
        sample(2, images=[picture(4_000, 20, seed=2)]),  # 128 * 20 // 4000 = 0 px
        sample(3, caption=None),
        sample(4, caption=" "),
        sample(5, images=[a], caption=None),
        sample(6, caption="", question="what?"),
        sample(7, images=[a[:-40]]),
        sample(8, images=[b""]),
        Sample("web-000000000009", "web", (a,), short, {}),
        Sample("web-00000000000a", "web", (), system, {}),
    ]
    made = sharded(root, samples, size=1)
    dropped = {"image_too_thin": 1, "empty": 2, "no_loss_tokens": 2, "undecodable": 2, "bad_turns": 1}
    assert made.manifest.counts == {"in": 10, "kept": 2, "dropped": dropped}
    assert numbers(made) == [1, 10]  # equal sizes: dropping comes before cutting
    assert [row["shard"] for row in ledger(made)] == [0, 1]
    reasons = {int(r["key"].split("-")[1], 16): r for r in rows(made.path / "dropped.parquet")}
    assert {i: r["reason"] for i, r in reasons.items()} == {
        **{2: "image_too_thin", 3: "empty", 4: "empty", 5: "no_loss_tokens", 6: "no_loss_tokens"},
        **{7: "undecodable", 8: "undecodable", 9: "bad_turns"},
    }
    assert "2 image items but 1 images" in reasons[9]["error"]
    assert "128 * 20 // 4000" in reasons[2]["error"]
    inst = sharded(root, samples, template="inst")
    assert inst.manifest.counts["dropped"] == dropped | {"bad_turns": 2}


def test_templates_count_differently(root):
    one = [sample(1, images=[picture(40, 40)], caption="a cat", question="what is it?")]
    plain, inst = (ledger(sharded(root, one, template=t))[0] for t in ("plain", "inst"))
    assert inst["n_loss_tokens"] == plain["n_loss_tokens"] + 1  # EOS after the answer
    assert inst["n_tokens"] > plain["n_tokens"]
    assert (plain["template"], inst["template"]) == ("plain", "inst")


def kinds():
    """A picture of each kind, one sample with three of them, one without."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8825)[1] = "N"
    turned = picture(150, 70, seed=1, kind="JPEG", exif=exif)
    plain = picture(64, 96, seed=2, kind="JPEG")
    dressed = picture(64, 96, seed=3, kind="JPEG", comment=b"who")
    flat = io.BytesIO()
    Image.new("RGBA", (96, 64), (200, 10, 10, 128)).save(flat, "PNG")
    small = picture(50, 40, seed=4)
    return [
        *(sample(i, images=[one]) for i, one in enumerate([turned, plain, dressed, flat.getvalue(), small])),
        sample(7, images=[small, plain, turned], question="which?"),
        sample(8),
    ]


def test_pictures_at_their_grid(root):
    samples = {one.key: one for one in kinds()}
    before, made = sharded(root, kinds()), sharded(root, kinds(), jpeg_quality=80)
    counted = ("key", "shard", *COUNTS, "width_px", "height_px", "image_sha256")
    assert [[row[c] for c in counted] for row in ledger(made)] == [[row[c] for c in counted] for row in ledger(before)]
    table = {int(row["key"].split("-")[1], 16): row for row in ledger(made)}
    forms = {0: [0, 0, 1, 0], 1: [1, 0, 0, 0], 2: [0, 1, 0, 0], 3: [0, 0, 0, 1], 4: [0, 0, 1, 0], 7: [1, 0, 2, 0]}
    assert {i: [row[name] for name in FORMS] for i, row in table.items()} == forms | {8: [0, 0, 0, 0]}
    worst = []
    for row in ledger(made):
        stored = read_sample(made.path / "shards" / f"{row['shard']:05d}.tar", row["offset"], row["length"])
        one = samples[stored.key]
        assert stored.messages == one.messages and stored.meta == one.meta
        assert (row["image_bytes_in"], row["image_bytes"]) == tuple(sum(map(len, s.images)) for s in (one, stored))
        lost = []
        for came, kept in zip(one.images, stored.images, strict=True):
            px = {"patch_px": 32, "max_side_px": 128}
            exact, got = patchify(came, **px), patchify(kept, **px)
            assert exact.shape == got.shape and not Image.open(io.BytesIO(kept)).getexif() and b"who" not in kept
            if error := ((exact.astype(float) - got) ** 2).mean():
                lost.append(10 * np.log10(255**2 / error))
        assert row["psnr_db"] == (pytest.approx(min(lost), abs=0.006) if lost else None)
        worst += [row["psnr_db"]] if lost else []
    assert made.manifest.stats["psnr_db"] == {
        "lowest": min(worst),
        "median": pytest.approx(float(np.median(worst)), abs=0.006),
    }

    (shown,) = data_pages.grid_rows([before, made])  # no row where the pictures are as they came
    assert [shown[name] for name in data_pages.FORM_NAMES.values()] == [2, 1, 4, 1]
    assert (shown["images"], shown["lowest PSNR, dB"]) == (8, min(worst))
    (said,) = data_pages.role_rows([made])
    assert said["text tokens"] == sum(said[name] for name in ("system", "user", "assistant", "markup"))
    page = "\n\n".join(data_pages.shard_page([made], {}))
    assert "## Text by role" in page and "## Pictures at their patch grid" in page


def test_a_picture_that_does_not_decode_is_counted_where_no_signal_says_so(root):
    cut = picture(64, 64, kind="JPEG")[:-200]
    made = sharded(root, [sample(1, images=[cut]), sample(2)], signals=["image.hashes"], jpeg_quality=80)
    assert made.manifest.counts["dropped"] == {"undecodable": 1} and numbers(made) == [2]


def test_only_what_filter_kept_is_there(root):
    samples = [sample(i, caption="x" * i) for i in range(1, 9)]
    made = sharded(root, samples, keep={"long": "n_chars > 3"})
    assert numbers(made) == [4, 5, 6, 7, 8]
    assert made.manifest.counts == {"in": 5, "kept": 5, "dropped": {}}


def test_nothing_left_is_one_empty_shard(root):
    made = sharded(root, [sample(1), sample(2)], keep={"long": "n_chars > 1000"})
    assert made.manifest.counts == {"in": 0, "kept": 0, "dropped": {}}
    assert ledger(made) == []
    assert made.manifest.stats["n_samples"] == 0
    assert list(read_samples(made.path / "shards" / "00000.tar")) == []


def test_bytes_do_not_depend_on_workers(root, made):
    two = sharded(root, many(), workers=2)
    assert same_files(made, two)
    assert made.manifest.digest == two.manifest.digest
    resized = [sharded(root / str(n), kinds(), size=2, workers=n, jpeg_quality=80) for n in (1, 2)]
    assert same_files(*resized)


@pytest.mark.parametrize("how", ["killed before its json", "torn files", "counted in part", "resized"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(root, how):
    resized = {"jpeg_quality": 80} if how == "resized" else {}
    truth = sharded(root, many(), **resized)
    shards = truth.path / "shards"
    kept = (shards / "00000.tar").stat().st_mtime_ns
    (truth.path / "manifest.json").unlink()
    for i in (2, 4):
        (shards / f"{i:05d}.json").unlink()
    if how == "torn files":
        (shards / "00002.tar").write_bytes(b"torn")
        (shards / "00004.parquet").unlink()
        (shards / "00004.parquet.tmp").write_bytes(b"PAR1")
    if how == "counted in part":
        (truth.path / ".work" / "counted").mkdir(parents=True)
        (truth.path / ".work" / "counted" / "00001.parquet.tmp").write_bytes(b"PAR1")
        (truth.path / ".work" / "00002.tar.77").write_bytes(b"of a worker that outlived its run")
    again = sharded(root, many(), **resized)
    assert same_files(truth, again)
    assert (shards / "00000.tar").stat().st_mtime_ns == kept
    assert not list(again.path.rglob("*.tmp"))


KILLED = """
if __name__ == "__main__":  # workers import this file too
    import sys
    from pathlib import Path
    from raw import picture, sample, sharded

    samples = [sample(i, images=[picture(40, 40, seed=i)]) for i in range(60)]
    sharded(Path(sys.argv[1]), samples, size=1, per_shard=20, workers=2)
"""


def test_sigkill_leaves_no_worker_and_the_rerun_makes_the_same_bytes(root, tmp_path):
    samples = [sample(i, images=[picture(40, 40, seed=i)]) for i in range(60)]
    main = tmp_path / "main.py"
    main.write_text(KILLED)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, CHECKOUT)))}
    run = subprocess.Popen([sys.executable, main, root], cwd=CHECKOUT, env=env)
    while run.poll() is None and not list(root.glob("shard/web/*/shards/*.json")):
        time.sleep(0.01)
    workers = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    assert len(workers) >= 2
    assert not psutil.wait_procs(workers, timeout=20)[1]
    n_done = len(list(root.glob("shard/web/*/shards/*.json")))
    assert 0 < n_done < 60
    again = sharded(root, samples, size=1, per_shard=20)
    assert same_files(again, sharded(tmp_path / "truth", samples, size=1, per_shard=20))
    assert not list(again.path.rglob("*.tmp"))


def test_mistakes_in_a_spec(root):
    with pytest.raises(SpecError, match=r"shard\.template: Input should be 'plain' or 'inst'") as caught:
        sharded(root, [sample(1)], template="chatml")
    assert "\n" not in str(caught.value)
    with pytest.raises(
        SpecError, match=r"shard\.grid_pictures\.jpeg_quality: Input should be less than or equal to 100"
    ):
        sharded(root, [sample(1)], jpeg_quality=101)
    with pytest.raises(SpecError, match="max_side_px 100 is not a multiple of patch_px 32"):
        sharded(root, [sample(1)], tokens=TOKENS | {"max_side_px": 100})
    with pytest.raises(ValueError, match=r"sha256 is dadf.*, the spec says 0000"):
        sharded(root, [sample(1)], tokens=TOKENS | {"tokenizer_sha256": "0" * 64})


def test_a_source_without_decodes_is_warned_of(root, caplog):
    cut = picture(64, 64, kind="JPEG")[:-200]
    made = sharded(root, [sample(1, images=[cut])], signals=["image.hashes"])
    assert "a truncated image may reach training" in caplog.text
    assert made.manifest.counts["kept"] == 1
