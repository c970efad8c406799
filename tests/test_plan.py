"""Resumption: at any step, on any number of ranks and workers, every pack once; on another plan, not at all."""

import io
import json
import random
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_loader import TOKENIZER, TOKENS, loader, plan_row, write_plan, write_shards

from solo.pack.plan import Plan
from solo.sample import Sample, end_tar, make_key, text, write_sample
from solo.sequence.loader import PackLoader, read_piece
from solo.sequence.shards import Shards

BATCH = 8
N_STEPS = 208
IDENTITY = {"digest": "a" * 64, "inputs": {"curate/m": "b" * 64}, "spec": {"seed": 1, "batch_packs": BATCH}}


def document(i):
    said = ({"role": "assistant", "content": [text(f"number {i}")]},)
    return Sample(make_key("web", str(i)), "web", (), said, {})


def manifest(folder, **changes):
    spec = IDENTITY["spec"] | {"pack_tokens": 48} | changes.pop("spec", {})
    (folder / "manifest.json").write_text(json.dumps(IDENTITY | changes | {"spec": spec}))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """1,664 packs of one short text each: 208 steps of 8."""
    folder = tmp_path_factory.mktemp("run")
    places = write_shards(folder, [document(i) for i in range(BATCH * N_STEPS)])
    packs = [[plan_row(i, 0, place, read_piece(place[0], TOKENIZER, "plain"))] for i, place in enumerate(places)]
    write_plan(folder / "plan", packs, rows_per_group=100)
    manifest(folder / "plan")
    return folder, [place[0].key for place in places]


def trained(packs_loader, first, last, world_size, workers):
    """(step, key) of what the ranks of a run train in steps [first, last), each rank as far as it gets."""
    each, seen = BATCH // world_size, []
    for rank in range(world_size):
        packs = packs_loader.iterate(first, batch_packs=BATCH, rank=rank, world_size=world_size, workers=workers)
        for step in range(first, last):
            seen += [(step, key) for _ in range(each) for _, key, _, _ in next(packs).segments]
        packs.close()
    return seen


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 8), (2, 2), (4, 0), (4, 8), (8, 2)])
def test_every_key_is_trained_once_over_200_resumptions(run, world_size, workers):
    """Each step is followed by a kill; some kills come after work that no checkpoint holds, which is done again."""
    folder, keys = run
    chance = random.Random(world_size * 100 + workers)
    packs_loader = loader(folder)
    ledger, step, n_resumed, n_lost = [], 0, 0, 0
    while step < N_STEPS:
        state = json.loads(json.dumps(packs_loader.plan.state(step)))  # through a checkpoint's JSON
        first = packs_loader.plan.step_of(state)
        if chance.random() < 0.02 and first + 2 <= N_STEPS:  # killed before the checkpoint of its second step
            n_lost += len(trained(packs_loader, first, first + 2, world_size, workers))
        # the ranks change too: half of the segments run on the next number of them
        ranks = world_size if chance.random() < 0.5 else {1: 2, 2: 4, 4: 8, 8: 1}[world_size]
        ledger += trained(packs_loader, first, first + 1, ranks, workers)
        step, n_resumed = first + 1, n_resumed + 1
    assert n_resumed == N_STEPS >= 200 and n_lost > 0
    assert sorted(ledger) == sorted((i // BATCH, key) for i, key in enumerate(keys))
    assert len({key for _, key in ledger}) == len(keys) == len(ledger)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"digest": "c" * 64}, ["the pack plan aaaaaaaa, not cccccccc"]),
        ({"inputs": {"curate/m": "d" * 64}}, ["the mix lock bbbbbbbb, not dddddddd"]),
        ({"spec": {"seed": 2}}, ["the seed 1, not 2"]),
        ({"spec": {"batch_packs": 4}}, ["the packs of a step 8, not 4"]),
        ({"spec": {"pack_tokens": 96}}, ["the tokens of a pack 48, not 96"]),
        (
            {"digest": "c" * 64, "spec": {"seed": 2, "batch_packs": 16}},
            ["the pack plan aaaaaaaa, not cccccccc", "the seed 1, not 2", "the packs of a step 8, not 16"],
        ),
    ],
)
def test_a_state_of_another_plan_is_refused_by_name(tmp_path, changes, named):
    write_plan(tmp_path, [[row] for row in rows_of(16)])
    manifest(tmp_path)
    state = Plan(tmp_path).state(2)
    assert Plan(tmp_path).step_of(state) == 2 and state["step"] == 2
    manifest(tmp_path, **changes)
    with pytest.raises(ValueError, match="counts in") as error:
        Plan(tmp_path).step_of(state)
    assert all(name in str(error.value) for name in named)
    assert str(error.value).count(", not ") == len(named)


