"""The filter's bench finds what it planted and measures every signal; its figures are for a quiet machine."""

import json

import pytest

from solo.bench import filter as bench_filter
from solo.signals import image, pii, sample, text


@pytest.mark.parametrize(("what", "n"), [("images", 100_000), ("texts", 5_000)])
def test_every_planted_pair_is_found_and_nothing_else(what, n):
    found = bench_filter.near(what, n, 2)
    assert json.loads(json.dumps(found)) == found
    assert (found["rows"], found["recall"], found["others"]) == (n, 1.0, 0)
    assert found["planted"] >= n // bench_filter.PLANTED * 0.9
    assert found["peak_mib"] >= found["peak_mib_before"] > 0


def test_every_signal_that_needs_no_weights_is_measured():
    modules = {"image": image, "text": text, "pii": pii, "sample": sample}
    assert set(bench_filter.SIGNALS) == {f"{stem}.{name}" for stem, m in modules.items() for name in m.VERSIONS}
    for name in ("image.texture", "text.size"):
        rate = bench_filter.signal_rate(name, 0.05)
        assert rate["alone"] > 0 and rate["decoded"] > 0
