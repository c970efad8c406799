"""`solo`: what a recipe would do, doing it, and what it did; all it prints comes from specs and manifests.

The CLI picks a recipe and a place to run; it does not change the recipe. Flows are started as processes of their own,
because `solo` does not import Prefect.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from solo import line, runs
from solo.artifact import CHECKOUT, LedgerError
from solo.cli import bench as cli_bench
from solo.cli import fetch as cli_fetch
from solo.cli import trace as cli_trace
from solo.cli.follow import STOPPED, follow
from solo.line import PARTS, Settings
from solo.report import closing
from solo.spec import RecipeSpec, SourceSpec, Template, load
from solo.train import hosts

app = typer.Typer(
    help="Train single-transformer vision-language models from a data recipe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
show = typer.Typer(help="Look at one thing a run made.", no_args_is_help=True)
diff = typer.Typer(help="What changed between two things a run made.", no_args_is_help=True)
app.add_typer(cli_bench.app, name="bench")
app.add_typer(diff, name="diff")
app.add_typer(show, name="show")
app.command("revision")(cli_fetch.revision)
app.command("fetch")(cli_fetch.fetch)
app.command("trace")(cli_trace.trace)
app.command("takedown")(cli_trace.takedown)
out = Console(highlight=False)

Recipe = Annotated[str, typer.Argument(help="Name of a file in datasets_spec/recipes/.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")]
Until = Annotated[str, typer.Option(help=f"Last part to make: {', '.join(PARTS)}.")]
Parts = Annotated[list[str] | None, typer.Option(help="A part; repeat for several.")]

COLOURS = {"reuse": "green", "run": "yellow", "unknown": "cyan"}


@app.command()
def plan(
    recipe: Recipe,
    until: Until = "report",
    force: Parts = None,
    machine_text: Annotated[
        str | None, typer.Option("--machine", help="[HOSTSx]GPUSxGPU[+HOST GIB], say 8x80 or 2x8xh100: predict memory.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say which artifacts a run would make or reuse, and which field or input is the reason."""
    from solo import estimate, estimate_text
    from solo.train import memory

    settings = Settings.from_env()
    _check_parts(force=force)
    planned = line.plan(line.select(line.nodes(recipe, settings.specs, settings.root), until), settings, force or ())
    packed = {p.name: p.last for p in planned if p.part == "pack" and p.last}
    stages = estimate.of_recipe(recipe, settings.specs, packed)
    # Where a GPU's memory is told, what cannot fit is refused here.
    machine = memory.Machine.parse(machine_text) if machine_text else memory.Machine.from_env()
    uses = memory.of_recipe(load(RecipeSpec, recipe, settings.specs), machine) if machine else {}
    unpinned = estimate.unpinned(recipe, settings.specs)
    downloads = cli_fetch.downloads(planned, settings)
    if as_json:
        more = estimate_text.as_json(stages) | {"unpinned": unpinned, "downloads": [asdict(one) for one in downloads]}
        more |= {"memory_gib": {name: use.gib() for name, use in uses.items()}} if machine else {}
        typer.echo(json.dumps(runs.plan_json(recipe, planned) | more))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("part", "name", "action"):
        table.add_column(name, no_wrap=True, overflow="fold")
    table.add_column("because", ratio=1)
    shown = ""
    for part, name, action, because in runs.plan_rows(planned):
        table.add_row("" if part == shown else part, name, f"[{COLOURS[action]}]{action}[/]", Text(because))
        shown = part
    out.print(table)
    _say(runs.plan_sentence(planned))
    if any(stage.basis != "unknown" for stage in stages):
        _say("")
        for text in estimate_text.lines(stages):
            _say(text)
    for text in [*estimate_text.sentences(stages, unpinned), *cli_fetch.sentences(downloads)]:
        _say(f"- {text}")
    for text in memory.lines(uses, machine) if machine else ():
        _say(f"- {text}")


