"""`solo trace`: where one sample came from and went, or where the documents of a step came from.

In: a name of a sample, or a step or pack. Out: lines, or one JSON document. Cost: what solo/lineage/trace.py says.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from solo.line import Settings

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")]


def trace(
    what: Annotated[
        str | None, typer.Argument(help="A key, the beginning of one, a URL, or a SHA-256 of bytes.")
    ] = None,
    stage: Annotated[str | None, typer.Option(help="A stage, with --step.")] = None,
    step: Annotated[int | None, typer.Option(help="Optimizer step of the stage, from 1.")] = None,
    mix: Annotated[str | None, typer.Option(help="A mix, with --pack.")] = None,
    pack: Annotated[int | None, typer.Option(help="Pack of the mix, from 0.")] = None,
    as_json: Json = False,
) -> None:
    """Follow a sample from its URL to the steps that trained it, or a step or pack back to its URLs."""
    from solo.lineage import trace as traced
    from solo.lineage import trace_text

    settings = Settings.from_env()
    root = settings.root
    given = (what is not None, stage is not None and step is not None, mix is not None and pack is not None)
    if sum(given) != 1 or sum(x is not None for x in (what, stage, step, mix, pack)) != (1 if given[0] else 2):
        raise ValueError("trace: give a key, URL or SHA-256; or --stage and --step; or --mix and --pack")
    found: dict[str, Any]
    if stage is not None and step is not None:
        found = traced.of_step(root, stage, step)
    elif mix is not None and pack is not None:
        found = traced.of_pack(root, mix, pack)
    else:
        found = traced.trace(root, what or "", settings.specs)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False, default=_plain))
        return
    for text in trace_text.lines(found) if what is not None else trace_text.documents(found):
        typer.echo(text)


def takedown(
    apply: Annotated[bool, typer.Option("--apply", help="Take out of all artifacts what is listed.")] = False,
    prove: Annotated[bool, typer.Option("--prove", help="Exit 1 while any file or page holds what is listed.")] = False,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="With --apply: remove what was trained on it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what holds the entries of datasets_spec/takedown.csv, old artifacts and caches included, or take it out."""
    from solo.lineage import removal, shown

    settings = Settings.from_env()
    if checkpoints and not apply:
        raise ValueError("takedown: --checkpoints removes them with --apply only")
    if apply:
        removal.apply(settings, checkpoints=checkpoints, say=lambda text: typer.echo(text, err=True))
    found = removal.look(settings)
    pages = shown.search(settings.root, found.needles, found.held)
    if apply and pages.pages:
        shown.remove(pages.pages)
        for page in pages.pages:
            typer.echo(f"page {page.key} {page.id}: removed", err=True)
        pages = shown.search(settings.root, found.needles, found.held)
    if as_json:
        more = {"pages": [asdict(page) for page in pages.pages], "pages_unsearched": pages.unsearched}
        typer.echo(json.dumps(removal.summary(found) | more))
    else:
        for text in [*removal.lines(found), *shown.lines(pages)]:
            typer.echo(text)
    if apply and not as_json:
        typer.echo("`solo plan RECIPE` says what the next run makes again")
    if prove and not (found.is_clean and not pages.pages):
        raise typer.Exit(1)


def _plain(value: Any) -> str:  # noqa: ANN401 - what JSON has no word for
    return value.hex() if isinstance(value, bytes) else str(value)
