"""The work of `solo.bench.curate` in polars or pandas, as one would write it: all ledgers in one frame.

In: a folder of ledgers and the number of sources. Out: one JSON line. Run by a Python that has polars or pandas; it
imports nothing of ours. Order comes from the frame's own hash of the key, cheaper than the part's md5.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

AMOUNT, CAP = 120, 0.5  # as solo.bench.curate.mix


def by_polars(files: list[str], n_sources: int, out: Path) -> tuple[int, int]:
    """Rows read and samples drawn."""
    import polars as pl  # type: ignore[import-not-found, unused-ignore]

    rows = pl.read_parquet(files)
    budget = len(rows) * AMOUNT / n_sources
    number = pl.col("source").str.slice(7).cast(pl.Int32)
    kept = rows.filter((pl.col("width_px") >= 128) & pl.col("n_loss_tokens").is_between(8, 100))
    kept = kept.sort("source", "key").unique("image_sha256", keep="first", maintain_order=True)
    kept = kept.with_columns(pl.col("key").hash(11).alias("order")).sort("source", "order", "key")
    total = pl.col("n_tokens").sum().over("source")
    amount = pl.when(number % 2 == 1).then(pl.min_horizontal(pl.lit(budget), CAP * total)).otherwise(pl.lit(budget))
    kept = kept.with_columns(
        ((amount // total) + (pl.col("n_tokens").cum_sum().over("source") <= amount % total)).alias("n_repeats")
    )
    drawn = kept.filter(pl.col("n_repeats") > 0).sort("source", "key")
    drawn.write_parquet(out, compression="zstd")
    return len(rows), len(drawn)


def by_pandas(files: list[str], n_sources: int, out: Path) -> tuple[int, int]:
    """Rows read and samples drawn."""
    import numpy as np
    import pandas as pd  # type: ignore[import-untyped, import-not-found, unused-ignore]

    rows = pd.concat([pd.read_parquet(f) for f in files], ignore_index=True)
    n, budget = len(rows), len(rows) * AMOUNT / n_sources
    kept = rows[(rows.width_px >= 128) & rows.n_loss_tokens.between(8, 100)]
    kept = kept.sort_values(["source", "key"]).drop_duplicates("image_sha256")
    kept = kept.assign(order=pd.util.hash_array(kept.key.to_numpy(), categorize=False))
    kept = kept.sort_values(["source", "order", "key"])
    groups = kept.groupby("source").n_tokens
    total, cumulative = groups.transform("sum"), groups.cumsum()
    odd = kept.source.str.slice(7).astype(int) % 2 == 1
    amount = np.where(odd, np.minimum(budget, CAP * total), budget)
    kept = kept.assign(n_repeats=amount // total + (cumulative <= amount % total))
    drawn = kept[kept.n_repeats > 0].sort_values(["source", "key"])
    drawn.to_parquet(out, compression="zstd")
    return n, len(drawn)


def main(root: Path, n_sources: int) -> dict[str, Any]:
    """Read, filter, drop twins, cap, weigh, order, write."""
    files = sorted(map(str, root.glob("shard/*/*/shards/*.parquet")))
    try:
        import polars

        name, work = f"polars {polars.__version__}", by_polars
    except ImportError:
        import pandas

        name, work = f"pandas {pandas.__version__}", by_pandas
    began, cpu = time.perf_counter(), time.process_time()
    rows, drawn = work(files, n_sources, root / "reference.parquet")
    wall, spent = time.perf_counter() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    rate = round(rows / spent)
    return {"by": name, "rows": rows, "drawn": drawn, "wall_s": round(wall, 2), "rows_per_s_core": rate} | {
        "peak_mib": peak
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
