"""Tokens: a sample as one self-contained document of ids, patch indices and targets.

In: a `Sample` and the patch grids of its images. Out: a `Document`; a pack is documents end to end, no more.
Invariants: text can never produce a control or vision id, those are inserted by id; only assistant text (and
the EOS after an `inst` answer) is a target; position 0 is never one. Cost: 20 MB of text a second where the words are
known, a quarter of that where they are not; image blocks are cached arrays: no Python loop over patches.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor

from solo.sample import Message, Sample
from solo.spec import Template, Tokens

BOS = 1
EOS = 2
FIRST_TEXT_ID = 3  # unk, bos and eos lie below
N_TEXT_IDS = 32_000  # Mistral-7B-v0.1; SOLO's ids follow and never carry loss
VISION = 32_000
VPATCH = 32_001
VROW_SEP = 32_002
VFRAME_SEP = 32_003  # reserved for video upstream, never used
VISION_END = 32_004
VOCAB_SIZE = 33_029  # 32,000 + 5 vision ids + <loc_1> ... <loc_1024>
IMAGE_CLOSE = {"</vision>": VISION_END, "<vision>": VISION}
ROLES = ("system", "user", "assistant")
SPACE = "\u2581"  # sentencepiece's mark for a space; a text that holds the mark itself reads the same
WORD = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
WORDS_KEPT, WORD_CHARS = 1 << 17, 32  # about 25 MB; those that come first are the frequent ones
PROBES = (
    "",
    " ",
    "a ",
    " a",
    "  a   b\n c\t",
    "\ufb01\u2460 e\u0301 \u3000x",
    "<s> \U0001f600\u200d",
)  # a normaliser shows
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


class Tokenizer:
    """Mistral's sentencepiece vocabulary with SOLO's ids appended; read-only, so threads may share one."""

    vocab_size = VOCAB_SIZE

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        path = tokenizer_path(tokens.tokenizer)
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest != tokens.tokenizer_sha256:
            raise ValueError(
                f"tokenizer {tokens.tokenizer}: sha256 is {digest}, the spec says {tokens.tokenizer_sha256}; "
                "pin this file or fetch the other"
            )
        self._pieces = SentencePieceProcessor(model_proto=data)
        self._words: dict[str, list[int]] = {}
        if self._pieces.vocab_size() != N_TEXT_IDS:
            raise ValueError(
                f"tokenizer {tokens.tokenizer}: {self._pieces.vocab_size()} pieces, but SOLO's ids begin at "
                f"{N_TEXT_IDS}; use the Mistral-7B-v0.1 vocabulary"
            )
        self._by_word = self._words_are_apart()

    def encode(self, text: str) -> list[int]:
        """Ids of one text item, with its own leading space mark; all in 3..31999, empty for an empty text."""
        ids: list[int] = []
        if not self._by_word:
            ids = self._pieces.encode(text)
        elif text:
            known = self._words
            for word in WORD.findall(SPACE + text.replace(" ", SPACE)):
                ids += known.get(word) or self._word(word)
        return ids

    def _word(self, word: str) -> list[int]:
        """Ids of space marks and what follows them; sentencepiece puts the first mark there itself."""
        ids: list[int] = self._pieces.encode(word[1:]) if len(word) > 1 else [self._pieces.piece_to_id(SPACE)]
        if len(self._words) < WORDS_KEPT and len(word) <= WORD_CHARS:
            self._words[word] = ids
        return ids

    def _words_are_apart(self) -> bool:
        """True where no piece reaches over the start of a word, so that words can be encoded one by one."""
        pieces = (self._pieces.id_to_piece(i) for i in range(N_TEXT_IDS))
        if any(SPACE in piece.lstrip(SPACE) for piece in pieces):
            return False
        self._by_word = True
        return all(self.encode(text) == self._pieces.encode(text) for text in PROBES)

    def decode(self, ids: Iterable[int]) -> str:
        """The text in `ids`; control, vision and unknown ids are left out."""
        text: str = self._pieces.decode([i for i in map(int, ids) if FIRST_TEXT_ID <= i < N_TEXT_IDS])
        return text


def tokenizer_path(name: str) -> Path:
    """Where `package:path/in/package`, or a file path, lies; the package is found without importing it."""
    package, colon, inside = name.partition(":")
    if not colon:
        path = Path(name)
    else:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"tokenizer {name}: no package {package!r} is installed; install it")
        path = Path(spec.submodule_search_locations[0]) / inside
    if not path.is_file():
        raise ValueError(f"tokenizer {name}: {path.name} is not there; give `package:path` or a file's path")
    return path


def tokenize(sample: Sample, grids: Sequence[tuple[int, int]], tokenizer: Tokenizer, template: Template) -> Document:
    """A sample as one document.

    plain: BOS, then all pieces of all turns in order; no markup, no EOS. inst: the blocks of all images, then
    BOS "[INST] user [/INST]" answer EOS, later turns without BOS. There a turn's text items are joined by a
    newline (the image that stood between them has moved to the front), a leading system turn precedes the
    first user text, and a conversation that ends with a user turn is a prompt to complete.
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
        close = IMAGE_CLOSE[getattr(self.tokenizer.tokens.image_close, template)]
        self.add(_image_block(*grid, close))

    def finish(self, grids: tuple[tuple[int, int], ...]) -> Document:
        ids = np.concatenate(self.ids) if self.ids else np.empty(0, np.int32)
        lengths = [len(piece) for piece in self.ids]
        is_target = np.repeat(np.array(self.target, bool), lengths)
        role = np.repeat(np.array(self.role, np.int8), lengths)
        is_patch = ids == VPATCH
        patch_index = np.where(is_patch, np.cumsum(is_patch, dtype=np.int32) - 1, -1).astype(np.int32)
        return Document(ids, is_target, patch_index, grids, role)


@lru_cache(maxsize=4096)
def _image_block(rows: int, cols: int, close: int) -> np.ndarray:
    """<vision> row <vrow_sep> row ... <vrow_sep> row close: separators stand between rows only."""
    body = np.full((rows, cols + 1), VPATCH, np.int32)
    body[:, -1] = VROW_SEP
    body[-1, -1] = close
    block: np.ndarray = np.concatenate([np.array([VISION], np.int32), body.ravel()])
    block.flags.writeable = False
    return block


def _plain(document: _Pieces, sample: Sample, grids: list[tuple[int, int]]) -> None:
    remaining = iter(grids)
    document.add([BOS])
    for message in sample.messages:
        for item in message["content"]:
            if item["type"] == "image":
                document.image(next(remaining), "plain")
            else:
                document.text(item["text"], message["role"], target=message["role"] == "assistant")


def _inst(document: _Pieces, sample: Sample, grids: list[tuple[int, int]]) -> None:
    for grid in grids:
        document.image(grid, "inst")
    document.add([BOS])
    system = ""
    for i, message in enumerate(sample.messages):
        role, text = message["role"], _joined(message)
        if role == "assistant":
            if text:  # an empty answer would teach the model to stop at once
                document.text(text, role, target=True)
                document.add([EOS], role, target=True)
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
