"""Balance: the order of packs inside an optimizer step, so that ranks which take every W-th pack do equal attention.

In: the attention cost of each pack of a step, the sum of its squared document lengths. Out: a permutation of the step,
a pure function of the costs. Invariants: a step trains the packs it trained before; no world size is chosen: the step
is split into N_GROUPS equal shares and pack i of the order is of share i % N_GROUPS, so W = 8, 4, 2 and 1 are balanced
at once wherever W divides the step's packs. Cost: 1 ms for a step of 128 packs, 20 ms where no order is within LIMIT.

Every rank trains as many packs as any other, so a dear pack comes with company: `bound` says below which ratio of the
dearest rank to the mean no order can be. Whole numbers throughout: sums of floats differ between machines, and a tie
that falls the other way would be another order.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from math import gcd
from typing import Any

import numpy as np

N_GROUPS = 8
WORLD_SIZES = (1, 2, 4, 8)
LIMIT = 1.05  # dearest rank over mean rank
NEAR = 1.005  # what is tried for first; it costs nothing where a step has many packs
BOUND_SHARE = 1.001  # a rank this little above the bound is at it

BITS = 28  # of a step's whole cost: its square, and a few of them, fit into 64
MOST_SWAPS = 200
KICKS = 30  # new starts near the best order found; 300 find no better one
LOOKED_AT = 32  # packs of a group that may be swapped, dear and cheap ones; swaps tried go with its square


def order(costs: np.ndarray) -> np.ndarray:
    """Places of a step's packs, such that every W-th of them is an equal share of the cost for W = 2, 4 and 8."""
    n_groups = gcd(len(costs), N_GROUPS)
    whole = costs // max(1, int(costs.sum()) >> BITS)
    arrived = np.arange(len(costs)).reshape(-1, n_groups).T
    groups = improved(dealt(whole, n_groups), whole, targets(whole, n_groups, NEAR))
    goal = targets(whole, n_groups, LIMIT)
    if missed(whole[groups].sum(1), goal):
        groups = min(searched(groups, whole, goal), arrived, key=lambda g: _excess(whole[g].sum(1)))
    # Dear packs meet at the same micro-step.
    groups = np.take_along_axis(groups, np.argsort(-costs[groups], axis=1, kind="stable"), axis=1)
    placed: np.ndarray = groups.T.ravel()
    return placed


def bound(costs: np.ndarray, world_size: int) -> float:
    """Dearest rank over mean rank: below this no order of the step's packs can be."""
    return float(_least(np.asarray(costs), world_size) * world_size / costs.sum())


