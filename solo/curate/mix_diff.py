"""Mix diff: what changed from one mix lock to another, in samples, exposures, tokens, and in what they are like.

In: two curate artifacts and the ledgers they were drawn from. Out: one dict (JSON), lines for a terminal, or a page
with thumbnails. Invariants: added - removed = the difference of the samples, in each group and in all, or it is an
error; a ledger that is gone is named, and what only it could tell is left out. Cost: one join of the two locks in
DuckDB, and a handful of reads for the pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from solo import artifact
from solo.artifact import Artifact, LedgerError
from solo.curate import categories, locks
from solo.curate.query import literal
from solo.report import gallery
from solo.report.markdown import escape, join, picture, table
from solo.sample import read_sample

Row = dict[str, Any]

N_EACH = 4  # samples shown of those added, and of those removed
GROUPS = ("source", "modality", "category")
MEASURES = ("n_tokens", "n_loss_tokens", "width_px", "height_px")
QUANTILES = (0.1, 0.5, 0.9)
LEDGER_COLUMNS = {"width_px": "BIGINT", "height_px": "BIGINT", "language": "VARCHAR", "meta_category": "VARCHAR"}

# One row per sample of either lock; `n_*` of a side that lacks it are 0, so sums need no cases.
JOINED = """
CREATE TEMP TABLE joined AS
SELECT source, key, coalesce(b.n_images, a.n_images) AS n_images,
  coalesce(a.n_repeats, 0) AS repeats_a, coalesce(b.n_repeats, 0) AS repeats_b,
  coalesce(a.n_tokens, 0) AS n_tokens_a, coalesce(b.n_tokens, 0) AS n_tokens_b,
  coalesce(a.n_loss_tokens, 0) AS n_loss_tokens_a, coalesce(b.n_loss_tokens, 0) AS n_loss_tokens_b
FROM read_parquet($a) AS a FULL JOIN read_parquet($b) AS b USING (source, key)
"""
KNOWN = """
CREATE TEMP TABLE known AS
SELECT joined.*, IF(n_images > 0, 'image-text', 'text') AS modality, {category} AS category,
  width_px, height_px, coalesce(language, '(none)') AS language
FROM joined LEFT JOIN ledger USING (source, key)
"""
COUNTS = """
SELECT {group} AS "group",
  count_if(repeats_a > 0) AS samples_a, count_if(repeats_b > 0) AS samples_b,
  count_if(repeats_a = 0) AS added, count_if(repeats_b = 0) AS removed,
  count_if(repeats_a > 0 AND repeats_b > repeats_a) AS repeated_more,
  count_if(repeats_b > 0 AND repeats_b < repeats_a) AS repeated_less,
  CAST(sum(repeats_a) AS BIGINT) AS exposures_a, CAST(sum(repeats_b) AS BIGINT) AS exposures_b,
  CAST(sum(repeats_a * n_tokens_a::BIGINT) AS BIGINT) AS tokens_a,
  CAST(sum(repeats_b * n_tokens_b::BIGINT) AS BIGINT) AS tokens_b,
  CAST(sum(repeats_a * n_loss_tokens_a::BIGINT) AS BIGINT) AS loss_tokens_a,
  CAST(sum(repeats_b * n_loss_tokens_b::BIGINT) AS BIGINT) AS loss_tokens_b
