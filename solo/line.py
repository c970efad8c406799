"""The line of a recipe: which artifacts it consists of, in which order, and what a run would do.

In: a recipe name, a spec folder, a data root. Out: `Node`s in an order where inputs come first, a plan that says for
each node reuse / run / unknown and why, and `make_node`, which makes one. Invariant: a node's spec holds just the
fields its part reads, so an edit elsewhere cannot rerun it. Cost: YAML and manifests only; no data is read.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from solo import artifact
from solo.acquire import location
from solo.artifact import CHECKOUT, Artifact, Job, Manifest, Result
from solo.plugin import resolve
from solo.spec import BenchmarkSpec, MixSpec, RecipeSpec, SourceSpec, SpecError, load
from solo.store import handover
from solo.store.folders import Store

Part = Literal["acquire", "filter", "shard", "curate", "pack", "train", "evaluate", "report"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class Settings:
    """WHERE a recipe runs. Nothing here may reach a fingerprint."""

    root: Path
    specs: Path
    workers: int
    store: Store | None = None

    @classmethod
    def from_env(cls) -> Settings:
        """$SOLO_ROOT, $SOLO_SPECS, $SOLO_WORKERS and $SOLO_STORE, with defaults inside the checkout and all cores."""
        workers = os.environ.get("SOLO_WORKERS", str(os.cpu_count() or 1))
        if not workers.isdigit() or int(workers) < 1:
            raise ValueError(f"SOLO_WORKERS is {workers!r}; give a whole number of processes, 1 or more")
        return cls(
            root=Path(os.environ.get("SOLO_ROOT", CHECKOUT / ".solo" / "data")).resolve(),
            specs=Path(os.environ.get("SOLO_SPECS", CHECKOUT / "datasets_spec")).resolve(),
            workers=int(workers),
            store=Store.from_env(),
        )


@dataclass(frozen=True)
class Node:
    """One artifact a recipe needs: its part, its name, the spec fields that part reads, the nodes it reads."""

    part: Part
    name: str
    version: int
    spec: dict[str, Any]
    inputs: tuple[str, ...]
    where: dict[str, Any] = field(default_factory=dict)  # spec fields that bear no identity

    @property
    def id(self) -> str:
        """`part/name`."""
        return f"{self.part}/{self.name}"


@dataclass(frozen=True)
class Ref:
    """A made artifact, as tasks hand it on: small, JSON, enough to find it and to name its content."""

    id: str
    fingerprint: str
    digest: str

    def path(self, root: Path) -> Path:
        """The artifact's folder."""
        return root / self.id / self.fingerprint

    def open(self, root: Path) -> Artifact:
        """The artifact itself."""
        manifest = artifact.read_manifest(self.path(root))
        if manifest is None:
            raise ValueError(f"{self.path(root)} has no readable manifest; run its part again")
        return Artifact(self.path(root), manifest)


@dataclass(frozen=True)
class Planned:
    """What a run would do with one node, and the field or input that makes it so."""

    part: Part
    name: str
    action: Literal["reuse", "run", "unknown"]
    because: str
    ref: Ref | None
    last: Manifest | None  # the artifact of this part and name made last, for estimates and comparison


