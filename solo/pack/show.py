"""Show: one pack of a mix as a reader would want it, document by document, with what carries loss set apart.

In: the data root, a mix, the number of a pack. Out: `PackView`, and from it text for a terminal, Markdown or one HTML
file with thumbnails. Invariant: what is shown is tokenised from the shards the plan was made from, found by content
digest; text of the data can neither act in a page nor move a terminal's cursor. Cost: the samples of one pack are read.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape as html_escape
from pathlib import Path
from typing import Any

import numpy as np

from solo import artifact
from solo.artifact import Artifact
from solo.pack.plan import Plan
from solo.report.gallery import thumbnail
from solo.report.html import POLICY, STYLE
from solo.report.markdown import Markup, escape, picture, table
from solo.sample import Sample, read_sample
from solo.sequence.patches import grid, image_size
from solo.sequence.tokenizer import Tokenizer
from solo.sequence.tokens import ROLES, Document, tokenize
from solo.spec import Tokens

N_CHARS = 300  # of a stretch of text; the count beside it says how long it is


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens of one kind: who says them, and whether they carry loss."""

    kind: str  # a role, `image`, or `begin`
    text: str
    n_tokens: int
    has_loss: bool


@dataclass(frozen=True)
class DocumentView:
    """A document of the pack: its row of the plan, its tokens in stretches, small pictures."""

    row: dict[str, Any]
    stretches: list[Stretch]
    thumbnails: list[bytes]


@dataclass(frozen=True)
class PackView:
    """A pack and where it stands."""

    mix: str
    number: int
    n_packs: int
    step: int
    pack_tokens: int
    documents: list[DocumentView]

    def total(self, column: str) -> int:
        """Sum over the documents."""
        return sum(int(d.row[column]) for d in self.documents)


