"""Draw: the queries that turn ledgers and amounts into the rows of a mix lock.

In: a DuckDB, the checked ledgers of a mix, and how much of each source is asked (solo/curate/amounts.py). Out: the
totals that amounts are counted from, the lock's Parquet file, and the script of the queries as the lock keeps it.
Invariants: what is drawn beyond whole passes is the longest prefix in hash order `md5(key || seed)` whose cumulative
tokens (or samples) do not exceed the rest; rows are sorted by source and key, so the bytes are the same on 1 or N
threads. Cost: one scan of the columns that predicates read, one of the lock's columns with one hash a key, one sort of
what is drawn; all sources at once, and everything spills to disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import duckdb

from solo.curate import exclude
from solo.curate.amounts import Draw
from solo.curate.exclude import Ledger
from solo.curate.query import literal

LAST = "g"  # behind every hash in hex

# {reason} is a CASE with one WHEN per predicate of the source, in its order; each was checked alone before.
BRANCH = """
SELECT {side} AS side, {source} AS source, key, shard, "offset", length, template,
  n_images, n_patches, n_text_tokens, n_loss_tokens, n_tokens,
  {reason} AS reason
FROM read_parquet({files}, union_by_name := TRUE)"""
SAMPLES = """
CREATE OR REPLACE TEMP VIEW samples AS  -- the first predicate that is not true (false or NULL) is the reason{branches}
"""
TOTALS = """
SELECT side, reason, count(*) AS n_samples, CAST(sum(n_tokens) AS BIGINT) AS n_tokens
FROM samples
GROUP BY ALL
ORDER BY ALL
"""
EXCLUDED_TOTALS = """
SELECT source, reason, count(*) AS n_samples, CAST(sum(n_tokens) AS BIGINT) AS n_tokens
FROM excluded
GROUP BY ALL
ORDER BY ALL
"""
# `upto` is a little behind the hash where the rest should end, so that what cannot be drawn is not kept.
DRAWS = """
CREATE OR REPLACE TEMP TABLE draws AS  -- whole passes, then a prefix of at most the rest
FROM (VALUES
{rows}
) AS draws(side, whole, rest, in_samples, upto)
"""
# The hash is compared in a join and not by WHERE, which DuckDB would push below, to compute it twice.
REACHED = """
CREATE OR REPLACE TEMP TABLE reached AS
WITH hashed AS (
  SELECT * EXCLUDE (reason), {hash} AS hash FROM samples WHERE reason IS NULL
)
SELECT hashed.* FROM hashed JOIN draws ON draws.side = hashed.side AND hash < upto{left_out}
"""
LEFT_OUT = """
ANTI JOIN excluded ON excluded.key = hashed.key"""
# Where a rest ends in hash order: sums over 4,096 stretches of that order find the stretch, so only one of them is
# sorted. Keys are unique in a source, so hashes are.
EDGES = """
CREATE OR REPLACE TEMP TABLE edges AS
WITH parts AS (
  SELECT side, hash, substr(hash, 1, 3) AS stretch, IF(in_samples, 1, n_tokens) AS amount, rest
  FROM reached JOIN draws USING (side)
  WHERE rest > 0
),
stretches AS (
  SELECT side, stretch, rest, sum(amount) AS amount FROM parts GROUP BY ALL
),
sums AS (  -- how much there is with each stretch
  SELECT side, stretch, rest, amount, sum(amount) OVER (PARTITION BY side ORDER BY stretch) AS cumulative
  FROM stretches
),
ends AS (
  SELECT side, stretch, cumulative - amount AS before FROM sums WHERE cumulative > rest AND cumulative - amount <= rest
),
last AS (
  SELECT side, hash, rest, before + sum(amount) OVER (PARTITION BY side ORDER BY hash) AS cumulative
  FROM parts JOIN ends USING (side, stretch)
)
SELECT side, min(hash) AS edge FROM last WHERE cumulative > rest GROUP BY side
"""
# A sample before its source's edge is seen once more than the others; a source with a rest of 0 has no edge. Shard and
# offset order what a key should tell apart.
COLUMNS = """
SELECT key, source, CAST(shard AS INTEGER) AS shard, CAST("offset" AS BIGINT) AS "offset",
  CAST(length AS BIGINT) AS length, template, CAST(n_images AS INTEGER) AS n_images,
  CAST(n_patches AS INTEGER) AS n_patches, CAST(n_text_tokens AS INTEGER) AS n_text_tokens,
  CAST(n_loss_tokens AS INTEGER) AS n_loss_tokens, CAST(n_tokens AS INTEGER) AS n_tokens,
  CAST({n_repeats} AS INTEGER) AS n_repeats
FROM {rows}
ORDER BY source, key, shard, "offset"
"""
LOCK = COLUMNS.format(
    n_repeats="whole + IF(hash < edge, 1, 0)",
    rows="""reached JOIN draws USING (side) LEFT JOIN edges USING (side)
