"""Tokens: a sample as one self-contained document of ids, patch indices and targets.

In: a `Sample` and the patch grids of its images. Out: a `Document`; a pack is documents end to end, no more.
Invariants: text can never produce a control or vision id, those are inserted by id; only assistant text (and
the EOS after it, if any) is a target; position 0 is never one. Cost: the tokenizer's; image blocks are cached
arrays: no Python loop over patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from solo.sample import Message, Sample
from solo.sequence.tokenizer import Tokenizer, Vocabulary
from solo.spec import Template

ROLES = ("system", "user", "assistant")
SYSTEM_GAP = "\n\n"  # between a system turn and the first user text, as mistral-common's v1 template has it


@dataclass(frozen=True, eq=False)
class Document:
    """One sample's tokens, n of them; it holds nothing about the pack it may lie in."""

    ids: np.ndarray  # (n,) int32
    is_target: np.ndarray  # (n,) bool: this token is predicted with loss
    patch_index: np.ndarray  # (n,) int32: -1, or which of the document's patches stands here
    grids: tuple[tuple[int, int], ...]  # (rows, cols) of each image
    role: np.ndarray  # (n,) int8: index into ROLES of who says this token; -1 in BOS and image blocks

    @property
    def n_patches(self) -> int:
        """Number of <vpatch> tokens."""
        return sum(rows * cols for rows, cols in self.grids)

    @property
    def n_text_tokens(self) -> int:
        """Every other token; image marks and separators count as text, as in SOLO's tables."""
        return len(self.ids) - self.n_patches

    @property
    def n_loss_tokens(self) -> int:
        """Tokens that carry loss."""
        return int(np.count_nonzero(self.is_target))

    def by_role(self) -> dict[str, dict[str, int]]:
        """Role -> its text tokens (markup and the answer's EOS too) and, of these, those that carry loss."""
        said = np.bincount(self.role + 1, minlength=1 + len(ROLES))[1:]
        labels = np.bincount(self.role[self.is_target] + 1, minlength=1 + len(ROLES))[1:]
        return {r: {"n_tokens": int(n), "n_loss_tokens": int(m)} for r, n, m in zip(ROLES, said, labels, strict=True)}


def tokenize(sample: Sample, grids: Sequence[tuple[int, int]], tokenizer: Tokenizer, template: Template) -> Document:
    """A sample as one document.

    plain: BOS, then all pieces of all turns in order; no markup, EOS only with `plain_eos`. inst: the blocks of
    all images, then BOS "[INST] user [/INST]" answer EOS, later turns without BOS. There a turn's text items are
    joined by a newline (the image that stood between them has moved to the front), a leading system turn precedes
    the first user text, and a conversation that ends with a user turn is a prompt to complete.
    """
    n_items = sum(item["type"] == "image" for message in sample.messages for item in message["content"])
    if n_items != len(grids):
        raise ValueError(f"{sample.key}: {n_items} image items but {len(grids)} images; drop the sample")
    document = _Pieces(tokenizer)
    (_plain if template == "plain" else _inst)(document, sample, list(grids))
    return document.finish(tuple((rows, cols) for rows, cols in grids))


class _Pieces:
    """The pieces of a document while it is being written."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = tokenizer.vocabulary
        self.ids: list[np.ndarray] = []
        self.target: list[bool] = []  # one flag per piece
        self.role: list[int] = []

    def add(self, ids: Sequence[int] | np.ndarray, role: str = "", *, target: bool = False) -> None:
        self.ids.append(np.asarray(ids, dtype=np.int32))
        self.target.append(target)
        self.role.append(ROLES.index(role) if role in ROLES else -1)

    def text(self, value: str, role: str, *, target: bool = False) -> None:
        self.add(self.tokenizer.encode(value), role, target=target)

    def image(self, grid: tuple[int, int], template: Template) -> None:
        close = self.vocabulary.image_close(getattr(self.tokenizer.tokens.image_close, template))
        self.add(_image_block(*grid, close, self.vocabulary))

    def finish(self, grids: tuple[tuple[int, int], ...]) -> Document:
        ids = np.concatenate(self.ids) if self.ids else np.empty(0, np.int32)
        lengths = [len(piece) for piece in self.ids]
        is_target = np.repeat(np.array(self.target, bool), lengths)
        role = np.repeat(np.array(self.role, np.int8), lengths)
        is_patch = ids == self.vocabulary.vpatch
        patch_index = np.where(is_patch, np.cumsum(is_patch, dtype=np.int32) - 1, -1).astype(np.int32)
        return Document(ids, is_target, patch_index, grids, role)


@lru_cache(maxsize=4096)
def _image_block(rows: int, cols: int, close: int, vocabulary: Vocabulary) -> np.ndarray:
    """<vision> row <vrow_sep> row ... <vrow_sep> row close: separators stand between rows only."""
    body = np.full((rows, cols + 1), vocabulary.vpatch, np.int32)
    body[:, -1] = vocabulary.vrow_sep
    body[-1, -1] = close
    block: np.ndarray = np.concatenate([np.array([vocabulary.vision], np.int32), body.ravel()])
    block.flags.writeable = False
    return block


def _plain(document: _Pieces, sample: Sample, grids: list[tuple[int, int]]) -> None:
    remaining = iter(grids)
    document.add([document.vocabulary.bos])
    for message in sample.messages:
        for item in message["content"]:
            if item["type"] == "image":
                document.image(next(remaining), "plain")
            else:
                document.text(item["text"], message["role"], target=message["role"] == "assistant")
    if document.tokenizer.tokens.plain_eos and sample.messages[-1]["role"] == "assistant":
        document.add([document.vocabulary.eos], "assistant", target=True)


def _inst(document: _Pieces, sample: Sample, grids: list[tuple[int, int]]) -> None:
    for grid in grids:
        document.image(grid, "inst")
    document.add([document.vocabulary.bos])
    system = ""
    for i, message in enumerate(sample.messages):
        role, text = message["role"], _joined(message)
        if role == "assistant":
            if text:  # an empty answer would teach the model to stop at once
                document.text(text, role, target=True)
                document.add([document.vocabulary.eos], role, target=True)
        elif role == "user":
            document.text(f"[INST] {system}{text.strip()} [/INST]", role)
            system = ""
        elif role == "system" and i == 0:
            system = text.strip() + SYSTEM_GAP if text else ""
        else:
            raise ValueError(f"{sample.key}: turn {i} is {role!r}; inst takes a leading system, user, assistant")


def _joined(message: Message) -> str:
    texts = (item["text"] for item in message["content"] if item["type"] == "text")
    return "\n".join(text for text in texts if text.strip())
