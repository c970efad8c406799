"""Exact match: the whole response must be the answer.

In: the response and the reference as text. Out: True when they agree up to case, runs of white space and one final
full stop. Nothing is extracted from a longer response: "the answer is four" is not "four", and a spec that wants it to
be needs another scorer, hence another protocol.
"""

from __future__ import annotations

VERSION = 1


def match(response: str, answer: str) -> bool:
    """Whether the response is the answer."""
    return _plain(response) == _plain(answer)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()
