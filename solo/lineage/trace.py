"""Trace: a sample's whole way, from its URL to the optimizer steps that trained it, and from a step back to the URLs.

In: a data root and a key, the beginning of one, a URL or a SHA-256; or a stage and step, or a mix and pack. Out: dicts
for JSON, which solo/lineage/trace_text.py writes out. Invariants: nothing is recomputed, each fact names the artifact
it is from; of each part and name the artifact made last counts, and one whose input is not the artifact shown before it
is `stale`. Cost: by key some row groups (solo/lineage/keyed.py) and two columns of integers of each pack plan; by URL
or hash one scan of that column besides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from solo.artifact import Artifact, read_manifest
from solo.lineage.keyed import Row
from solo.lineage.named import MOST, Root, Unknown, acquired_rows, resolve, taken_down

PLACED = """
SELECT pack, slot, exposure, "begin", "end", n_tokens, n_patches, n_loss_tokens FROM read_parquet($plan)
WHERE {place} key = $key ORDER BY pack, slot
"""
TRAINED = "SELECT pack, step, loss, sources, left_out FROM read_parquet($trained) WHERE list_contains($packs, pack)"


def trace(root: Path, asked: str, specs: Path | None = None) -> dict[str, Any]:
    """Everything about the samples that a key, the beginning of one, a URL or a hash means.

    With `specs` a name that is unknown because it was taken down is said to be that.
    """
    found = Root(root)
    try:
        kind, keys = resolve(found, asked.strip())
    except Unknown as unknown:
        raise Unknown(taken_down(asked.strip(), specs) or str(unknown)) from None
    shown = [sample(found, key) for key in keys[:MOST]]
    return {"asked": asked, "kind": kind, "n_samples": len(keys), "samples": shown}


def sample(root: Root, key: str) -> dict[str, Any]:
    """One sample's way."""
    source = key.rpartition("-")[0]
    acquired, filtered = root.artifact("acquire", source), root.artifact("filter", source)
    assert acquired is not None, f"{key}: its source has no acquire artifact"
    outcomes = root.keyed(acquired.path / "outcomes.parquet")
    fetches = root.keyed(acquired.path / "fetch.parquet")
    found: dict[str, Any] = {"key": key, "source": source}
    found["acquire"] = _of(acquired) | {
        "outcomes": outcomes.rows(key) if outcomes else [],
        "fetches": fetches.rows(key) if fetches else [],
    }
    found["filter"] = _filtered(root, key, filtered, acquired) if filtered else None
    verdict = (found["filter"] or {}).get("verdict")
    sharded, is_kept = root.artifact("shard", source), verdict is None or verdict["keep"]
    found["shard"] = _sharded(root, key, sharded, filtered, is_kept=is_kept) if sharded else None
    found["locks"] = list(_locked(root, key, source, sharded))
    found["packs"] = [pack for lock in found["locks"] if (pack := _packed(root, key, source, lock))]
    found["trained"] = list(_trained(root, key, source, found["packs"]))
    return found


def _of(made: Artifact, *before: Artifact | None) -> dict[str, Any]:
    """Which artifact a fact is from, and whether it was made from those shown before it."""
    m = made.manifest
    own: dict[str, Any] = {"artifact": m.id, "fingerprint": m.fingerprint}
    is_stale = any(b is not None and m.inputs.get(b.manifest.id) != b.manifest.digest for b in before)
    return own | ({"stale": True} if is_stale else {})


def _filtered(root: Root, key: str, made: Artifact, acquired: Artifact) -> dict[str, Any]:
    verdicts, signals = (root.keyed(made.path / f"{name}.parquet") for name in ("verdicts", "signals"))
    verdict = verdicts.rows(key) if verdicts else []
    measured = signals.rows(key) if signals else []
    shown = {k: v for row in measured for k, v in row.items() if k not in ("key", "raw_shard") and v is not None}
    return _of(made, acquired) | {"verdict": verdict[0] if verdict else None, "signals": shown}


