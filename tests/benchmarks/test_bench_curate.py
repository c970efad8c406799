"""Curate's bench runs the real part, leaves out just the twins, and spills under a cap; its figures are not tested."""

import json
from pathlib import Path

import duckdb
import pytest

from solo.bench import curate as bench_curate

ROWS = 6_000  # of each of 32 sources
CAP_BYTES = 42 << 20  # some megabytes of 192,000 rows lie on disk then; the writer of Parquet needs most of the rest


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    bench_curate.make_ledgers(root, ROWS)
    return root


def test_twins_are_left_out_and_the_capped_run_spills_and_makes_the_same_lock(root: Path):
    found = bench_curate.measured(root, 2)
    assert json.loads(json.dumps(found)) == found
    eligible = f"FROM '{root}/shard/*/*/shards/*.parquet' WHERE width_px >= 128 AND n_loss_tokens BETWEEN 8 AND 100"
    ((twins,),) = duckdb.sql(f"SELECT count(*) - count(DISTINCT image_sha256) {eligible}").fetchall()
    assert found["rows"] == 32 * ROWS and found["twins_left_out"] == twins > 0
    capped = bench_curate.apart(root, 2, cap_bytes=CAP_BYTES)
    assert capped["digest"] == found["digest"]
    assert capped["spilled_mib"] > 0
    if reference := bench_curate.other(root):
        # The frame's hash gives another order, so another last sample; at most a few a source.
        assert reference["rows"] == found["rows"]
        assert abs(reference["drawn"] - found["drawn"]) < 0.02 * found["drawn"]