FROM known GROUP BY ALL ORDER BY "group"
"""
SPREAD = """
WITH sides AS (
  SELECT {of_a} AS value, repeats_a AS a, 0 AS b FROM known
  UNION ALL
  SELECT {of_b}, 0, repeats_b FROM known
)
SELECT value, CAST(sum(a) AS BIGINT) AS a, CAST(sum(b) AS BIGINT) AS b
FROM sides WHERE value IS NOT NULL GROUP BY ALL ORDER BY value
"""
SHOWN = """
SELECT source, key, shard, "offset", length
FROM read_parquet($has) ANTI JOIN read_parquet($lacks) AS other USING (source, key)
ORDER BY md5(key), key LIMIT $n
"""


def difference(root: Path, a: Artifact, b: Artifact) -> Row:
    """Everything that changed from lock `a` to lock `b`."""
    ledgers = [locks.shards(root, lock) for lock in (b, a)]  # where both know a sample, b's word counts
    with duckdb.connect() as con:
        con.execute(JOINED, {"a": str(a.path / "lock.parquet"), "b": str(b.path / "lock.parquet")})
        _load_ledgers(con, {x.path: x for of in ledgers for x in of.values()}.values())
        con.execute(KNOWN.format(category=categories.named(categories.given(a, b), "meta_category")))
        groups = {group: _counted(con, group) for group in GROUPS}
        total = (_counted(con, "'all'") or [_empty()])[0]
        shift = {m: s for m in MEASURES if (s := _shift(_spread(con, m)))}
        language = _spread(con, "language")
    sources = {r["group"] for r in groups["source"]}
    found: Row = {"a": _named(a), "b": _named(b), "total": total, **{f"by_{g}": rows for g, rows in groups.items()}}
    found |= {
        "shift": shift,
        "language": _shares(language),
        "ledger_gone": sorted(sources - {s for of in ledgers for s in of}),
    }
    check(found)
    return found


def check(found: Mapping[str, Any]) -> None:
    """Raise LedgerError unless added - removed is the difference of the samples, and groups add up to the total."""
    total = found["total"]
    rows = [("all", total), *((f"{g} {r['group']}", r) for g in GROUPS for r in found[f"by_{g}"])]
    for what, r in rows:
        if r["added"] - r["removed"] != r["samples_b"] - r["samples_a"]:
            raise LedgerError(
                f"diff mix: {what}: {r['added']} added - {r['removed']} removed != {r['samples_b']} - {r['samples_a']}"
            )
    for group in GROUPS:
        for name in total.keys() - {"group"}:
            if (summed := sum(r[name] for r in found[f"by_{group}"])) != total[name]:
                raise LedgerError(f"diff mix: {name}: {summed} over {group} != {total[name]} in all")
    for side in ("a", "b"):
        stats = found[side]
        for name, stat in (("samples", "n_samples"), ("exposures", "n_exposures"), ("tokens", "n_tokens")):
            if total[f"{name}_{side}"] != stats[stat]:
                raise LedgerError(
                    f"diff mix: {stats['lock']}: {total[f'{name}_{side}']} {name} in its lock != "
                    f"{stats[stat]} in its manifest; make it again"
                )


def _named(a: Artifact) -> Row:
    own = {k: a.manifest.stats[k] for k in ("n_samples", "n_exposures", "n_tokens", "n_loss_tokens")}
    return {"lock": f"{a.manifest.name}@{a.path.name}", **own}


def _load_ledgers(con: duckdb.DuckDBPyConnection, ledgers: Iterable[Artifact]) -> None:
    """Table `ledger` with what only the ledgers know; a column that a source does not measure is NULL."""
    columns = ", ".join(f"{name} {kind}" for name, kind in LEDGER_COLUMNS.items())
    con.execute(f"CREATE TEMP TABLE ledger (source VARCHAR, key VARCHAR, {columns})")
    for a in ledgers:
        if files := [str(f) for f in sorted((a.path / "shards").glob("*.parquet"))]:
            read = f"SELECT * FROM read_parquet({literal(files)}, union_by_name := TRUE)"
            have = {c.lower() for c in con.sql(read).columns}
            names = ", ".join(n for n in ("source", "key", *LEDGER_COLUMNS) if n in have)
            con.execute(f"INSERT INTO ledger BY NAME SELECT {names} FROM ({read}) ANTI JOIN ledger USING (source, key)")


def _counted(con: duckdb.DuckDBPyConnection, group: str) -> list[Row]:
    found = con.execute(COUNTS.format(group=group))
    names = [d[0] for d in found.description or ()]
    return [_deltas(dict(zip(names, row, strict=True))) for row in found.fetchall()]


def _deltas(row: Row) -> Row:
    return row | {f"{n}_delta": row[f"{n}_b"] - row[f"{n}_a"] for n in ("exposures", "tokens", "loss_tokens")}


def _empty() -> Row:
    sides = {f"{n}_{side}": 0 for n in ("samples", "exposures", "tokens", "loss_tokens") for side in "ab"}
    changes = dict.fromkeys(("added", "removed", "repeated_more", "repeated_less"), 0)
    return _deltas({"group": "all"} | sides | changes)


def _spread(con: duckdb.DuckDBPyConnection, column: str) -> list[tuple[Any, int, int]]:
    """Each value with its exposures on both sides; a sample's tokens may differ between the locks, its picture not."""
    sides = [f"{column}_{side}" if column.endswith("tokens") else column for side in "ab"]
    return con.execute(SPREAD.format(of_a=sides[0], of_b=sides[1])).fetchall()


def _shift(rows: Sequence[tuple[Any, int, int]]) -> Row | None:
    """Mean and quantiles on both sides over exposures, and the largest gap of the two distribution functions."""
    values = np.array([r[0] for r in rows], np.float64)
    sides = {side: np.array([r[i] for r in rows], np.float64) for i, side in ((1, "a"), (2, "b"))}
    if not all(n.sum() for n in sides.values()):
        return None
    over = {side: np.cumsum(n) / n.sum() for side, n in sides.items()}
    found: Row = {}
    for side, n in sides.items():
        found[f"mean_{side}"] = round(float(values @ n / n.sum()), 2)
        for q in QUANTILES:
            found[f"p{q * 100:.0f}_{side}"] = float(values[int(np.searchsorted(over[side], q))])
    return found | {"largest_gap": round(float(np.abs(over["a"] - over["b"]).max()), 4)}