def _least(costs: np.ndarray, world_size: int) -> int:
    """What the dearest of W ranks costs at least, by two arguments for every number k; each rank trains n / W packs.

    Of the kW + 1 dearest packs some rank has k + 1, and besides them the cheapest there are. And the k dearest packs
    are on k ranks at most, whose other packs are the cheapest there are: one of these ranks costs their mean.
    """
    dearest_first = np.sort(costs)[::-1]
    dear, cheap = (np.append(0, np.cumsum(c)) for c in (dearest_first, dearest_first[::-1]))
    each = len(costs) // world_size
    k = np.arange(each)
    crowded = dear[k * world_size + 1] - dear[k * world_size - k] + cheap[each - k - 1]
    k = np.arange(1, world_size + 1)
    in_company = -(-(dear[k] + cheap[k * (each - 1)]) // k)
    return int(max(crowded.max(), in_company.max()))


def targets(costs: np.ndarray, n_groups: int, ratio: float) -> dict[int, int]:
    """World size -> what its ranks should cost at most: `ratio` times the mean, or the bound where that is higher."""
    total = int(costs.sum())
    sizes = [w for w in WORLD_SIZES[1:] if n_groups % w == 0]
    return {w: max(int(total * ratio) // w, int(_least(costs, w) * BOUND_SHARE)) for w in sizes}


def missed(sums: np.ndarray, goal: Mapping[int, int]) -> int:
    """By how much ranks exceed what they should cost, squared and summed over ranks and world sizes."""
    return sum(int((np.maximum(sums.reshape(-1, w).sum(0) - most, 0) ** 2).sum()) for w, most in goal.items())


def _excess(sums: np.ndarray) -> float:
    """By how much the dearest rank exceeds LIMIT times the mean, over all world sizes."""
    per_rank = [sums.reshape(-1, w).sum(0) for w in WORLD_SIZES if len(sums) % w == 0]
    return float(sum(max(r.max() / r.mean(), LIMIT) - LIMIT for r in per_rank))


def dealt(costs: np.ndarray, n_groups: int) -> np.ndarray:
    """Packs in groups of equal number, (n_groups, n_packs / n_groups): the dearest left to the cheapest with room."""
    size = len(costs) // n_groups
    members: list[list[int]] = [[] for _ in range(n_groups)]
    sums = [0] * n_groups
    for pack in np.argsort(-costs, kind="stable").tolist():
        group = min((g for g in range(n_groups) if len(members[g]) < size), key=sums.__getitem__)
        members[group].append(pack)
        sums[group] += int(costs[pack])
    return np.array(members)


def searched(groups: np.ndarray, costs: np.ndarray, goal: Mapping[int, int]) -> np.ndarray:
    """The best of several descents, each from the best so far with a few packs exchanged at random."""
    chance = random.Random(len(costs))
    best = improved(groups, costs, goal)
    for _ in range(KICKS):
        least = missed(costs[best].sum(1), goal)
        if not least:
            break
        other = best.ravel().copy()
        for _ in range(chance.randrange(1, 4)):
            a, b = chance.randrange(len(other)), chance.randrange(len(other))
            other[a], other[b] = other[b], other[a]
        other = improved(other.reshape(best.shape), costs, goal)
        if missed(costs[other].sum(1), goal) < least:
            best = other
    return best


def improved(groups: np.ndarray, costs: np.ndarray, goal: Mapping[int, int]) -> np.ndarray:
    """The best swap of two packs of different groups, again and again, until the goal is met or none helps."""
    groups = groups.copy()
    for _ in range(MOST_SWAPS):
        if not missed(costs[groups].sum(1), goal) or not _swap(groups, costs, goal):
            break
    return groups


def _swap(groups: np.ndarray, costs: np.ndarray, goal: Mapping[int, int]) -> bool:
    """Make the best swap of two packs, in place; False when none makes `missed` less."""
    n_groups, size = groups.shape
    groups[:] = np.take_along_axis(groups, np.argsort(-costs[groups], axis=1, kind="stable"), axis=1)
    looked_at = np.unique(np.linspace(0, size - 1, min(size, LOOKED_AT)).astype(np.int64))
    held, sums = costs[groups][:, looked_at], costs[groups].sum(1)
    more = held[None, :, None, :] - held[:, None, :, None]  # (g, h, a, b) what g gains for its a from h's b
    change = np.zeros_like(more)
    for w, most in goal.items():
        rank = np.arange(n_groups) % w
        over = (sums.reshape(-1, w).sum(0) - most)[rank]  # (g,)
        was = np.maximum(over, 0) ** 2
        gains, loses = np.maximum(over[:, None, None, None] + more, 0), np.maximum(over[:, None, None] - more, 0)
        apart = (rank[:, None] != rank)[:, :, None, None]
        change += (gains**2 + loses**2 - (was[:, None] + was)[:, :, None, None]) * apart
    best = np.unravel_index(change.argmin(), change.shape)
    if change[best] >= 0:
        return False
    g, h = int(best[0]), int(best[1])
    a, b = int(looked_at[best[2]]), int(looked_at[best[3]])
    groups[g, a], groups[h, b] = groups[h, b], groups[g, a]
    return True


def imbalance(costs: np.ndarray, batch_packs: int, world_size: int) -> np.ndarray:
    """Dearest rank over mean rank of each step, where rank r takes packs r, r + W, ... of it."""
    per_rank = costs.reshape(-1, batch_packs // world_size, world_size).sum(1)  # (n_steps, world_size)
    dearest: np.ndarray = per_rank.max(1) / per_rank.mean(1)
    return dearest


def steps(packs: np.ndarray, costs: np.ndarray, batch_packs: int) -> tuple[np.ndarray, dict[str, Any]]:
    """The same packs in each step in another order, and dearest / mean rank: arrived, ordered, at best."""
    arrived = packs.reshape(-1, batch_packs)
    ordered = np.concatenate([step[order(costs[step])] for step in arrived])
    found: dict[str, Any] = {}
    for ranks in WORLD_SIZES[1:]:
        if batch_packs % ranks:
            continue
        before, after = (imbalance(costs[p], batch_packs, ranks) for p in (packs, ordered))
        least = np.array([bound(costs[step], ranks) for step in arrived])
        ratios = {"arrival": before, "ordered": after, "bound": least}
        said: dict[str, Any] = {k: {"mean": _round(v.mean()), "max": _round(v.max())} for k, v in ratios.items()}
        said["n_over_limit"] = int((after > LIMIT).sum())  # steps
        said["n_over_bound"] = int((after > np.maximum(LIMIT, least * BOUND_SHARE) + 1e-6).sum())
        found[f"{ranks}_ranks"] = said
    return ordered, found


def _round(share: float) -> float:
    return round(float(share), 6)
