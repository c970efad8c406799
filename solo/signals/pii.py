"""Signals of personal data in a sample's text: how many shapes of each kind, never what they are.

A shape is what looks like one and passes its check digits: a card number Luhn's, an IBAN mod 97; an IP address is
public or private alike. Invariant: no value is kept. Cost: about 1 ms for 1,000 words.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TypedDict

from solo.filter.pictures import Pictures
from solo.sample import Sample
from solo.signals.text import EMAIL

VERSIONS = {"shapes": 1}

CARD = re.compile(r"(?<![\w.,-])\d(?:[ -]?\d){12,18}(?![\w-])")
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
IP = re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|(?:[0-9a-fA-F]{0,4}:){2,7}[0-9a-fA-F]{0,4})(?![\w:]|\.\d)")
# International with +, or a trunk form with separators; a bare run of digits is a number, not a telephone.
PHONE = re.compile(
    r"(?<![\w+.-])(?:\+\d{1,3}[ .-]?(?:\(?\d{1,4}\)?[ .-]?){2,5}\d{2,4}"
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4}|0[1-9]\d{1,3}[ /-]\d{3,4}[ -]?\d{3,5})(?![\w-]|\.\d)"
)


class Shapes(TypedDict):
    """Columns of `shapes`."""

    n_emails: int
    n_phones: int
    n_cards: int
    n_ibans: int
    n_ips: int


def shapes(sample: Sample, pictures: Pictures) -> Shapes:
    """Counts over all text items; what was counted as one kind is no other."""
    text = "\n".join(item["text"] for m in sample.messages for item in m["content"] if "text" in item)
    found = {}
    kinds = (("ibans", IBAN, _is_iban), ("cards", CARD, _is_card), ("ips", IP, _is_ip))
    for kind, pattern, check in kinds:
        matches = [m for m in pattern.finditer(text) if check(m[0])]
        for m in reversed(matches):
            text = text[: m.start()] + " # " + text[m.end() :]
        found[kind] = len(matches)
    n_emails = len(EMAIL.findall(text))
    n_phones = len(PHONE.findall(EMAIL.sub(" # ", text)))
    return Shapes(
        n_emails=n_emails, n_phones=n_phones, n_cards=found["cards"], n_ibans=found["ibans"], n_ips=found["ips"]
    )


def _is_card(shape: str) -> bool:
    digits = [int(c) for c in shape if c.isdigit()]
    doubled = [d if i % 2 == 0 else sum(divmod(2 * d, 10)) for i, d in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0 and len(set(digits)) > 1


def _is_iban(shape: str) -> bool:
    flat = shape.replace(" ", "")
    turned = flat[4:] + flat[:4]
    return 15 <= len(flat) <= 34 and int("".join(str(int(c, 36)) for c in turned)) % 97 == 1


def _is_ip(shape: str) -> bool:
    if ":" in shape and (sum(map(bool, shape.split(":"))) < 2 or not any(c.isdigit() for c in shape)):
        return False  # `a::b` is code
    try:
        ipaddress.ip_address(shape)
    except ValueError:
        return False
    return True
