"""Pages of earlier runs in the server's database: told one a line, or removed, for `solo takedown`.

In: nothing, or ids on standard input. Out: JSON lines of id, key, the time of the last change and the text. What of
them may not stay is judged by solo/lineage/shown.py, which knows no Prefect. Cost: a request for PAGES of them.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.sorting import ArtifactSort
from prefect.exceptions import ObjectNotFound

PAGES = 20  # at once: one with thumbnails has a megabyte


def tell(client: SyncPrefectClient) -> None:
    """Every version of every artifact."""
    n = 0
    while found := client.read_artifacts(sort=ArtifactSort.ID_DESC, limit=PAGES, offset=n):
        for one in found:
            text = one.data if isinstance(one.data, str) else json.dumps(one.data)
            changed = one.updated or one.created
            assert changed
            said = {"id": str(one.id), "key": one.key or "", "changed_at": changed.timestamp()}
            sys.stdout.write(json.dumps(said | {"text": f"{one.description or ''}\n{text}"}) + "\n")
        n += len(found)


def remove(client: SyncPrefectClient) -> None:
    """Those named on standard input; one that is gone already is gone."""
    for line in sys.stdin:
        with suppress(ObjectNotFound):
            client.delete_artifact(UUID(line.strip()))


if __name__ == "__main__":
    with get_client(sync_client=True) as connected:
        {"tell": tell, "remove": remove}[sys.argv[1]](connected)
