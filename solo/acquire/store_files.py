"""Files in object stores, by fsspec: s3 and what else its clients speak.

In: a store's URL, a file or a folder. Out: files with their sizes, and bytes from any place on. Invariants: credentials
and endpoint are the environment's; a file that is replaced while it is read is noticed. Cost: a listing, then a ranged
request for each BLOCK_BYTES.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from solo.acquire.location import Asked, chosen
from solo.acquire.published import Answer, File, Opener
from solo.isolated.rules import Failed
from solo.sequence.shards import check_protocol

BLOCK_BYTES = 8 << 20
LOGIN = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true for a public bucket"


def _store(want: Asked) -> tuple[Any, str]:
    check_protocol(want.location)
    from fsspec.core import url_to_fs

    store, root = url_to_fs(want.location)
    return store, root.rstrip("/")


def listed(want: Asked) -> list[File]:
    """The files below the location that the patterns ask for."""
    store, root = _store(want)
    try:
        store.invalidate_cache()
        entries: dict[str, dict[str, Any]] = store.find(root, detail=True)
    except Exception as error:  # clients raise what their libraries do
        end = failed(error)
        raise ValueError(f"{want.source}: {want.location} cannot be listed: {end.detail}; {remedy(end)}") from None
    sizes = {path.removeprefix(root).lstrip("/"): int(entry["size"]) for path, entry in entries.items()}
    names = chosen(sorted(sizes), want)
    if not names:
        raise ValueError(f"{want.source}: nothing is at {want.location}; correct acquire.location")
    lacking = [name for name in names if name not in want.sha256]
    if want.sha256 and (odd := sorted(set(want.sha256) - set(names))):
        raise ValueError(f"{want.source}: acquire.sha256: {odd[0]} is not among the files at {want.location}")
    if lacking and len(want.revision) == 40:
        raise ValueError(
            f"{want.source}: acquire.sha256 has no digest of {lacking[0]}, and revision pins no byte of it"
        )
    return [File(name, sizes[name], want.sha256.get(name)) for name in names]


def opener(want: Asked) -> Opener:
    """What opens these files."""
    store, root = _store(want)

    def stamp(path: str) -> str:
        store.invalidate_cache(path)
        return str(store.ukey(path))

    def parts(path: str, start: int, total: int, seen: str) -> Iterator[bytes]:
        while start < total:
            try:
                data = store.cat_file(path, start=start, end=min(start + BLOCK_BYTES, total))
                now = stamp(path) if start + len(data) >= total else seen
            except Exception as error:  # clients raise what their libraries do
                raise failed(error) from None
            if not data:
                raise Failed("connection", None, "the store sends no bytes")
            if now != seen:
                raise Failed("hash_mismatch", None, "it was replaced while it was read")
            start += len(data)
            yield data

    def opened(file: File, start: int, _: str | None) -> Answer:
        path = f"{root}/{file.name}" if file.name else root
        try:
            now, total = stamp(path), int(store.info(path)["size"])
        except Exception as error:  # as above
            raise failed(error) from None
        return Answer(start, total, now, parts(path, start, total, now))

    return opened


def failed(error: Exception) -> Failed:
    """A client's exception as a status; its text may hold what was signed, so only its kind is told."""
    kind = type(error).__name__
    if isinstance(error, FileNotFoundError):
        return Failed("http_404", 404, "it is not there")
    if isinstance(error, PermissionError) or "Credentials" in kind:
        return Failed("http_4xx", None, f"the store refuses ({kind})")
    return Failed("timeout" if isinstance(error, TimeoutError) else "connection", None, f"the store failed ({kind})")


def remedy(failed: Failed, setting: str = "acquire.location") -> str:
    """What a user can do about it; `setting` is where the URL was read."""
    if failed.status == "http_404":
        return f"correct {setting}"
    return LOGIN if failed.status == "http_4xx" else "try again later, or correct AWS_ENDPOINT_URL"
