"""Metrics: a stage's steps as a table, for DuckDB and whoever reads Parquet.

In: the rows of `metrics.jsonl`. Out: `metrics.parquet`, a row per step; losses of sources and kinds are maps.
Invariant: step 0 is the model as it was given, where something is held out and so was measured before the first step;
it has no training loss. Cost: none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FILE = "metrics.parquet"
LOSSES = pa.map_(pa.string(), pa.float64())
COLUMNS = pa.schema(
    [
        ("step", pa.int64()),
        ("n_steps", pa.int64()),
        ("loss", pa.float64()),  # null where it was not finite
        ("lr", pa.float64()),
        ("grad_norm", pa.float64()),
        *((name, pa.int64()) for name in ("tokens", "loss_tokens", "left_out")),
        *((name, pa.float64()) for name in ("tokens_per_s", "tflops", "mfu", "step_s", "input_stall_s")),
        *((name, pa.float64()) for name in ("checkpoint_stall_s", "host_gib", "peak_gib")),
        ("sources", LOSSES),
        ("modalities", LOSSES),
        ("lr_groups", LOSSES),
        *((name, pa.float64()) for name in ("held_out", "held_out_text", "held_out_image")),
        ("held_out_sources", LOSSES),
    ]
)


def write(out: Path, metrics: Sequence[Mapping[str, Any]]) -> None:
    """The table of a stage, in its artifact."""
    first = [{"step": 0, "n_steps": m["n_steps"], **_held(m["held_out_before"])} for m in metrics[:1] if _measured(m)]
    rows = first + [{**m, **_held(m.get("held_out"))} for m in metrics]
    own = [{k: list(v.items()) if isinstance(v, dict) else v for k, v in row.items()} for row in rows]
    aside = out / (FILE + ".tmp")
    pq.write_table(pa.Table.from_pylist(own, COLUMNS), aside, compression="zstd")
    aside.replace(out / FILE)


def _measured(m: Mapping[str, Any]) -> bool:
    return "held_out_before" in m


def _held(found: Mapping[str, Any] | None) -> dict[str, Any]:
    names = {"loss": "held_out", **{name: f"held_out_{name}" for name in ("text", "image", "sources")}}
    return {column: (found or {}).get(name) for name, column in names.items()}
