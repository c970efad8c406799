"""Trace text: a sample's way, or the documents of a step, for people.

In: what solo/lineage/trace.py found. Out: lines. Invariant: text of the data can neither move a terminal's cursor nor
fill it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from solo.lineage.named import MOST

Found = Mapping[str, Any]
N_SIGNALS = 12
FIELDS = ("identity", "url", "status", "error", "http_status", "evidence", "served_sha256", "sha256", "bytes")


def _cell(value: Any, limit: int = 60) -> str:  # noqa: ANN401 - any value of a column
    """One line of printable text: a caption may hold the escapes that a terminal obeys."""
    text = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list) else str(value)
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def lines(found: Found) -> Iterator[str]:
    """All samples of a trace, part by part."""
    for i, sample in enumerate(found["samples"]):
        if i:
            yield ""
        yield from _sample(sample)
    if found["n_samples"] > MOST:
        yield f"\n{found['n_samples'] - MOST} samples more; a key traces one"


def _sample(s: Found) -> Iterator[str]:
    yield f"{s['key']}  of {s['source']}"
    yield from _acquired(s["acquire"])
    if s["filter"]:
        yield from _filtered(s["filter"])
    if s["shard"]:
        yield from _sharded(s["shard"])
    yield from map(_locked, s["locks"])
    for pack in s["packs"]:
        yield _line("pack", pack, f"{pack['mix']}: {_many(len(pack['documents']))}")
        yield from _more(map(_document, pack["documents"]))
    for stage in s["trained"]:
        yield from _trained(stage)


def _line(part: str, made: Found, text: str) -> str:
    stale = "  STALE: made from other inputs than those above" if made.get("stale") else ""
    return f"{part:<9} {made['fingerprint']}  {text}{stale}"


def _more(texts: Iterator[str], most: int = 8) -> Iterator[str]:
    shown = list(texts)
    yield from (f"{'':<20}{text}" for text in shown[:most])
    if len(shown) > most:
        yield f"{'':<20}and {len(shown) - most} more; --json has all"


def _fields(row: Found, names: Sequence[str]) -> Iterator[str]:
    yield from (f"{name}: {_cell(row[name], 200)}" for name in names if row.get(name) is not None)


def _acquired(part: Found) -> Iterator[str]:
    for row in part["outcomes"]:
        place = f"raw/{row['raw_shard']:05d}.tar at {row['offset']:,}, {row['length']:,} bytes"
        yield _line("acquire", part, f"{row['status']}, {place if row['raw_shard'] is not None else 'nothing kept'}")
        yield from _more(_fields(row, FIELDS))
    for fetch in part["fetches"]:
        asked = f"asked {fetch['fetched_at']:%Y-%m-%d %H:%M:%S}" if fetch.get("fetched_at") else "not asked"
        pass_ = f"pass {fetch['pass']}: " if "pass" in fetch else ""
        shown = [f"robots: {fetch.get('robots')}", f"tries: {fetch.get('n_tries')}"]
        shown += [f"redirect: {url}" for url in fetch.get("redirects") or ()]
        shown += [f"header {k}: {v}" for k, v in dict(fetch.get("headers") or {}).items()]
        yield from _more(_cell(text, 200) for text in [f"{pass_}{asked}, HTTP {fetch.get('http_status')}", *shown])


def _filtered(part: Found) -> Iterator[str]:
    verdict = part["verdict"]
    if verdict is None:
        yield _line("filter", part, "no verdict: it was not kept by acquire")
        return
    winner = f" ({verdict['winner']} stays)" if verdict.get("winner") else ""
    yield _line("filter", part, "kept" if verdict["keep"] else f"dropped: {_cell(verdict['reason'])}{winner}")
    shown = [f"{name} {_cell(value, 40)}" for name, value in part["signals"].items()]
    yield from (f"{'':<20}{', '.join(shown[i : i + 3])}" for i in range(0, min(len(shown), N_SIGNALS), 3))


def _sharded(part: Found) -> Iterator[str]:
    row = part["row"]
    if row is None:
        lost = part.get("dropped")
        yield _line("shard", part, f"dropped: {lost['reason']} ({_cell(lost['error'])})" if lost else "not in a shard")
        return
    yield _line("shard", part, f"{part['tar']} at {row['offset']:,}, {row['length']:,} bytes")
    counts = ("n_tokens", "n_text_tokens", "n_patches", "n_loss_tokens", "n_images")
    yield f"{'':<20}{', '.join(f'{name} {row[name]:,}' for name in counts)}, {row['template']}"


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n:,} times"


def _many(n: int) -> str:
    return "1 document" if n == 1 else f"{n:,} documents"


def _locked(lock: Found) -> str:
    if lock["n_repeats"]:
        return _line("curate", lock, f"{lock['mix']}: drawn {_times(lock['n_repeats'])}")
    why = lock.get("excluded")
    twin = f" ({why['winner']} of {why['winner_source']} stays)" if why and why["winner"] else ""
    return _line("curate", lock, f"{lock['mix']}: not in it, {why['reason'] + twin if why else 'not drawn'}")


def _document(d: Found) -> str:
    return (
        f"pack {d['pack']}, slot {d['slot']}, step {d['step']}: tokens {d['begin']:,} to {d['end']:,}, "
        f"exposure {d['exposure']}"
    )


def _trained(stage: Found) -> Iterator[str]:
    documents = stage["documents"]
    if documents is None:
        yield _line("train", stage, f"{stage['stage']}: the packs it was trained on are gone")
        return
    n_out = sum(d["left_out"] is not None for d in documents)
    out = f", {n_out} left out" if n_out else ""
    yield _line("train", stage, f"{stage['stage']}: {_many(len(documents) - n_out)} trained{out}")
    yield from _more(map(_learned, documents))


def _learned(d: Found) -> str:
    place = f"step {d['step']}, pack {d['pack']}"
    if d["left_out"]:
        return f"{place}: left out, {d['left_out']}"
    of_pack, of_source = _loss(d["loss_of_pack"]), _loss(d["loss_of_source_in_pack"])
    return f"{place}: loss {of_pack} of the pack, {of_source} of its source in it"


def _loss(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def documents(found: Found) -> Iterator[str]:
    """The documents of a step or a pack, each with where it came from."""
    where = f"stage {found['stage']}, step {found['step']}" if "stage" in found else f"pack {found['pack']}"
    yield f"{where} of mix {found['mix']}: {len(found['documents'])} documents"
    for d in found["documents"]:
        origin = d["url"] or d["identity"] or "its record is gone from acquire"
        loss = f", loss {_loss(d['loss_of_source_in_pack'])}" if "loss_of_source_in_pack" in d else ""
        lost = f", left out: {d['left_out']}" if d.get("left_out") else ""
        yield (
            f"{d['pack']:>6} {d['slot']:>4}  {d['key']}  tokens {d['begin']:,} to {d['end']:,}{loss}{lost}  "
            f"{_cell(origin, 200)}"
        )
