import hashlib
import io
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_tokens import TOKENIZER, TOKENS

from solo.sample import IMAGE, Sample, end_tar, make_key, text, write_sample
from solo.sequence.loader import NO_TARGET, DamagedSampleError, PackLoader, assemble, read_piece
from solo.sequence.patches import patchify

PACK_TOKENS = 48
N_PACKS = 12
HELLO = [22557, 1526]  # "Hello world"
V, P, SEP, END = 32_000, 32_001, 32_002, 32_004


def picture(seed, width=64, height=32):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def make_sample(i):
    """Every third sample is text, the others show a picture; even ones come from `web`, odd ones from `chat`."""
    source = "web" if i % 2 == 0 else "chat"
    words = text("Hello world" + " again" * (i % 4))
    images = () if i % 3 == 0 else (picture(i),)
    shown = [IMAGE] * len(images)
    if source == "web":
        messages = ({"role": "assistant", "content": [*shown, words]},)
    else:
        messages = (
            {"role": "user", "content": [*shown, text("What?")]},
            {"role": "assistant", "content": [words]},
        )
    return Sample(make_key(source, str(i)), source, images, messages, {})


def plan_row(pack, slot, place, piece, *, begin=0):
    sample, shard, offset, length, template = place
    return {
        "pack": pack,
        "slot": slot,
        "key": sample.key,
        "exposure": 0,
        "source": sample.source,
        "shard": shard,
        "offset": offset,
        "length": length,
        "template": template,
        "begin": begin,
        "end": begin + len(piece.ids),
        "n_tokens": len(piece.ids),
        "n_patches": len(piece.patches),
        "n_loss_tokens": piece.n_loss_tokens,
    }


def write_shards(folder, samples):
    """Two tars per source; returns each sample with its place."""
    places = []
    for source, template in (("web", "plain"), ("chat", "inst")):
        mine = [s for s in samples if s.source == source]
        (folder / source / "shards").mkdir(parents=True)
        for shard in range(2):
            with (folder / source / "shards" / f"{shard:05d}.tar").open("wb") as tar:
                for sample in mine[shard::2]:
                    offset = tar.tell()
                    places.append((sample, shard, offset, write_sample(tar, sample), template))
                end_tar(tar)
            ledger = [
                {"key": s.key, "sha256": hashlib.sha256(tar_bytes(tar.name, offset, length)).hexdigest()}
                for s, n, offset, length, _ in places
                if n == shard and s.source == source
            ]
            schema = pa.schema([("key", pa.string()), ("sha256", pa.string())])
            pq.write_table(pa.Table.from_pylist(ledger, schema), folder / source / "shards" / f"{shard:05d}.parquet")
    return sorted(places, key=lambda place: place[0].key)


def tar_bytes(path, offset, length):
    return Path(path).read_bytes()[offset : offset + length]


