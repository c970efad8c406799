"""The part `report`: one summary of a recipe from its manifests, and whether every count closes.

In: manifests of all nodes. Out: `report.json` (everything), `report.md` (no times, so the same bytes for the same
data), `report.html` (self-contained), and in `mixes/` the card of each mix (solo/curate/croissant.py). Invariant:
`closes` is computed from equations that are listed one by one, never asserted. Cost: `summarise` reads no data; the
pages inside report.html read what the UI's pages read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from solo.artifact import Job, Manifest, Result, canonical, write_atomic
from solo.curate import croissant
from solo.line import PARTS
from solo.report import pages
from solo.report.html import html
from solo.report.markdown import BAR, Markup, bar, escape, table
from solo.shard.counts import TEXT_COUNTS
from solo.shard.part import FORM_COUNTS

# 2: the cards of the mixes
VERSION = 3  # 3: the pages of sources, mixes and stages say and draw more

Row = dict[str, Any]


def run(job: Job) -> Result:
    """Write the three forms of the summary."""
    manifests = [a.manifest for a in job.inputs.values()]
    summary = summarise(manifests, spec=job.spec)
    sections = {"overview": pages.overview(list(job.inputs.values()))}
    for part in PARTS:
        if artifacts := list(job.of(part).values()):
            sections[part] = pages.page(part, artifacts, inputs=job.inputs)
    write_atomic(job.out / "report.json", json.dumps(summary, indent=1, ensure_ascii=False).encode())
    sections["equations"] = equations_table(summary)
    page = f"{markdown(summary)}\n## Equations\n\n{equations_table(summary)}\n"
    write_atomic(job.out / "report.md", page.encode())
    write_atomic(job.out / "report.html", html(summary, markdown(summary, times=True), sections).encode())
    licences, acquired = job.spec.get("licences", {}), job.of("acquire")
    origins = {n: croissant.Origin(licences.get(n), revision=a.manifest.spec["revision"]) for n, a in acquired.items()}
    for lock in job.of("curate").values():
        croissant.write(job.out / "mixes", lock, origins)
    failed = [c["name"] for c in summary["checks"] if not c["ok"]]
    job.progress(
        f"report: {len(summary['checks'])} equations checked, {len(failed)} do not hold {failed or ''}".rstrip()
    )
    stats = {"closes": summary["closes"], "n_checks": len(summary["checks"]), "n_failed": len(failed)}
    stats |= {"scores": summary["scores"], "digest": summary["digest"]}
    # The page of the last part shows seconds and rates too, and report.json holds seconds, a card its date.
    return Result(len(manifests), len(manifests), {}, stats, volatile=("report.json", "report.html", "mixes/*.json"))


def summarise(manifests: Sequence[Manifest], *, spec: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Counts, stages, scores and checks of a recipe, from manifests alone.

    `spec` is the report's own (recipe, title, and licences by source); it may also come with a report's manifest.
    """
    own = next((m.spec for m in manifests if m.part == "report"), {}) if spec is None else spec
    licences = own.get("licences", {})
    line = in_order([m for m in manifests if m.part != "report"])
    checks = [{"name": n, "left": left, "right": right, "ok": left == right} for n, left, right in equations(line)]
    by_id = {m.id: m for m in line}
    return {
        "recipe": own.get("recipe", ""),
        "title": own.get("title", ""),
        "digest": _digest(line),
        "closes": all(c["ok"] for c in checks),
        "parts": [_part(m) for m in line],
        "stages": [_stage(m, by_id) for m in line if m.part == "train"],
        "scores": [_score(m, by_id, licences) for m in line if m.part == "evaluate"],
        "data": [_data(m, by_id, licences) for m in line if m.part == "acquire"],
        "checks": checks,
        "lineage": {m.id: m.inputs for m in line},
    }


def closing_rows(manifests: Sequence[Manifest], states: Mapping[str, str]) -> list[Row]:
    """The closing table of a run: a row per node, `states` telling which were reused; reused ones took no time."""
    rows = []
    for m in in_order(manifests):
        reused = states.get(m.id, "reused") == "reused"
        rows.append(
            {
                "part": m.part,
                "name": m.name,
                "state": "reused" if reused else "ran",
                "in": m.counts["in"],
                "kept": m.counts["kept"],
                "dropped": reasons(m.counts["dropped"]),
                "tokens": m.stats.get("n_tokens", ""),
                "seconds": 0.0 if reused else round(float(m.record["seconds"]), 1),
            }
        )
    return rows


