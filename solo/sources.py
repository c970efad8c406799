"""Sources: a list of all of them with what is expected and what was made, and a probe of a copy's layout.

In: source specs, the manifests of a data root, a copy at `acquire.location` or in the data root. Out: rows, sentences.
Invariant: a probe reads the first records only, and fetches and writes nothing: where there is no copy yet, it asks
whether what the spec names is published. Cost: YAML and manifests; for a probe how each file begins and ends, what its
adapter needs to begin (the index of an image archive) and PROBED records, or a listing.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from solo import artifact
from solo.acquire import copies, image_files, published, tables, url_rows
from solo.acquire.location import UNPINNED, Asked, asked
from solo.acquire.mistaken import cut_short, dangling, mistaken
from solo.estimate import published_bytes
from solo.estimate_text import size
from solo.plugin import resolve
from solo.sample import Rejected, Sample
from solo.spec import SourceSpec, load

PROBED = 50
LOOKED_AT = 200_000  # records of another part of a mixture, before one of this source; or files
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
OF = re.compile(r"(.*)-(\d{5})-of-(\d{5})")
WHOLE = {".tar", ".zip", ".parquet", ".json", ".jsonl", ".csv", ".tsv", ".txt", ".gz", ".tgz", ".zst", ".bz2", ".lz4"}
HEADING = ("source", "licence", "revision", "size", "expected", "acquired", "kept", "tokens expected", "tokens")


def names(specs: Path) -> list[str]:
    """All sources there are."""
    return sorted(path.stem for path in (specs / "sources").glob("*.yaml"))


def listed(specs: Path, root: Path) -> list[dict[str, Any]]:
    """One row a source: licence, pin, published size, expected samples, and what was made last under this root."""
    found = []
    for name in names(specs):
        spec = load(SourceSpec, name, specs)
        acquired = artifact.latest(root, "acquire", name)
        sharded = artifact.latest(root, "shard", name)
        found.append(
            {
                "source": name,
                "licence": spec.licence.id,
                "licence_url": spec.licence.url,
                "licence_checked": "licence" not in spec.unchecked,
                "revision": spec.revision,
                "download_bytes": spec.upstream.download_bytes if spec.upstream else None,
                "estimated_bytes": published_bytes(spec),
                "expected": spec.expected.model_dump(mode="json") if spec.expected else None,
                "acquired": acquired.counts["kept"] if acquired else None,
                "kept": sharded.counts["kept"] if sharded else None,
                "n_text_tokens": sharded.stats["n_text_tokens"] if sharded else None,
                "n_patches": sharded.stats["n_patches"] if sharded else None,
            }
        )
    return found


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """The list as a table; `?` stands by a licence that was not checked, `~` by a size from the expected counts."""
    table = [HEADING, *(_cells(row) for row in rows)]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(HEADING))]
    left = ("".join(c.ljust(w + 2) for c, w in zip(cells[:3], widths[:3], strict=True)) for cells in table)
    right = ("  ".join(c.rjust(w) for c, w in zip(cells[3:], widths[3:], strict=True)) for cells in table)
    return [a + b for a, b in zip(left, right, strict=True)]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    expected = row["expected"] or {}
    tokens = None if row["n_patches"] is None else row["n_text_tokens"] + row["n_patches"]
    asked = [n for name in ("text_tokens", "vision_tokens") if (n := expected.get(name)) is not None]
    wanted = sum(asked) if len(asked) == 2 else None
    counts = (expected.get("samples"), row["acquired"], row["kept"], wanted, tokens)
    about = row["estimated_bytes"]
    return (
        row["source"],
        row["licence"] + ("" if row["licence_checked"] else " ?"),
        row["revision"] if row["revision"] == UNPINNED else row["revision"].removeprefix("sha256:")[:8],
        size(row["download_bytes"]) if row["download_bytes"] else f"~{size(about)}" if about else "",
        *("" if n is None else f"{n:,}" for n in counts),
    )


def told(spec: SourceSpec) -> list[str]:
    """One source in sentences."""
    said = [
        f"{spec.name}: {spec.title}",
        f"licence: {spec.licence.id}, {spec.licence.url}",
        f"revision: {spec.revision}",
    ]
    if spec.upstream:
        said += [f"from: {spec.upstream.id}, {spec.upstream.url}", f"files: {', '.join(spec.upstream.files)}"]
        said += [f"layout: {spec.upstream.layout}"]
    said += [f"read by: {spec.acquire.adapter} at {spec.acquire.location}"]
    said += [f"becomes: {spec.messages}"] if spec.messages else []
    if spec.expected:
        counts = spec.expected.model_dump(exclude={"origin"}, exclude_none=True)
        said.append(f"expected: {', '.join(f'{k} {v:,}' for k, v in counts.items())} ({spec.expected.origin})")
    said += [f"choice: {c.choice}, since {c.reason}" for c in spec.choices]
    said += [f"note: {note}" for note in spec.notes]
    return said + ([f"unchecked: {', '.join(spec.unchecked)}"] if spec.unchecked else [])


@dataclass(frozen=True)
class Probe:
    """What the first records of a copy gave."""

    good: int
    statuses: Counter[str]
    first: dict[str, Rejected]  # status -> the first record with it
    missing: list[str]  # numbered files that are not there, in words


def check(spec: SourceSpec, specs: Path, root: Path, at: Path | None = None) -> Probe:
    """Read first records of the copy (`at`: of that one); ValueError with file, field and remedy if none is good."""
    if at is not None:
        spec = spec.model_copy(update={"acquire": spec.acquire.model_copy(update={"location": str(at.absolute())})})
    want = asked(spec)
    location = specs / spec.acquire.location if want.kind == "local" else copies.place(want, root)
    if not location.exists():
        if want.kind != "local":
            raise ValueError(f"{spec.name}: {absent(want)}")
        raise ValueError(f"{spec.name}: {location} does not exist; {remedy(spec)}")
    good, statuses, first = 0, Counter[str](), dict[str, Rejected]()
    try:
        _refuse_damaged(location)
        for n, item in enumerate(_records(spec, location)):
            if isinstance(item, Rejected):
                statuses[item.status] += 1
                first.setdefault(item.status, item)
            else:
                good += 1
            if good + statuses.total() - statuses["excluded_set"] >= PROBED or n >= LOOKED_AT:
                break
    except ValueError as error:
        raise ValueError(f"{spec.name}: {error}; {remedy(spec)}") from None
    if not good:
        odd = next((item for status, item in first.items() if status != "excluded_set"), first.get("excluded_set"))
        so = f", and so for all of the first {statuses.total()} records"
        raise ValueError(
            f"{spec.name}: {_told(spec, location, odd) + so if odd else 'no record is there'}; {remedy(spec)}"
        )
    return Probe(good, statuses, first, _missing(spec, location))


def _missing(spec: SourceSpec, location: Path) -> list[str]:
    """Which files of a numbered series are not there, where one of it is: a download that was broken off."""
    have = {path.name for path in islice(location.rglob("*"), LOOKED_AT)}
    series = dict[str, list[str]]()
    for file in spec.upstream.files if spec.upstream else ():
        name = file.rpartition("/")[2]
        if numbers := RANGE.search(name):
            low, high = numbers.groups()
            names = [name.replace(numbers[0], f"{i:0{len(low)}}") for i in range(int(low), int(high) + 1)]
            series[name] = [n for n in names if not {n, n.removesuffix(".gz")} & have]
            if len(series[name]) == len(names):
                del series[name]
    for prefix, total in sorted({(m[1], m[3]) for name in have if (m := OF.match(name))}):
        there = {m[2] for name in have if (m := OF.match(name)) and (m[1], m[3]) == (prefix, total)}
        numbered = (f"{i:05}" for i in range(int(total)))
        series[f"{prefix}-*-of-{total}"] = [f"{prefix}-{i}-of-{total}" for i in numbered if i not in there]
    return [
        f"{name}: {len(gone):,} files are not there, the first is {gone[0]}" for name, gone in series.items() if gone
    ]


def _refuse_damaged(location: Path) -> None:
    """ValueError for the first file of a copy that cannot be what its name says, or not all of it."""
    paths = [location] if location.is_file() else islice(location.rglob("*"), LOOKED_AT)
    for path in sorted(path for path in paths if path.suffix in WHOLE and (path.is_file() or dangling(path))):
        if what := mistaken(path) or cut_short(path):
            raise ValueError(f"{path}: {what}")


def _told(spec: SourceSpec, location: Path, odd: Rejected) -> str:
    """An odd record with the file it is from, and for a picture that is nowhere the name of one that is somewhere."""
    args = spec.acquire.args
    file = next((str(args[name]) for name in ("records", "shards", "mapping") if name in args), "")
    where = odd.identity if "." in odd.identity or not file else f"{file}, record {odd.identity}"
    if odd.status != "missing_image" or "images" not in args or not args["images"]:
        return f"{where}: {odd.error}"
    try:
        held = image_files.first_name(location, args["images"])  # type: ignore[arg-type]
    except (ValueError, OSError):
        return f"{where}: {odd.error}"
    return f"{where}: image: {odd.error} ({held}; correct acquire.args.images to fit)"


def absent(want: Asked) -> str:
    """What is published of a source that is not here yet, and how to have it."""
    files = published.listed(want, once=True)
    known = [file.size for file in files if file.size is not None]
    total = size(sum(known)) if len(known) == len(files) else "of unknown size"
    shown = ", ".join(file.name or want.name for file in files[:3]) + (", ..." if len(files) > 3 else "")
    then = f"`solo fetch {want.source}` brings it, and check then reads its first records"
    if want.revision == UNPINNED:
        then = f"`solo revision {want.source}` tells the pin for its spec"
    return f"not here yet; {len(files)} files, {total}, are published at {want.location} ({shown}); {then}"


def _records(spec: SourceSpec, location: Path) -> Iterator[Sample | Rejected | object]:
    read, args = resolve("adapters", spec.acquire.adapter), dict(spec.acquire.args)
    signature = inspect.signature(read)
    if "job" in signature.parameters:  # a URL list: its rows are looked at, nothing is fetched
        columns = [str(args["url_column"]), str(args["caption_column"])]
        for path in url_rows.list_files(location):
            for place, row in tables.rows(path, [], columns):
                missing = [c for c in columns if not isinstance(row, Rejected) and not isinstance(row.get(c), str)]
                yield Rejected(place, "bad_record", f"{missing[0]} is no text") if missing else row
        return
    try:
        signature.bind(location, source=spec.name, **args)
    except TypeError as error:
        raise ValueError(f"acquire.args: {error}") from None
    yield from read(location, source=spec.name, **args)


def remedy(spec: SourceSpec) -> str:
    """What to do about a copy that cannot be read."""
    up = spec.upstream
    if asked(spec).kind != "local":
        return "correct acquire.adapter or acquire.args"
    if up is None:
        return "correct acquire.location or acquire.args"
    fetch = f"fetch {', '.join(up.files)} from {up.url}"
    if up.id.startswith("huggingface:"):
        pinned = "" if spec.revision == UNPINNED or spec.revision.startswith("sha256:") else f" at {spec.revision[:12]}"
        fetch += pinned
    return f"{fetch} (layout: {up.layout}), or correct acquire.args"
