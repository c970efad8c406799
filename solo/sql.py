"""SQL: a locked DuckDB over every finished artifact of a data root, for questions nobody foresaw.

In: a data root and one query. Out: columns and rows. Invariants: a query is a SELECT over the views of `VIEWS`, so it
changes nothing, and reads no file but theirs (solo/curate/query.py); each row names its artifact. Cost: one stat per
file of an artifact, then the footers of the views that the query names; memory and scratch are capped.
"""

from __future__ import annotations

import glob
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import psutil
import pyarrow as pa

from solo import artifact
from solo.acquire import raw
from solo.artifact import Manifest
from solo.curate.part import LOCK
from solo.curate.query import QueryError, check, literal, lock, one_line
from solo.evaluate.part import ANSWERS
from solo.filter.part import FIXED, VERDICT
from solo.pack.plan_files import PACKS, PLAN
from solo.shard.part import PLACE
from solo.train import metrics, trained

MEMORY_SHARE = 0.5  # of the machine's; the rest stays with whoever is running a recipe beside the query
SCRATCH_BYTES = 32 << 30
SCRATCH_DIRECTORY = ".solo-sql-"

SCORES = pa.schema(
    [
        ("category", pa.string()),
        ("n_questions", pa.int64()),
        ("score", pa.float64()),
        ("blind", pa.float64()),
        ("chance", pa.float64()),
        ("protocol", pa.string()),
        ("checkpoint_digest", pa.string()),
    ]
)
NAMED = (("artifact", pa.string()), ("name", pa.string()), ("fingerprint", pa.string()))


@dataclass(frozen=True)
class View:
    """Files of one part as one table; `files` is a glob inside an artifact, '' where rows come from manifests."""

    part: str
    files: str
    columns: pa.Schema
    what: str


VIEWS = {
    "outcomes": View("acquire", "outcomes.parquet", raw.SCHEMA, "a row per upstream record: status, error, raw place"),
    "signals": View("filter", "signals.parquet", FIXED, "a row per acquired sample: what was measured of it"),
    "verdicts": View("filter", "verdicts.parquet", VERDICT, "a row per acquired sample: kept, or the reason why not"),
    "ledger": View("shard", "shards/*.parquet", PLACE, "a row per sharded sample: place, tokens, patches, roles"),
    "locks": View("curate", "lock.parquet", LOCK, "a row per sample of a mix, with n_repeats"),
    "packs": View("pack", "packs.parquet", PACKS, "a row per pack: documents, tokens, source"),
    "plan": View("pack", "plan.parquet", PLAN, "a row per document in a pack: pack, slot, key, token range"),
    "trained": View("train", "trained.parquet", trained.ROW, "a row per pack trained: step, loss, tokens by source"),
    "metrics": View("train", metrics.FILE, metrics.COLUMNS, "a row per step: losses, held out too, rate, speed"),
    "answers": View("evaluate", "answers.parquet", ANSWERS, "a row per question: prompt, response, right or wrong"),
    "scores": View("evaluate", "", SCORES, "a row per benchmark and category; category '' is all of it"),
}
CATALOG = "views"  # the table that lists the others
ALL = "_all"  # with this at its end a view holds every artifact, not only the one made last under each name
KNOWN = frozenset({CATALOG, *VIEWS, *(name + ALL for name in VIEWS)})
VIEWS_ARE = f"views are {', '.join((*VIEWS, CATALOG))}, and each with {ALL}"


@dataclass(frozen=True)
class Answer:
    """Columns of a query and its rows."""

    columns: list[str]
    rows: list[tuple[Any, ...]]


