"""Packing: every document once, no pack over capacity, full packs, and a prefix that later documents cannot move."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solo.pack import bestfit

cases = st.integers(1, 200).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=300))
)


def packs(lengths: list[int], capacity: int, window: int = bestfit.WINDOW) -> list[list[int]]:
    made = bestfit.pack(np.array(lengths, dtype=np.int64), capacity, window=window)
    return [p.tolist() for p in np.split(made.order, made.first[1:-1])] if len(made.first) > 1 else []


def fill(lengths: np.ndarray, capacity: int) -> float:
    made = bestfit.pack(lengths, capacity)
    return float(lengths.sum() / ((len(made.first) - 1) * capacity))


@pytest.mark.parametrize(
    ("lengths", "want"),
    [
        ([], []),
        ([10], [[0]]),
        ([10, 10, 10], [[0], [1], [2]]),  # each of exactly capacity
        ([1] * 10, [[0, 9, 8, 7, 6, 5, 4, 3, 2, 1]]),
        ([6, 7, 4, 3], [[0, 2], [1, 3]]),  # the one that closes the gap
        ([4, 9, 5, 1], [[0, 2, 3], [1]]),  # two that close it together, though 5 alone is no exact fit
        ([4, 3, 3, 9], [[0, 1, 2], [3]]),  # two of equal length, oldest first
        ([4, 3, 9, 8], [[0, 1], [2], [3]]),  # 3 is there once, so it is no pair
        ([5, 2, 4, 9], [[0, 2], [1], [3]]),  # nothing exact: the longest that fits
        ([9, 9, 9], [[0], [1], [2]]),
    ],
)
def test_hand_written(lengths: list[int], want: list[list[int]]) -> None:
    got = packs(lengths, 10)
    assert [sorted(p) for p in got] == [sorted(p) for p in want]
    assert [p[:1] for p in got] == [p[:1] for p in want], "a pack begins with the document that has waited longest"


def test_bulk_stays_in_stream_order() -> None:
    lengths = np.random.default_rng(0).integers(20, 80, 5_000)
    made = bestfit.pack(lengths, 4_096, window=64)
    in_order = np.diff(made.order) == 1
    assert in_order.mean() > 0.9


@given(cases, st.integers(1, 40))
def test_every_document_once_and_no_pack_over_capacity(case: tuple[int, list[int]], window: int) -> None:
    capacity, lengths = case
    made = packs(lengths, capacity, window)
    assert sorted(i for p in made for i in p) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in p) <= capacity for p in made)
    assert made == packs(lengths, capacity, window)


@settings(max_examples=200)
@given(cases, st.integers(1, 20), st.data())
def test_appending_moves_no_stable_pack(case: tuple[int, list[int]], window: int, data: st.DataObject) -> None:
    capacity, lengths = case
    more = data.draw(st.lists(st.integers(1, capacity), max_size=50))
    n_stable = bestfit.pack(np.array(lengths, dtype=np.int64), capacity, window=window).n_stable
    assert packs(lengths, capacity, window)[:n_stable] == packs(lengths + more, capacity, window)[:n_stable]


@given(cases, st.integers(1, 20))
def test_no_document_waits_longer_than_the_window(case: tuple[int, list[int]], window: int) -> None:
    capacity, lengths = case
    n_stable = bestfit.pack(np.array(lengths, dtype=np.int64), capacity, window=window).n_stable
    made = packs(lengths, capacity, window)[:n_stable]
    reached = -1  # the last document of the stream that has been placed
    seen_by = {}  # first pack after which a later document was placed
    for number, pack in enumerate(made):
        for i in range(reached + 1, max(pack) + 1):
            seen_by[i] = number
        reached = max(reached, *pack)
        assert all(number - seen_by[i] <= window for i in pack)


@settings(max_examples=100)
@given(cases)
def test_a_stream_the_window_holds_is_packed_at_least_as_well_as_first_fit(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    space: list[int] = []
    for n in lengths:
        at = next((i for i, left in enumerate(space) if left >= n), None)
        if at is None:
            space.append(capacity - n)
        else:
            space[at] -= n
    assert len(packs(lengths, capacity)) <= max(len(space), 1) or not lengths


@pytest.mark.parametrize("seed", range(5))
def test_a_short_stream_takes_no_pack_more_than_its_tokens_need(seed: int) -> None:
    """Charts of the sample: seven or eight documents a pack, no two of which close a gap."""
    lengths = np.random.default_rng(seed).integers(103, 176, 120)
    sums = [int(lengths[p].sum()) for p in packs(lengths.tolist(), 1_024)]
    assert len(sums) == -(-lengths.sum() // 1_024)
    assert sorted(sums)[1] >= 0.98 * 1_024


@pytest.mark.parametrize("seed", range(3))
def test_short_texts_fill_all_packs_but_the_last(seed: int) -> None:
    """Three to eight documents a pack, of few streams that are as short: what is lost is lost for good."""
    lengths = np.random.default_rng(seed).integers(60, 320, 100)
    sums = sorted(int(lengths[p].sum()) for p in packs(lengths.tolist(), 1_024))
    assert sum(sums[1:]) >= 0.999 * 1_024 * len(sums[1:])


def test_a_few_lengths_fill_packs() -> None:
    """Questions about small pictures: pairs of twenty lengths have few sums."""
    lengths = np.random.default_rng(0).choice([18, 19, 20, 22, 23, 24, 25, 26, 51, 52, 54, 56, 58, 60], 6_000)
    sums = sorted(int(lengths[p].sum()) for p in packs(lengths.tolist(), 512))
    assert sum(sums[1:]) >= 0.9995 * 512 * len(sums[1:])


def test_most_packs_are_stable_and_window_bounds_the_rest() -> None:
    lengths = np.random.default_rng(1).integers(20, 80, 20_000)
    made = bestfit.pack(lengths, 4_096, window=64)
    assert made.n_stable >= len(made.first) - 1 - 64


@pytest.mark.parametrize("capacity", [32_768, 10_000, 2_047])
def test_small_documents_fill_packs(capacity: int) -> None:
    rng = np.random.default_rng(2)
    captions = np.clip(rng.normal(250, 80, 200_000).astype(np.int64), 40, 1_200)
    assert fill(captions, capacity) >= 0.999


def test_text_and_mixes_fill_packs() -> None:
    rng = np.random.default_rng(3)
    text = np.clip(rng.lognormal(6.6, 1.2, 100_000).astype(np.int64), 1, 32_768)
    captions = np.clip(rng.normal(250, 80, 100_000).astype(np.int64), 40, 1_200)
    mix = np.where(rng.random(100_000) < 0.7, captions, text)
    assert fill(text, 32_768) >= 0.999
    assert fill(mix, 32_768) >= 0.999


@pytest.mark.parametrize("lengths", [[0, 1], [11, 3], [-1]])
def test_lengths_that_cannot_be_packed_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"need 1\.\.10; cut or drop"):
        bestfit.pack(np.array(lengths), 10)