@app.command()
def run(
    recipe: Recipe, until: Until = "report", only: Parts = None, force: Parts = None, as_json: Json = False
) -> None:
    """Run a recipe here, without a worker: the same tracked flow as `prefect deployment run solo/full-recipe`."""
    settings = Settings.from_env()
    hosts.count()  # a wrong setting of the machine is found here, not when training begins
    _check_parts(only=only, force=force)
    nodes = line.select(
        line.nodes(recipe, settings.specs, settings.root), max(only, key=PARTS.index) if only else until
    )
    arguments = [f"recipe={recipe}", f"until={until}"]
    arguments += [f"only={','.join(only)}"] if only else []
    arguments += [f"force={','.join(force)}"] if force else []
    code = follow(_module("run", *arguments), CHECKOUT, [n.id for n in nodes])
    if code == STOPPED:
        typer.echo(f"stopped; `solo run {recipe}` goes on from here", err=True)
    if code:
        raise typer.Exit(code)
    report(recipe, as_json=as_json)


@app.command()
def join(
    head: Annotated[str, typer.Argument(help="HOST:PORT at which the head listens, its SOLO_HEAD.")],
    address: Annotated[str | None, typer.Option(help="Address of this host, where it has several.")] = None,
    once: Annotated[bool, typer.Option("--once", help="End after one stage, as started from a hostfile.")] = False,
) -> None:
    """Train beside another host, the head: serve the stages it starts with SOLO_HOSTS set, until ended."""
    from solo.train import join as joined

    joined.main(head, address, once=once)


@app.command()
def report(recipe: Recipe, as_json: Json = False) -> None:
    """Print the closing table, the scores and the links of a recipe's last run."""
    from solo.report.part import closing_rows, in_order, summarise

    settings = Settings.from_env()
    record, manifests = runs.read(settings.root, recipe)
    summary = summarise(manifests)
    if as_json:
        # The name is the record's, because a run up to an earlier part has no report that bears it.
        typer.echo(json.dumps(summary | {"recipe": recipe, "states": record["states"], "links": record["links"]}))
        return
    rows = closing_rows(manifests, record["states"])
    rows = [row | {"dropped": m.counts["dropped"]} for row, m in zip(rows, in_order(manifests), strict=True)]
    _say(f"recipe {recipe}", "bold")
    heading, *lines = closing.table(rows, out.width)
    _say(heading, "bold")
    for text, row in zip(lines, rows, strict=True):
        _say(text, "green" if row["state"] == "ran" else "")
    if lost := closing.dropped(rows, out.width):
        _say("\ndropped, by reason", "bold")
        for text in lost:
            _say(text)
    failed = sum(not check["ok"] for check in summary["checks"])
    verdict = f"NO, {failed} of {len(summary['checks'])} equations fail; see the report" if failed else "yes"
    _say(f"\nledger closes: {verdict}", "red" if failed else "")
    for score in summary["scores"]:
        _say("{benchmark}: score {score:.3f}, chance {chance:.3f}, blind {blind:.3f}".format(**score))
    _say("")
    width = max(map(len, record["links"]), default=0)
    for name, link in record["links"].items():
        _say(f"{name:<{width}}  {link}")


@app.command()
def chat(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint, or of the train artifact that holds it.")],
    images: Annotated[list[Path] | None, typer.Argument(help="Pictures the talk is about.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 256,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: cuda where there is one.")] = None,
    template: Annotated[Template, typer.Option(help="inst: questions; plain: a text to go on with.")] = "inst",
) -> None:
    """Talk with a checkpoint about pictures; in a pipe each line is a question of its own and gets a line."""
    from solo.model import chat as talk

    talked = talk.Chat(checkpoint, device=device, max_new_tokens=max_new_tokens, template=template)
    for image in images or ():
        talked.look(image)
    if sys.stdin.isatty():
        talk.converse(talked)
    else:
        talk.answer_lines(talked, sys.stdin, sys.stdout)


