"""Balance: the same packs in every step, equal shares for every world size, and honest about what cannot be equal."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solo import balance

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


@settings(max_examples=60, deadline=None)
@given(steps)
def test_no_step_gets_worse_over_all_world_sizes(costs: list[int]) -> None:
    def missed(order: np.ndarray) -> float:
        sizes = [w for w in (2, 4, 8) if len(costs) % w == 0]
        return sum(max(worst(costs, order, w), balance.LIMIT) - balance.LIMIT for w in sizes)

    assert missed(balance.order(np.array(costs))) <= missed(np.arange(len(costs))) + 1e-9


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([128, 256, 512]))
def test_one_order_serves_every_world_size(seed: int, n: int) -> None:
    """Long-tailed, but no pack costs more than a third of what a rank of eight should do."""
    costs = np.random.default_rng(seed).pareto(1.5, n) + 0.1
    costs = np.minimum(costs, 5 * np.median(costs))
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
