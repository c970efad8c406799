"""Counts: what a kept sample costs in tokens and patches, or why it cannot be used.

In: byte ranges of samples in one raw tar, a template, a `Tokens` spec. Out: one row a sample, COUNTS or a reason of
REASONS. Invariants: the counts are those of `tokens.tokenize`, with grids from headers; the tokens of ROLE_COUNTS sum
to n_text_tokens. Cost: a read and a tokenisation; a decode only where pictures will be resized and no signal says that
they decode.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from solo.filter.measure import write_table
from solo.filter.pictures import Pictures
from solo.sample import Sample, read_sample
from solo.sequence.patches import grid
from solo.sequence.tokenizer import Tokenizer
from solo.sequence.tokens import ROLES, Document, tokenize
from solo.spec import GridPictures, Template, Tokens

REASONS = (
    "undecodable",  # by the signal `decodes`, or by its header where that signal was not measured
    "image_too_thin",  # SOLO's resize makes its short side 0
    "empty",  # neither image nor text
    "bad_turns",  # the template has no place for these turns; `error` in dropped.parquet says why
    "no_loss_tokens",  # nothing in it would be learnt
)
ROLE_COUNTS = tuple(f"n_{role}_tokens" for role in ROLES)  # [INST] and a leading system turn in it are the user's
# Loss needs no column by role: only the assistant's tokens carry any. Markup: BOS and the marks of image blocks.
TEXT_COUNTS = (*ROLE_COUNTS, "n_markup_tokens")
COUNTS = ("n_images", "n_patches", "n_text_tokens", *TEXT_COUNTS, "n_loss_tokens", "n_tokens")
COUNTED = pa.schema(
    [("key", pa.string()), ("reason", pa.string()), ("error", pa.string()), *((name, pa.int32()) for name in COUNTS)]
)


@dataclass(frozen=True)
class Rules:
    """What the counts of a sample depend on."""

    template: Template
    tokens: Tokens
    grid_pictures: GridPictures | None = None


@dataclass(frozen=True)
class CountUnit:
    """The kept samples of one raw shard, to be counted."""

    kept: Path  # rows of KEPT, all raw shards
    raw: Path
    out: Path
    rules: Rules


def count(unit: CountUnit) -> int:
    """Count the kept samples of one raw shard."""
    columns = [c for c in pq.read_schema(unit.kept).names if c in ("key", "offset", "length", "decodes")]
    rows = pq.read_table(unit.kept, columns=columns, filters=[("raw_shard", "=", int(unit.raw.stem))]).to_pylist()
    counted = []
    for row in rows:
        sample = read_sample(unit.raw, row["offset"], row["length"])
        assert sample.key == row["key"], f"{unit.raw}: {sample.key} lies where outcomes place {row['key']}"
        counted.append({"key": sample.key} | judge(sample, unit.rules, decodes=row.get("decodes")))
    write_table(unit.out, pa.Table.from_pylist(counted, COUNTED))
    return len(counted)


def judge(sample: Sample, rules: Rules, *, decodes: bool | None) -> dict[str, Any]:
    """The counts of a sample, or `reason` (and `error`) why it cannot be used; `decodes` is None where unmeasured."""
    pictures = Pictures(sample.images)
    indices = range(len(sample.images))
    headers = [header for i in indices if (header := pictures.header(i)) is not None]
    if decodes is None:
        decodes = rules.grid_pictures is None or all(pictures.rgb(i) is not None for i in indices)
    if not decodes or len(headers) < len(sample.images):
        return {"reason": "undecodable"}
    patch_px, max_side_px = rules.tokens.patch_px, rules.tokens.max_side_px
    try:
        grids = [grid(h.width_px, h.height_px, patch_px=patch_px, max_side_px=max_side_px) for h in headers]
    except ValueError as error:
        return {"reason": "image_too_thin", "error": str(error)}
    if not sample.images and not any(item.get("text", "").strip() for m in sample.messages for item in m["content"]):
        return {"reason": "empty"}
    tokenizer = _tokenizer(rules.tokens)  # outside of `try`: a wrong tokenizer is no fault of the sample
    try:
        document = tokenize(sample, grids, tokenizer, rules.template)
    except ValueError as error:
        return {"reason": "bad_turns", "error": str(error)}
    if not document.n_loss_tokens:
        return {"reason": "no_loss_tokens"}
    return {"n_images": len(sample.images), **text_counts(document)} | {
        "n_patches": document.n_patches,
        "n_text_tokens": document.n_text_tokens,
        "n_loss_tokens": document.n_loss_tokens,
        "n_tokens": len(document.ids),
    }


def text_counts(document: Document) -> dict[str, int]:
    """A document's text tokens by who says them; what nobody says is markup."""
    by_role = document.by_role()
    assert by_role["assistant"]["n_loss_tokens"] == document.n_loss_tokens, "a label outside the assistant's text"
    said = {f"n_{role}_tokens": by_role[role]["n_tokens"] for role in ROLES}
    return said | {"n_markup_tokens": document.n_text_tokens - sum(said.values())}


@cache
def _tokenizer(tokens: Tokens) -> Tokenizer:
    return Tokenizer(tokens)