def test_a_step_beyond_the_plan_and_a_plan_without_identity_are_refused(tmp_path):
    write_plan(tmp_path, [[row] for row in rows_of(16)])
    with pytest.raises(ValueError, match="no manifest"):
        Plan(tmp_path).state(0)
    manifest(tmp_path)
    for step in (-1, 3, "1", None):
        with pytest.raises(ValueError, match=f"is at step {step}, the plan has 2"):
            Plan(tmp_path).step_of({**Plan(tmp_path).state(0), "step": step})


def rows_of(n):
    piece = read_piece(document(0), TOKENIZER, "plain")
    return [plan_row(i, 0, (document(0), 0, 0, 512, "plain"), piece) for i in range(n)]


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """A plan of a million documents in 125,000 packs, over one tar of 512 samples."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "web" / "shards").mkdir(parents=True)
    n, each, samples, tar = 1_000_000, 8, [document(i) for i in range(512)], io.BytesIO()
    offsets = np.cumsum([0] + [write_sample(tar, sample) for sample in samples])
    end_tar(tar)
    (folder / "web" / "shards" / "00000.tar").write_bytes(tar.getvalue())
    pieces = [read_piece(sample, TOKENIZER, "plain") for sample in samples]
    which, zeros = np.arange(n) % len(samples), np.zeros(n, np.int32)
    n_tokens = np.array([len(p.ids) for p in pieces], np.int32)[which]
    plan = {
        "pack": np.arange(n, dtype=np.int32) // each,
        "slot": (np.arange(n) % each).astype(np.int32),
        "key": pa.DictionaryArray.from_arrays(which.astype(np.int32), [s.key for s in samples]).cast(pa.string()),
        "source": pa.array(["web"]).take(pa.array(zeros)),
        "template": pa.array(["plain"]).take(pa.array(zeros)),
        "shard": zeros,
        "offset": offsets[:-1][which],
        "length": np.diff(offsets)[which],
        "begin": zeros,
        "end": n_tokens,
        "n_tokens": n_tokens,
        "n_patches": zeros,
        "n_loss_tokens": n_tokens - 1,
    }
    (folder / "plan").mkdir()
    pq.write_table(pa.table(plan), folder / "plan" / "plan.parquet", row_group_size=65_536)
    packs = {"pack": np.arange(n // each, dtype=np.int32), "first_row": np.arange(0, n, each)}
    packs["n_rows"] = np.full(n // each, each, np.int32)
    pq.write_table(pa.table(packs), folder / "plan" / "packs.parquet")
    return folder, n // each


@pytest.mark.parametrize("share", [0.0, 0.37, 0.999])
@pytest.mark.parametrize("workers", [0, 8])
def test_the_first_batch_comes_at_once_and_nothing_consumed_is_read(long_run, share, workers):
    folder, n_packs = long_run
    first_step = int(share * n_packs / BATCH)
    shards = Shards({"web": folder / "web"})
    began = time.monotonic()
    packs_loader = PackLoader(folder / "plan", shards, TOKENS, 256)
    packs = packs_loader.iterate(first_step, batch_packs=BATCH, workers=workers)
    batch = [next(packs) for _ in range(BATCH)]
    seconds = time.monotonic() - began
    packs.close()
    assert [p.index for p in batch] == list(range(first_step * BATCH, (first_step + 1) * BATCH))
    rows = [row for p in batch for row in packs_loader.rows(p.index)]
    assert [key for p in batch for _, key, _, _ in p.segments] == [row["key"] for row in rows]
    assert seconds < 5
    n_ahead = workers + 2 if workers else 0
    assert BATCH * 8 <= shards.read_so_far.n_reads <= (BATCH + n_ahead) * 8
    assert shards.read_so_far.n_bytes <= (BATCH + n_ahead) * 8 * 1536
    assert packs_loader.plan.n_groups_read <= 2  # of 16 in the plan: the rows before are not read
