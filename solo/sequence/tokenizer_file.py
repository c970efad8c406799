"""Tokenizer files: two kinds behind one face, both cut so that no text reaches a control or added token.

In: the bytes of a SentencePiece `.model` or a Hugging Face `tokenizer.json`. Out: `encode`, `decode`, and of each id
whether it is text or control. Invariant: ids from SOLO's own on, where a file has them (the released tokenizer's
33,029 pieces do), are left out; the ids of ordinary text are those of the untouched file. Cost: the file is parsed
once, 0.2 s for 32,000 SentencePiece pieces, 1 s for 151,000 byte pairs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor

OWN = ("<vision>", "<vpatch>", "<vrow_sep>", "<vframe_sep>", "</vision>")
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
NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6  # sentencepiece_model.proto, SentencePiece.Type
REPLACEMENT = "\ufffd"
# What is lost with a byte that text hardly has, as part of a regular expression: a control character but tab and line
# ends, or four planes of Unicode in which nothing is assigned.
RARE = {b: f"\\x{b:02x}" for b in (*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), 0x7F)}
RARE |= {0xF1: "\U00040000-\U0007ffff", 0xF2: "\U00080000-\U000bffff"}
UTF8_BYTES = [*range(0xC0), *range(0xC2, 0xF5)]  # the others occur in no text


class SentencePieces:
    """A SentencePiece model, word by word where its pieces allow it."""

    def __init__(self, data: bytes, name: str) -> None:
        cut, types = _without_own(data, name)
        try:
            self._model = SentencePieceProcessor(model_proto=cut)
        except RuntimeError as error:
            raise ValueError(f"tokenizer {name}: not a SentencePiece model: {error}") from None
        self.n_ids = len(types)
        self.is_text = np.isin(types, (NORMAL, BYTE))
        self.is_control = np.isin(types, (CONTROL, USER_DEFINED))
        begin, end = self._model.bos_id(), self._model.eos_id()
        self.bos = begin if begin >= 0 else None
        self.eos = end if end >= 0 else None
        self._words: dict[str, list[int]] = {}
        self._by_word = self._words_are_apart()

    def encode(self, text: str) -> list[int]:
        """Ids of one text item, with its own leading space mark; empty for an empty text."""
        ids: list[int] = []
        if not self._by_word:
            ids = self._model.encode(text)
        elif text:
            known = self._words
            for word in WORD.findall(SPACE + text.replace(" ", SPACE)):
                ids += known.get(word) or self._word(word)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids that are text."""
        text: str = self._model.decode(ids)
        return text

    def id_of(self, token: str) -> int | None:
        """Id of the piece that is written so."""
        found: int = self._model.piece_to_id(token)
        return found if self._model.id_to_piece(found) == token else None

    def token_of(self, number: int) -> str:
        """How a piece is written."""
        token: str = self._model.id_to_piece(number)
        return token

    def _word(self, word: str) -> list[int]:
        """Ids of space marks and what follows them; sentencepiece puts the first mark there itself."""
        ids: list[int] = self._model.encode(word[1:]) if len(word) > 1 else [self._model.piece_to_id(SPACE)]
        if len(self._words) < WORDS_KEPT and len(word) <= WORD_CHARS:
            self._words[word] = ids
        return ids

    def _words_are_apart(self) -> bool:
        """True where no piece reaches over the start of a word, so that words can be encoded one by one."""
        pieces = (self._model.id_to_piece(i) for i in np.flatnonzero(self.is_text).tolist())
        if any(SPACE in piece.lstrip(SPACE) for piece in pieces):
            return False
        self._by_word = True
        return all(self.encode(text) == self._model.encode(text) for text in PROBES)