def _sharded(root: Root, key: str, made: Artifact, filtered: Artifact | None, *, is_kept: bool) -> dict[str, Any]:
    """The ledger row, or the reason shard had to leave the sample out."""
    own = _of(made, filtered)
    if row := ledger_row(root, key, made, is_kept=is_kept):
        return own | {"tar": f"shards/{row['shard']:05d}.tar", "row": row}
    dropped = root.keyed(made.path / "dropped.parquet")
    lost = dropped.rows(key) if dropped else []
    return own | {"row": None, "dropped": lost[0] if lost else None}


def ledger_row(root: Root, key: str, made: Artifact, *, is_kept: bool) -> Row | None:
    """A key's row of a ledger: shards are in the order (raw shard, key), so the one it is in is found by halving.

    Where that order is of raw tars other than those there now, a sample that should be there is looked for in all.
    """
    files = sorted((made.path / "shards").glob("*.parquet"))
    own = _raw_place(root, key)
    low, high = 0, len(files) if own else 0
    while own and high - low > 1:  # the shard is in [low, high)
        middle = (low + high) // 2
        file = root.keyed(files[middle])
        first = file.first_key() if file else None
        place = _raw_place(root, first) if first else None
        low, high = (middle, high) if place and place <= own else (low, middle)
    likely = files[low:high]
    for path in [*likely, *(p for p in files if is_kept and p not in likely)]:
        if (file := root.keyed(path)) and (rows := file.rows(key)):
            return rows[0]
    return None


def _raw_place(root: Root, key: str) -> tuple[int, str] | None:
    rows = [r for r in acquired_rows(root, key, ["key", "raw_shard"]) if r["raw_shard"] is not None]
    return (rows[0]["raw_shard"], key) if rows else None


def _locked(root: Root, key: str, source: str, sharded: Artifact | None) -> Iterator[dict[str, Any]]:
    """Each mix that draws from the source: how often it has the sample, or why not."""
    for made in root.all("curate").values():
        if f"shard/{source}" not in made.manifest.inputs:
            continue
        lock, excluded = (root.keyed(made.path / f"{name}.parquet") for name in ("lock", "excluded"))
        rows = lock.rows(key) if lock else []
        why = excluded.rows(key) if excluded and not rows else []
        own = _of(made, sharded) | {"mix": made.manifest.name}
        yield (
            own
            | {"n_repeats": rows[0]["n_repeats"] if rows else 0, "row": rows[0] if rows else None}
            | ({"excluded": why[0]} if why else {})
        )


def _packed(root: Root, key: str, source: str, lock: Mapping[str, Any]) -> dict[str, Any] | None:
    """The documents of a sample in the packs of a mix."""
    made, row = root.artifact("pack", lock["mix"]), lock["row"]
    if made is None or row is None:
        return None
    own = _of(made, root.artifact("curate", lock["mix"]))
    place = {"source": source, "shard": row["shard"], "offset": row["offset"]}
    return own | {"mix": lock["mix"], "documents": _placed(root, made, key, None if "stale" in own else place)}


