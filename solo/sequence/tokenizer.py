"""Tokenizer: the text of a backbone as ids, and where SOLO's own ids begin.

In: a `Tokens` spec that pins a tokenizer file, SentencePiece's `.model` or Hugging Face's `tokenizer.json`. Out: ids
of a text, the text of ids, the `Vocabulary`. Invariant: whatever a text says, its ids are those of ordinary pieces:
control and added tokens have no way in, so they stand only where a caller puts their id. Cost: 20 MB of text a second
where SentencePiece's words are known, a quarter of that where they are not; 1 MB a second through `tokenizer.json`.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from solo.sequence.tokenizer_file import BytePairs, SentencePieces
from solo.spec import ModelSpec, Tokens

N_OWN_IDS = 5 + 1024  # image marks, then <loc_1> ... <loc_1024> as upstream reserves them


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a model: the backbone's, then SOLO's own, which never carry loss."""

    n_text_ids: int  # rows of the backbone's embedding
    bos: int  # begins a document
    eos: int  # ends an answer, fills a pack

    @property
    def vision(self) -> int:
        """<vision>: begins an image."""
        return self.n_text_ids

    @property
    def vpatch(self) -> int:
        """<vpatch>: one for each patch."""
        return self.n_text_ids + 1

    @property
    def vrow_sep(self) -> int:
        """<vrow_sep>: between rows of patches."""
        return self.n_text_ids + 2

    @property
    def vframe_sep(self) -> int:
        """<vframe_sep>: reserved for video upstream, never used."""
        return self.n_text_ids + 3

    @property
    def vision_end(self) -> int:
        """</vision>: ends an image."""
        return self.n_text_ids + 4

    @property
    def size(self) -> int:
        """All ids."""
        return self.n_text_ids + N_OWN_IDS

    def image_close(self, name: str) -> int:
        """Id of the token that closes an image."""
        return {"</vision>": self.vision_end, "<vision>": self.vision}[name]


SOLO = Vocabulary(32_000, 1, 2)  # SOLO-7B's: Mistral-7B-v0.1's pieces, then 1,029 ids


class Tokenizer:
    """A backbone's tokenizer with SOLO's ids after its own; read-only, so threads may share one."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        data = read_pinned(tokens)
        name = tokens.tokenizer
        is_json = data[:64].lstrip().startswith(b"{")  # a SentencePiece model begins with the byte 0x0a and a length
        self.file: BytePairs | SentencePieces = BytePairs(data, name) if is_json else SentencePieces(data, name)
        n_ids = self.file.n_ids if tokens.text_ids is None else tokens.text_ids
        if n_ids < self.file.n_ids:
            raise ValueError(
                f"tokenizer {name}: text_ids {n_ids} < {self.file.n_ids} ids in the file; give the rows of the "
                "backbone's embedding, or leave text_ids out"
            )
        bos = self._control("bos", tokens.bos, self.file.bos)
        eos = self._control("eos", tokens.eos, self.file.eos)
        self.vocabulary = Vocabulary(n_ids, bos, eos)

    @property
    def file_name(self) -> str:
        """What Hugging Face calls a file of this kind."""
        return "tokenizer.json" if isinstance(self.file, BytePairs) else "tokenizer.model"

    @property
    def bos_token(self) -> str:
        """How the token that begins a document reads."""
        return self.file.token_of(self.vocabulary.bos)

    @property
    def eos_token(self) -> str:
        """How the token that ends an answer reads."""
        return self.file.token_of(self.vocabulary.eos)

    def encode(self, text: str) -> list[int]:
        """Ids of one text item; empty for an empty text."""
        return self.file.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text in `ids`; control, vision and unknown ids are left out."""
        is_text, n = self.file.is_text, self.file.n_ids
        return self.file.decode([i for i in map(int, ids) if 0 <= i < n and is_text[i]])

    def _control(self, field: str, token: str | None, own: int | None) -> int:
        """Id of the token that the spec, else the file, names."""
        name = self.tokens.tokenizer
        controls = [self.file.token_of(i) for i in range(self.file.n_ids) if self.file.is_control[i]]
        have = f"it has {controls[:8]}{' ...' if len(controls) > 8 else ''}"
        if token is None:
            if own is None:
                raise ValueError(f"tokenizer {name}: the file names no {field} token; give tokens.{field}, {have}")
            return own
        found = self.file.id_of(token)
        if found is None or not self.file.is_control[found]:
            fact = "no token" if found is None else "a piece of ordinary text"
            raise ValueError(f"tokenizer {name}: {field} {token!r} is {fact} there; name a control token, {have}")
        return found


def check_model(model: ModelSpec, vocabulary: Vocabulary) -> None:
    """Refuse a model whose rows are not the vocabulary's ids."""
    n, least = vocabulary.n_text_ids, vocabulary.vision_end + 1
    if model.n_text_ids != n or model.vocab_size < least:
        raise ValueError(
            f"model: n_text_ids {model.n_text_ids} and vocab_size {model.vocab_size}, but the tokenizer has {n} text "
            f"ids and image marks up to {least}; set n_text_ids to {n} and vocab_size to {vocabulary.size}"
        )


def read_pinned(tokens: Tokens) -> bytes:
    """The tokenizer file, with the content that the spec pins."""
    data = tokenizer_path(tokens.tokenizer).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != tokens.tokenizer_sha256:
        raise ValueError(
            f"tokenizer {tokens.tokenizer}: sha256 is {digest}, the spec says {tokens.tokenizer_sha256}; "
            "pin this file or fetch the other"
        )
    return data


def tokenizer_path(name: str) -> Path:
    """Where `package:path/in/package`, or a file path, lies; the package is found without importing it."""
    package, colon, inside = name.partition(":")
    path = Path(name)
    if colon and not path.is_file():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"tokenizer {name}: no package {package!r} is installed; install it")
        path = Path(spec.submodule_search_locations[0]) / inside
    if not path.is_file():
        raise ValueError(f"tokenizer {name}: {path.name} is not there; give `package:path` or a file's path")
    return path
