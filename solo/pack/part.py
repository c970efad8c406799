"""Pack: which documents share a training sequence, and in which order the sequences are trained.

In: a mix lock, the shards it draws from. Out: `plan.parquet` and `packs.parquet` (solo/pack/plan_files.py). Invariants:
no pack holds more than `pack_tokens`; a document is whole unless it is plain text longer than a pack; order comes from
hashes of keys and the seed, inside a step from the packs' lengths, so pack i is the same on any machine and world size;
lock tokens = planned tokens + dropped tokens, by source, checked on the files written; documents of a pack cannot see
each other, proven on some of its packs (solo/pack/proof.py); samples that a recipe holds out are in no pack that is
trained (solo/pack/held_out.py). Cost: one sort of the exposures in DuckDB, a few microseconds a pack, and about five
seconds for the proof, most of it loading torch.

Where a pack holds one source, each source ends in a pack that is not full. Upstream trains those as they are; here
their documents share packs, never more of them than there are sources, and packs that fill no batch are dropped and
counted.

Loss tokens: a document's first token is never a target. A piece cut from inside a document has no predictor for its
first token either, so each cut (`split_boundaries`) takes one target away: that is the whole difference to the lock.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from solo.artifact import Job, LedgerError, Result
from solo.pack import balance, bestfit, held_out, proof
from solo.pack.plan_files import COUNTED, MIX, PACKS, PLAN, Pieces, Planned, write_packs, write_plan
from solo.spec import SpecError, Tokens

__all__ = ["PACKS", "PLAN", "VERSION", "run"]

# 2: packs of a step ordered for equal attention; an incomplete batch drops the emptiest packs
# 3: the ends of sources share packs; more orders tried for the end of a stream; another order inside a step
VERSION = 3  # 3: ends of sources share packs; short streams are tried in more orders

OVER_LONG = "over_long"
INCOMPLETE_BATCH = "incomplete_batch"
BOUNDARIES = "split_boundaries"

EXPOSURES = """
SELECT key, CAST(exposure AS INTEGER) AS exposure, source, shard, "offset", length, template,
  n_images, n_patches, n_loss_tokens, n_tokens
FROM read_parquet($lock), unnest(range(n_repeats)) AS repeats(exposure)
WHERE $one_in IS NULL OR md5_number_lower(key || ':held_out:' || $seed) % CAST($one_in AS UBIGINT) != 0
ORDER BY IF($by_source, source, ''), md5(key || exposure || $seed), key, exposure, shard, "offset"
"""

# What should have been packed and what was, from the two files and not from the arrays between them.
LOCK_SUMS = """
SELECT source, CAST(sum(n_repeats * n_tokens::BIGINT) AS BIGINT) AS n_tokens,
  CAST(sum(n_repeats * n_patches::BIGINT) AS BIGINT) AS n_patches,
  CAST(sum(n_repeats * n_loss_tokens::BIGINT) AS BIGINT) AS n_loss_tokens
FROM read_parquet($lock)
GROUP BY source
ORDER BY source
"""
PLAN_SUMS = """
SELECT source, count(DISTINCT pack) AS n_packs, CAST(sum(n_tokens) AS BIGINT) AS n_tokens,
  CAST(sum(n_patches) AS BIGINT) AS n_patches, CAST(sum(n_loss_tokens) AS BIGINT) AS n_loss_tokens