def _placed(root: Root, planned: Artifact, key: str, place: Mapping[str, Any] | None) -> list[Row]:
    """A key's rows of a plan. By its place two columns of integers are read, by its key one of text."""
    sql = PLACED.format(place='shard = $shard AND "offset" = $offset AND source = $source AND' if place else "")
    rows = root.rows(sql, plan=str(planned.path / "plan.parquet"), key=key, **(place or {}))
    batch_packs = int(planned.manifest.spec["batch_packs"])
    return [row | {"step": row["pack"] // batch_packs + 1} for row in rows]


def _trained(root: Root, key: str, source: str, packed: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """What each stage that reads the source made of it, by the very packs it was trained on."""
    now = {p["fingerprint"]: p["documents"] for p in packed}
    for stage in root.all("train").values():
        if f"shard/{source}" not in stage.manifest.inputs:
            continue
        node = next(i for i in stage.manifest.inputs if i.startswith("pack/"))
        planned = _with_digest(root, node, stage.manifest.inputs[node])
        own = _of(stage, root.artifact("pack", node.removeprefix("pack/"))) | {"stage": stage.manifest.name}
        if planned is None:
            yield own | {"documents": None}
            continue
        fingerprint = planned.manifest.fingerprint
        documents = now[fingerprint] if fingerprint in now else _placed(root, planned, key, None)
        packs = sorted({d["pack"] for d in documents})
        rows = root.rows(TRAINED, trained=str(stage.path / "trained.parquet"), packs=packs) if packs else []
        by_pack = {r["pack"]: r for r in rows}
        yield own | {"documents": [_learned(key, source, d, by_pack[d["pack"]]) for d in documents]}


def _learned(key: str, source: str, document: Row, row: Row) -> Row:
    """A document's step, and the loss there: of its pack, and of its source's documents in the pack."""
    out = [r for r in row["left_out"] if r["key"] == key and r["begin"] == document["begin"]]
    lost = next((r["reason"] for r in out if r["exposure"] == document["exposure"]), None)
    losses = [s["loss"] for s in row["sources"] if s["source"] == source]
    place = {name: document[name] for name in ("pack", "slot", "exposure", "begin", "end")}
    return place | {
        "step": row["step"],
        "left_out": lost,
        "loss_of_pack": row["loss"],
        "loss_of_source_in_pack": losses[0] if losses else None,
    }


def of_step(root: Path, stage: str, step: int) -> dict[str, Any]:
    """The documents of one optimizer step of a stage, with their URLs."""
    found = Root(root)
    made = found.artifact("train", stage)
    if made is None:
        raise Unknown(f"trace: no stage {stage!r} was trained under {root}; there are {sorted(found.all('train'))}")
    (node,) = [i for i in made.manifest.inputs if i.startswith("pack/")]
    planned = _with_digest(found, node, made.manifest.inputs[node])
    if planned is None:
        raise Unknown(
            f"trace: the packs that stage {stage!r} was trained on are gone from {root}; its steps stay unknown"
        )
    batch_packs = int(planned.manifest.spec["batch_packs"])
    n_steps = int(planned.manifest.stats["n_packs"]) // batch_packs
    if not 1 <= step <= n_steps:
        raise Unknown(f"trace: stage {stage!r} has steps 1 to {n_steps}, not {step}")
    packs = list(range((step - 1) * batch_packs, step * batch_packs))
    rows = found.rows(TRAINED, trained=str(made.path / "trained.parquet"), packs=packs)
    by_pack = {r["pack"]: r for r in rows}
    documents = [d | _learned(d["key"], d["source"], d, by_pack[d["pack"]]) for d in _documents(found, planned, packs)]
    return _of(made, planned) | {"stage": stage, "step": step, "mix": planned.manifest.name, "documents": documents}


def of_pack(root: Path, mix: str, pack: int) -> dict[str, Any]:
    """The documents of one pack of a mix, with their URLs."""
    found = Root(root)
    planned = found.artifact("pack", mix)
    if planned is None:
        raise Unknown(f"trace: no packs of mix {mix!r} under {root}; there are packs of {sorted(found.all('pack'))}")
    n_packs = int(planned.manifest.stats["n_packs"])
    if not 0 <= pack < n_packs:
        raise Unknown(f"trace: mix {mix!r} has packs 0 to {n_packs - 1}, not {pack}")
    step = pack // int(planned.manifest.spec["batch_packs"]) + 1
    return _of(planned) | {"mix": mix, "pack": pack, "step": step, "documents": _documents(found, planned, [pack])}


def _documents(root: Root, planned: Artifact, packs: Sequence[int]) -> list[Row]:
    """The plan's rows of some packs, with what each document was upstream."""
    from solo.pack.plan import Plan

    plan = Plan(planned.path)
    rows = [row for pack in packs for row in plan.rows(pack)]
    upstream: dict[str, Row] = {}
    for source in {row["source"] for row in rows}:
        made = root.artifact("acquire", source)
        file = root.keyed(made.path / "outcomes.parquet") if made else None
        keys = {row["key"] for row in rows if row["source"] == source}
        found = file.many(keys, ["key", "url", "identity", "status"]) if file else []
        upstream |= {r["key"]: r for r in found if r["status"] == "ok"}
    none = {"url": None, "identity": None}
    return [row | {name: upstream.get(row["key"], none)[name] for name in none} for row in rows]


def _with_digest(root: Root, node: str, digest: str) -> Artifact | None:
    """The artifact of this content, whatever its fingerprint; None where it is gone."""
    folders = sorted((root.root / node).glob("*/"))
    return next((Artifact(f, m) for f in folders if (m := read_manifest(f)) and m.digest == digest), None)
