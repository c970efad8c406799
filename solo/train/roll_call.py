"""Roll call: which ranks did not come to a collective that failed.

In: a rank whose collective ended in an error. Out: the ranks that say nothing of the kind within a few seconds: they
stand still, or are gone. Invariant: no collective; the ranks meet at the store they joined by. Cost: the seconds.
"""

from __future__ import annotations

import time

import torch.distributed as dist

PATIENCE_S = {"stuck": 5.0, "gone": 1.0}  # ranks in one collective wait from nearly the same moment on
POLL_S = 0.05


def absent(within_s: float) -> list[int]:
    """Ranks without an error of their own; none where that cannot be known."""
    if not dist.is_initialized():
        return []
    missing, deadline = set(range(dist.get_world_size())), time.monotonic() + within_s
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"failed {dist.get_rank()}", "")
        while missing and time.monotonic() < deadline:
            missing -= {rank for rank in missing if store.check([f"failed {rank}"])}
            time.sleep(POLL_S)
    except RuntimeError:  # its host is gone too
        return []
    return sorted(missing)


def named(ranks: list[int]) -> str:
    """Ranks as words."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else "ranks " + ", ".join(map(str, ranks))
