"""`solo`: what a recipe would do, doing it, and what it did; all it prints comes from specs and manifests.

The CLI picks a recipe and a place to run; it does not change the recipe. Flows are started as processes of their own,
because `solo` does not import Prefect.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from solo import line, runs
from solo.artifact import LedgerError
from solo.line import CHECKOUT, PARTS, Settings

app = typer.Typer(
    help="Train single-transformer vision-language models from a data recipe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
out = Console(highlight=False)

Recipe = Annotated[str, typer.Argument(help="Name of a file in datasets_spec/recipes/.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")]
Until = Annotated[str, typer.Option(help=f"Last part to make: {', '.join(PARTS)}.")]
Parts = Annotated[list[str] | None, typer.Option(help="A part; repeat for several.")]

COLOURS = {"reuse": "green", "run": "yellow", "unknown": "cyan"}


@app.command()
def plan(recipe: Recipe, until: Until = "report", force: Parts = None, as_json: Json = False) -> None:
    """Say which artifacts a run would make or reuse, and which field or input is the reason."""
    settings = Settings.from_env()
    planned = line.plan(line.select(line.nodes(recipe, settings.specs), until), settings, force or ())
    if as_json:
        typer.echo(json.dumps(runs.plan_json(recipe, planned)))
        return
    table = Table("part", "name", "action", "because", box=None, header_style="bold")
    for p in planned:
        table.add_row(p.part, p.name, f"[{COLOURS[p.action]}]{p.action}[/]", p.because.replace("[", r"\["))
    out.print(table)
    out.print(runs.plan_sentence(planned))


@app.command()
def run(
    recipe: Recipe, until: Until = "report", only: Parts = None, force: Parts = None, as_json: Json = False
) -> None:
    """Run a recipe here, without a worker: the same tracked flow as `prefect deployment run solo/full-recipe`."""
    settings = Settings.from_env()
    line.select(line.nodes(recipe, settings.specs), until)
    arguments = [f"recipe={recipe}", f"until={until}"]
    arguments += [f"only={','.join(only)}"] if only else []
    arguments += [f"force={','.join(force)}"] if force else []
    _module("flows.server", "server")
    code = _module("flows.recipe", *arguments)
    if code:
        raise typer.Exit(code)
    report(recipe, as_json=as_json)


@app.command()
def report(recipe: Recipe, as_json: Json = False) -> None:
    """Print the closing table, the scores and the links of a recipe's last run."""
    from solo.report import closing_rows, summarise

    settings = Settings.from_env()
    record, manifests = runs.read(settings.root, recipe)
    summary = summarise(manifests)
    if as_json:
        typer.echo(json.dumps(summary | {"states": record["states"], "links": record["links"]}))
        return
    rows = closing_rows(manifests, record["states"])
    table = Table(box=None, header_style="bold", title=f"recipe {recipe}", title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if name in ("part", "name", "state", "dropped") else "right")
    for row in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()))
    out.print(table)
    out.print(f"ledger closes: {'yes' if summary['closes'] else 'NO, see the report'}")
    for score in summary["scores"]:
        out.print(
            f"{score['benchmark']}: score {score['score']:.3f}, chance {score['chance']:.3f}, blind {score['blind']:.3f}"
        )
    for name, link in record["links"].items():
        out.print(f"{name:<22} {link}", soft_wrap=True)


@app.command()
def up() -> None:
    """Start this checkout's Prefect server, its worker and the deployments (loopback only)."""
    raise typer.Exit(_module("flows.server", "worker"))


@app.command()
def down() -> None:
    """Stop what `solo up` started, by pid."""
    raise typer.Exit(_module("flows.server", "down"))


def _module(name: str, *arguments: str) -> int:
    """Run a module of flows/ in a process of its own; standard output goes to standard error, ours stays for JSON."""
    command = [sys.executable, "-m", name, *arguments]
    return subprocess.run(command, cwd=CHECKOUT, env=os.environ, stdout=sys.stderr, check=False).returncode


def main() -> Any:  # noqa: ANN401 - typer's own return
    """Entry point: a user's mistake is one line and exit code 2, a broken promise of ours keeps its traceback."""
    try:
        return app()
    except LedgerError as error:
        sys.exit(f"error: {error}")
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
