"""Pictures for the pages: a few kept and dropped samples of a source, a few answered questions.

In: artifacts of acquire and filter, or of evaluate. Out: Markdown tables with small JPEG data URIs and escaped text.
Invariant: which samples are shown depends on keys alone. Cost: one scan of the verdicts, then a handful of reads.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from solo.artifact import Artifact
from solo.report.markdown import escape, picture
from solo.sample import Sample, read_sample
from solo.sequence.patches import ImageError, open_rgb

THUMB_PX = 96
N_EACH = 3  # samples shown per verdict
N_REASONS = 5  # verdicts shown per source, kept among them

Shown = tuple[str, str]  # a sample's picture and its text, as cells

CHOSEN = """
WITH chosen AS (
  SELECT key, coalesce(reason, 'kept') AS verdict
  FROM read_parquet($verdicts)
  QUALIFY row_number() OVER (PARTITION BY reason ORDER BY md5(key), key) <= $n_each
)
SELECT c.verdict, o.raw_shard, o."offset", o.length
FROM chosen AS c
JOIN read_parquet($outcomes) AS o ON o.key = c.key
WHERE o.raw_shard IS NOT NULL
ORDER BY c.verdict <> 'kept', c.verdict, md5(c.key), c.key
"""

N_CLUSTERS, N_LOST = 8, 4
CLUSTERS = """
WITH verdicts AS (SELECT key, reason, winner FROM read_parquet($verdicts)),
largest AS (
  SELECT winner, count(*) AS n_lost FROM verdicts
  WHERE winner IS NOT NULL GROUP BY winner ORDER BY n_lost DESC, winner LIMIT $n_clusters
),
members AS (
  SELECT winner, n_lost, winner AS key, NULL AS reason FROM largest
  UNION ALL
  SELECT winner, n_lost, key, reason FROM verdicts JOIN largest USING (winner)
  QUALIFY row_number() OVER (PARTITION BY winner ORDER BY key) <= $n_lost
)
SELECT winner, n_lost, reason, o.raw_shard, o."offset", o.length
FROM members JOIN read_parquet($outcomes) AS o ON o.key = members.key
WHERE o.raw_shard IS NOT NULL
ORDER BY n_lost DESC, winner, reason IS NOT NULL, members.key
"""


def thumbnail(data: bytes) -> bytes | None:
    """A JPEG of at most THUMB_PX a side, or None where the bytes do not decode."""
    try:
        image = open_rgb(data)
    except ImageError:
        return None
    if max(image.size) < THUMB_PX // 2:  # a picture too small to see is what such a sample was dropped for
        times = THUMB_PX // 2 // max(image.size)
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    image.thumbnail((THUMB_PX, THUMB_PX), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=72)
    return out.getvalue()


def verdicts(filtered: Artifact, acquired: Artifact, *, n_each: int = N_EACH, n_reasons: int = N_REASONS) -> str:
    """One source's table: a line per verdict, its samples side by side."""
    import duckdb

    files = {"verdicts": filtered.path / "verdicts.parquet", "outcomes": acquired.path / "outcomes.parquet"}
    names = {name: str(path) for name, path in files.items()}
    with duckdb.connect() as con:
        rows = con.execute(CHOSEN, {**names, "n_each": n_each}).fetchall()
    shown: dict[str, list[Shown]] = {}
    for verdict, raw_shard, offset, length in rows:
        if verdict in shown or len(shown) < n_reasons:
            raw = acquired.path / "raw" / f"{raw_shard:05d}.tar"
            shown.setdefault(verdict, []).append(_sample(read_sample(raw, offset, length)))
    if not shown:
        return "(no sample to show)"
    lines = [line for verdict, some in shown.items() for line in _lines(escape(verdict), some, n_each)]
    return grid(["verdict", *[""] * n_each], lines)


def clusters(filtered: Artifact, acquired: Artifact) -> str:
    """The largest clusters of duplicates: the sample that stays, then some that went for it; "" where there is none."""
    import duckdb

    files = {"verdicts": filtered.path / "verdicts.parquet", "outcomes": acquired.path / "outcomes.parquet"}
    names = {name: str(path) for name, path in files.items()}
    with duckdb.connect() as con:
        rows = con.execute(CLUSTERS, {**names, "n_clusters": N_CLUSTERS, "n_lost": N_LOST}).fetchall()
    lost: dict[str, int] = {}
    found: dict[str, list[Shown]] = {}
    for winner, n_lost, reason, raw_shard, offset, length in rows:
        raw = acquired.path / "raw" / f"{raw_shard:05d}.tar"
        small, said = _sample(read_sample(raw, offset, length))
        lost[winner] = n_lost
        found.setdefault(winner, []).append((small, f"**{escape(reason)}** {said}" if reason else said))
    width = max(map(len, found.values()), default=0)
    lines = [line for winner, some in found.items() for line in _lines(f"{lost[winner]:,}", some, width)]
    return grid(["gone", "stays", *["went"] * (width - 1)], lines) if lines else ""


def answers(evaluated: Artifact, *, n_columns: int = 4) -> str:
    """Questions of one benchmark with picture, reference and what the model said."""
    rows = pq.read_table(evaluated.path / "gallery.parquet").to_pylist()
    cells = [f"{picture(r['thumbnail'], 'question') if r['thumbnail'] else ''} {_answer(r)}" for r in rows]
    cells += [""] * (-len(cells) % n_columns)
    lines = [cells[i : i + n_columns] for i in range(0, len(cells), n_columns)]
    return grid([""] * n_columns, lines) if rows else "(no question was answered)"


def _answer(row: dict[str, Any]) -> str:
    said = f"said {escape(row['response'] or '(nothing)', limit=40)}"
    verdict = "right" if row["correct"] else f"wrong, answer {escape(row['answer'], limit=40)}"
    return f"{escape(row['prompt'], limit=90)} - {said}: {verdict}"


def _sample(sample: Sample) -> Shown:
    """The first picture of a sample, and the beginning of what is said."""
    said = " ".join(i["text"] for m in sample.messages for i in m["content"] if i["type"] == "text")
    if not sample.images:
        return "", escape(said, limit=140)
    small = thumbnail(sample.images[0])
    return picture(small, "sample") if small else "(cannot be decoded)", escape(said, limit=70)


def _lines(name: str, some: Sequence[Shown], width: int) -> Iterator[list[str]]:
    """A line of pictures, where there are any, over a line of what is said."""
    smalls, saids = [small for small, _ in some], [said for _, said in some]
    padding = [""] * (width - len(some))
    if any(smalls):
        yield [name, *smalls, *padding]
        name = ""
    yield [name, *saids, *padding]


def grid(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table of cells that are Markdown already."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def folder(artifact: Artifact) -> Path:
    """Where an artifact lies under the data root, as a page may name it."""
    return Path(artifact.manifest.part, artifact.manifest.name, artifact.manifest.fingerprint)