WHERE whole > 0 OR hash < edge""",
)
LOCK_OF_SQL = COLUMNS.format(n_repeats="n_repeats", rows="samples JOIN asked USING (source, key)")
DRAWN = """
SELECT source, count(*) AS n_samples, CAST(sum(n_repeats) AS BIGINT) AS n_exposures,
  CAST(coalesce(sum(n_repeats * n_tokens::BIGINT) FILTER (n_images = 0), 0) AS BIGINT) AS n_text_only_tokens, {sums}
FROM read_parquet($lock)
GROUP BY source
"""

Totals = dict[str, dict[str | None, tuple[int, int]]]  # source -> reason (None: eligible) -> samples, tokens


def judge(con: duckdb.DuckDBPyConnection, ledgers: Sequence[Ledger]) -> str:
    """Create the view `samples` over all ledgers; returns it as the lock keeps it, without a path of this machine."""
    con.execute(_judged(ledgers, {c.name: literal(c.files) for c in ledgers}))
    return _judged(ledgers, named(ledgers))


def named(ledgers: Sequence[Ledger]) -> dict[str, str]:
    """The parameter that stands for each source's files in what the lock keeps."""
    return {c.name: f"$files_{c.name.replace('-', '_')}" for c in ledgers}


def _judged(ledgers: Sequence[Ledger], files: Mapping[str, str]) -> str:
    branches = (
        BRANCH.format(side=side, source=literal(c.name), reason=c.reason, files=files[c.name])
        for side, c in enumerate(ledgers)
    )
    return SAMPLES.format(branches="\nUNION ALL".join(branches))


def totals(con: duckdb.DuckDBPyConnection, ledgers: Sequence[Ledger], *, excluded: bool) -> Totals:
    """What each source has, by the reason that leaves it out; a source without a row is absent."""
    found: Totals = {}
    for side, reason, n, n_tokens in con.execute(TOTALS).fetchall():
        found.setdefault(ledgers[side].name, {})[reason] = (int(n), int(n_tokens))
    for source, reason, n, n_tokens in con.execute(EXCLUDED_TOTALS).fetchall() if excluded else ():
        own = found[source]
        own[reason] = (int(n), int(n_tokens))
        left = (own[None][0] - int(n), own[None][1] - int(n_tokens))
        own[None] = left
        if not left[0]:
            del own[None]
    return found


def write(
    con: duckdb.DuckDBPyConnection, draws: Sequence[tuple[Draw, int, int]], path: Path, *, seed: str, excluded: bool
) -> list[str]:
    """Write the lock of `draws` (with each source's eligible samples and tokens, in order); returns its queries."""
    rests = [side for side, (draw, _, _) in enumerate(draws) if draw.rest]
    hashed = f"IF(side IN ({', '.join(map(str, rests))}), md5(key || $seed), '')" if rests else "''"
    reached = REACHED.format(hash=hashed, left_out=LEFT_OUT if excluded else "")
    upto = [_upto(*draw) for draw in draws]
    while True:
        table = DRAWS.format(rows=",\n".join(_values(draws, upto)))
        for sql, values in ((table, None), (reached, {"seed": seed} if rests else None), (EDGES, None)):
            con.execute(sql, values)
        # A few long samples may hold most tokens: then the rest does not end where it should.
        edged = {side for (side,) in con.execute("SELECT side FROM edges").fetchall()}
        if not (open_ended := [side for side in rests if side not in edged]):
            break
        assert any(upto[side] != LAST for side in open_ended), f"a rest is not below its source: sides {open_ended}"
        upto = [LAST if side in open_ended else u for side, u in enumerate(upto)]
    exclude.write(con, LOCK, path)
    return [table, reached, EDGES, LOCK]


def _upto(draw: Draw, n_samples: int, n_tokens: int) -> str:
    """A hash behind the end of a draw's rest: for samples of like length, 20 deviations of a sum behind."""
    share = draw.rest / (n_samples if draw.in_samples else n_tokens) + 20 / n_samples**0.5
    if not (draw.whole or draw.rest):
        return ""
    return LAST if draw.whole or share >= 1 else f"{int(share * 2**32):08x}"


def _values(draws: Sequence[tuple[Draw, int, int]], upto: Sequence[str]) -> Iterator[str]:
    for side, (draw, _, _) in enumerate(draws):
        values = (side, draw.whole, draw.rest, draw.in_samples, upto[side])
        yield f"  ({', '.join(map(literal, values))})"


def drawn(con: duckdb.DuckDBPyConnection, lock: Path, columns: Sequence[str]) -> dict[str, dict[str, int]]:
    """Samples, exposures and the sums of `columns` with repeats, by source, from the file written."""
    sums = ", ".join(f"CAST(sum(n_repeats * {c}::BIGINT) AS BIGINT) AS {c}" for c in columns)
    rows = con.execute(DRAWN.format(sums=sums), {"lock": str(lock)}).fetchall()
    names = ("n_samples", "n_exposures", "n_text_only_tokens", *columns)
    return {row[0]: dict(zip(names, row[1:], strict=True)) for row in rows}