FROM read_parquet($plan)
GROUP BY source
ORDER BY source
"""

Sums = dict[str, dict[str, int]]  # source -> column -> sum


def run(job: Job) -> Result:
    """Write plan.parquet and packs.parquet for one mix; prove on some of its packs that no document sees another."""
    made = make_plan(job)
    tokens = Tokens.model_validate(job.spec["tokens"])
    shards = {source: artifact.path for source, artifact in job.of("shard").items()}
    found = proof.prove(job.out, shards, tokens, pack_tokens=job.spec["pack_tokens"], seed=job.spec["seed"])
    job.progress(f"pack/{job.name}: {found['n_documents']} documents of {found['n_packs']} packs proven apart")
    return replace(made, stats=made.stats | {"proof": found})


def make_plan(job: Job) -> Result:
    """The plan alone."""
    pack_tokens, batch_packs = job.spec["pack_tokens"], job.spec["batch_packs"]
    by_source = job.spec["pack_by"] != "mix"
    lock = job.one("curate").path / "lock.parquet"
    con = duckdb.connect(config={"threads": max(1, job.workers), "temp_directory": str(job.work / "duckdb")})
    params = {"lock": str(lock), "by_source": by_source, "seed": str(job.spec["seed"]), "one_in": held_out.one_in(job)}
    pieces = cut(con.sql(EXPOSURES, params=params).to_arrow_table().combine_chunks(), pack_tokens)
    if job.spec["pack_by"] == "sample":
        order, first = np.arange(len(pieces.row)), np.arange(len(pieces.row) + 1)
    else:
        order, first = assign(pieces, pack_tokens, by_source=by_source)
    packs = arrange(pieces, order[first[:-1]], job.spec["seed"])
    job.progress(f"pack/{job.name}: {len(pieces.row)} documents and pieces in {len(packs)} packs")
    if len(packs) < batch_packs:
        raise SpecError(
            f"pack/{job.name}: have {len(packs)} packs of {pack_tokens} tokens, batch_packs needs {batch_packs} "
            f"({(pieces.n_pieces == 0).sum()} of {len(pieces.n_pieces)} documents are longer than a pack); "
            f"raise budget_tokens or epochs in mixes/{job.name}.yaml, or lower batch_packs"
        )
    n_tokens = pieces.counts["n_tokens"][order]
    packs, left_out = whole_batches(packs, np.add.reduceat(n_tokens, first[:-1]), batch_packs)
    costs = np.add.reduceat(n_tokens**2, first[:-1])
    packs, balanced = balance.steps(packs, costs, batch_packs)
    plan = members(order, first, packs)
    write_plan(job.out, pieces, plan)
    write_packs(job.out, pieces, plan, by_source=by_source)
    lost = losses(pieces, members(order, first, left_out).piece)
    apart = held_out.set_aside(con, lock, job) if held_out.one_in(job) else None
    lost |= apart.lost if apart else {}
    sources = check_sums(f"pack/{job.name}", con, lock, job.out / "plan.parquet", lost)
    con.close()
    made = result(pieces, plan, lost, sources, pack_tokens)
    if apart:
        made = held_out.counted(made, apart, held_out.write(job.out, cut(apart.measured, pack_tokens), pack_tokens))
    written = pq.read_table(job.out / "packs.parquet", columns=["n_tokens", "source"])
    filled = fills(written["n_tokens"].to_numpy().astype(np.int64), pack_tokens)
    n_shared = pc.sum(pc.equal(written["source"], MIX)).as_py() if by_source else None
    return replace(made, stats=made.stats | filled | {"n_shared_packs": n_shared, "attention_imbalance": balanced})


def cut(exposures: pa.Table, pack_tokens: int) -> Pieces:
    """Documents as they are, long plain text in pieces of `pack_tokens`, other long documents not at all."""
    names = exposures["source"].dictionary_encode().combine_chunks()
    totals = {k: exposures[k].to_numpy().astype(np.int64) for k in COUNTED}
    n_tokens = totals["n_tokens"]
    # Which tokens of a text with user turns are targets is not known here, so only a text that is all answer is cut.
    can_split = pc.equal(exposures["template"], "plain").to_numpy() & (exposures["n_images"].to_numpy() == 0)
    can_split &= totals["n_loss_tokens"] == n_tokens - 1
    n_pieces = np.where(n_tokens <= pack_tokens, 1, np.where(can_split, -(-n_tokens // pack_tokens), 0))
    row = np.repeat(np.arange(len(n_tokens)), n_pieces)
    begin = (np.arange(len(row)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)) * pack_tokens
    end = np.minimum(begin + pack_tokens, n_tokens[row])
    counts = {name: values[row] for name, values in totals.items()}
    is_piece = n_pieces[row] > 1
    counts["n_loss_tokens"] = np.where(is_piece, end - begin - 1, counts["n_loss_tokens"])
    counts["n_tokens"] = end - begin
    sources, source_of = names.dictionary.to_pylist(), names.indices.to_numpy()
    return Pieces(exposures, sources, source_of, totals, n_pieces, row, begin, end, counts)


def assign(pieces: Pieces, pack_tokens: int, *, by_source: bool) -> tuple[np.ndarray, np.ndarray]:
    """Pieces in the order they are placed, and where each pack begins in that order (and the last one ends).

    Where a pack holds one source, the ends of sources, one pack each that is not full, are packed together if that
    takes fewer packs, or as many with one of them emptier.
    """
    n_tokens = pieces.counts["n_tokens"]
    # The stream is sorted by source where a pack holds one source, so each source is one stretch of it.
    borders = np.flatnonzero(np.diff(pieces.source)) + 1 if by_source else np.zeros(0, dtype=np.int64)
    made = [_packed(part, n_tokens, pack_tokens) for part in np.split(np.arange(len(pieces.row)), borders)]
    parted = [_without_end(order, sizes, n_tokens, pack_tokens) for order, sizes in made]
    ends = [end for _, _, end in parted if len(end)]
    if len(ends) > 1:
        shared = _packed(np.concatenate(ends), n_tokens, pack_tokens)
        emptiest = np.add.reduceat(n_tokens[shared[0]], np.cumsum(shared[1]) - shared[1]).min()
        if (len(shared[1]), emptiest) < (len(ends), min(n_tokens[end].sum() for end in ends)):
            made = [*((order, sizes) for order, sizes, _ in parted), shared]
    sizes = np.concatenate([sizes for _, sizes in made])
    return np.concatenate([order for order, _ in made]), np.append(0, np.cumsum(sizes))


def _packed(part: np.ndarray, n_tokens: np.ndarray, pack_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Some pieces in the order they are placed, and how many each pack holds."""
    packs = bestfit.pack(n_tokens[part], pack_tokens)
    return part[packs.order], np.diff(packs.first)