def write_plan(folder, packs, *, rows_per_group=5):
    rows = [row for pack in packs for row in pack]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "plan.parquet", row_group_size=rows_per_group)
    heads = []
    for i, pack in enumerate(packs):
        counts = {name: sum(r[name] for r in pack) for name in ("n_tokens", "n_patches", "n_loss_tokens")}
        first_row = sum(len(p) for p in packs[:i])
        heads.append({"pack": i, "first_row": first_row, "n_rows": len(pack), **counts, "source": "mix"})
    pq.write_table(pa.Table.from_pylist(heads), folder / "packs.parquet")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Shards of 40 samples and a plan of 12 packs of one to four documents."""
    folder = tmp_path_factory.mktemp("made")
    places = write_shards(folder, [make_sample(i) for i in range(40)])
    packs, at = [], 0
    for i in range(N_PACKS):
        pack, used = [], 0
        for slot in range(1 + i % 4):
            place = places[at]
            piece = read_piece(place[0], TOKENIZER, place[4])
            if used + len(piece.ids) > PACK_TOKENS:
                break
            pack.append(plan_row(i, slot, place, piece))
            used, at = used + len(piece.ids), at + 1
        packs.append(pack)
    write_plan(folder / "plan", packs)
    return folder, places, packs


def loader(folder, plan="plan", **options):
    return PackLoader(folder / plan, {s: folder / s for s in ("web", "chat")}, TOKENS, PACK_TOKENS, **options)


def same(a, b):
    names = ("input_ids", "position_ids", "document_ids", "patches", "patch_index", "targets")
    return (a.index, a.segments) == (b.index, b.segments) and all(
        torch.equal(getattr(a, n), getattr(b, n)) for n in names
    )


def test_a_pack_by_hand():
    seen = Sample("web-a", "web", (picture(1),), ({"role": "assistant", "content": [IMAGE, text("Hello world")]},), {})
    asked = Sample(
        "chat-b",
        "chat",
        (picture(2, 32, 64),),
        (
            {"role": "user", "content": [IMAGE, text("Hello world")]},
            {"role": "assistant", "content": [text("Hello world")]},
        ),
        {},
    )
    pieces = [read_piece(seen, TOKENIZER, "plain"), read_piece(asked, TOKENIZER, "inst")]
    pack = assemble(pieces, index=7, pack_tokens=28)
    first = [1, V, P, P, END, *HELLO]
    second = [V, P, SEP, P, V, 1, 733, 16289, 28793, *HELLO, 733, 28748, 16289, 28793, *HELLO, 2]
    no = NO_TARGET
    assert pack.input_ids.tolist() == [*first, *second, 2, 2, 2]
    assert pack.position_ids.tolist() == [*range(7), *range(18), 0, 0, 0]
    assert pack.document_ids.tolist() == [0] * 7 + [1] * 18 + [-1] * 3
    assert pack.patch_index.tolist() == [-1, -1, 0, 1, -1, -1, -1, -1, 2, -1, 3] + [-1] * 17
    assert pack.targets.tolist() == [no] * 4 + HELLO + [no] * 15 + [*HELLO, 2] + [no] * 4
    assert pack.segments == [("web", "web-a", 0, 7), ("chat", "chat-b", 7, 25)]
    assert pack.loss_ranges() == [("web", "web-a", 0, 2), ("chat", "chat-b", 2, 5)]
    assert (pack.index, pack.n_tokens, pack.n_loss_tokens) == (7, 25, 5)
    px = {"patch_px": 32, "max_side_px": 1024}
    expected = np.concatenate([patchify(picture(1), **px), patchify(picture(2, 32, 64), **px)])
    assert np.array_equal(pack.patches.numpy(), expected)


def test_padding_is_the_vocabularys_eos(made):
    folder, _, _ = made
    other = PackLoader(folder / "plan", loader(folder).shards, TOKENS.model_copy(update={"eos": "<s>"}), PACK_TOKENS)
    n_padding = 0
    for ours, theirs in ((loader(folder).load(i), other.load(i)) for i in range(3)):
        padding = ours.document_ids < 0
        n_padding += int(padding.sum())
        assert (ours.input_ids[padding] == 2).all() and (theirs.input_ids[padding] == 1).all()
    assert n_padding


def test_every_pack_holds_what_the_plan_says(made):
    folder, _, packs = made
    packs_loader = loader(folder)
    assert len(packs_loader) == N_PACKS and sum(len(p) for p in packs) > 20
    assert {row["source"] for p in packs for row in p} == {"web", "chat"}
    heads = pq.read_table(folder / "plan" / "packs.parquet").to_pylist()
    for i in reversed(range(N_PACKS)):  # any order: a pack does not depend on what was loaded before
        pack, head = packs_loader.load(i), heads[i]
        assert packs_loader.rows(i) == packs[i]
        assert [key for _, key, _, _ in pack.segments] == [row["key"] for row in packs[i]]
        assert (pack.n_tokens, len(pack.patches), pack.n_loss_tokens) == (
            *(head["n_tokens"], head["n_patches"], head["n_loss_tokens"]),
        )
        assert (pack.document_ids >= 0).sum() == head["n_tokens"]
        assert sorted(pack.patch_index[pack.patch_index >= 0].tolist()) == list(range(head["n_patches"]))
        assert len(pack.input_ids) == PACK_TOKENS


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("first_step", [0, 1, 2, 3])
def test_each_step_is_its_packs_on_any_number_of_ranks(made, world_size, first_step):
    packs_loader = loader(made[0])
    ranks = [
        [
            pack.index
            for pack in packs_loader.iterate(
                first_step, batch_packs=4, rank=rank, world_size=world_size, workers=rank % 3
            )
        ]
        for rank in range(world_size)
    ]
    for rank, indices in enumerate(ranks):
        assert indices == [i for i in range(first_step * 4, N_PACKS) if i % 4 % world_size == rank]
    each = 4 // world_size
    for step in range(first_step, N_PACKS // 4):
        at = (step - first_step) * each
        got = sorted(i for indices in ranks for i in indices[at : at + each])
        assert got == list(range(step * 4, step * 4 + 4))


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_resumed_run_sees_what_an_uninterrupted_one_saw(made, workers):
    whole = list(loader(made[0]).iterate(0, batch_packs=3))
    assert len(whole) == N_PACKS
    for first_step in range(5):
        resumed = list(loader(made[0]).iterate(first_step, batch_packs=3, workers=workers))
        assert len(resumed) == N_PACKS - 3 * first_step
        assert all(same(a, b) for a, b in zip(whole[3 * first_step :], resumed, strict=True))


def test_a_reader_that_stops_early_leaves_no_thread(made):
    before = threading.active_count()
    packs = loader(made[0]).iterate(0, batch_packs=3, workers=2)
    assert next(packs).index == 0
    packs.close()
    assert threading.active_count() == before


def test_ranks_that_cannot_share_a_step_are_refused(made):
    for batch_packs, world_size in ((4, 3), (5, 1)):
        with pytest.raises(ValueError, match="each must be a multiple of the next"):
            next(loader(made[0]).iterate(0, batch_packs=batch_packs, world_size=world_size))


@pytest.mark.parametrize("column", ["n_tokens", "n_patches", "n_loss_tokens"])
def test_a_count_that_differs_from_the_plan_names_the_key(made, column):
    folder, _, packs = made
    wrong = [dict(row) for row in packs[0]]
    wrong[-1][column] += 1
    write_plan(folder / f"wrong-{column}", [wrong])
    for max_damaged in (0, 9):  # code that changed is no damage: it is never left out
        with pytest.raises(ValueError, match=rf"{wrong[-1]['key']}: .* the plan says"):
            loader(folder, f"wrong-{column}", max_damaged=max_damaged).load(0)


def test_a_wrong_place_names_the_key(made):
    folder, places, packs = made
    row = packs[1][0]
    other = next(p for p in places if p[0].source == row["source"] and p[0].key != row["key"])
    changes = ({"shard": 9}, {"offset": row["offset"] + 7}, {"shard": other[1], "offset": other[2], "length": other[3]})
    for i, change in enumerate(changes):
        write_plan(folder / f"place-{i}", [[{**row, **change, "pack": 0}]])
        with pytest.raises(ValueError, match=rf"^{row['key']}: "):
            loader(folder, f"place-{i}").load(0)


def test_a_long_text_is_cut_and_each_piece_loses_its_first_target(tmp_path):
    long = Sample("web-0", "web", (), ({"role": "assistant", "content": [text("Hello world " * 60)]},), {})
    (place,) = write_shards(tmp_path, [long])
    whole = read_piece(long, TOKENIZER, "plain")
    n = len(whole.ids)
    assert 2 * PACK_TOKENS < n <= 3 * PACK_TOKENS and whole.n_loss_tokens == n - 1
    packs = []
    for i, begin in enumerate(range(0, n, PACK_TOKENS)):
        piece = read_piece(long, TOKENIZER, "plain", begin=begin, end=min(begin + PACK_TOKENS, n))
        assert piece.n_loss_tokens == len(piece.ids) - 1
        packs.append([plan_row(i, 0, place, piece, begin=begin)])
    write_plan(tmp_path / "plan", packs)
    loaded = [loader(tmp_path).load(i) for i in range(3)]
    assert np.concatenate([p.input_ids[: p.n_tokens] for p in loaded]).tolist() == whole.ids.tolist()
    assert all(p.position_ids[0] == 0 and p.targets[p.n_tokens - 1] == NO_TARGET for p in loaded)
    assert all(torch.equal(p.targets[: p.n_tokens - 1], p.input_ids[1 : p.n_tokens]) for p in loaded)


def test_documents_with_images_are_not_cut_and_packs_do_not_overflow():
    sample = make_sample(2)
    n = len(read_piece(sample, TOKENIZER, "plain").ids)
    with pytest.raises(ValueError, match=rf"{sample.key}: cannot cut 0:{n - 1} from {n} tokens with 1 images"):
        read_piece(sample, TOKENIZER, "plain", end=n - 1)
    piece = read_piece(sample, TOKENIZER, "plain")
    with pytest.raises(ValueError, match=rf"pack 3: {2 * n} tokens in 2 documents > pack_tokens {2 * n - 1}"):
        assemble([piece, piece], index=3, pack_tokens=2 * n - 1)


def test_an_extended_piece_is_the_longer_prompt():
    prompt = read_piece(make_sample(1), TOKENIZER, "inst")
    longer = prompt.extended([8, 9])
    n = len(prompt.ids)
    assert longer.ids.tolist() == [*prompt.ids.tolist(), 8, 9]
    assert longer.is_target[n:].tolist() == [False, False] and longer.patch_index[n:].tolist() == [-1, -1]
    assert len(prompt.ids) == n and prompt.extended([]).ids.tolist() == prompt.ids.tolist()


@pytest.mark.parametrize("workers", [0, 3])
def test_the_fast_path_gives_the_same_packs_within_two_levels(made, workers):
    def cut(packs):
        return [replace(pack, patches=pack.patches.clone()) for pack in packs]

    exact = list(loader(made[0]).iterate(0, batch_packs=3))
    fast = cut(loader(made[0], decode="fast").iterate(0, batch_packs=3, workers=workers))
    assert all(same(replace(a, patches=b.patches), b) for a, b in zip(exact, fast, strict=True))
    differences = [(a.patches.int() - b.patches.int()).abs() for a, b in zip(exact, fast, strict=True)]
    assert max(int(d.max()) for d in differences if len(d)) <= 2
    again = cut(list(loader(made[0], decode="fast").iterate(0, batch_packs=3)))  # all of them alive together
    assert all(same(a, b) for a, b in zip(fast, again, strict=True))


def damaged(made, tmp_path, at, value=None):
    """A copy of the shards in which byte `at` of the first document of pack 2 is wrong; its plan row."""
    folder, _, packs = made
    shutil.copytree(folder, tmp_path / "copy")
    row = packs[2][0]
    path = tmp_path / "copy" / row["source"] / "shards" / f"{row['shard']:05d}.tar"
    data = bytearray(path.read_bytes())
    where = row["offset"] + at(row) if callable(at) else row["offset"] + at
    data[where] = data[where] ^ 0x41 if value is None else value
    path.write_bytes(data)
    return tmp_path / "copy", row


def in_the_text(row):
    """Offset of a letter of the JSON, so that it parses and says something else."""
    return 512 + 60


@pytest.mark.parametrize("at", [0, 100, 130, 512, in_the_text])
def test_a_damaged_document_names_key_and_place_and_stops(made, tmp_path, at):
    folder, row = damaged(made, tmp_path, at)
    place = rf"{row['shard']:05d}\.tar\[{row['offset']}:\+{row['length']}\] of {row['source']}"
    with pytest.raises(DamagedSampleError, match=rf"^{row['key']}: no sample at {place}"):
        list(loader(folder).iterate(0, batch_packs=3, workers=2))


def test_damaged_documents_are_left_out_and_counted_when_the_recipe_allows(made, tmp_path):
    folder, row = damaged(made, tmp_path, 0)
    whole = list(loader(made[0]).iterate(0, batch_packs=3))
    tolerant = loader(folder, max_damaged=1)
    packs = list(tolerant.iterate(0, batch_packs=3, workers=2))
    out = [(r["source"], r["key"], r["n_tokens"]) for p in packs for r in p.left_out]
    assert tolerant.n_left_out == 1 and out == [(row["source"], row["key"], row["n_tokens"])]
    assert all(same(a, b) for a, b in zip(whole, packs, strict=True) if b.index != 2)
    kept = [key for _, key, _, _ in packs[2].segments]
    assert kept == [key for _, key, _, _ in whole[2].segments if key != row["key"]]
    assert packs[2].n_tokens == whole[2].n_tokens - row["n_tokens"]
    assert len(packs[2].patches) == len(whole[2].patches) - row["n_patches"]
    assert same(loader(folder, max_damaged=1, decode="fast").load(2), packs[2])  # its pictures need no resize
    assert same(loader(folder, max_damaged=1).load(2), packs[2])  # which document is out does not depend on the order


def test_a_pack_of_which_nothing_is_left_is_padding_and_too_much_damage_stops(made, tmp_path):
    folder, _, packs = made
    shutil.copytree(folder, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*.tar"):
        path.write_bytes(b"x" * path.stat().st_size)
    n = len(packs[3])
    pack = loader(tmp_path / "copy", max_damaged=n).load(3)
    assert len(pack.left_out) == n and pack.segments == [] and pack.n_tokens == pack.n_loss_tokens == 0
    assert pack.loss_ranges() == [] and (pack.document_ids == -1).all() and pack.patches.shape == (0, 3072)
    with pytest.raises(DamagedSampleError, match=rf"damaged document {n}, max_damaged is {n - 1}"):
        loader(tmp_path / "copy", max_damaged=n - 1).load(3)