class Session:
    """A connection that answers queries over the artifacts under one root."""

    def __init__(self, root: Path, scratch: Path, *, memory_bytes: int | None = None) -> None:
        self.artifacts, self.damaged = finished(root)
        self._newest = newest(self.artifacts)
        self._made: set[str] = set()
        memory = memory_bytes or int(psutil.virtual_memory().total * MEMORY_SHARE)
        self._con = lock(scratch, files=self._files(), memory_bytes=memory, scratch_bytes=SCRATCH_BYTES)
        self._parser = duckdb.connect()
        self._con.from_arrow(catalog()).create(CATALOG)

    def close(self) -> None:
        """Give the memory and the scratch back."""
        self._con.close()
        self._parser.close()

    def ask(self, text: str) -> Answer:
        """The rows of one query; QueryError where it is no query, names what there is not, or fails."""
        try:
            names = check(self._parser, text, KNOWN, VIEWS_ARE) & KNOWN
            for name in sorted(names):
                self._make(name)
            found = self._con.execute(text)
            columns = [str(d[0]) for d in found.description or ()]
            return Answer(columns, found.fetchall())
        except duckdb.Error as error:
            raise QueryError(f"sql: {one_line(error)}") from None

    def _files(self) -> list[str]:
        views = [v for v in VIEWS.values() if v.files]
        files = [f for folder, m in self.artifacts for v in views if v.part == m.part for f in _matching(folder, v)]
        return sorted({*files, *map(glob.escape, files)})  # a path is looked up first as it is written, escapes and all

    def _make(self, name: str) -> None:
        """Create a view once a query names it: with 10,000 shards, opening all footers would take seconds."""
        if name in self._made or name == CATALOG:
            return
        view = VIEWS[name.removesuffix(ALL)]
        chosen = self.artifacts if name.endswith(ALL) else self._newest
        chosen = [(folder, m) for folder, m in chosen if m.part == view.part]
        columns = pa.schema([*NAMED, *view.columns])
        if not view.files:
            rows = [row for _, m in chosen for row in _scores(m)]
            self._con.from_arrow(pa.Table.from_pylist(rows, columns)).create(name)
        else:
            self._con.execute(f'DROP TABLE IF EXISTS "{name}_columns"')  # of an attempt that failed half-way
            self._con.from_arrow(columns.empty_table()).create(f"{name}_columns")
            selects = [f'SELECT * FROM "{name}_columns"']
            selects += [_select(m, files) for folder, m in chosen if (files := _matching(folder, view))]
            self._con.execute(f'CREATE VIEW "{name}" AS {" UNION ALL BY NAME ".join(selects)}')
        self._made.add(name)


@contextmanager
def session(root: Path, *, memory_bytes: int | None = None) -> Iterator[Session]:
    """A session whose scratch is a folder of its own and gone afterwards."""
    with tempfile.TemporaryDirectory(prefix=SCRATCH_DIRECTORY) as scratch:
        opened = Session(root, Path(scratch), memory_bytes=memory_bytes)
        try:
            yield opened
        finally:
            opened.close()


def finished(root: Path) -> tuple[list[tuple[Path, Manifest]], list[str]]:
    """Every whole artifact under a data root in order of its path, and what is wrong with the others."""
    good, bad = [], []
    for path in sorted(root.glob(f"*/*/*/{artifact.MANIFEST}")):
        folder = path.parent
        wrong = artifact.damage(folder)
        manifest = artifact.read_manifest(folder)
        if wrong or manifest is None:
            bad.append(f"{folder.relative_to(root)}: {wrong}")
        else:
            good.append((folder, manifest))
    return good, bad


def newest(found: Sequence[tuple[Path, Manifest]]) -> list[tuple[Path, Manifest]]:
    """Of each part and name the artifact made last."""
    last: dict[str, tuple[Path, Manifest]] = {}
    for folder, m in found:
        if m.id not in last or float(m.record["made_at"]) > float(last[m.id][1].record["made_at"]):
            last[m.id] = (folder, m)
    return list(last.values())


def catalog() -> pa.Table:
    """What the views hold, as a table."""
    rows = [{"view": n, "part": v.part, "holds": v.what} for n, v in VIEWS.items()]
    rows += [{"view": n + ALL, "part": v.part, "holds": "the same, with older artifacts"} for n, v in VIEWS.items()]
    return pa.Table.from_pylist(rows)


def _matching(folder: Path, view: View) -> list[str]:
    return [str(path) for path in sorted(folder.glob(view.files))]


def _select(m: Manifest, files: Sequence[str]) -> str:
    paths = literal([glob.escape(f) for f in files])
    named = f"{literal(m.id)} AS artifact, {literal(m.name)} AS name, {literal(m.fingerprint)} AS fingerprint"
    return f"SELECT {named}, * FROM read_parquet({paths}, union_by_name := TRUE)"


def _scores(m: Manifest) -> Iterator[dict[str, Any]]:
    own = {"artifact": m.id, "name": m.name, "fingerprint": m.fingerprint}
    bound = {k: m.stats.get(k) for k in ("chance", "protocol", "checkpoint_digest")}
    for category, s in {"": m.stats, **m.stats.get("by_category", {})}.items():
        yield own | bound | {"category": category} | {k: s.get(k) for k in ("n_questions", "score", "blind")}


def split(text: str) -> tuple[list[str], str]:
    """Whole statements typed so far and the rest; a `;` inside quotes or a comment ends nothing."""
    token = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|;")
    done, begin = [], 0
    for match in token.finditer(text):
        if match[0] == ";":
            done.append(text[begin : match.start()].strip())
            begin = match.end()
    return [s for s in done if s], text[begin:]