def _without_end(
    order: np.ndarray, sizes: np.ndarray, n_tokens: np.ndarray, pack_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packs without the emptiest, where one is not full, and the pieces of that one."""
    if not len(sizes):
        return order, sizes, order
    first = np.cumsum(sizes) - sizes
    held = np.add.reduceat(n_tokens[order], first)
    end = int(held.argmin())
    if held[end] == pack_tokens:
        return order, sizes, order[:0]
    rows = slice(first[end], first[end] + sizes[end])
    return np.delete(order, rows), np.delete(sizes, end), order[rows]


def arrange(pieces: Pieces, leaders: np.ndarray, seed: int) -> np.ndarray:
    """Packs in training order: by a hash of their first piece, so all sources mix and none depends on another.

    `begin` is in the hash: without it the pieces of one long text would be neighbours.
    """
    rows = pa.array(pieces.row[leaders])
    keys, exposures = (pieces.exposures[name].take(rows).to_pylist() for name in ("key", "exposure"))
    begins = pieces.begin[leaders].tolist()
    names = [f"{key}:{i}:{begin}:{seed}" for key, i, begin in zip(keys, exposures, begins, strict=True)]
    digests = [hashlib.md5(name.encode(), usedforsecurity=False).digest() for name in names]
    return np.array(sorted(range(len(names)), key=lambda i: (digests[i], i)), dtype=np.int64)


def whole_batches(packs: np.ndarray, n_tokens: np.ndarray, batch_packs: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs in whole batches, and those that are too many: the emptiest, so that the fewest tokens are dropped.

    They are the ends of sources, mostly; under `loss_average: pack` a nearly empty pack weighs as much as a full one.
    """
    by_fill = np.lexsort((-np.arange(len(packs)), n_tokens[packs]))  # among equals the last goes first
    is_out = np.zeros(len(packs), dtype=bool)
    is_out[by_fill[: len(packs) % batch_packs]] = True
    return packs[~is_out], packs[is_out]


def members(order: np.ndarray, first: np.ndarray, packs: np.ndarray) -> Planned:
    """Pieces of the given packs, pack after pack, with the packs numbered anew."""
    sizes = np.diff(first)[packs]
    number = np.repeat(np.arange(len(packs)), sizes)
    slot = np.arange(len(number)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return Planned(order[first[packs][number] + slot], number)


def fills(n_tokens: np.ndarray, pack_tokens: int) -> dict[str, Any]:
    """Share of the trained packs that is tokens: of all, without the emptiest, and what no packing can exceed."""
    total = int(n_tokens.sum())
    others = len(n_tokens) - 1
    return {
        "fill": _round(total / (len(n_tokens) * pack_tokens)),
        "fill_without_last": _round((total - n_tokens.min()) / (others * pack_tokens)) if others else None,
        "fill_limit": _round(total / (-(-total // pack_tokens) * pack_tokens)),
    }


def _round(share: float) -> float:
    return round(float(share), 6)


def losses(pieces: Pieces, left_out: np.ndarray) -> dict[str, Sums]:
    """Tokens of the lock that are in no pack of the plan, by reason, source and column."""
    over = np.flatnonzero(pieces.n_pieces == 0)
    cuts = np.maximum(pieces.n_pieces - 1, 0)

    def by_source(source: np.ndarray, counts: dict[str, np.ndarray]) -> Sums:
        # bincount adds in float64, exact to 2^53: hundreds of times the tokens of any corpus there is.
        columns = {k: np.bincount(source, weights=v, minlength=len(pieces.sources)) for k, v in counts.items()}
        return {s: {k: int(v[i]) for k, v in columns.items()} for i, s in enumerate(pieces.sources)}

    return {
        OVER_LONG: by_source(pieces.source_of[over], {k: pieces.totals[k][over] for k in COUNTED}),
        INCOMPLETE_BATCH: by_source(pieces.source[left_out], {k: pieces.counts[k][left_out] for k in COUNTED}),
        BOUNDARIES: by_source(pieces.source_of, {"n_tokens": 0 * cuts, "n_patches": 0 * cuts, "n_loss_tokens": cuts}),
    }


def check_sums(what: str, con: duckdb.DuckDBPyConnection, lock: Path, plan: Path, lost: dict[str, Sums]) -> Sums:
    """Raise LedgerError unless lock = plan + everything lost, by source and column; the plan's sums by source."""
    have = sums_of(con, LOCK_SUMS, {"lock": str(lock)})
    planned = sums_of(con, PLAN_SUMS, {"plan": str(plan)})
    for source in sorted(have | planned):
        for name in COUNTED:
            n_lock = have.get(source, {}).get(name, 0)
            terms = {"planned": planned.get(source, {}).get(name, 0)}
            terms |= {reason: by.get(source, {}).get(name, 0) for reason, by in lost.items()}
            if n_lock != sum(terms.values()):
                equation = " + ".join(f"{n} {term}" for term, n in terms.items())
                raise LedgerError(
                    f"{what}: {source}: the ledger does not close: {n_lock} {name} in the lock != {equation} "
                    f"= {sum(terms.values())}; this is a bug in the part, please report it"
                )
    return planned


def sums_of(con: duckdb.DuckDBPyConnection, sql: str, params: dict[str, str]) -> Sums:
    """Rows of a query by their `source`."""
    return {row.pop("source"): row for row in con.sql(sql, params=params).to_arrow_table().to_pylist()}


def result(pieces: Pieces, plan: Planned, lost: dict[str, Sums], sums: Sums, pack_tokens: int) -> Result:
    """Counts in documents, statistics in tokens; a document counts as kept when a piece of it is planned."""
    kept = np.zeros(len(pieces.n_pieces), dtype=bool)
    kept[pieces.row[plan.piece]] = True
    over_long = int((pieces.n_pieces == 0).sum())
    dropped = {OVER_LONG: over_long, INCOMPLETE_BATCH: len(kept) - int(kept.sum()) - over_long}
    documents = np.bincount(pieces.source_of[kept], minlength=len(pieces.sources)).tolist()
    nothing = dict.fromkeys(("n_packs", *COUNTED), 0)
    sources = {s: {"n_documents": n} | sums.get(s, nothing) for s, n in zip(pieces.sources, documents, strict=True)}
    totals = {name: sum(s[name] for s in sources.values()) for name in COUNTED}
    lost_tokens = {r: {k: sum(s[k] for s in by.values()) for k in COUNTED} for r, by in lost.items()}
    n_packs = int(plan.pack[-1]) + 1
    stats: dict[str, Any] = {
        "n_packs": n_packs,
        "pack_tokens": pack_tokens,
        "n_documents": int(kept.sum()),
        **totals,
        "n_text_tokens": totals["n_tokens"] - totals["n_patches"],
        "sources": dict(sorted(sources.items())),
        "n_splits": int((pieces.n_pieces > 1).sum()),
        "split_boundaries": lost_tokens.pop(BOUNDARIES)["n_loss_tokens"],
        "dropped_tokens": {reason: n["n_tokens"] for reason, n in lost_tokens.items()},
        "dropped_loss_tokens": {reason: n["n_loss_tokens"] for reason, n in lost_tokens.items()},
    }
    return Result(len(kept), int(kept.sum()), dropped, stats)
