"""What a file is that is not what its name says: the usual ways in which a copy of a published set goes wrong.

In: a path. Out: a sentence with the remedy, or None. Invariant: says nothing about a file that could be what its name
says. Cost: HEAD_BYTES from its beginning, TAIL_BYTES from its end.
"""

from __future__ import annotations

import re
from pathlib import Path

HEAD_BYTES = 512
TAIL_BYTES = 1024
POINTER = re.compile(rb"version https://git-lfs\S+\n(?:.*\n)*?size (\d+)\n")
PAGE = re.compile(rb"\s*(?:<!doctype html|<html|<\?xml|<head|<error)", re.IGNORECASE)
PAGES = (".html", ".htm", ".xml", ".svg")
NEVER_EMPTY = (".tar", ".zip", ".parquet", ".gz", ".tgz", ".zst", ".bz2", ".json")
ZSTD = (b"\x28\xb5\x2f\xfd", *(bytes([i]) + b"\x2a\x4d\x18" for i in range(0x50, 0x60)))  # a frame, or one to skip
BEGINS = {
    ".parquet": (b"PAR1",),
    ".zip": (b"PK",),
    ".gz": (b"\x1f\x8b",),
    ".tgz": (b"\x1f\x8b",),
    ".zst": ZSTD,
    ".bz2": (b"BZh",),
}
TEXT_BEGINS = {".json": (b"[", b"{")}
ENDS = {".parquet": b"PAR1"}
END_OF_ZIP = b"PK\x05\x06"
ZIP_TAIL_BYTES = 22 + (1 << 16)  # its last record, with a comment


def dangling(path: Path) -> bool:
    """Is it a link to nothing?"""
    return path.is_symlink() and not path.exists()


def mistaken(path: Path) -> str | None:
    """Why the file cannot be what its name says, told from how it begins."""
    if what := _not_there(path):
        return what
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if pointer := POINTER.match(head):
        size = f"{int(pointer[1]):,}"
        return f"a Git LFS pointer to {size} bytes, not the file itself; run `git lfs pull` in that clone, or fetch it"
    if PAGE.match(head) and path.suffix not in PAGES:
        return "a web page, not data: an error, or a form to log in or agree to terms, was saved; open its URL and see"
    if not head and path.suffix in NEVER_EMPTY:
        return "0 bytes long; fetch it again"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    well = head.startswith(BEGINS.get(path.suffix, b"")) and text.startswith(TEXT_BEGINS.get(path.suffix, b""))
    if not well or (path.suffix == ".tar" and len(head) < HEAD_BYTES):
        return f"no {path.suffix[1:]} file, it begins with {_shown(head)}; fetch it again"
    return None


def _not_there(path: Path) -> str | None:
    if dangling(path):
        return f"a link to {str(path.readlink())!r}, which is not there; copy what links lead to (`cp -L`)"
    if path.with_name(path.name + ".aria2").exists():
        return "not all of it yet, as its .aria2 file tells; let aria2c go on"
    return None


def cut_short(path: Path) -> str | None:
    """Why the file cannot be whole, told from how it ends."""
    with path.open("rb") as file:
        n = file.seek(0, 2)
        file.seek(max(0, n - (ZIP_TAIL_BYTES if path.suffix == ".zip" else TAIL_BYTES)))
        tail = file.read()
    if path.suffix == ".tar" and (n % 512 or any(tail)):
        why = "a tar ends in two blocks of zeros"
    elif path.suffix == ".zip" and END_OF_ZIP not in tail:
        why = "a zip ends in its list of members"
    elif not tail.endswith(ENDS.get(path.suffix, b"")):
        why = f"a {path.suffix[1:]} file ends in {_shown(ENDS[path.suffix])}"
    elif path.suffix in (".json", ".jsonl") and tail.strip()[-1:] not in (b"]", b"}", b""):
        why = f"it ends in {_shown(tail[-20:])}"
    else:
        return None
    return f"cut short at {n:,} bytes: {why}"


def _shown(raw: bytes) -> str:
    return repr(raw[:20].decode("latin-1"))
