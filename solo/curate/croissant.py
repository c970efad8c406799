"""Card of a mix: its lock as Croissant JSON-LD (MLCommons 1.0) and as a datasheet for people.

In: a lock, and what is known of its sources' origin. Out: `<mix>.croissant.json` and `<mix>.datasheet.md`. Invariants:
every number is the manifest's; the JSON names the lock by its bytes' SHA-256 and a path relative to itself, so the pair
can be checked and loaded wherever the data root lies. Cost: none, manifests only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from solo.artifact import Artifact, Manifest, write_atomic
from solo.curate.part import LOCK
from solo.report.markdown import escape, table
from solo.spec import SourceSpec

Row = dict[str, Any]

CONFORMS_TO = "http://mlcommons.org/croissant/1.0"
CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
FORMATS = {".parquet": "application/x-parquet", ".sql": "application/sql"}
MEANING = {
    "key": "the sample's id, unique in its source",
    "source": "the upstream dataset it is from",
    "shard": "number of the tar that holds it",
    "offset": "first byte of the sample in that tar",
    "length": "bytes of the sample in that tar",
    "template": "how its turns become text: plain or inst",
    "n_images": "pictures in it",
    "n_patches": "image patches, one token each",
    "n_text_tokens": "all other tokens",
    "n_loss_tokens": "tokens that carry loss",
    "n_tokens": "n_patches + n_text_tokens",
    "n_repeats": "how often one training stage sees it",
}


@dataclass(frozen=True)
class Origin:
    """What a card says of one source; None is unknown here."""

    licence: str | None
    licence_url: str | None = None
    revision: str | None = None
    title: str | None = None
    url: str | None = None

    @classmethod
    def of(cls, spec: SourceSpec) -> Origin:
        """From a source's YAML."""
        url = spec.upstream.url if spec.upstream else None
        return cls(spec.licence.id, spec.licence.url, spec.revision, spec.title, url)


def write(folder: Path, lock: Artifact, origins: Mapping[str, Origin]) -> list[Path]:
    """Both forms of a lock's card into a folder."""
    name = lock.manifest.name
    data = json.dumps(json_ld(lock, origins, folder), indent=1, ensure_ascii=False).encode()
    files = {f"{name}.croissant.json": data, f"{name}.datasheet.md": datasheet(lock.manifest, origins).encode()}
    for file, content in files.items():
        write_atomic(folder / file, content)
    return [folder / file for file in files]


def json_ld(lock: Artifact, origins: Mapping[str, Origin], folder: Path) -> Row:
    """A lock as a Croissant document that will lie in `folder`."""
    m = lock.manifest
    mix, stats = m.spec["mix"], m.stats
    licences = sorted({o.licence_url or o.licence or "unknown" for o in _known(m, origins).values()})
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": CONFORMS_TO,
        "name": m.name,
        "description": (
            f"{mix['title'].rstrip('.')}. Exact membership of a training mix: {stats['n_samples']} samples, "
            f"{stats['n_exposures']} exposures, {stats['n_tokens']} tokens "
            f"({stats['n_loss_tokens']} with loss), seed {mix['seed']}."
        ),
        "version": f"1.0.0+{m.fingerprint}",
        "license": licences,
        "url": f"urn:solo:curate:{m.name}:{m.fingerprint}",
        "citeAs": f"solo mix {m.name}, lock {m.fingerprint}, content sha256:{m.digest}",
        "datePublished": datetime.fromtimestamp(float(m.record["made_at"]), UTC).date().isoformat(),
        "isLiveDataset": False,
        "isBasedOn": [_based_on(source, origin) for source, origin in _known(m, origins).items()],
        "distribution": [_file(entry, lock.path, folder) for entry in m.files],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "lock",
                "name": "lock",
                "description": "One row per sample of the mix.",
                "key": [{"@id": "lock/source"}, {"@id": "lock/key"}],
                "field": [_field(field) for field in LOCK],
            }
        ],
    }


def _known(m: Manifest, origins: Mapping[str, Origin]) -> dict[str, Origin]:
    return {s["source"]: origins.get(s["source"], Origin(None)) for s in m.spec["mix"]["sources"]}


def _based_on(source: str, origin: Origin) -> Row:
    facts = {"license": origin.licence_url or origin.licence, "url": origin.url, "version": origin.revision}
    known = {k: v for k, v in facts.items() if v}
    return {"@type": "sc:Dataset", "name": source, "description": origin.title or source} | known


