"""Files of a Hugging Face dataset at a commit, by the hub's own client and its file addresses.

In: a repository, a folder in it, a commit, patterns. Out: files with the sizes and digests that the commit names, and
bytes from any place on. Invariants: what is fetched is checked against the commit, so neither a mirror nor a cache can
change a byte; the token is HF_TOKEN and goes to the endpoint alone. Cost: a page of the listing for 1,000 files; where
the hub does not answer, its client tries for 23 s.
"""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit

from solo.acquire.location import UNPINNED, Asked, chosen, stem
from solo.acquire.patience import ONCE_S
from solo.acquire.published import Answer, File, Opener
from solo.acquire.web_files import WAIT_S, Client, rules
from solo.isolated.rules import Failed

ENDPOINT = "https://huggingface.co"
OFFLINE = "HF_HUB_OFFLINE is set; unset it, or fetch where there is a network"


def endpoint() -> str:
    """The hub, or the mirror that the user's environment names."""
    return os.environ.get("HF_ENDPOINT", ENDPOINT).rstrip("/")


def _api() -> Any:  # noqa: ANN401 - imported here, since it takes half a second
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint(), token=os.environ.get("HF_TOKEN") or False, library_name="solo-recipe")


def listed(want: Asked, *, once: bool = False) -> list[File]:
    """The files of the commit that the patterns ask for; `once`: no more tries where the hub does not answer."""
    repository, folder = want.repository
    if want.revision == UNPINNED:
        raise ValueError(f"{want.source}: revision is unpinned; {repository} is at {latest(want, once=once)} now")
    from huggingface_hub.hf_api import RepoFile

    below = "/".join(part for part in (folder, stem(want.files)) if part)
    asked = {"recursive": True, "revision": want.revision, "repo_type": "dataset"}
    try:
        if once:  # of the client's two requests the one that it does not repeat
            _api().dataset_info(repository, revision=want.revision, timeout=ONCE_S)
        entries = [e for e in _api().list_repo_tree(repository, below or None, **asked) if isinstance(e, RepoFile)]
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        raise ValueError(f"{want.source}: {_said(error, want)}") from None
    by_name = {e.path.removeprefix(f"{folder}/" if folder else ""): e for e in entries}
    return [_file(name, by_name[name]) for name in chosen(sorted(by_name), want)]


def _file(name: str, entry: Any) -> File:  # noqa: ANN401
    if entry.lfs is not None:
        return File(name, entry.lfs.size, entry.lfs.sha256)
    return File(name, entry.size, None, entry.blob_id)


def latest(want: Asked, *, once: bool = False) -> str:
    """The commit that the repository's main branch has now, to be put into the spec."""
    try:
        return str(_api().dataset_info(want.repository[0], timeout=ONCE_S if once else WAIT_S).sha)
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        raise ValueError(f"{want.source}: {_said(error, want)}") from None


def opener(want: Asked) -> Opener:
    """What opens these files; stamps are left out, since a commit's bytes have digests and its caches many stamps."""
    from huggingface_hub import hf_hub_url

    repository, folder = want.repository
    base, token = endpoint(), os.environ.get("HF_TOKEN")
    parts = urlsplit(base)
    own = "HF_ENDPOINT" in os.environ  # where the user sends us, be it this machine
    trusted = ((parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)),) if own else ()
    client = Client(rules(trusted=trusted), {"Authorization": f"Bearer {token}"} if token else None)

    def opened(file: File, start: int, _: str | None) -> Answer:
        name = f"{folder}/{file.name}" if folder else file.name
        url = hf_hub_url(repository, name, repo_type="dataset", revision=want.revision, endpoint=base)
        try:
            answer = client.open(url, start, None)
        except Failed as failed:
            if failed.http_status in (401, 403):
                raise Failed(failed.status, failed.http_status, f"{failed.detail}: {_login(want)}") from None
            raise
        return Answer(answer.start, answer.total, None, answer.parts, answer.close)

    return opened


def _login(want: Asked) -> str:
    has = "HF_TOKEN may not read it" if os.environ.get("HF_TOKEN") else "HF_TOKEN is not set"
    return f"{has}; accept its terms at {ENDPOINT}/datasets/{want.repository[0]} and set the token of that account"


def _said(error: Exception, want: Asked) -> str:
    """What the hub's client met, without its own text, which holds addresses and request ids."""
    from huggingface_hub import errors

    what = f"{want.location} at {want.revision[:12]}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{what}: {OFFLINE}"
    if isinstance(error, errors.GatedRepoError) or status in (401, 403):
        return f"{what}: the hub refuses; {_login(want)}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{what}: the repository has no such commit; correct revision"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{what}: no such folder at this commit; correct acquire.location or acquire.files"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{what}: no such dataset; correct acquire.location"
    failed = f"HTTP {status}" if status else type(error).__name__
    return f"{what}: {urlsplit(endpoint()).hostname} cannot be asked ({failed}); try again later"