def _shares(rows: Sequence[tuple[Any, int, int]]) -> list[Row]:
    """Share of the exposures on each side by value, the largest change first; nothing where none is known."""
    n_a, n_b = (max(1, sum(r[i] for r in rows)) for i in (1, 2))
    found = [{"language": v, "share_a": round(a / n_a, 4), "share_b": round(b / n_b, 4)} for v, a, b in rows]
    if [r["language"] for r in found] == ["(none)"]:
        return []
    return sorted(found, key=lambda r: (-abs(r["share_b"] - r["share_a"]), r["language"]))


def _rows(found: Mapping[str, Any], group: str) -> Iterator[Row]:
    """A group's table for people, the largest change of tokens first, what did not change left out."""
    rows = [found["total"]] if group == "total" else found[f"by_{group}"]
    for r in sorted(rows, key=lambda r: (-abs(r["tokens_delta"]), r["group"])):
        changes = ("added", "removed", "repeated_more", "repeated_less")
        if group == "total" or any(r[c] for c in changes) or r["tokens_delta"]:
            names = {"samples before": "samples_a", "after": "samples_b"} | {c.replace("_", " "): c for c in changes}
            yield {group: r["group"], **{label: r[c] for label, c in names.items()}} | {
                "tokens": f"{r['tokens_delta']:+,}",
                "label tokens": f"{r['loss_tokens_delta']:+,}",
            }


def _shift_rows(found: Mapping[str, Any]) -> Iterator[Row]:
    for measure, s in found["shift"].items():
        pairs = {q: f"{s[f'{q}_a']:,g} -> {s[f'{q}_b']:,g}" for q in ("mean", "p10", "p50", "p90")}
        yield {"measure": measure, **pairs, "largest gap": s["largest_gap"]}


def tables(found: Mapping[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    """Heading and rows of each table that has something to say."""
    yield "In all", list(_rows(found, "total"))
    for group in GROUPS:
        if group != "category" or {r["group"] for r in found["by_category"]} != {"(none)"}:
            yield f"By {group}", list(_rows(found, group))
    yield "Distributions over exposures", list(_shift_rows(found))
    if found["language"]:
        yield "Languages", found["language"][:12]
    if found["ledger_gone"]:
        yield (
            "Ledgers that are gone, so category, size and language are unknown",
            [{"source": s} for s in found["ledger_gone"]],
        )


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The difference for a terminal."""
    yield f"{found['a']['lock']} -> {found['b']['lock']}"
    for heading, rows in tables(found):
        yield f"\n{heading}"
        yield from _aligned(rows) if rows else ["(no change)"]


def _aligned(rows: Sequence[Row]) -> Iterator[str]:
    cells = [list(rows[0]), *([f"{v:,}" if isinstance(v, int) else str(v) for v in r.values()] for r in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        first, *rest = (
            f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join([first, *rest]).rstrip()


def page(root: Path, a: Artifact, b: Artifact) -> str:
    """The difference as a page, with a few of the samples that came and went."""
    found = difference(root, a, b)
    blocks = [f"# Mix {escape(found['a']['lock'])} to {escape(found['b']['lock'])}"]
    blocks += [f"## {heading}\n\n{table(rows) if rows else '(no change)'}" for heading, rows in tables(found)]
    for heading, has, lacks in (("Added", b, a), ("Removed", a, b)):
        shown = list(samples(root, has, lacks))
        blocks.append(f"## {heading}, a few of them\n\n{table(shown) if shown else '(none, or their shards are gone)'}")
    return join(blocks)


def samples(root: Path, has: Artifact, lacks: Artifact) -> Iterator[Row]:
    """Samples that one lock has and the other lacks, the first in the order of hashed keys."""
    shards = locks.shards(root, has)
    given = {"has": str(has.path / "lock.parquet"), "lacks": str(lacks.path / "lock.parquet"), "n": N_EACH}
    with duckdb.connect() as con:
        rows = con.execute(SHOWN, given).fetchall()
    for source, key, shard, offset, length in rows:
        tar = shards[source].path / "shards" / f"{shard:05d}.tar" if source in shards else None
        if tar is not None and tar.is_file():
            sample = read_sample(tar, offset, length)
            small = gallery.thumbnail(sample.images[0]) if sample.images else None
            said = " ".join(i["text"] for m in sample.messages for i in m["content"] if i["type"] == "text")
            yield {"source": source, "key": key, "picture": picture(small, "sample") if small else "", "text": said}


def changed(root: Path, last: Mapping[str, str], made: Sequence[Artifact]) -> Iterator[tuple[str, str]]:
    """Mix and page for each lock that is not that of the recipe's last run (node -> fingerprint), where it is there."""
    for lock in made:
        before = root / lock.manifest.id / last.get(lock.manifest.id, "")
        if lock.manifest.id in last and before.name != lock.path.name and artifact.damage(before) is None:
            m = artifact.read_manifest(before)
            assert m is not None
            yield lock.manifest.name, page(root, Artifact(before, m), lock)
