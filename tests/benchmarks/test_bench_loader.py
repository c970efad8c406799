"""The loader's bench runs, compares equal work and says what it measured; its figures are for a quiet machine."""

import json

import pytest

from solo import bench_loader


@pytest.fixture(scope="module")
def result():
    return bench_loader.run(repeats=1, n_packs=1)


def test_the_result_is_one_json_line_with_its_parts(result):
    assert json.loads(json.dumps(result)) == result
    assert {"bench", "ratio", "reference", "ours", "exact", "feeds", "mix", "machine", "goal"} <= set(result)
    assert result["ratio"] == pytest.approx(
        result["ours"]["tokens_per_s"] / result["reference"]["tokens_per_s"], abs=0.006
    )
    assert result["ratio"] > 1.5  # far below the goal, so that a busy machine fails no test


def test_the_mix_is_the_one_it_claims(result):
    mix = result["mix"]
    assert abs(mix["vision_share"] - bench_loader.VISION_SHARE) < 0.03
    assert 0.9 * bench_loader.PACK_TOKENS < mix["n_tokens"] <= bench_loader.PACK_TOKENS
    assert 1.0 < mix["bits_per_pixel"] < 2.5
