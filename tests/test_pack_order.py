"""pack: batches, their balance, and an order that seed, sources, threads and kills leave as it must be."""

import dataclasses
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from packed import PACK_TOKENS, digests, job, lengths, mixed, packs, plan, rows, run

from solo import artifact
from solo.artifact import Artifact
from solo.pack import part as pack
from solo.spec import SpecError


def held(made: Artifact) -> list[frozenset]:
    """What each pack holds."""
    found: dict[int, set] = {}
    for r in plan(made):
        found.setdefault(r["pack"], set()).add((r["key"], r["exposure"], r["begin"]))
    return [frozenset(found[i]) for i in range(len(found))]


def test_the_incomplete_batch_is_the_emptiest(root: Path) -> None:
    whole, cut = run(root, mixed(), batch=1), run(root, mixed(), batch=8)
    n_out = len(packs(whole)) % 8
    assert n_out
    left_out = sorted(p["n_tokens"] for p in packs(whole))[:n_out]
    assert cut.manifest.stats["dropped_tokens"]["incomplete_batch"] == sum(left_out) < n_out * PACK_TOKENS
    assert set(held(cut)) < set(held(whole))


def test_balancing_moves_packs_inside_their_step_alone(root: Path) -> None:
    members = rows("text", np.random.default_rng(0).geometric(1 / 30, 4_000).clip(1, PACK_TOKENS).tolist())
    arrival, ordered = run(root, members, batch=1), run(root, members, batch=32)
    after = held(ordered)
    kept = set(after)
    before = [p for p in held(arrival) if p in kept]
    steps = [(set(before[i : i + 32]), set(after[i : i + 32])) for i in range(0, len(after), 32)]
    assert len(steps) > 10
    assert all(was == now for was, now in steps)
    assert before != after, "the guard: packs did move"


def test_ranks_are_balanced(root: Path) -> None:
    """Long-tailed text, 128 packs a step, up to 8 ranks; read from the files, as the loader shares packs out."""
    members = rows("text", np.random.default_rng(0).geometric(1 / 20, 40_000).clip(1, PACK_TOKENS).tolist())
    made = run(root, members, batch=128)
    costs = np.zeros(len(packs(made)))
    for r in plan(made):
        costs[r["pack"]] += r["n_tokens"] ** 2
    said = made.manifest.stats["attention_imbalance"]
    for n_ranks in (2, 4, 8):
        ranks = costs.reshape(-1, 128 // n_ranks, n_ranks).sum(1)  # rank r takes r, r + W, ... of the step
        worst = (ranks.max(1) / ranks.mean(1)).max()
        assert said[f"{n_ranks}_ranks"]["ordered"]["max"] == pytest.approx(worst, abs=1e-4)
        assert worst <= 1.05
        assert said[f"{n_ranks}_ranks"]["n_over_limit"] == said[f"{n_ranks}_ranks"]["n_over_bound"] == 0
        assert 1 <= said[f"{n_ranks}_ranks"]["bound"]["max"] <= worst + 1e-6
        assert worst < said[f"{n_ranks}_ranks"]["arrival"]["mean"]
    assert set(run(root, mixed(), batch=6).manifest.stats["attention_imbalance"]) == {"2_ranks"}


def test_fill_is_of_all_packs_that_are_trained(root: Path) -> None:
    members = rows("a", [100, 60, 40, 30]) + rows("b", [60], images=1)
    stats = run(root, members).manifest.stats
    assert (stats["n_packs"], stats["n_shared_packs"]) == (3, 1), "the ends, 30 and 60 tokens, share one"
    assert stats["fill"] == stats["fill_limit"] == pytest.approx(290 / 300, abs=1e-6)
    assert stats["fill_without_last"] == 1
    full = run(root, members, batch=2).manifest.stats
    assert (full["n_packs"], full["fill"]) == (2, 1)
    assert full["dropped_tokens"]["incomplete_batch"] == 90, "what is dropped is counted"
    loose = run(root, rows("a", [70, 70, 20])).manifest.stats
    assert (loose["fill"], loose["fill_limit"]) == (pytest.approx(0.8), pytest.approx(0.8))
    loose = run(root, rows("a", [60, 60, 60])).manifest.stats
    assert (loose["fill"], loose["fill_limit"]) == (pytest.approx(0.6), pytest.approx(0.9)), (
        "a limit may be out of reach"
    )
    assert run(root, rows("b", [50], images=1)).manifest.stats["fill_without_last"] is None


def test_fewer_packs_than_a_batch(root: Path) -> None:
    with pytest.raises(
        SpecError, match=r"pack/toy: have 2 packs of 100 tokens, batch_packs needs 3 .*lower batch_packs"
    ):
        run(root, rows("a", [90, 90]), batch=3)
    with pytest.raises(SpecError, match=r"have 0 packs.*\(1 of 1 documents are longer than a pack\)"):
        run(root, rows("a", [101], images=1))


def test_other_sources_change_no_pack_of_a_source_but_its_end_nor_their_order(root: Path) -> None:
    alone = run(root, rows("captions", lengths(60, 1), images=1))
    among = run(root, rows("captions", lengths(60, 1), images=1) + rows("text", lengths(40, 2)))

    def contents(made: Artifact, numbers: set[int]) -> list[tuple]:
        held: dict[int, list] = {}
        for r in plan(made):
            if r["pack"] in numbers:
                held.setdefault(r["pack"], []).append((r["key"], r["exposure"]))
        return [tuple(held[i]) for i in sorted(held)]

    whole = {p["pack"] for p in packs(alone)} - {min(packs(alone), key=lambda p: p["n_tokens"])["pack"]}
    mine = {p["pack"] for p in packs(among) if p["source"] == "captions"}
    assert contents(alone, whole) == contents(among, mine) and len(mine) > 10
    turns = [r["source"] for r in packs(among)]
    assert turns not in (sorted(turns), sorted(turns, reverse=True)), "packs of both sources are mixed"


def test_the_seed_moves_the_order(root: Path) -> None:
    members = rows("a", lengths(100, 1))
    assert [r["key"] for r in plan(run(root, members))] != [r["key"] for r in plan(run(root, members, seed=2))]


def test_equal_bytes_on_one_and_four_threads_and_twice(tmp_path: Path) -> None:
    members = rows("a", lengths(5_000, 1), repeats=2) + rows("b", lengths(2_000, 2), images=1)
    made = [run(tmp_path / str(i), members, workers=w, by=by) for i, (w, by) in enumerate([(1, "mix"), (4, "mix")])]
    assert digests(made[0]) == digests(made[1])
    assert set(digests(made[0])) == {"plan.parquet", "packs.parquet"}
    made[0].path.joinpath("manifest.json").unlink()
    again = run(tmp_path / "0", members, by="mix")
    assert digests(again) == digests(made[0])


def _die_when_packed(root: Path) -> None:
    wanted = dataclasses.replace(job(root, mixed()), progress=lambda _: os.kill(os.getpid(), signal.SIGKILL))
    artifact.make(wanted, pack.make_plan)


def test_killed_and_run_again_gives_the_same_bytes(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_die_when_packed, args=(tmp_path / "killed",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    half = job(tmp_path / "killed", mixed()).out
    assert half.is_dir()
    assert not (half / "manifest.json").exists()
    # A kill between and inside the two writes leaves these.
    (half / "plan.parquet").write_bytes(b"PAR1 of another run")
    (half / "packs.parquet.tmp").write_bytes(b"half a file")
    made = [run(tmp_path / name, mixed()) for name in ("killed", "whole")]
    assert digests(made[0]) == digests(made[1])
