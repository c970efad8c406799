"""Locations: what `acquire.location` may name, and what its spec must say beside it so that the bytes are pinned.

In: fields of a source spec. Out: what to fetch (`Asked`), what of it is identity, or a ValueError with the remedy.
Invariants: no host, port or mirror reaches a fingerprint where the revision names the bytes; no credential is taken
from a spec; no name leads out of the folder that is fetched. Cost: none, nothing is asked of anybody.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qsl, urlsplit

if TYPE_CHECKING:
    from solo.spec import Acquire, SourceSpec

Kind = Literal["local", "web", "store", "hub"]
UNPINNED = "unpinned"
HUB = "huggingface:"
STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "file", "memory")
WEB = re.compile(r"https?://", re.IGNORECASE)
REPOSITORY = re.compile(r"huggingface:([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)((?:/[^/]+)*)", re.ASCII)
SECRET = re.compile(
    r"(x-(amz|goog)-.*|.*(signature|token|secret|password|credential|apikey|api_key|accesskey).*|sig|key)"
)
WILD = re.compile(r"[*?\[]")
NUMBERS = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
MOST_NUMBERED = 100_000
SHA256 = re.compile(r"[0-9a-f]{64}")
FETCHING = ("files", "sha256", "loopback_ports")  # fields of Acquire that only a location which is fetched has


@dataclass(frozen=True)
class Asked:
    """Files that are published somewhere, and the pin they must have."""

    source: str
    location: str
    revision: str
    files: tuple[str, ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)
    loopback_ports: Mapping[str, int] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """Who has them."""
        return kind(self.location)

    @property
    def name(self) -> str:
        """Last part of the location: the copy's own name."""
        return last(self.location)

    @property
    def repository(self) -> tuple[str, str]:
        """Of a hub location: `owner/name`, and the folder in it."""
        match = REPOSITORY.fullmatch(self.location)
        assert match is not None
        return match[1], match[2].strip("/")


def asked(spec: SourceSpec) -> Asked:
    """What a source's spec asks for."""
    return of(spec.name, spec.revision, spec.acquire)


def of(source: str, revision: str, acquire: Acquire) -> Asked:
    """The same of its parts."""
    files = tuple(name for pattern in acquire.files for name in numbered(pattern))
    return Asked(source, acquire.location, revision, files, acquire.sha256, acquire.loopback_ports)


def numbered(pattern: str) -> list[str]:
    """`a-{000..575}.tar` as the names it stands for; the lower number says how many digits they have."""
    if (match := NUMBERS.search(pattern)) is None:
        return [pattern]
    low, high = int(match[1]), int(match[2])
    if not 0 <= high - low < MOST_NUMBERED:
        raise ValueError(
            f"acquire.files: {pattern!r} counts from {low} to {high}; up to {MOST_NUMBERED:,} files are named so"
        )
    names = (f"{pattern[: match.start()]}{i:0{len(match[1])}}{pattern[match.end() :]}" for i in range(low, high + 1))
    return [name for each in names for name in numbered(each)]


def kind(location: str) -> Kind:
    """What a location is; unknown protocols are stores, and refused as such."""
    if location.startswith(HUB):
        return "hub"
    if "://" not in location:
        return "local"
    return "web" if WEB.match(location) else "store"


def last(location: str) -> str:
    """The last part of a location's path."""
    path = urlsplit(location).path if kind(location) in ("web", "store") else location.removeprefix(HUB)
    return path.rstrip("/").rpartition("/")[2] or "data"


def identity(spec: SourceSpec) -> dict[str, Any]:
    """The fields of a source that its acquire artifact depends on.

    Where the revision is the SHA-256 of what is fetched, whence it comes changes no byte, so only the last part of the
    location counts (a record may be named by its file). A commit names a repository but not which part of it, so there
    the whole location and the files count.
    """
    acquire = spec.acquire.model_dump(mode="json")
    more = {name: acquire.pop(name) for name in FETCHING}
    if kind(spec.acquire.location) != "local" and spec.revision.startswith("sha256:"):
        acquire["location"] = last(spec.acquire.location)
    else:
        acquire |= {name: more[name] for name in ("files", "sha256") if more[name]}
    return {"source": spec.name, "revision": spec.revision, "acquire": acquire}


def where(spec: SourceSpec) -> dict[str, Any]:
    """What acquire needs beside its identity: of a location that is fetched, whence."""
    if kind(spec.acquire.location) == "local":
        return {}
    return spec.acquire.model_dump(mode="json", include={"location", *FETCHING})


