"""Bench pack: it says what it needs; with TRL (SOLO_TRL_PYTHON) it runs and both sides hold the same tokens."""

import importlib.util
import os

import numpy as np
import pytest

from solo.bench import pack as bench_pack
from solo.pack import bestfit

needs_trl = pytest.mark.skipif(
    "SOLO_TRL_PYTHON" not in os.environ and importlib.util.find_spec("trl") is None, reason="needs TRL"
)


@pytest.mark.skipif(importlib.util.find_spec("trl") is not None, reason="TRL is here")
def test_without_trl_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOLO_TRL_PYTHON", raising=False)
    with pytest.raises(ValueError, match=r"bench pack: TRL is not installed here; .* set SOLO_TRL_PYTHON"):
        bench_pack.run()


@pytest.mark.parametrize("mix", ["captions", "documents", "70/30"])
def test_its_mixes_fill_packs(mix: str) -> None:
    lengths = bench_pack.lengths_of(mix, 100_000)
    packs = bestfit.pack(lengths, bench_pack.PACK_TOKENS)
    sums = np.add.reduceat(lengths[packs.order], packs.first[:-1])
    assert np.sort(sums)[1:].mean() / bench_pack.PACK_TOKENS >= 0.9999  # without the last
    assert len(sums) == -(-lengths.sum() // bench_pack.PACK_TOKENS), "no packing has fewer"


@needs_trl
@pytest.mark.optional
def test_it_is_faster_and_as_full() -> None:
    found = bench_pack.run(n_documents=20_000, n_runs=3)
    assert found["ratio"] >= 20
    for mix in found["mixes"].values():
        assert mix["ours"]["fill"] >= mix["reference"]["fill"]
        assert mix["ours"]["fill"] == pytest.approx(mix["fill_limit"])