def nodes(recipe_name: str, specs: Path, root: Path | None = None) -> list[Node]:
    """Every artifact of a recipe, inputs before their readers. Reads and checks all specs the recipe names.

    `root` is where passes over URL lists are looked for, and samples that were listed in takedown.csv since; without
    it no source has any.
    """
    from solo.acquire import passes
    from solo.filter import measure
    from solo.lineage import erase, takedown

    recipe = load(RecipeSpec, recipe_name, specs)
    mixes = [load(MixSpec, stage.mix, specs) for stage in recipe.stages]
    names = list(dict.fromkeys(s.source for mix in mixes for s in mix.sources))
    sources = [load(SourceSpec, name, specs) for name in names]
    benchmarks = [load(BenchmarkSpec, name, specs) for name in recipe.benchmarks]
    _check_plugins(sources, benchmarks, specs)
    entries = takedown.read(specs)
    tokens = recipe.tokens.model_dump(mode="json", exclude_none=True)  # what is off is not identity
    line: list[Node] = []

    def add(part: Part, name: str, spec: dict[str, Any], inputs: Sequence[str] = ()) -> None:
        line.append(Node(part, name, _module(part).VERSION, spec, tuple(inputs)))

    version = _module("acquire").VERSION
    for s in sources:
        asked = location.identity(s)
        if root:
            asked = passes.identity(root, version, asked)
            asked = erase.identity(root, version, asked, entries) if entries else asked
        line.append(Node("acquire", s.name, version, asked, (), location.where(s)))
    for s in sources:
        measured = {
            "filter": s.filter.model_dump(mode="json"),
            "signals": measure.versions(s.filter.signals, s.filter.arguments),
        }
        add("filter", s.name, measured, [f"acquire/{s.name}"])
    for s in sources:
        shard = {"shard": s.shard.model_dump(mode="json"), "tokens": tokens}
        add("shard", s.name, shard, [f"acquire/{s.name}", f"filter/{s.name}"])
    for mix in mixes:
        add(
            "curate",
            mix.name,
            {"mix": mix.model_dump(mode="json")} | _compared(mix, specs),
            [f"shard/{s.source}" for s in mix.sources],
        )
    for stage, mix in zip(recipe.stages, mixes, strict=True):
        if mix.pack_tokens not in (None, stage.pack_tokens):
            raise SpecError(
                f"{specs / f'mixes/{mix.name}.yaml'}: pack_tokens is {mix.pack_tokens}, but stage {stage.name} packs "
                f"{stage.pack_tokens}; make them equal"
            )
        pack = {key: getattr(stage, key) for key in ("pack_tokens", "pack_by", "batch_packs")}
        shards = [f"shard/{s.source}" for s in mix.sources]  # read by the proof that documents of a pack are apart
        if recipe.held_out:
            pack["held_out"] = recipe.held_out.of_pack()
        add("pack", mix.name, pack | {"seed": recipe.seed, "tokens": tokens}, [f"curate/{mix.name}", *shards])
    before: list[str] = []
    for stage, mix in zip(recipe.stages, mixes, strict=True):
        train: dict[str, Any] = {"stage": stage.model_dump(mode="json"), "model": recipe.model.model_dump(mode="json")}
        if recipe.held_out:
            train["held_out_every_steps"] = recipe.held_out.every_steps
        shards = [f"shard/{s.source}" for s in mix.sources]
        add(
            "train",
            stage.name,
            train | {"tokens": tokens, "seed": recipe.seed},
            [f"pack/{mix.name}", *shards, *before],
        )
        before = [f"train/{stage.name}"]
    for b in benchmarks:
        add("evaluate", b.name, {"benchmark": _untitled(b), "tokens": tokens}, before)
    licences = {s.name: s.licence.id for s in sources} | {b.name: b.licence.id for b in benchmarks}
    summary = {"recipe": recipe.name, "title": recipe.title, "licences": licences}
    add("report", recipe.name, summary, [n.id for n in line])
    return line


def _compared(mix: MixSpec, specs: Path) -> dict[str, Any]:
    """What a mix compares itself with: of each benchmark that it names, where its items are and nothing else."""
    from solo.filter import decontaminate

    named = [load(BenchmarkSpec, name, specs) for name in mix.decontaminate]
    fields = {b.name: b.model_dump(mode="json", include={"revision", "location", "adapter", "args"}) for b in named}
    return {"benchmarks": fields, "decontaminate": decontaminate.VERSION} if fields else {}


def _untitled(spec: MixSpec | BenchmarkSpec) -> dict[str, Any]:
    """A spec without its title, which is for people and changes no byte."""
    return spec.model_dump(mode="json") | {"title": ""}


def _check_plugins(sources: Sequence[SourceSpec], benchmarks: Sequence[BenchmarkSpec], specs: Path) -> None:
    """Resolve every dotted name before anything runs, so a typo costs a second and not an hour."""
    wanted = [(f"sources/{s.name}.yaml", "acquire.adapter", "adapters", s.acquire.adapter) for s in sources]
    wanted += [(f"sources/{s.name}.yaml", "filter.signals", "signals", x) for s in sources for x in s.filter.signals]
    wanted += [(f"benchmarks/{b.name}.yaml", "adapter", "adapters", b.adapter) for b in benchmarks]
    wanted += [(f"benchmarks/{b.name}.yaml", "scorer", "benchmarks", b.scorer) for b in benchmarks]
    for file, fld, folder, dotted in wanted:
        try:
            resolve(folder, dotted)
        except SpecError as error:
            raise SpecError(f"{specs / file}: {fld}: {error}") from None


def _module(part: Part) -> Any:  # noqa: ANN401 - a module has no better type
    return importlib.import_module(f"solo.{part}.part")


def fingerprint(node: Node, inputs: Mapping[str, Ref]) -> str:
    """The node's fingerprint once the digests of its inputs are known."""
    digests = {i: inputs[i].digest for i in node.inputs}
    return artifact.fingerprint(node.part, node.name, node.version, node.spec, digests)