def check(spec: SourceSpec) -> None:
    """Raise ValueError where the fields of a source do not say together what is fetched and what its pin is."""
    want = asked(spec)
    for name in (*want.files, *want.sha256):
        check_name(name, "acquire.files")
    if want.kind != "local":
        check_name(want.name, "acquire.location")
    for name, digest in want.sha256.items():
        if not SHA256.fullmatch(digest):
            raise ValueError(f"acquire.sha256: {name}: {digest!r} is not 64 hex digits")
    {"local": _check_local, "web": _check_web, "store": _check_store, "hub": _check_hub}[want.kind](want)


def check_name(name: str, place: str) -> None:
    """Refuse a name that would lead out of the folder its file is put into."""
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{place}: {name!r} is no name below a folder; one without .. and leading / is")


def _check_local(want: Asked) -> None:
    given = [name for name in FETCHING if getattr(want, name)]
    if given:
        raise ValueError(f"acquire.{given[0]} is for a location that is fetched; {want.location!r} is a path")


def _check_web(want: Asked) -> None:
    _check_secrets(want.location)
    if not urlsplit(want.location).hostname:
        raise ValueError(f"acquire.location: {want.location!r} names no host")
    if wild := next((name for name in want.files if WILD.search(name)), None):
        raise ValueError(f"acquire.files: {wild!r} is a pattern, and a web server has no listing; name each file")
    names = want.files or ("",)
    if odd := sorted(set(want.sha256) - set(want.files)):
        raise ValueError(f"acquire.sha256: {odd[0]!r} is not in acquire.files, which has {list(want.files)}")
    if not want.revision.startswith("sha256:") and want.revision != UNPINNED and set(names) - set(want.sha256):
        raise ValueError("revision is a commit, which pins no byte on a web server; give each file its acquire.sha256")


def _check_store(want: Asked) -> None:
    protocol = want.location.partition("://")[0]
    if protocol not in STORES or "::" in want.location:
        raise ValueError(
            f"acquire.location: {want.location!r} is neither http(s) nor a store of {', '.join(STORES)}; "
            "use one of these, huggingface:OWNER/NAME or a path"
        )
    _check_secrets(want.location)
    if want.loopback_ports:
        raise ValueError("acquire.loopback_ports is for http; a store's endpoint comes from the environment")
    if not want.revision.startswith("sha256:") and want.revision != UNPINNED and not want.sha256:
        raise ValueError("revision is a commit, which pins no byte in a store; use sha256:<64 hex digits>")


def _check_hub(want: Asked) -> None:
    match = REPOSITORY.fullmatch(want.location)
    if match is None or any(part in (".", "..") for part in match[2].split("/")):
        raise ValueError(f"acquire.location: {want.location!r} is not huggingface:OWNER/NAME or .../FOLDER")
    if not want.files:
        raise ValueError("acquire.files is missing; name what to fetch of the repository, such as ['*.parquet']")
    if want.revision.startswith("sha256:"):
        raise ValueError("revision is a sha256; a hub location is pinned by the 40 digits of a commit")
    if want.sha256 or want.loopback_ports:
        raise ValueError(
            "acquire.sha256 and acquire.loopback_ports are for http; a commit of the hub names its digests"
        )


def _check_secrets(location: str) -> None:
    """Credentials come from the environment alone: a spec is published, and so is a manifest."""
    parts = urlsplit(location)
    if "@" in parts.netloc:
        raise ValueError("acquire.location holds user information; credentials come from the environment")
    if odd := next((name for name, _ in parse_qsl(parts.query) if SECRET.fullmatch(name.lower())), None):
        raise ValueError(f"acquire.location: its query holds {odd!r}, a credential; these come from the environment")


def chosen(names: Sequence[str], want: Asked) -> list[str]:
    """The names that a pattern asks for, all where none is given; `*` stays within one folder."""
    found = set[str]()
    for pattern in want.files:
        these = {name for name in names if matches(name, pattern)}
        if not these:
            have = f"{len(names)} other files, such as {sorted(names)[:3]}" if names else "nothing there"
            raise ValueError(
                f"{want.source}: acquire.files: nothing matches {pattern!r} at {want.location}; it has {have}"
            )
        found |= these
    for name in found if want.files else filter(None, names):
        check_name(name, f"{want.source}: {want.location}")
    return sorted(found if want.files else names)


def matches(name: str, pattern: str) -> bool:
    """Whether a name fits a pattern, folder by folder."""
    a, b = name.split("/"), pattern.split("/")
    return len(a) == len(b) and all(fnmatchcase(x, y) for x, y in zip(a, b, strict=True))


def stem(patterns: Sequence[str]) -> str:
    """The folder that all names which fit lie in, so that no more than it is listed."""
    plain = []
    for pattern in patterns:
        parts = pattern.split("/")[:-1]
        n = next((i for i, part in enumerate(parts) if WILD.search(part)), len(parts))
        plain.append(parts[:n])
    shared: list[str] = []
    for level in zip(*plain, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return PurePosixPath(*shared).as_posix() if shared else ""
