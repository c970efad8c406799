"""Benchmark of packing: speed and fill against TRL's `pack_dataset(..., "bfd")`, on the same lengths in one run.

In: a Python that has TRL ($SOLO_TRL_PYTHON, else this one). Out: one dictionary, medians of runs taken in turn. Two
figures, because TRL plans and moves tokens in one call: `plan` is our plan alone, which is all that the pack part
makes, `tokens` our plan and the same move of the same tokens. Cost: about a minute.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from solo.pack import bestfit

PACK_TOKENS = 32_768
N_DOCUMENTS = 50_000
N_RUNS = 5

# Reads a line with a batch size, packs once, writes what it took. `None` is one batch of all documents.
TRL = """
import json, sys, time
import numpy as np, pyarrow as pa, datasets, trl
datasets.disable_caching(); datasets.disable_progress_bars()
lengths, capacity = np.load(sys.argv[1]), int(sys.argv[2])
ids = pa.ListArray.from_arrays(np.append(0, np.cumsum(lengths)).astype(np.int32), np.ones(lengths.sum(), np.int32))
data = datasets.Dataset(pa.table({"input_ids": ids}))
print(json.dumps({"version": trl.__version__}), flush=True)
for line in sys.stdin:
    began = time.perf_counter()
    made = trl.pack_dataset(data, capacity, "bfd", {"batch_size": json.loads(line)})
    print(json.dumps({"s": time.perf_counter() - began, "n_packs": len(made)}), flush=True)
"""


def lengths_of(mix: str, n: int) -> np.ndarray:
    """Document lengths like captions with a picture, like web text, or 70 to 30 of both; drawn from a fixed seed."""
    rng = np.random.default_rng(2026)
    captions = np.clip(rng.normal(250, 80, n), 40, 1_200).astype(np.int64)
    documents = np.clip(rng.lognormal(6.6, 1.2, n), 1, PACK_TOKENS).astype(np.int64)
    return {"captions": captions, "documents": documents, "70/30": np.where(rng.random(n) < 0.7, captions, documents)}[
        mix
    ]


def run(n_documents: int = N_DOCUMENTS, n_runs: int = N_RUNS) -> dict[str, Any]:
    """All three mixes; `ratio` is the smallest of them, by plan speed."""
    mixes = {mix: _compare(lengths_of(mix, n_documents), n_runs) for mix in ("captions", "documents", "70/30")}
    worst = min(mixes.values(), key=lambda m: m["ratio"])
    return {
        "bench": "pack",
        "ratio": worst["ratio"],
        "ratio_with_tokens": min(m["ratio_with_tokens"] for m in mixes.values()),
        "reference": worst["reference"],
        "ours": worst["ours"],
        "mixes": mixes,
        "documents": n_documents,
        "pack_tokens": PACK_TOKENS,
        "runs": n_runs,
        "machine": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()},
    }


def _compare(lengths: np.ndarray, n_runs: int) -> dict[str, Any]:
    ids = pa.array(np.ones(lengths.sum(), np.int32))
    column = pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(lengths)), pa.int32()), ids)
    n_packs = len(bestfit.pack(lengths, PACK_TOKENS).first) - 1
    taken: dict[str, list[float]] = {"plan": [], "tokens": [], "trl": [], "trl_one_batch": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lengths.npy"
        np.save(path, lengths)
        command = [_python(), "-c", TRL, str(path), str(PACK_TOKENS)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder) as trl:
            version = _ask(trl, None)["version"]
            _ask(trl, 1000)  # both sides have run once before anything is timed
            for _ in range(n_runs):  # in turn, so that a busy minute of the machine meets both
                taken["plan"].append(_seconds(lambda: bestfit.pack(lengths, PACK_TOKENS)))
                default = _ask(trl, 1000)  # TRL's own default
                taken["trl"].append(default["s"])
                taken["tokens"].append(_seconds(lambda: _with_tokens(column, lengths)))
            whole = _ask(trl, "all")  # once: it shows what TRL can fill, and is no faster
            taken["trl_one_batch"].append(whole["s"])
            assert trl.stdin
            trl.stdin.close()
    s = {name: statistics.median(seconds) for name, seconds in taken.items()}
    n, n_tokens = len(lengths), int(lengths.sum())

    def side(name: str, n_packs: int) -> dict[str, Any]:
        fill = n_tokens / (n_packs * PACK_TOKENS)
        spread = [round(n / x) for x in (max(taken[name]), min(taken[name]))]
        return {"documents_per_s": round(n / s[name]), "from_to": spread, "fill": round(fill, 6)}

    return {
        "ratio": round(s["trl"] / s["plan"], 1),
        "ratio_with_tokens": round(s["trl"] / s["tokens"], 1),
        "ours": side("plan", n_packs) | {"with_tokens": side("tokens", n_packs)},
        "reference": {"name": f"TRL {version} pack_dataset bfd", **side("trl", default["n_packs"])}
        | {"one_batch": side("trl_one_batch", whole["n_packs"])},
        "fill_limit": round(n_tokens / (-(-n_tokens // PACK_TOKENS) * PACK_TOKENS), 6),
    }


def _with_tokens(column: pa.ListArray, lengths: np.ndarray) -> pa.ListArray:
    """Packs as TRL returns them: each one list of all its tokens."""
    packs = bestfit.pack(lengths, PACK_TOKENS)
    ends = np.append(0, np.cumsum(lengths[packs.order]))[packs.first]
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), column.take(pa.array(packs.order)).flatten())


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _ask(trl: subprocess.Popen[str], batch_size: int | str | None) -> dict[str, Any]:
    """One run of TRL with this batch size; with None its greeting."""
    assert trl.stdin and trl.stdout
    if batch_size is not None:
        trl.stdin.write("null\n" if batch_size == "all" else f"{batch_size}\n")
        trl.stdin.flush()
    line = trl.stdout.readline()
    if not line:
        raise RuntimeError(f"TRL ended with exit code {trl.wait()}; its message is above")
    found: dict[str, Any] = json.loads(line)
    return found


def _python() -> str:
    """The interpreter that has TRL; it is no dependency of ours."""
    python = os.environ.get("SOLO_TRL_PYTHON")
    if python is None and importlib.util.find_spec("trl") is None:
        raise ValueError(
            "bench pack: TRL is not installed here; make an environment with `pip install trl datasets torch` "
            "and set SOLO_TRL_PYTHON to its python"
        )
    return python or sys.executable


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run()) + "\n")
