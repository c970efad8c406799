"""Shown: pages of earlier runs, in the database of the checkout's Prefect server, that hold what is listed.

In: what `solo takedown` found under the data root, and the pages as flows/shown.py tells them. Out: pages that must
go. Invariants: a page goes that has an entry in its words, or pictures and the name of a source (or benchmark) that
holds an entry, or held one when the page was last changed: thumbnails have bytes of their own. Where no server runs,
that is said. Cost: a look at each page; a start of Prefect's client, which is seconds.
"""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from solo.acquire import passes
from solo.artifact import CHECKOUT, write_atomic
from solo.lineage import erase, holders
from solo.lineage.holders import Held, Needles

PAGES = "pages.json"  # in the memory of takedowns: until when pages of a source may show what was listed
PICTURE = "data:image/"
BREAK = "\u200b"  # what markdown.escape breaks links with

Touched = dict[str, tuple[float, set[str]]]


@dataclass(frozen=True)
class Page:
    """A page that must go, one of the versions of its key, and the entries it is for."""

    id: str
    key: str
    entries: list[str]


@dataclass(frozen=True)
class Shown:
    """Pages that must go; `unsearched` says why none was looked at."""

    pages: list[Page] = field(default_factory=list)
    unsearched: str = ""


def names(held: Sequence[Held]) -> dict[str, set[str]]:
    """Sources and benchmarks whose pictures are those of samples that are listed -> the entries."""
    found: dict[str, set[str]] = {}
    for h in held:
        part, name, *_ = [*h.place.split("/"), ""]
        if part in ("acquire", "filter", passes.PART, "benchmarks"):
            found.setdefault(name.removesuffix(".yaml"), set()).add(h.entry)
    return found


def note(root: Path, held: Sequence[Held]) -> None:
    """Remember that pages of these sources, as they are until now, may show what goes."""
    path = root / erase.MEMORY / PAGES
    known: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    for name, ids in names(held).items():
        known[name] = {"until": time.time(), "entries": sorted({*ids, *known.get(name, {}).get("entries", ())})}
    if known:
        write_atomic(path, json.dumps(dict(sorted(known.items())), indent=1).encode())


def touched(root: Path, needles: Needles, held: Sequence[Held]) -> Touched:
    """Name -> until when its pictures may be those of what is listed, and the entries."""
    path, ids = root / erase.MEMORY / PAGES, {e.id for e in needles.listed.entries}
    known: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    found: Touched = {name: (row["until"], ids & {*row["entries"]}) for name, row in known.items()}
    found |= {name: (float("inf"), entries) for name, entries in names(held).items()}
    return {name: (until, entries) for name, (until, entries) in found.items() if entries}


def means(said: dict[str, Any], needles: Needles, sources: Touched) -> set[str]:
    """Ids of the entries for which a page must go."""
    plain = html.unescape(said["text"]).replace(BREAK, "")
    found = holders.tokens(said["text"].encode(), needles) | holders.tokens(plain.encode(), needles)
    for name, (until, entries) in sources.items():
        is_named = re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", f"{said['key']}\n{plain}")
        if PICTURE in said["text"] and said["changed_at"] <= until and (is_named or said["key"].endswith(f"-{name}")):
            found |= entries
    return found


def search(root: Path, needles: Needles, held: Sequence[Held]) -> Shown:
    """The pages that must go, if the server runs."""
    if not needles.listed:
        return Shown()
    sources, pages = touched(root, needles, held), []
    with _command("tell") as child:
        assert child.stdout and child.stderr
        for line in child.stdout:
            said = json.loads(line)
            if ids := means(said, needles, sources):
                pages.append(Page(said["id"], said["key"], sorted(ids)))
        wrong = child.stderr.read().strip()
    if child.returncode:
        return Shown(unsearched=wrong.splitlines()[-1].removeprefix("error: ") if wrong else "its client failed")
    return Shown(sorted(pages, key=lambda page: (page.key, page.id)))


def remove(pages: Sequence[Page]) -> None:
    """Take pages out of the database; the next run shows them anew."""
    with _command("remove") as child:
        _, wrong = child.communicate("".join(f"{page.id}\n" for page in pages))
    if child.returncode:
        raise ValueError(f"takedown: pages were not removed: {wrong.strip().splitlines()[-1]}")


def lines(shown: Shown) -> Iterator[str]:
    """For people."""
    if shown.unsearched:
        yield f"pages of earlier runs were NOT searched: {shown.unsearched}; then run this again"
    keys: dict[str, int] = {}
    for page in shown.pages:
        keys[page.key] = keys.get(page.key, 0) + 1
    for key, n in keys.items():
        yield f"    shown by {key}: {n} version{'s' * (n > 1)} in Prefect's database"


def _command(what: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "flows.server", "shown", what]
    return subprocess.Popen(command, cwd=CHECKOUT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