def _file(entry: Mapping[str, Any], made: Path, folder: Path) -> Row:
    path = Path(entry["path"])
    return {
        "@type": "cr:FileObject",
        "@id": entry["path"],
        "name": entry["path"],
        "contentUrl": Path(os.path.relpath(made / path, folder)).as_posix(),
        "contentSize": f"{entry['bytes']} B",
        "encodingFormat": FORMATS.get(path.suffix, "application/octet-stream"),
        "sha256": entry["sha256"],
    }


def _field(field: pa.Field) -> Row:
    return {
        "@type": "cr:Field",
        "@id": f"lock/{field.name}",
        "name": field.name,
        "description": MEANING[field.name],
        "dataType": "sc:Text" if field.type == pa.string() else "sc:Integer",
        "source": {"fileObject": {"@id": "lock.parquet"}, "extract": {"column": field.name}},
    }


def datasheet(m: Manifest, origins: Mapping[str, Origin]) -> str:
    """A lock in the order of "Datasheets for Datasets"."""
    return "\n\n".join(_sections(m, _known(m, origins))) + "\n"


def _sections(m: Manifest, known: Mapping[str, Origin]) -> Iterator[str]:
    mix, s = m.spec["mix"], m.stats
    yield f"# Datasheet of the mix {escape(m.name)}"
    yield f"Lock {m.fingerprint}, content sha256:{m.digest}."
    yield f"## Motivation\n\n{escape(mix['title'], limit=1000)}"
    total = max(1, s["n_tokens"])
    yield (
        f"## Composition\n\n{s['n_samples']:,} samples, seen {s['n_exposures']:,} times: {s['n_tokens']:,} tokens, "
        f"{s['n_patches']:,} of them image patches ({s['n_patches'] / total:.1%}) and {s['n_text_tokens']:,} text; "
        f"{s['n_loss_tokens']:,} carry loss."
    )
    yield table(list(_composition(s, total)))
    yield "## Collection\n\nFetched from their publishers; this mix holds references, no picture and no text."
    yield table([_origin_row(source, origin) for source, origin in known.items()])
    yield "## Preprocessing\n\nWhat was left out of the ledgers, by reason; the queries are in `mix.sql`."
    yield table([{"reason": r, "samples": n} for r, n in m.counts["dropped"].items() if n])
    if predicates := list(_predicates(mix["sources"])):
        yield table(predicates)
    if limits := list(_limits(mix)):
        yield table(limits)
    if mix.get("sql"):
        yield "Which of the others are in it, and how often, a query says that `mix.sql` holds."
    yield (
        "## Uses\n\nTraining one stage of a vision-language model. Personal data, bias and unsafe content are those of "
        "the sources after their filters; nothing further was removed or checked here."
    )
    unknown = [source for source, origin in known.items() if not origin.licence]
    yield "## Distribution\n\nEach source keeps its licence; using the mix means keeping to all of them." + (
        f" Unknown for: {escape(', '.join(unknown), limit=1000)}." if unknown else ""
    )
    yield (
        f"## Maintenance\n\nThe same spec and the same shards give the same bytes (curate version {m.version}). "
        f"`solo diff mix {escape(m.name)}` shows what changed between two locks."
    )


def _composition(stats: Mapping[str, Any], total: int) -> Iterator[Row]:
    for source, own in stats["sources"].items():
        yield {
            "source": source,
            "samples": own["n_samples"],
            "exposures": own["n_exposures"],
            "epochs": own["epochs"],
            "tokens": own["n_tokens"],
            "patches": own["n_patches"],
            "label tokens": own["n_loss_tokens"],
            "share": f"{own['n_tokens'] / total:.2%}",
        }


def _origin_row(source: str, origin: Origin) -> Row:
    facts = {"title": origin.title, "licence": origin.licence, "revision": origin.revision, "published at": origin.url}
    return {"source": source} | {k: v or "unknown" for k, v in facts.items()}


def _limits(mix: Mapping[str, Any]) -> Iterator[Row]:
    """What the spec of the mix allows at most, or demands."""
    for s in mix["sources"]:
        for name, q in s.get("quotas", {}).items():
            yield {"limit": name, "on": s["source"], "of each": q["by"], "is": _most(q)}
    for category, q in mix.get("quotas", {}).items():
        yield {"limit": "quota", "on": f"category {category}", "of each": None, "is": _most(q)}
    if share := mix.get("text_share"):
        told = f"{share['least']:g} ... {share['most']:g} of the tokens"
        yield {"limit": "text_share", "on": "samples without images", "of each": None, "is": told}


def _most(quota: Mapping[str, Any]) -> str:
    return f"{quota['samples']:,} samples" if quota.get("samples") else f"{quota['tokens']:,} tokens"


def _predicates(sources: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    for s in sources:
        for name, text in s["where"].items():
            yield {"source": s["source"], "kept where": name, "is true": text}
