"""The loader's bench runs, compares equal work and says what it measured; its figures are for a quiet machine."""

import json

import pytest

from solo.bench import loader as bench_loader
from solo.bench import mix as bench_mix


@pytest.fixture(scope="module")
def result():
    return bench_loader.run(repeats=1, n_packs=1)


def test_the_result_is_one_json_line_with_its_parts(result):
    assert json.loads(json.dumps(result)) == result
    assert {"bench", "ratio", "goal", "reference", "exact", "original", "grid", "mix", "machine"} <= set(result)
    for name in ("original", "grid"):
        ours = result[name]
        ratio = ours["tokens_per_s"] / result["reference"]["tokens_per_s"]
        assert result["ratio"][name] == pytest.approx(ratio, abs=0.006)
        assert ratio > 1.5  # far below the goal, so that a busy machine fails no test
        shares = ours["feeds"]["cpu_shares"]
        assert sum(shares.values()) == pytest.approx(1, abs=0.02) and ours["feeds"]["limited_by"] in shares


def test_the_mix_is_the_one_it_claims(result):
    mix = result["mix"]
    assert abs(mix["vision_share"] - bench_mix.VISION_SHARE) < 0.03
    assert 0.9 * bench_mix.PACK_TOKENS < mix["n_tokens"] <= bench_mix.PACK_TOKENS
    assert 1.0 < mix["bits_per_pixel"] < 2.5
    grid = mix["grid"]
    assert 40 < grid["lowest_psnr_db"] <= grid["median_psnr_db"] and grid["n_images_as_came"] < mix["n_images"] / 10