def make_node(
    node: Node,
    inputs: Mapping[str, Ref],
    settings: Settings,
    *,
    force: bool = False,
    **hooks: Callable[..., Any],
) -> tuple[Ref, bool]:
    """Make or reuse one node's artifact; the flag is True when work was done. `hooks` go to the part's `run`."""
    job = Job(
        part=node.part,
        name=node.name,
        version=node.version,
        spec=node.spec,
        inputs={i: handover.opened(node, inputs[i], settings) for i in node.inputs},
        root=settings.root,
        specs=settings.specs,
        workers=settings.workers,
        where=node.where,
        store=settings.store,
    )
    module = _module(node.part)
    run: Callable[..., Result] = module.run
    make: Callable[..., tuple[Artifact, bool]] = getattr(module, "made", artifact.make)
    made, ran = handover.make(job, lambda: make(job, lambda j: run(j, **hooks), force=force), force=force)
    return Ref(node.id, made.manifest.fingerprint, made.manifest.digest), ran


def plan(line: Sequence[Node], settings: Settings, force: Collection[str] = ()) -> list[Planned]:
    """What a run of these nodes would do, decided from manifests alone.

    Behind a node that will run, actions are `unknown`: if its new content equals the old, its readers are reused.
    """
    known: dict[str, Ref] = {}
    rows: list[Planned] = []
    for node in line:
        last = artifact.latest(settings.root, node.part, node.name)
        waiting = [i for i in node.inputs if i not in known]
        if waiting:
            rows.append(Planned(node.part, node.name, "unknown", f"reads {_list(waiting)}", None, last))
            continue
        fp = fingerprint(node, known)
        folder = settings.root / node.id / fp
        wrong = artifact.damage(folder)
        if wrong is None and node.part not in force:
            manifest = artifact.read_manifest(folder)
            assert manifest is not None
            known[node.id] = ref = Ref(node.id, fp, manifest.digest)
            rows.append(Planned(node.part, node.name, "reuse", "same spec, same inputs, files in place", ref, last))
            continue
        because = f"force={node.part}" if wrong is None else _why(node, known, last, wrong)
        rows.append(Planned(node.part, node.name, "run", because, None, last))
    return rows


def _why(node: Node, inputs: Mapping[str, Ref], last: Manifest | None, wrong: str) -> str:
    """The spec field, version or input that differs from the artifact made last, or what is wrong with its files."""
    if last is None:
        return "never made"
    if last.fingerprint == fingerprint(node, inputs):
        return wrong
    reasons = []
    if last.version != node.version:
        reasons.append(f"VERSION of solo/{node.part}.py {last.version} -> {node.version}")
    reasons += differences(last.spec, node.spec)
    for i in sorted(set(last.inputs) | set(node.inputs)):
        if i not in node.inputs:
            reasons.append(f"input {i} is gone")
        elif i not in last.inputs:
            reasons.append(f"input {i} is new")
        elif last.inputs[i] != inputs[i].digest:
            reasons.append(f"content of {i} changed")
    return "; ".join(reasons) or wrong


def differences(old: object, new: object, path: str = "") -> list[str]:
    """Leaf fields in which two JSON values differ, each as `field: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [*old, *(k for k in new if k not in old)]:
            where = f"{path}.{key}" if path else str(key)
            if key not in new:
                found.append(f"{where}: {_brief(old[key])} -> (removed)")
            elif key not in old:
                found.append(f"{where}: (absent) -> {_brief(new[key])}")
            else:
                found += differences(old[key], new[key], where)
        if not found and list(old) != list(new):
            found.append(f"{path or '(top)'}: order of its keys")
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in differences(a, b, f"{path}[{i}]")]
    return [] if old == new else [f"{path}: {_brief(old)} -> {_brief(new)}"]


def _brief(value: object, width: int = 60) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= width else shown[: width - 3] + "..."


def _list(ids: Sequence[str], most: int = 3) -> str:
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return ", ".join(ids[:most]) + more


def select(line: Sequence[Node], until: str) -> list[Node]:
    """The nodes of all parts up to and with `until`."""
    if until not in PARTS:
        raise ValueError(f"until is {until!r}; choose one of {', '.join(PARTS)}")
    return [n for n in line if PARTS.index(n.part) <= PARTS.index(until)]


def intact(node: Node, inputs: Mapping[str, Ref], settings: Settings) -> bool:
    """Whether the artifact these inputs lead to is there and whole."""
    return artifact.damage(settings.root / node.id / fingerprint(node, inputs)) is None


def check_only(planned: Sequence[Planned], only: Collection[str] | None) -> None:
    """Refuse `only=` where a part it leaves out is stale."""
    for p in planned if only else ():
        if p.part not in (only or ()) and p.action != "reuse":
            raise ValueError(
                f"only={','.join(only or ())} reads {p.part}/{p.name}, which is stale ({p.because}); "
                f"add {p.part} to only, or use until= instead"
            )