def equations(line: Sequence[Manifest]) -> Iterator[tuple[str, Any, Any]]:
    """Every equation a recipe must satisfy, as (name, left, right), in the order of the line."""
    by_id = {m.id: m for m in line}
    for m in line:
        yield f"{m.id}: in = kept + dropped", m.counts["in"], m.counts["kept"] + sum(m.counts["dropped"].values())
        if m.inputs:
            found = sum(i in by_id and by_id[i].digest == digest for i, digest in m.inputs.items())
            yield f"{m.id}: inputs = artifacts of this report with that content", len(m.inputs), found
        readers = {"filter": _reads_one, "shard": _shard, "curate": _curate, "pack": _pack, "train": _train}
        inputs = [by_id[i] for i in m.inputs if i in by_id]
        yield from readers[m.part](m, inputs) if m.part in readers else ()
        if m.part == "evaluate":
            judged = next((i.digest for i in inputs if i.part == "train"), None)
            asked = m.stats.get("checkpoint_digest")
            yield f"{m.id}: checkpoint asked = checkpoint trained", str(asked)[:16], str(judged)[:16]


def _reads_one(m: Manifest, inputs: Sequence[Manifest]) -> Iterator[tuple[str, Any, Any]]:
    before = {"filter": "acquire", "shard": "filter"}[m.part]
    for i in inputs:
        if i.part == before:
            yield f"{m.id}: in = kept by {i.id}", m.counts["in"], i.counts["kept"]


def _shard(m: Manifest, inputs: Sequence[Manifest]) -> Iterator[tuple[str, Any, Any]]:
    yield from _reads_one(m, inputs)
    yield (
        f"{m.id}: tokens = text tokens + patches",
        m.stats["n_tokens"],
        m.stats["n_text_tokens"] + m.stats["n_patches"],
    )
    by_role = sum(m.stats[name] for name in TEXT_COUNTS)
    yield f"{m.id}: text tokens = system + user + assistant + markup", m.stats["n_text_tokens"], by_role
    by_form = sum(m.stats[name] for name in FORM_COUNTS)
    yield f"{m.id}: images = as they came + without metadata + as JPEG + as PNG", m.stats["n_images"], by_form


def _curate(m: Manifest, inputs: Sequence[Manifest]) -> Iterator[tuple[str, Any, Any]]:
    yield f"{m.id}: in = kept by its {len(inputs)} shard parts", m.counts["in"], sum(i.counts["kept"] for i in inputs)
    for field in ("n_exposures", "n_tokens", "n_loss_tokens"):
        yield from _sums(m, field)


def _pack(m: Manifest, inputs: Sequence[Manifest]) -> Iterator[tuple[str, Any, Any]]:
    for i in (i for i in inputs if i.part == "curate"):
        yield f"{m.id}: in = exposures of {i.id}", m.counts["in"], i.stats["n_exposures"]
        lost, unpredicted = m.stats.get("dropped_tokens", {}), m.stats.get("split_boundaries", 0)
        placed = m.stats["n_tokens"] + sum(lost.values())
        yield f"{m.id}: tokens placed + dropped = tokens of {i.id}", placed, i.stats["n_tokens"]
        # The first token of a later piece of a cut text has nothing before it to predict it from.
        lost = m.stats.get("dropped_loss_tokens", {})
        placed = m.stats["n_loss_tokens"] + sum(lost.values()) + unpredicted
        yield f"{m.id}: loss tokens placed + dropped + cut off = those of {i.id}", placed, i.stats["n_loss_tokens"]
    for field in ("n_tokens", "n_loss_tokens"):
        yield from _sums(m, field)


