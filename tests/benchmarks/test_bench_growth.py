"""The bench of growth does both parts on a real list and says what each cost; its figures are for a quiet machine."""

from solo.bench import acquire as bench_acquire
from solo.bench import growth as bench_growth


def test_a_list_is_acquired_and_filtered_whole(tmp_path):
    [picture] = bench_growth.samples(1)[0].images
    with bench_acquire.origin({f"/{i}.jpg": picture for i in range(10)}) as port:
        costs = dict(bench_growth._measured(tmp_path / "list", 30, port))
    assert set(costs) == set(bench_growth.PARTS)
    assert all(cost["cpu_s"] > 0 and cost["peak_process_mb"] > 50 for cost in costs.values())


def test_growth_is_the_last_size_over_the_first():
    sizes = [{"cpu_us_per_row": 200.0, "peak_process_mb": 100.0}, {"cpu_us_per_row": 220.0, "peak_process_mb": 150.0}]
    assert bench_growth._grows(sizes) == {"cpu_us_per_row": 1.1, "peak_process_mb": 1.5}
