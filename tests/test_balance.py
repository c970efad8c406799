"""Balance: the same packs in every step, equal shares for every world size, and a bound on what cannot be equal."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solo.bench import pack as bench_pack
from solo.pack import balance, bestfit

steps = st.lists(st.integers(1, 1_000), min_size=1, max_size=40)


def worst(costs: list[int] | np.ndarray, order: np.ndarray | list[int], n_ranks: int) -> float:
    placed = np.asarray(costs)[np.asarray(order)]
    return float(balance.imbalance(placed, len(placed), n_ranks).max())


@given(steps)
def test_a_step_keeps_its_packs(costs: list[int]) -> None:
    order = balance.order(np.array(costs))
    assert sorted(order.tolist()) == list(range(len(costs)))
    assert order.tolist() == balance.order(np.array(costs)).tolist()


@pytest.mark.parametrize(
    ("costs", "n_ranks", "want"),
    [
        ([9, 1, 1, 9], 2, 1.0),
        ([4, 3, 2, 1], 2, 1.0),
        ([7, 1, 1, 1], 2, 8 / 5),  # no order shares out a pack that is more than half of all
        ([8, 7, 6, 5, 4, 3, 2, 1], 4, 1.0),
        ([5] * 16, 8, 1.0),
    ],
)
def test_hand_written(costs: list[int], n_ranks: int, want: float) -> None:
    assert worst(costs, balance.order(np.array(costs)), n_ranks) == pytest.approx(want)


@settings(max_examples=60)
@given(steps)
def test_no_step_gets_worse_over_all_world_sizes(costs: list[int]) -> None:
    def missed(order: np.ndarray) -> float:
        sizes = [w for w in (2, 4, 8) if len(costs) % w == 0]
        return sum(max(worst(costs, order, w), balance.LIMIT) - balance.LIMIT for w in sizes)

    assert missed(balance.order(np.array(costs))) <= missed(np.arange(len(costs))) + 1e-9


@settings(max_examples=60)
@given(st.lists(st.integers(1, 30), min_size=4, max_size=6).filter(lambda costs: len(costs) % 2 == 0))
def test_no_order_is_below_the_bound(costs: list[int]) -> None:
    for n_ranks in [w for w in (2, 4) if len(costs) % w == 0]:
        best = min(worst(costs, list(order), n_ranks) for order in permutations(range(len(costs))))
        assert balance.bound(np.array(costs), n_ranks) <= best + 1e-9


@pytest.mark.parametrize(
    ("costs", "n_ranks", "want"),
    [
        ([5] * 38 + [0] * 90, 8, 5 / (38 / 8)),  # 38 equal packs: some rank has five of them
        ([50, *[1] * 15], 2, (50 + 7) / (65 / 2)),  # the dear one and the seven cheapest
        ([10, 10, 10, 2, 1, 1], 2, 21 / 17),  # two of three on one rank, and the cheapest third
        ([1] * 16, 8, 1.0),
    ],
)
def test_bounds_by_hand(costs: list[int], n_ranks: int, want: float) -> None:
    assert balance.bound(np.array(costs), n_ranks) == pytest.approx(want)
    assert worst(costs, balance.order(np.array(costs)), n_ranks) == pytest.approx(want)


def attention(mix: str) -> np.ndarray:
    """Costs of the full packs of 32,768 tokens of a bench mix."""
    lengths = bench_pack.lengths_of(mix, 40_000)
    packs = bestfit.pack(lengths, bench_pack.PACK_TOKENS)
    return np.add.reduceat(lengths[packs.order] ** 2, packs.first[:-1])[:-1]


@pytest.mark.parametrize(("n", "text"), [(128, 0.1), (128, 0.3), (128, 0.5), (128, 1.0), (256, 0.3)])
def test_steps_of_real_sizes_are_balanced_or_at_the_bound(n: int, text: float) -> None:
    """Packs of captions and of long-tailed text in one step, as `pack_by: source` makes them."""
    captions, documents = attention("captions"), attention("documents")
    rng = np.random.default_rng(n)
    arrival, ordered = [], []
    for _ in range(12):
        n_text = rng.binomial(n, text)
        step = rng.permutation(np.append(rng.choice(captions, n - n_text), rng.choice(documents, n_text)))
        order = balance.order(step)
        for n_ranks in (2, 4, 8):
            allowed = max(balance.LIMIT, balance.bound(step, n_ranks) * 1.001)
            assert worst(step, order, n_ranks) <= allowed + 1e-6
        arrival.append(worst(step, np.arange(n), 8))
        ordered.append(worst(step, order, 8))
    assert np.mean(arrival) > 1.2 > np.median(ordered) or text == 0.1
    assert np.mean(arrival) > np.mean(ordered)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([8, 16, 24, 32, 64]))
def test_small_steps_are_near_the_bound(seed: int, n: int) -> None:
    """Dear packs, few of them: an order that serves W = 2, 4 and 8 is not the best for each alone."""
    costs = (np.random.default_rng(seed).pareto(1.5, n) * 1_000).astype(np.int64) + 100
    for n_ranks in (2, 4, 8):
        assert worst(costs, balance.order(costs), n_ranks) <= 1.15 * max(balance.LIMIT, balance.bound(costs, n_ranks))


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([128, 256, 512]))
def test_one_order_serves_every_world_size(seed: int, n: int) -> None:
    """Long-tailed, but no pack costs more than a third of what a rank of eight should do."""
    costs = (np.random.default_rng(seed).pareto(1.5, n) * 1_000).astype(np.int64) + 100
    costs = np.minimum(costs, 5 * int(np.median(costs)))
    for n_ranks in (2, 4, 8):
        assert worst(costs, balance.order(costs), n_ranks) <= balance.LIMIT


@pytest.mark.parametrize(("n", "n_ranks"), [(1, 1), (3, 1), (6, 2), (12, 4), (20, 4)])
def test_batches_that_are_no_power_of_two(n: int, n_ranks: int) -> None:
    costs = np.arange(1, n + 1)
    assert worst(costs, balance.order(costs), n_ranks) <= (1.15 if n > n_ranks else 1.0)


def test_dear_packs_meet_at_one_micro_step() -> None:
    costs = np.random.default_rng(0).integers(1, 1_000, 64)
    micro_steps = costs[balance.order(costs)].reshape(-1, 8)
    assert (np.diff(micro_steps, axis=0) <= 0).all()