def _train(m: Manifest, inputs: Sequence[Manifest]) -> Iterator[tuple[str, Any, Any]]:
    for i in inputs:
        if i.part == "pack":
            yield f"{m.id}: in = kept by {i.id}", m.counts["in"], i.counts["kept"]
            yield f"{m.id}: packs trained = packs of {i.id}", m.stats["n_packs"], i.stats["n_packs"]
            out = m.stats["left_out"]
            trained = m.stats["n_tokens"] + out["tokens"]
            yield f"{m.id}: tokens trained + left out = tokens of {i.id}", trained, i.stats["n_tokens"]
            trained = m.stats["n_loss_tokens"] + out["loss_tokens"]
            yield f"{m.id}: loss tokens trained + left out = those of {i.id}", trained, i.stats["n_loss_tokens"]
            yield from _realised(m, i)
    for field in ("n_tokens", "n_loss_tokens"):
        yield from _sums(m, field)


def _realised(m: Manifest, pack: Manifest) -> Iterator[tuple[str, Any, Any]]:
    """The mix that was trained is the one that was packed, source by source."""
    planned, trained = (x.stats.get("sources", {}) for x in (pack, m))
    out = m.stats["left_out"].get("sources", {})
    for source in sorted(planned | trained):
        for field, what in (("n_tokens", "tokens"), ("n_loss_tokens", "loss tokens")):
            delivered = trained.get(source, {}).get(field, 0) + out.get(source, {}).get(field, 0)
            yield (
                f"{m.id}: {what} of {source} realised + left out = planned",
                delivered,
                planned.get(source, {}).get(field, 0),
            )


def _sums(m: Manifest, field: str) -> Iterator[tuple[str, Any, Any]]:
    """A total equals the sum over its sources, where the part reports both."""
    of_sources = [s[field] for s in m.stats.get("sources", {}).values() if field in s]
    if of_sources and field in m.stats:
        yield f"{m.id}: {field} = sum over its sources", m.stats[field], sum(of_sources)


def in_order(manifests: Sequence[Manifest]) -> list[Manifest]:
    """In the order of the line; stages one after the other, whatever their names."""
    by_id = {m.id: m for m in manifests}

    def depth(m: Manifest) -> int:
        before = [by_id[i] for i in m.inputs if i.startswith("train/") and i in by_id] if m.part == "train" else []
        return 1 + depth(before[0]) if before else 0

    return sorted(manifests, key=lambda m: (PARTS.index(m.part), depth(m)))


def reasons(dropped: Mapping[str, int]) -> str:
    """`12 too_small, 3 decodes`, the most frequent first."""
    return ", ".join(f"{n:,} {reason}" for reason, n in sorted(dropped.items(), key=lambda kv: (-kv[1], kv[0])) if n)


def _part(m: Manifest) -> Row:
    return {
        "part": m.part,
        "name": m.name,
        "in": m.counts["in"],
        "kept": m.counts["kept"],
        "dropped": m.counts["dropped"],
        "seconds": m.record["seconds"],
        "tokens": m.stats.get("n_tokens"),
        "bytes": sum(f["bytes"] for f in m.files),
        "fingerprint": m.fingerprint,
        "digest": m.digest,
    }


def _stage(m: Manifest, by_id: Mapping[str, Manifest]) -> Row:
    pack = next((by_id[i] for i in m.inputs if i.startswith("pack/") and i in by_id), None)
    planned = pack.stats if pack else {}
    total = max(m.stats["n_tokens"], 1)
    shares = {
        source: {
            "tokens": s["n_tokens"],
            "patches": s.get("n_patches", 0),
            "share": round(s["n_tokens"] / total, 6),
        }
        for source, s in planned.get("sources", {}).items()
    }
    return {
        "name": m.name,
        "mix": pack.name if pack else None,
        "packs": m.stats["n_packs"],
        "steps": m.stats["n_steps"],
        "tokens": m.stats["n_tokens"],
        "loss_tokens": m.stats["n_loss_tokens"],
        "loss_first": m.stats["loss_first"],
        "loss_last": m.stats["loss_last"],
        "fill": planned.get("fill"),
        "sources": shares,
    }


