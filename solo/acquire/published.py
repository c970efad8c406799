"""Published files: what lies at a location that is fetched, and any file of it from any byte on.

In: what is asked for (solo/acquire/location.py). Out: its files in order of name, and a function that opens one.
Invariant: a digest comes from the spec or from a commit, never from the server that hands out the bytes. Cost: a
listing of the folder, or on the web one request of one byte for each file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from solo.acquire.location import Asked


@dataclass(frozen=True)
class File:
    """One published file; its name is below the location, and empty where the location is the file."""

    name: str
    size: int | None = None
    sha256: str | None = None
    git: str | None = None  # id of its git blob, where that is all that the commit says
    amiss: str | None = None  # what to do where it is not there as pinned, if that is not to correct the pin


@dataclass(frozen=True)
class Answer:
    """Bytes of a file from `start` on; `stamp` changes when the file does."""

    start: int
    total: int | None
    stamp: str | None
    parts: Iterator[bytes]
    close: Callable[[], None] = field(default=lambda: None)


Opener = Callable[[File, int, str | None], Answer]  # the file, the first byte wanted, the stamp seen before


def listed(want: Asked, *, once: bool = False) -> list[File]:
    """The files asked for; ValueError where one is not there. `once`: a person waits, so nobody is asked again."""
    if want.kind == "hub":
        from solo.acquire import hub_files

        return hub_files.listed(want, once=once)
    if want.kind == "store":
        from solo.acquire import store_files

        return store_files.listed(want)
    from solo.acquire import web_files

    return web_files.listed(want, once=once)


def opener(want: Asked) -> Opener:
    """What opens these files; threads may share it. It raises Failed with a status of solo/acquire/part.py."""
    if want.kind == "hub":
        from solo.acquire import hub_files

        return hub_files.opener(want)
    if want.kind == "store":
        from solo.acquire import store_files

        return store_files.opener(want)
    from solo.acquire import web_files

    return web_files.opener(want)
