"""`solo bench`: a part measured against its reference, both in one run.

In: options of the size. Out: one JSON line, or the ratio and what stands behind it. Cost: what each bench says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(help="Measure a part against its reference, both in one run.", no_args_is_help=True)
out = Console(highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")]


@app.command("loader")
def bench_loader(as_json: Json = False) -> None:
    """Tokens per second and core of the loader, against the straightforward path on the same bytes."""
    from solo.bench import loader as measured

    _figures(measured.run(), as_json)


@app.command("pack")
def bench_pack(as_json: Json = False) -> None:
    """Fill and speed of the pack plan, against TRL's `bfd` on the same lengths ($SOLO_TRL_PYTHON has TRL)."""
    from solo.bench import pack as measured

    _figures(measured.run(), as_json)


@app.command("train")
def bench_train(
    profile: Annotated[str, typer.Option(help="toy, gpu-toy, h100-slice or h100-7b-offload.")] = "toy",
    toy: Annotated[bool, typer.Option("--toy", help="The profile's way at a size for a CPU, in 20 steps.")] = False,
    log: Annotated[Path | None, typer.Option(help="Where the trainers' own lines go.")] = None,
    trace: Annotated[Path | None, typer.Option(help="A folder for a trace of one step and its kernels' table.")] = None,
    as_json: Json = False,
) -> None:
    """Tokens per second and MFU of the trainer, against Hugging Face's model in the same trainer."""
    from solo.bench import train as measured

    _figures(measured.run(profile, log=log, toy=toy, trace=trace), as_json)


@app.command("filter")
def bench_filter(
    as_json: Json = False,
    hashes: Annotated[int, typer.Option(help="Rows of the search for near images.", min=1000)] = 10_000_000,
    texts: Annotated[int, typer.Option(help="Rows of the search for near texts.", min=1000)] = 1_000_000,
) -> None:
    """Signals per second and core, and near duplicates among made hashes with planted pairs, as rows grow."""
    from solo.bench import filter as measured

    _figures(measured.run(n_hashes=hashes, n_texts=texts), as_json)


@app.command("acquire")
def bench_acquire(
    as_json: Json = False,
    mix: Annotated[list[str] | None, typer.Option(help="500, 1024 or 40/40/20; all where none is given.")] = None,
    repeats: Annotated[int, typer.Option(help="Turns of each side.", min=1)] = 3,
) -> None:
    """Samples per second and core of acquire with every guard on, against plain img2dataset on the same origin."""
    from solo.bench import acquire as measured

    if unknown := sorted(set(mix or ()) - set(measured.MIXES)):
        raise typer.BadParameter(f"{unknown} is no mix; choose from {', '.join(measured.MIXES)}")
    _figures(measured.run(repeats=repeats, mixes=mix or tuple(measured.MIXES)), as_json)


@app.command("growth")
def bench_growth(
    as_json: Json = False,
    rows: Annotated[int, typer.Option(help="Rows of 1x; 10x and 100x follow.", min=100)] = 300,
) -> None:
    """Time and memory per row of acquire and filter, as one URL list grows 1x, 10x and 100x."""
    from solo.bench import growth as measured

    _figures(measured.run(n_rows=rows), as_json)


@app.command("curate")
def bench_curate(as_json: Json = False) -> None:
    """Rows per second and core of curate, against polars or pandas ($SOLO_FRAME_PYTHON has one) on the same files."""
    from solo.bench import curate as measured

    _figures(measured.run(), as_json)


@app.command("trace")
def bench_trace(
    as_json: Json = False,
    rows: Annotated[int, typer.Option(help="Rows of the ledger.", min=10_000)] = 10_000_000,
) -> None:
    """Seconds of `solo trace` by key, URL, hash and step on a made ledger, beside a full scan of the same files."""
    from solo.bench import trace as measured

    _figures(measured.run(rows), as_json)


def _figures(found: dict[str, Any], as_json: bool) -> None:
    """A bench's result: one JSON line, or the ratio and what stands behind it."""
    if as_json:
        typer.echo(json.dumps(found))
        return
    out.print_json(json.dumps({k: v for k, v in found.items() if k != "machine"}))
