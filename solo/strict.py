"""Strict: what every spec is, and the error of one that is wrong.

In: fields as a user wrote them. Out: a frozen object, or an error. Invariant: a field added later whose `exclude_if`
calls its value off is not in a dump, so a spec that does not use it keeps its fingerprint. Cost: none.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class SpecError(ValueError):
    """Something a user wrote is wrong; the message is one line and holds the remedy."""


class Spec(BaseModel):
    """Frozen and strict: an unknown key is an error, so a typo can never silently change a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def off(value: object) -> bool:
    """`exclude_if` of a field that is off where it is absent: what is off is not identity."""
    return value is None or value == {}
