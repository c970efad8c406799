"""Plan: the rows of any pack, and a loader's state as one integer that knows what it counts in.

In: the folder of a pack artifact. Out: a pack's rows. Invariants: a pack's rows are read without those of the packs
before it; a state saved on one plan is refused on another, naming every difference. Cost: `packs.parquet` once (16
bytes a pack), then the row groups that are asked for, a few of them kept.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUPS_KEPT = 4
STATE_NAMES = {
    "plan": "the pack plan",
    "mix_lock": "the mix lock",
    "seed": "the seed",
    "batch_packs": "the packs of a step",
    "pack_tokens": "the tokens of a pack",
}


class Plan:
    """A pack plan on disk; threads may share one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        packs = pq.read_table(folder / "packs.parquet", columns=["pack", "first_row", "n_rows"])
        self._first_row, self._n_rows = (packs[name].to_numpy() for name in ("first_row", "n_rows"))
        assert np.array_equal(packs["pack"].to_numpy(), np.arange(len(packs))), f"{folder}: packs are not 0..n-1"
        self._file = pq.ParquetFile(folder / "plan.parquet", memory_map=True)
        meta = self._file.metadata
        sizes = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
        self._group_ends = np.cumsum(sizes, dtype=np.int64)
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.Lock()
        self.n_groups_read = 0

    def __len__(self) -> int:
        """Number of packs."""
        return len(self._first_row)

    def rows(self, i: int) -> list[dict[str, Any]]:
        """The rows of pack i."""
        first, left = int(self._first_row[i]), int(self._n_rows[i])
        found: list[dict[str, Any]] = []
        group = int(np.searchsorted(self._group_ends, first, side="right"))
        while left:
            table = self._group(group)
            offset = first - (int(self._group_ends[group]) - len(table))
            part = table.slice(offset, left).to_pylist()
            found += part
            first, left, group = first + len(part), left - len(part), group + 1
        assert {row["pack"] for row in found} <= {i}, f"pack {i}: first_row {self._first_row[i]} is not its own"
        return found

    def identity(self) -> dict[str, Any]:
        """What a step number means here: the plan, its lock, and the numbers that cut it into steps."""
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise ValueError(f"{path}: no manifest, so the plan cannot be told from another; run pack again")
        manifest = json.loads(path.read_bytes())
        locks = {node: digest for node, digest in manifest["inputs"].items() if node.startswith("curate/")}
        numbers = {name: manifest["spec"].get(name) for name in ("seed", "batch_packs", "pack_tokens")}
        return {"plan": manifest["digest"], "mix_lock": ",".join(sorted(locks.values())), **numbers}

    def state(self, step: int) -> dict[str, Any]:
        """A loader's state after `step` optimizer steps: that integer, and what it counts in."""
        return {"step": step, **self.identity()}

    def step_of(self, state: Mapping[str, Any]) -> int:
        """The step of a saved state; ValueError naming each difference where it was saved on another plan."""
        mine = self.identity()
        if other := [
            f"{what} {_short(state.get(name))}, not {_short(mine[name])}"
            for name, what in STATE_NAMES.items()
            if state.get(name) != mine[name]
        ]:
            raise ValueError(
                f"loader: the saved state of step {state.get('step')} counts in {'; '.join(other)}; "
                f"go on with the plan it was saved on, or start the stage afresh"
            )
        step, n_steps = state["step"], len(self) // mine["batch_packs"]
        if not isinstance(step, int) or not 0 <= step <= n_steps:
            raise ValueError(f"loader: the saved state is at step {step}, the plan has {n_steps}; start afresh")
        return step

    def _group(self, group: int) -> pa.Table:
        with self._lock:
            if group not in self._groups:
                self._groups[group] = self._file.read_row_group(group)
                self.n_groups_read += 1
                while len(self._groups) > ROW_GROUPS_KEPT:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
            return self._groups[group]


def _short(value: object) -> str:
    """A digest by its first digits."""
    return value[:8] if isinstance(value, str) else str(value)
