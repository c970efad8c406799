"""Opt-outs in an answer's headers, judged before its body is read.

In: headers. Out: the header that refuses, or None. Read are `X-Robots-Tag` (each of several headers, lists by comma or
semicolon, any case, for all robots or for ours by name), `TDM-Reservation` (the W3C group's text-and-data-mining
protocol) and `Content-Usage` (the IETF's AI preferences draft). Invariant: a directive for another robot, or a value
that belongs to another directive (`max-image-preview: none`), refuses nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

REFUSE = frozenset(("noai", "noimageai", "noindex", "noimageindex", "none"))
WITH_VALUE = frozenset(("max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"))
USES = frozenset(("train-ai", "ai", "tdm", "bots"))  # of Content-Usage: what training needs
DATE = re.compile(r"unavailable_after\s*:[^;]*", re.IGNORECASE)  # holds commas and colons
EVIDENCE_CHARS = 200


def refusal(headers: Iterable[tuple[str, str]], token: str) -> str | None:
    """The first header that refuses use by a robot of this product token, as `Name: value`."""
    for name, value in headers:
        if name == "x-robots-tag":
            refused = _robots_tag(value, token)
        elif name == "tdm-reservation":
            refused = value.strip().strip('"').startswith(("1", "?1"))
        elif name == "content-usage":
            refused = _content_usage(value)
        else:
            continue
        if refused:
            return f"{name}: {' '.join(value.split())}"[:EVIDENCE_CHARS]
    return None


def _robots_tag(value: str, token: str) -> bool:
    """A name before a colon holds for all that follows it, up to the next name."""
    ours = True
    for item in re.split(r"[,;]", DATE.sub("", value)):
        word = item.strip().strip('"').lower()
        while ":" in word or "=" in word:
            name, _, word = (part.strip() for part in re.split(r"([:=])", word, maxsplit=1))
            if name in WITH_VALUE:
                word = ""
            elif name == "tdm-reservation":
                return ours and word.startswith("1")
            else:
                ours = name in (token, "*", "")
        if ours and re.sub(r"[-_ ]", "", word) in REFUSE:
            return True
    return False


def _content_usage(value: str) -> bool:
    pairs = (item.partition("=") for item in re.split(r"[,;]", value.lower()))
    return any(name.strip() in USES and said.strip() == "n" for name, _, said in pairs)