def _score(m: Manifest, by_id: Mapping[str, Manifest], licences: Mapping[str, str]) -> Row:
    """A score with what it rests on: question set, protocol, checkpoint, and every revision that fed the checkpoint."""
    behind = _ancestors(m, by_id)
    benchmark = m.spec.get("benchmark", {})
    return {
        "benchmark": m.name,
        "score": m.stats["score"],
        "chance": m.stats["chance"],
        "blind": m.stats["blind"],
        "n_questions": m.stats["n_questions"],
        "protocol": m.stats.get("protocol"),
        "revision": benchmark.get("revision"),
        "licence": benchmark.get("licence", {}).get("id"),
        "checkpoint": next((a.digest for a in behind if a.part == "train"), None),
        "mixes": {a.name: a.digest for a in behind if a.part == "curate"},
        "data": {
            a.name: {"revision": a.spec.get("revision"), "licence": licences.get(a.name)}
            for a in behind
            if a.part == "acquire"
        },
    }


def _ancestors(m: Manifest, by_id: Mapping[str, Manifest]) -> list[Manifest]:
    """Everything an artifact was made from, nearest first."""
    found: dict[str, Manifest] = {}
    waiting = [i for i in m.inputs if i in by_id]
    while waiting:
        node = waiting.pop(0)
        if node not in found:
            found[node] = by_id[node]
            waiting += [i for i in by_id[node].inputs if i in by_id]
    return list(found.values())


def _data(m: Manifest, by_id: Mapping[str, Manifest], licences: Mapping[str, str]) -> Row:
    """One source: what was pinned, and how much of it reached the shards."""
    shard = by_id.get(f"shard/{m.name}")
    return {
        "source": m.name,
        "revision": m.spec.get("revision"),
        "licence": licences.get(m.name),
        "records": m.counts["in"],
        "samples": shard.counts["kept"] if shard else None,
        "tokens": shard.stats.get("n_tokens") if shard else None,
    }


def _digest(line: Sequence[Manifest]) -> str:
    """One hash over the content of all parts: two reports with the same digest tell of the same bytes."""
    return hashlib.sha256(canonical([[m.id, m.digest] for m in line])).hexdigest()


def equations_table(summary: Mapping[str, Any]) -> str:
    """Every check as a row."""
    rows = [c | {"ok": "holds" if c["ok"] else "FAILS"} for c in summary["checks"]]
    return table(rows, most=len(rows))


def markdown(summary: Mapping[str, Any], *, times: bool = False) -> str:
    """The summary as a page; without `times` the same data give the same bytes."""
    failed = [c for c in summary["checks"] if not c["ok"]]
    verdict = (
        f"All {len(summary['checks'])} equations hold: every count closes from the first record to the last token."
    )
    if failed:
        verdict = f"**{len(failed)} of {len(summary['checks'])} equations do not hold.** The counts do not close."
    blocks = [
        f"# {escape(summary['title'] or summary['recipe'])}",
        f"Recipe {escape(summary['recipe'])}, content {summary['digest'][:12]}. {verdict}",
        *([table(failed)] if failed else []),
        "## Scores",
        table([{k: s[k] for k in ("benchmark", "score", "chance", "blind", "n_questions")} for s in summary["scores"]]),
        "## Training stages",
        table([{k: v for k, v in s.items() if k != "sources"} for s in summary["stages"]]),
        "## Tokens trained, by source",
        table(list(_share_rows(summary))),
        "## Parts",
        table(list(_part_rows(summary, times=times))),
        "## Data",
        table([d | {"revision": str(d["revision"] or "")[:19]} for d in summary["data"]]),
    ]
    return "\n\n".join(blocks) + "\n"


def _share_rows(summary: Mapping[str, Any]) -> Iterator[Row]:
    for stage in summary["stages"]:
        for source, s in stage["sources"].items():
            text = s["tokens"] - s["patches"]
            yield {
                "stage": stage["name"],
                "source": source,
                "tokens": s["tokens"],
                "patches": s["patches"],
                "text": text,
                "share": f"{s['share']:.1%}",
                BAR: bar(s["share"]),
            }


def _part_rows(summary: Mapping[str, Any], *, times: bool) -> Iterator[Row]:
    for p in summary["parts"]:
        row = {k: p[k] for k in ("part", "name", "in", "kept")}
        row |= {"dropped": Markup(escape(reasons(p["dropped"]), limit=400)), "tokens": p["tokens"]}
        yield row | ({"seconds": p["seconds"]} if times else {})