@show.command("pack")
def show_pack(
    number: Annotated[int, typer.Argument(help="Number of the pack, from 0.", min=0)],
    mix: Annotated[str, typer.Option(help="Name of a mix that has been packed.")],
    html: Annotated[Path | None, typer.Option(help="Write a page with thumbnails here instead.")] = None,
) -> None:
    """Print one pack: its documents, their sources, what carries loss and what is masked."""
    from solo.pack import show as shown

    seen = shown.pack(Settings.from_env().root, mix, number)
    if html is None:
        typer.echo(shown.text(seen), nl=False)
        return
    html.write_text(shown.html(seen), encoding="utf-8")
    typer.echo(f"wrote {html}")


@app.command()
def up() -> None:
    """Start this checkout's Prefect server, its worker and the deployments (loopback only)."""
    raise typer.Exit(follow(_module("worker"), CHECKOUT))


@app.command()
def down() -> None:
    """Stop what `solo up` started, by pid."""
    raise typer.Exit(follow(_module("down"), CHECKOUT))


@app.command()
def sources(
    name: Annotated[str | None, typer.Argument(help="A source to tell all about.")] = None, as_json: Json = False
) -> None:
    """List the sources: licence, pin, size, and the counts expected and made; or tell one in full."""
    from solo import sources as known

    settings = Settings.from_env()
    if name is not None:
        spec = load(SourceSpec, name, settings.specs)
        lines = [json.dumps(spec.model_dump(mode="json"))] if as_json else known.told(spec)
    else:
        rows = known.listed(settings.specs, settings.root)
        lines = [json.dumps(rows)] if as_json else known.lines(rows)
    for text in lines:
        typer.echo(text)


@app.command()
def check(
    source: Annotated[str, typer.Argument(help="Name of a file in datasets_spec/sources/.")],
    at: Annotated[Path | None, typer.Option(help="A copy elsewhere, in place of acquire.location.")] = None,
    as_json: Json = False,
) -> None:
    """Probe a copy of a source: the first mismatch by file and field, and what to do about it."""
    from solo import sources as known

    settings = Settings.from_env()
    found = known.check(load(SourceSpec, source, settings.specs), settings.specs, settings.root, at)
    if as_json:
        first = {status: {"record": item.identity, "error": item.error} for status, item in found.first.items()}
        typer.echo(
            json.dumps(
                {"source": source, "good": found.good, "odd": found.statuses, "first": first, "missing": found.missing}
            )
        )
        return
    typer.echo(f"{source}: {found.good} of the first {found.good + found.statuses.total()} records are as expected")
    for status, item in found.first.items():
        typer.echo(f"  {status} {found.statuses[status]}, the first is {item.identity}: {item.error}")
    for text in found.missing:
        typer.echo(f"  {text}")


@app.command()
def retry(
    source: Annotated[str, typer.Argument(help="Name of a file in datasets_spec/sources/ that reads a URL list.")],
    cause: Annotated[list[str] | None, typer.Option(help="A transient status; repeat for several.")] = None,
    recrawl: Annotated[bool, typer.Option(help="Ask for all that came, and compare.")] = False,
) -> None:
    """Ask a source's failed URLs again by cause, or all of them to see what rotted; the next run takes it up."""
    from solo.acquire import retry as passed

    for text in passed.run(source, cause or [], recrawl, Settings.from_env()):
        typer.echo(text)


@app.command()
def backbone(  # noqa: PLR0913, PLR0917 (a command's options)
    folder: Annotated[Path, typer.Argument(help="A Mistral, Llama, SmolLM2, Qwen2 or Qwen3 checkpoint.")],
    out_folder: Annotated[Path, typer.Option("--out", help="Where the SOLO to train is written.")],
    gguf: Annotated[str | None, typer.Option(help="Name of a GGUF file in the folder.")] = None,
    new_rows: Annotated[str, typer.Option(help="How SOLO's new ids begin: normal or mean.")] = "normal",
    bos: Annotated[str | None, typer.Option(help="Token that begins a document, where the model has none.")] = None,
    untie: Annotated[bool, typer.Option("--untie", help="Give a tied head weights of its own.")] = False,
    seed: int = 0,
) -> None:
    """Turn a published text model into a SOLO to train, and print the blocks that its recipe needs."""
    import yaml

    from solo.model.backbone import write

    how: dict[str, Any] = {"gguf_file": gguf, "bos": bos, "new_rows": new_rows, "untie": untie, "seed": seed}
    typer.echo(yaml.safe_dump(write(folder, out_folder, **how), sort_keys=False).rstrip())


