"""`solo fetch`, `solo revision`, and what a plan says of downloads: where the CLI meets solo/acquire/copies.py.

In: names of sources, the plan of a recipe. Out: a path, a pin, sentences; progress goes to standard error.
Cost: the bytes that are not there yet; a plan asks nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from solo.acquire import location
from solo.line import Planned, Settings
from solo.spec import SourceSpec, load

if TYPE_CHECKING:
    from solo.acquire.copies import Download  # the clients of stores and of the hub, which most commands do not need


def revision(
    data: Annotated[str, typer.Argument(help="A file or folder of data, or a source whose location is fetched.")],
) -> None:
    """Print the pin of a source's data as they are now, to be put into its spec."""
    from solo.acquire import copies
    from solo.acquire.part import content_sha256

    if Path(data).exists():
        typer.echo(f"revision: sha256:{content_sha256(Path(data))}")
        return
    settings = Settings.from_env()
    want = location.asked(load(SourceSpec, data, settings.specs))
    if want.kind == "local":
        raise ValueError(f"{data}: no such file, and the location of source {data} is a path; give that path")
    typer.echo(f"revision: {copies.pin(want, settings.root, _aside)}")


def fetch(source: Annotated[str, typer.Argument(help="A source whose acquire.location is fetched.")]) -> None:
    """Fetch what a source is published as into the data root; what is there of it is not fetched again."""
    from solo.acquire import copies
    from solo.acquire.part import check_pinned

    settings = Settings.from_env()
    want = location.asked(load(SourceSpec, source, settings.specs))
    if want.kind == "local":
        raise ValueError(f"{source}: acquire.location is the path {want.location}; there is nothing to fetch")
    check_pinned(source, want.revision, source)
    typer.echo(copies.fetch(want, settings.root, _aside))


def downloads(planned: Sequence[Planned], settings: Settings) -> list[Download]:
    """What acquire would fetch for what it would make."""
    from solo.acquire import copies

    wanted = [p.name for p in planned if p.part == "acquire" and p.action == "run"]
    return copies.downloads([load(SourceSpec, name, settings.specs) for name in wanted], settings.root)


def sentences(found: Sequence[Download]) -> list[str]:
    """The same for people."""
    from solo.acquire import copies

    return [copies.sentence(found)] if found else []


def _aside(text: str) -> None:
    typer.echo(text, err=True)
