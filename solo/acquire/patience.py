"""Patience: which ends of a request are tried again and when, and what a user can do about the others.

In: the Failed that ended a request. Out: a pause, or a remedy. Invariants: terminal causes are not tried again;
pauses grow and are random, so that many who failed together do not come back together. Cost: the pauses.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import TypeVar

from solo.isolated.rules import Failed

TRIES = 6  # in a row that bring nothing to speak of
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
LONGEST_RETRY_AFTER_S = 300.0
ONCE_S = 4.0  # for an answer, where a person waits for it and nothing is tried again
TRANSIENT = ("timeout", "dns", "connection", "http_429", "http_5xx")
REMEDIES = {
    "http_404": "correct acquire.location or acquire.files",
    "http_4xx": "see whether its publisher wants a login or moved it",
    "http_3xx": "correct acquire.location",
    "refused_address": "only public addresses are asked; acquire.loopback_ports names a mirror on this machine",
    "refused_scheme": "only http and https are fetched; correct acquire.location",
    "refused_encoding": "the server packs what it stores; use another mirror",
    "bad_record": "correct acquire.location",
    "hash_mismatch": "run again to fetch it as it is now, and see whether its pin still holds",
}
T = TypeVar("T")


class Stopped(Exception):
    """Another file failed, so this one is left where it is."""


class Busy(Failed):
    """An answer that says when to ask again."""

    wait_s: float | None = None


def pause(failed: Failed, failures: int, stop: threading.Event) -> None:
    """Wait as the server says, else longer each time."""
    asked = getattr(failed, "wait_s", None)
    wait_s = min(FIRST_WAIT_S * 2 ** (failures - 1), LONGEST_WAIT_S)
    if asked is not None:
        wait_s = min(max(asked, wait_s), LONGEST_RETRY_AFTER_S)
    if stop.wait(wait_s * random.uniform(1, 1.5)):
        raise Stopped


def patiently(act: Callable[[], T]) -> T:
    """What `act` gives, TRIES times tried; the last Failed where it gives nothing."""
    for failures in range(1, TRIES):
        try:
            return act()
        except Failed as failed:
            if failed.status not in TRANSIENT:
                raise
            pause(failed, failures, threading.Event())
    return act()


def remedy(failed: Failed) -> str:
    """What a user can do about an end."""
    return REMEDIES.get(failed.status, "try again later")
