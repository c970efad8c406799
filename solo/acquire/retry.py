"""`solo retry`: ask a source's URLs again, those of a transient cause or all that came, as a pass of its own.

In: a source that was acquired as its spec stands. Out: a pass artifact (solo/acquire/passes.py) and lines that say what
came. Invariants: terminal causes are never asked again; the acquire artifact is not touched, the next run makes a new
one from it and the pass. Cost: the requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import duckdb

from solo import artifact
from solo.acquire import location, passes
from solo.acquire import part as acquire
from solo.acquire.raw import OUTCOMES
from solo.artifact import Artifact, Job
from solo.line import Settings
from solo.lineage import erase, takedown
from solo.spec import SourceSpec, load

ADAPTERS = ("url_list.download", "url_questions.download")


def run(source: str, causes: Sequence[str], recrawl: bool, settings: Settings) -> Iterator[str]:
    """Make the next pass; one line for each thing a user wants to know."""
    _check(causes, recrawl)
    acquired = current(source, settings)
    asked = ["ok"] if recrawl else sorted(set(causes))
    n_urls = passes.n_chosen(acquired, asked)
    if n_urls == 0:
        yield f"{source}: no URL ended with {', '.join(asked)}; nothing was asked"
        return
    kind = "recrawl" if recrawl else "retry"
    job = passes.job_of(acquired, kind=kind, causes=asked, where=_place(source, settings))
    made, _ = artifact.make(job, acquire.run)
    counts = made.manifest.counts
    ends = ", ".join(f"{n} {status}" for status, n in sorted(made.manifest.stats["by_status"].items()))
    yield f"{source}: pass {job.spec['pass']['number']} ({kind}): asked for {counts['in']} URLs: {ends}"
    if recrawl:
        with duckdb.connect() as db:
            hosts = passes.compare(db, acquired.path / OUTCOMES, made.path / OUTCOMES).to_pylist()
        rot = passes.link_rot(hosts)
        names = ("same", "changed", "gone", "withdrawn", "unknown")
        yield f"{source}: of {rot['urls']} URLs on {rot['n_hosts']} hosts: " + ", ".join(f"{rot[n]} {n}" for n in names)
    yield f"{source}: the next run lays the pass over acquire/{source}; `solo plan RECIPE` shows it"


def _check(causes: Sequence[str], recrawl: bool) -> None:
    if bool(causes) == recrawl:
        raise ValueError("retry: give --cause (once or more) or --recrawl, and not both")
    for cause in causes:
        if cause not in passes.TRANSIENT:
            final = "is final and is not asked again" if cause in acquire.STATUSES else "is no status"
            raise ValueError(f"retry: cause {cause!r} {final}; choose from {', '.join(passes.TRANSIENT)}")


def _place(source: str, settings: Settings) -> Job:
    """Where a pass is made; its spec comes later."""
    job = Job("acquire", source, acquire.VERSION, {}, {}, settings.root, settings.specs, settings.workers, _quiet)
    return replace(job, where=location.where(load(SourceSpec, source, settings.specs)))


def _quiet(line: str) -> None:
    """A pass says what came when it is done."""


def current(source: str, settings: Settings) -> Artifact:
    """The acquire artifact of a source's spec as it stands, with the passes so far."""
    spec = load(SourceSpec, source, settings.specs)
    if spec.acquire.adapter not in ADAPTERS:
        lists = " and ".join(ADAPTERS)
        raise ValueError(f"{source}: its adapter is {spec.acquire.adapter}; only lists of {lists} have URLs to ask")
    asked = passes.identity(settings.root, acquire.VERSION, location.identity(spec))
    entries = takedown.read(settings.specs)
    if passes.nearest(settings.root, acquire.VERSION, asked, {e.id for e in entries}) is None:
        raise ValueError(f"{source}: acquire has not run for its spec as it stands; `solo run` it first")
    job = replace(_place(source, settings), spec=erase.identity(settings.root, acquire.VERSION, asked, entries))
    return acquire.made(job, acquire.run)[0]  # with passes that no run has taken up yet, a matter of hard links