class BytePairs:
    """A byte-pair `tokenizer.json` through the `tokenizers` library.

    `encode_special_tokens` would still match added tokens that are not flagged special (Qwen3's <think> is one), and a
    merge may make a control token of its letters: so all added tokens, and the merges that lead to one, are taken out
    before the library sees the file.
    """

    def __init__(self, data: bytes, name: str) -> None:
        from tokenizers import Tokenizer

        try:
            raw: dict[str, Any] = json.loads(data)
            model, added = raw["model"], {t["content"]: int(t["id"]) for t in raw["added_tokens"]}
            vocabulary: dict[str, int] = model["vocab"]
            kind = model.get("type", "BPE")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"tokenizer {name}: not a tokenizer.json: {type(error).__name__}: {error}") from None
        if kind != "BPE":
            raise ValueError(f"tokenizer {name}: its model is {kind}, only BPE is supported; use another backbone's")
        self._lost = _lost(raw, name)
        self._ids = vocabulary | added
        self._tokens = [""] * (max(self._ids.values()) + 1)
        for token, number in self._ids.items():
            self._tokens[number] = token
        self.n_ids = _own_begin(self._tokens)
        own = set(self._tokens[self.n_ids :])
        model["vocab"] = {token: n for token, n in vocabulary.items() if token not in added and token not in own}
        pairs = (tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"])
        kept = model["vocab"]
        model["merges"] = [[a, b] for a, b in pairs if a in kept and b in kept and a + b in kept]
        model["unk_token"] = None  # no byte is lost, so nothing is unknown
        raw |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self._model = Tokenizer.from_str(json.dumps(raw))
        self.is_text, self.is_control = np.zeros(self.n_ids, bool), np.zeros(self.n_ids, bool)
        self.is_text[list(kept.values())] = True
        self.is_control[[n for n in added.values() if n < self.n_ids]] = True
        self.bos: int | None = None  # such a file does not say which of its tokens these are
        self.eos: int | None = None

    def encode(self, text: str) -> list[int]:
        """Ids of one text item; empty for an empty text."""
        if self._lost is not None:
            text = self._lost.sub(REPLACEMENT, text)
        ids: list[int] = self._model.encode(text, add_special_tokens=False).ids if text else []
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids that are text."""
        text: str = self._model.decode(ids, skip_special_tokens=False)
        return text

    def id_of(self, token: str) -> int | None:
        """Id of the token that is written so."""
        found = self._ids.get(token)
        return found if found is not None and found < self.n_ids else None

    def token_of(self, number: int) -> str:
        """How a token is written."""
        return self._tokens[number]


def _lost(raw: dict[str, Any], name: str) -> re.Pattern[str] | None:
    """The characters that no token can write, if there are any; `tokenizers` would leave them out without a word.

    A vocabulary trained on text may lack bytes that text does not have (SmolLM2's lacks six control characters and the
    planes 4 to 11, where Unicode has assigned nothing). Those read as REPLACEMENT; lacking any other is an error.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = raw["model"]["vocab"]
    if raw["model"].get("byte_fallback"):
        lost = [b for b in UTF8_BYTES if f"<0x{b:02X}>" not in vocabulary]
    elif '"ByteLevel"' in json.dumps(raw["pre_tokenizer"]):
        shown = [b for b in range(256) if chr(b).isprintable() and b not in (0x20, 0xA0, 0xAD)]
        hidden = [b for b in range(256) if b not in set(shown)]
        letters = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}
        assert set(letters.values()) == set(ByteLevel.alphabet())
        lost = [b for b in UTF8_BYTES if letters[b] not in vocabulary]
    else:
        raise ValueError(f"tokenizer {name}: neither byte-level nor with byte_fallback, so that text would be lost")
    if needed := [b for b in lost if b not in RARE]:
        raise ValueError(
            f"tokenizer {name}: no token for {len(needed)} bytes, {needed[0]:#04x} first: text would be lost; "
            "use another backbone's"
        )
    return re.compile(f"[{''.join(RARE[b] for b in lost)}]") if lost else None


def _own_begin(tokens: Sequence[str]) -> int:
    """Where SOLO's own tokens begin in a file that has them, else the number of tokens."""
    for i, token in enumerate(tokens):
        if token == OWN[0] and tuple(tokens[i : i + len(OWN)]) == OWN:
            return i
    return len(tokens)


def _without_own(data: bytes, name: str) -> tuple[bytes, list[int]]:
    """The model without SOLO's pieces, its user-defined pieces out of reach; and the type of each piece as it was.

    Upstream appended its pieces to the protobuf as NORMAL with score 0. A user-defined piece is matched wherever a text
    holds its string; as UNUSED it is not.
    """
    out = bytearray(data)
    spans, tokens, types = [], [], []
    try:
        for field, begin, value, end in _fields(data, 0, len(data)):
            if field != 1:  # ModelProto.pieces
                continue
            token, kind = b"", NORMAL
            for inner, _, at, stop in _fields(data, value, end):
                if inner == 1:
                    token = data[at:stop]
                elif inner == 3:
                    kind = data[at]
                    out[at] = UNUSED if kind == USER_DEFINED else kind
            spans.append((begin, end))
            tokens.append(token.decode())
            types.append(kind)
    except (IndexError, UnicodeDecodeError):
        raise ValueError(f"tokenizer {name}: neither a SentencePiece model nor a tokenizer.json") from None
    if not tokens:
        raise ValueError(f"tokenizer {name}: neither a SentencePiece model nor a tokenizer.json")
    n = _own_begin(tokens)
    for begin, end in reversed(spans[n:]):
        del out[begin:end]
    return bytes(out), types[:n]


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, begin, begin of the value, end) of each field of a protobuf message at data[at:end]."""
    while at < end:
        begin = at
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            _, after = _varint(data, at)
        elif wire == 2:
            length, at = _varint(data, at)
            after = at + length
        else:
            after = at + {1: 8, 5: 4}.get(wire, end)
        if after > end:
            raise IndexError(after)
        yield key >> 3, begin, at, after
        at = after


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7