def pack(root: Path, mix: str, number: int) -> PackView:
    """Read pack `number` of the plan made last for a mix."""
    made = newest(root, mix)
    rows = plan_rows(made, number)
    tokenizer = Tokenizer(Tokens.model_validate(made.manifest.spec["tokens"]))
    shards = {i.removeprefix("shard/"): find(root, i, d) for i, d in made.manifest.inputs.items() if "shard/" in i}
    documents = []
    for row in rows:
        tar = shards[row["source"]] / "shards" / f"{row['shard']:05d}.tar"
        documents.append(view(row, read_sample(tar, row["offset"], row["length"]), tokenizer))
    spec, n_packs = made.manifest.spec, int(made.manifest.stats["n_packs"])
    return PackView(mix, number, n_packs, number // spec["batch_packs"] + 1, spec["pack_tokens"], documents)


def newest(root: Path, mix: str) -> Artifact:
    """The pack artifact made last for a mix."""
    manifest = artifact.latest(root, "pack", mix)
    if manifest is None:
        have = sorted(p.name for p in (root / "pack").glob("*/") if not p.name.startswith("."))
        raise ValueError(f"show pack: no packs of mix {mix!r} under {root}; there are packs of {have}")
    if "tokens" not in manifest.spec:
        raise ValueError(f"show pack: {manifest.id} was made by version {manifest.version} of pack; run it again")
    return Artifact(root / "pack" / mix / manifest.fingerprint, manifest)


def plan_rows(made: Artifact, number: int) -> list[dict[str, Any]]:
    """The plan's rows of one pack."""
    n_packs = int(made.manifest.stats["n_packs"])
    if not 0 <= number < n_packs:
        raise ValueError(f"show pack: mix {made.manifest.name!r} has packs 0 to {n_packs - 1}, not {number}")
    return Plan(made.path).rows(number)


def find(root: Path, node: str, digest: str) -> Path:
    """The folder of the artifact with this content, whatever its fingerprint."""
    for folder in sorted((root / node).glob("*/")):
        manifest = artifact.read_manifest(folder)
        if manifest is not None and manifest.digest == digest:
            return folder
    raise ValueError(f"show pack: {node} with content {digest[:8]} is gone from {root}; run its part again")


def view(row: dict[str, Any], sample: Sample, tokenizer: Tokenizer) -> DocumentView:
    """One document from its row of the plan and its sample."""
    px = {"patch_px": tokenizer.tokens.patch_px, "max_side_px": tokenizer.tokens.max_side_px}
    grids = [grid(*image_size(data), **px) for data in sample.images]
    document = tokenize(sample, grids, tokenizer, row["template"])
    small = [thumb for data in sample.images if (thumb := thumbnail(data))]
    return DocumentView(row, list(stretches(document, tokenizer, row["begin"], row["end"])), small)


def stretches(document: Document, tokenizer: Tokenizer, begin: int, end: int) -> Iterator[Stretch]:
    """The tokens [begin, end) of a document, cut where speaker or loss changes and around each image."""
    ids, role = document.ids[begin:end], document.role[begin:end]
    bos, eos, vision = (getattr(tokenizer.vocabulary, name) for name in ("bos", "eos", "vision"))
    is_target = document.is_target[begin:end].copy()
    is_target[0] = False  # nothing in the piece predicts its first token
    same = (np.diff(role) == 0) & (np.diff(is_target.astype(np.int8)) == 0) & (ids[1:] != vision) & (ids[:-1] != bos)
    borders = [*(np.flatnonzero(~same) + 1).tolist(), len(ids)]
    grids, at = iter(document.grids), 0
    while at < len(ids):
        if ids[at] == vision:
            rows, cols = next(grids)
            last = at + 1 + rows * (cols + 1)  # the mark, then a separator or the closing mark after each row
            yield Stretch("image", f"{rows} x {cols} patches", last - at, False)
        else:
            last = next(border for border in borders if border > at)
            part = ids[at:last]
            said = tokenizer.decode(part.tolist())
            said = f"{tokenizer.bos_token} {said}" if part[0] == bos else said
            said = f"{said} {tokenizer.eos_token}" if part[-1] == eos else said
            kind = ROLES[role[at]] if role[at] >= 0 else "begin"
            yield Stretch(kind, said.strip(), last - at, bool(is_target[at]))
        at = last


def head(seen: PackView) -> str:
    """One line of totals."""
    n_tokens = seen.total("n_tokens")
    return (
        f"step {seen.step}, {len(seen.documents)} documents, {n_tokens:,} of {seen.pack_tokens:,} tokens "
        f"({n_tokens / seen.pack_tokens:.2%} full), {seen.total('n_patches'):,} patches, "
        f"{seen.total('n_loss_tokens'):,} tokens with loss"
    )


def text(seen: PackView) -> str:
    """For a terminal: `+` before what carries loss, `-` before what is masked."""
    lines = [f"pack {seen.number} of {seen.n_packs} of {seen.mix}: {head(seen)}"]
    for d in seen.documents:
        r = d.row
        lines.append("")
        lines.append(
            f"{r['slot']:>3}  {r['key']}  from {_visible(r['source'])}, tokens {r['begin']:,} to {r['end']:,}, "
            f"{r['n_loss_tokens']:,} with loss, exposure {r['exposure']}, {r['template']}"
        )
        for part in d.stretches:
            lines.append(f"     {'+' if part.has_loss else '-'} {part.kind} {part.n_tokens:,}: {_visible(part.text)}")
    return "\n".join(lines) + "\n"


def markdown(seen: PackView) -> str:
    """One table with pictures; bold is what carries loss."""
    rows = []
    for d in seen.documents:
        said = [f"**{escape(p.text, limit=N_CHARS)}**" if p.has_loss else _masked(p) for p in d.stretches if p.text]
        rows.append(
            {
                "slot": d.row["slot"],
                "sample": d.row["key"],
                "source": d.row["source"],
                "picture": Markup(" ".join(picture(small, "picture") for small in d.thumbnails)),
                "what it says": Markup(" ".join(said)),
                "tokens": d.row["n_tokens"],
                "patches": d.row["n_patches"],
                "with loss": d.row["n_loss_tokens"],
            }
        )
    title = f"# Pack {seen.number} of {seen.n_packs}: {escape(seen.mix)}"
    legend = "**Bold** carries loss; the rest is masked. No document sees another."
    return "\n\n".join([title, f"{head(seen)}.", legend, table(rows, most=len(rows))]) + "\n"


def html(seen: PackView) -> str:
    """The same as one file that fetches nothing."""
    from markdown_it import MarkdownIt

    title = html_escape(f"pack {seen.number} of {seen.mix}")
    body = str(MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown(seen)))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<style>{STYLE}</style></head>\n'
        f"<body>{body}</body></html>\n"
    )


def _masked(part: Stretch) -> str:
    return f"{escape(part.kind)}: {escape(part.text, limit=N_CHARS)}"


def _visible(value: str) -> str:
    """One line without control characters or overrides: a caption may not move the cursor."""
    words = " ".join(value.split())
    seen = "".join(c for c in words if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co"))
    return seen if len(seen) <= N_CHARS else seen[: N_CHARS - 3] + "..."
