"""Balance: the order of packs inside an optimizer step, so that ranks which take every W-th pack do equal attention.

In: the attention cost of each pack of a step, the sum of its squared document lengths. Out: a permutation of the step,
a pure function of the costs. Invariants: a step trains the packs it trained before; no world size is chosen: the step
is split into N_GROUPS equal shares and pack i of the order is of share i % N_GROUPS, so W = 8, 4, 2 and 1 are balanced
at once wherever W divides the step's packs. Cost: a millisecond or two for a step of 128 packs.

A pack that costs more than a rank's share of its step cannot be balanced by any order; `imbalance` says what is left.
"""

from __future__ import annotations

from math import gcd

import numpy as np

N_GROUPS = 8
WORLD_SIZES = (1, 2, 4, 8)
LIMIT = 1.05  # dearest rank over mean rank
MOST_SWAPS = 200


def order(costs: np.ndarray) -> np.ndarray:
    """Places of a step's packs, such that every W-th of them is an equal share of the cost for W = 2, 4 and 8."""
    n_groups = gcd(len(costs), N_GROUPS)
    # Shares of one split serve the largest W best. Where a few packs are too dear for that, halves of halves still
    # serve W = 2 and 4.
    arrived = np.arange(len(costs))
    candidates = [_paired(shares(costs, n_groups), costs), _halved(arrived, costs, n_groups)]
    candidates.append(arrived.reshape(-1, n_groups).T)  # so that no step gets worse
    groups = min(candidates, key=lambda groups: _missed(costs[groups].sum(1)))
    # Dear packs meet at the same micro-step.
    groups = np.take_along_axis(groups, np.argsort(-costs[groups], axis=1, kind="stable"), axis=1)
    placed: np.ndarray = groups.T.ravel()
    return placed


def _paired(groups: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Groups in such an order that half as many ranks join the dearest with the cheapest."""
    by_sum = np.argsort(costs[groups].sum(1), kind="stable")
    half = len(by_sum) // 2
    by_sum[half:] = by_sum[half:][::-1]
    return groups[by_sum]


def _halved(packs: np.ndarray, costs: np.ndarray, n_groups: int) -> np.ndarray:
    """Groups as halves of halves: group i is of half i % 2."""
    if n_groups == 1:
        return packs[None]
    one, two = (_halved(packs[half], costs, n_groups // 2) for half in shares(costs[packs], 2))
    return np.stack([one, two], axis=1).reshape(n_groups, -1)


def _missed(sums: np.ndarray) -> float:
    """By how much the dearest rank exceeds LIMIT times the mean, over all world sizes."""
    per_rank = [sums.reshape(-1, w).sum(0) for w in WORLD_SIZES if len(sums) % w == 0]
    return float(sum(max(r.max() / r.mean(), LIMIT) - LIMIT for r in per_rank))


def shares(costs: np.ndarray, n_groups: int) -> np.ndarray:
    """Packs in groups of equal number and nearly equal cost, (n_groups, n_packs / n_groups).

    The dearest left goes to the cheapest group with room; then packs of the dearest group are swapped for others as
    long as that makes the dearer of the two cheaper.
    """
    size = len(costs) // n_groups
    members: list[list[int]] = [[] for _ in range(n_groups)]
    sums = [0] * n_groups
    for pack in np.argsort(-costs, kind="stable").tolist():
        group = min((g for g in range(n_groups) if len(members[g]) < size), key=sums.__getitem__)
        members[group].append(pack)
        sums[group] += int(costs[pack])
    groups = np.array(members)
    for _ in range(MOST_SWAPS if n_groups > 1 else 0):
        if not _swap(groups, costs):
            break
    return groups


def _swap(groups: np.ndarray, costs: np.ndarray) -> bool:
    """Make the best swap of a pack of the dearest group, in place; False when none makes the dearer one cheaper."""
    held = costs[groups]  # (n_groups, size)
    sums = held.sum(1)
    dearest = int(sums.argmax())
    less = held[dearest][:, None, None] - held[None]  # (size, n_groups, size) what the dearest group would lose
    dearer = np.maximum(sums[dearest] - less, sums[:, None] + less)
    dearer[:, dearest] = sums[dearest]
    best = np.unravel_index(dearer.argmin(), dearer.shape)
    if dearer[best] >= sums[dearest]:
        return False
    mine, other, theirs = (int(i) for i in best)
    groups[dearest, mine], groups[other, theirs] = groups[other, theirs], groups[dearest, mine]
    return True


def imbalance(costs: np.ndarray, batch_packs: int, world_size: int) -> np.ndarray:
    """Dearest rank over mean rank of each step, where rank r takes packs r, r + W, ... of it."""
    per_rank = costs.reshape(-1, batch_packs // world_size, world_size).sum(1)  # (n_steps, world_size)
    dearest: np.ndarray = per_rank.max(1) / per_rank.mean(1)
    return dearest