@app.command()
def sql(
    query: Annotated[
        str | None, typer.Argument(help="One SELECT; without it a terminal, or a pipe that holds it.")
    ] = None,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """Ask all artifacts under the data root in SQL, read-only; `SELECT * FROM views` says what there is."""
    from solo.cli import sql_shell
    from solo.sql import session

    if as_json and as_csv:
        raise ValueError("sql: --json and --csv exclude each other; give one")
    with session(Settings.from_env().root) as opened:
        for text in opened.damaged:
            typer.echo(f"left out, {text}", err=True)
        if query is None and sys.stdin.isatty():
            sql_shell.converse(opened, typer.echo)
        else:
            text = query if query is not None else sys.stdin.read()
            typer.echo(sql_shell.written(opened.ask(text), "json" if as_json else "csv" if as_csv else "table"))


@diff.command("mix")
def diff_mix(
    before: Annotated[str, typer.Argument(help="`mix` or `mix@fingerprint`; alone, its newest two locks.")],
    after: Annotated[str | None, typer.Argument(help="The same, to compare with.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write a page with thumbnails here (Markdown).")] = None,
    as_json: Json = False,
) -> None:
    """Say what changed from one mix lock to another: samples, repeats, tokens, and what they are like."""
    from solo.curate import locks, mix_diff

    root = Settings.from_env().root
    a, b = locks.pair(root, before, after)
    if page is not None:
        page.write_text(mix_diff.page(root, a, b), encoding="utf-8")
    found = mix_diff.difference(root, a, b)
    for text in [json.dumps(found)] if as_json else mix_diff.lines(found):
        typer.echo(text)


@app.command()
def card(
    mix: Annotated[str, typer.Argument(help="`mix` or `mix@fingerprint`.")],
    out_folder: Annotated[Path, typer.Option("--out", help="Folder to write into.")] = Path(),
) -> None:
    """Write a mix lock's card: Croissant JSON-LD and a datasheet."""
    from solo.curate import croissant, locks

    settings = Settings.from_env()
    lock = locks.one(settings.root, mix)
    names = [s["source"] for s in lock.manifest.spec["mix"]["sources"]]
    origins = {name: croissant.Origin.of(load(SourceSpec, name, settings.specs)) for name in names}
    for path in croissant.write(out_folder.resolve(), lock, origins):
        typer.echo(f"wrote {path}")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A train artifact, or the checkpoint folder in it.")],
    to: Annotated[Path, typer.Option("--to", help="Where the Hugging Face folder is written.")],
) -> None:
    """Write a trained stage as a Hugging Face folder with a model card."""
    from solo.model import export as exported

    _say(f"wrote {exported.run(checkpoint, to)}")


def _module(*arguments: str) -> list[str]:
    """The command of flows/server.py, which holds all that knows Prefect."""
    return [sys.executable, "-m", "flows.server", *arguments]


def _check_parts(**options: list[str] | None) -> None:
    """Refuse a misspelt part before anything starts."""
    for option, given in options.items():
        for part in given or ():
            if part not in PARTS:
                raise ValueError(f"{option} is {part!r}; choose one of {', '.join(PARTS)}")


def _say(text: str, style: str = "") -> None:
    """One line as it is: no markup, no wrapping."""
    out.print(Text(text, style=style), soft_wrap=True)


def main() -> Any:  # noqa: ANN401 - typer's own return
    """Entry point: a user's mistake is one line and exit code 2, a broken promise of ours keeps its traceback."""
    try:
        return app()
    except LedgerError as error:
        sys.exit(f"error: {error}")
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
