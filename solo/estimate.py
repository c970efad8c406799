"""Estimates: what a recipe will take, before any of its data exist.

In: a recipe, its mixes and sources with the counts they expect (or the packs a run has made). Out: for each stage
packs, steps, tokens by modality, download, disk, CPU-hours, GPU-hours and cost, and a sentence for every number that
is assumed or differs from the paper's. Invariant: nothing is read but specs and manifests; every rate is a named
constant with its origin. Cost: milliseconds.

Two countings stand side by side. `packs`, `steps` and the tokens are the paper's: its packs of one source, its rule
`packs // batch + 1`, its Table 1. `packs_here` and `steps_here` are what this pipeline makes of the same samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from solo.acquire.location import UNPINNED
from solo.artifact import Manifest
from solo.curate import amounts
from solo.spec import MixSpec, ModelSpec, RecipeSpec, SourceSpec, Stage, load

PAPER_PACK_TOKENS = 32_768
FILL = 0.999  # of a best-fit pack; `solo bench pack` measures it
# The authors' all_data.jsonl: 3.1 GB over 1,701,560 records, at 4 bytes a token.
TEXT_TOKENS_OF_A_CONVERSATION = 450
PATCHES_OF_AN_IMAGE = 300  # 640 x 480, COCO's usual size
# Mean of four published archives: LLaVAR 145, Detailed Captions 221, WebSight 253, ALLaVA-LAION 325 bytes a patch.
BYTES_OF_A_PATCH = 240
BYTES_OF_A_TOKEN = 4
COMPRESSED = 0.35  # zstd and Parquet on English text, about
IMAGES_PER_CORE_S = 84  # img2dataset's README: 1,350 images a second on 16 cores
CPU_S_OF_A_PATCH = 20e-6  # decode, size and hashes, measured on one core: 15 ms for 1024 x 768
CPU_S_OF_A_RECORD = 3e-3  # read, write, copy to a shard, measured on the sample's records
TOKENS_PER_CPU_S = 1_000_000  # tokenizer on text it has not seen; words it has seen are four times as fast
A100_FLOPS, H100_FLOPS = 312e12, 989.4e12  # dense bf16 peak, data sheets
A100_MFU = 0.32  # 42 % of the hardware with every layer recomputed, which costs a quarter of it; assumed
H100_MFU = 0.46  # measured: one H100, 8 of the 32 layers, every layer recomputed, through DeepSpeed
A100_DOLLARS, H100_DOLLARS, CPU_DOLLARS = 1.8, 3.0, 0.04  # an hour; assumed rents, put your own here


@dataclass(frozen=True)
class Use:
    """One source in one stage: its inventory, and how often it is drawn."""

    source: SourceSpec
    samples: float
    packs: float | None  # of the paper
    text_tokens: float
    vision_tokens: float
    truncated_tokens: float  # counted by the paper in packs that cannot hold them
    epochs: float
    assumed: bool

    @property
    def tokens(self) -> float:
        """Of the inventory."""
        return self.text_tokens + self.vision_tokens

    @property
    def held(self) -> float:
        """What weights are shares of: the paper's packs, full or not, else the tokens."""
        return self.packs * PAPER_PACK_TOKENS if self.packs else self.tokens


@dataclass
class StageEstimate:
    """One stage; JSON is these fields."""

    name: str
    basis: str  # "expected": the sources' counts; "made": a pack artifact; "unknown"
    packs: int | None = None
    steps: int | None = None
    packs_drawn: int | None = None
    packs_here: int | None = None
    steps_here: int | None = None
    text_tokens: int | None = None
    vision_tokens: int | None = None
    trained_tokens: int | None = None
    trained_vision_tokens: int | None = None
    download_bytes: int | None = None
    disk_bytes: int | None = None
    cpu_hours: float | None = None
    gpu_hours: float | None = None
    gpu_hours_h100: float | None = None
    dollars: float | None = None
    notes: list[str] = field(default_factory=list)


def of_recipe(name: str, specs: Path, packed: Mapping[str, Manifest]) -> list[StageEstimate]:
    """One estimate a stage; `packed` are the pack artifacts made last, by mix."""
    recipe = load(RecipeSpec, name, specs)
    found: list[StageEstimate] = []
    seen: set[str] = set()  # sources whose CPU time, and files whose download, an earlier stage has paid
    for stage in recipe.stages:
        mix = load(MixSpec, stage.mix, specs)
        uses = [use for m in mix.sources if (use := _use(load(SourceSpec, m.source, specs), stage)) is not None]
        if stage.mix in packed:
            one = _made(stage, packed[stage.mix])
        elif len(uses) == len(mix.sources):
            one = _expected(stage, mix, _drawn(mix, uses), seen)
        else:
            one = StageEstimate(stage.name, "unknown", notes=[f"{stage.name}: its sources state no expected counts"])
        _price(one, recipe.model)
        found.append(one)
    return found


def unpinned(name: str, specs: Path) -> list[str]:
    """Sources of a recipe that acquire will refuse."""
    recipe = load(RecipeSpec, name, specs)
    names = dict.fromkeys(m.source for s in recipe.stages for m in load(MixSpec, s.mix, specs).sources)
    return [source for source in names if load(SourceSpec, source, specs).revision == UNPINNED]


def parameters(model: ModelSpec, patch_values: int = 3_072) -> tuple[int, int]:
    """All parameters, and those a token is multiplied with (the input embedding is looked up)."""
    d, head = model.hidden_size, model.head_dim or model.hidden_size // model.num_attention_heads
    attention = 2 * d * head * (model.num_attention_heads + model.num_key_value_heads)
    layer = attention + 3 * d * model.intermediate_size
    matmul = model.num_hidden_layers * layer + model.vocab_size * d
    embedding = 0 if model.tie_word_embeddings else model.vocab_size * d
    norms = (2 * model.num_hidden_layers + 1) * d
    return matmul + embedding + norms + patch_values * d, matmul


def published_bytes(source: SourceSpec) -> int | None:
    """About how large a source is where that is not known, from the counts it expects."""
    e = source.expected
    if e is None:
        return None
    images = 0 if source.modality == "text" else e.images if e.images is not None else e.samples or 0
    text = e.text_tokens if e.text_tokens is not None else (e.samples or 0) * TEXT_TOKENS_OF_A_CONVERSATION
    vision = e.vision_tokens if e.vision_tokens is not None else images * PATCHES_OF_AN_IMAGE
    return round(vision * BYTES_OF_A_PATCH + text * BYTES_OF_A_TOKEN * COMPRESSED)


def _use(source: SourceSpec, stage: Stage) -> Use | None:
    e = source.expected
    if e is None or (e.samples is None and e.text_tokens is None):
        return None
    # The paper's packs hold one source and 32,768 tokens; a stage that packs otherwise is counted in tokens.
    packs = e.packs if stage.pack_by == "source" and stage.pack_tokens == PAPER_PACK_TOKENS else None
    samples = float(e.samples or 0)
    images = 0 if source.modality == "text" else e.images if e.images is not None else samples
    text = e.text_tokens if e.text_tokens is not None else samples * TEXT_TOKENS_OF_A_CONVERSATION
    vision = e.vision_tokens if e.vision_tokens is not None else images * PATCHES_OF_AN_IMAGE
    truncated = max(0.0, text + vision - packs * PAPER_PACK_TOKENS) if packs else 0.0
    assumed = e.text_tokens is None or e.vision_tokens is None
    return Use(source, samples, packs, text, vision, truncated, 1.0, assumed)


def _drawn(mix: MixSpec, uses: Sequence[Use]) -> list[Use]:
    """How often each inventory is drawn, by the arithmetic of curate; a mix by sql is taken to draw it once."""
    if mix.sql is not None:
        return list(uses)
    there = {use.source.name: (max(1, round(use.samples)), max(1, round(use.held))) for use in uses}
    draws, _ = amounts.of(mix, there)
    found = []
    for use in uses:
        draw, (n_samples, n_tokens) = draws[use.source.name], there[use.source.name]
        found.append(replace(use, epochs=draw.whole + draw.rest / (n_samples if draw.in_samples else n_tokens)))
    return found


def _expected(stage: Stage, mix: MixSpec, uses: Sequence[Use], seen: set[str]) -> StageEstimate:
    one = StageEstimate(stage.name, "expected")
    weighted = bool(mix.budgets)
    if stage.pack_by == "sample":
        one.packs = one.packs_here = round(sum(use.samples * use.epochs for use in uses))
        one.steps = one.steps_here = one.packs // stage.batch_packs
        one.packs_drawn = one.steps * stage.batch_packs
    else:
        drawn = sum((use.held if weighted else use.tokens) * use.epochs for use in uses)
        one.packs_here = round(drawn / stage.pack_tokens / (1.0 if weighted else FILL))
        one.steps_here = one.packs_here // stage.batch_packs
        if all(use.packs for use in uses):
            one.packs = round(sum((use.packs or 0) * (1 if weighted else use.epochs) for use in uses))
            one.steps = one.packs // stage.batch_packs + 1
        else:
            one.packs, one.steps = one.packs_here, one.steps_here
        one.packs_drawn = one.steps * stage.batch_packs
    times = [1.0 if weighted else use.epochs for use in uses]
    one.text_tokens = round(sum(use.text_tokens * t for use, t in zip(uses, times, strict=True)))
    one.vision_tokens = round(sum(use.vision_tokens * t for use, t in zip(uses, times, strict=True)))
    one.trained_tokens = round(sum((use.tokens - use.truncated_tokens) * use.epochs for use in uses))
    one.trained_vision_tokens = round(sum(use.vision_tokens * use.epochs for use in uses))
    _bytes_and_cpu(one, uses, seen)
    one.notes += _notes(one, stage, mix, uses)
    return one


def _bytes_and_cpu(one: StageEstimate, uses: Sequence[Use], seen: set[str]) -> None:
    """What fetching, filtering and sharding the sources takes that no earlier stage has."""
    download = disk = cpu_s = 0.0
    for use in uses:
        images = use.vision_tokens * BYTES_OF_A_PATCH
        stored = images + use.text_tokens * BYTES_OF_A_TOKEN
        if use.source.name not in seen:
            disk += 2 * stored  # raw tars and shards
            cpu_s += use.vision_tokens * CPU_S_OF_A_PATCH + use.samples * CPU_S_OF_A_RECORD
            cpu_s += use.text_tokens / TOKENS_PER_CPU_S
            is_urls = use.source.acquire.adapter.startswith("url_")
            cpu_s += use.samples / IMAGES_PER_CORE_S if is_urls else 0
        wanted = f"{use.source.acquire.location} {sorted(use.source.acquire.files)}"
        if wanted not in seen:
            known = use.source.upstream.download_bytes if use.source.upstream else None
            fetched = images + use.text_tokens * BYTES_OF_A_TOKEN * COMPRESSED
            is_list = use.source.acquire.adapter.startswith("url_")  # a list's own bytes come on top of the pictures
            one_download = (known or 0) + images if is_list else known or fetched
            download += one_download
            disk += 0 if is_list else one_download
        seen |= {use.source.name, wanted}
    one.download_bytes, one.disk_bytes, one.cpu_hours = round(download), round(disk), round(cpu_s / 3600, 1)


def _notes(one: StageEstimate, stage: Stage, mix: MixSpec, uses: Sequence[Use]) -> list[str]:
    said = []
    assert one.packs is not None and one.packs_here is not None
    if mix.budgets:
        drawn = ", ".join(
            f"{u.source.name} {u.epochs * (u.packs or u.tokens / stage.pack_tokens):,.0f} packs ({u.epochs:.2f} epochs)"
            for u in uses
        )
        said.append(f"drawn by weight: {drawn}; packs and tokens of the table are the inventory, as in Table 1")
    said += _of_mix(mix, uses)
    for use in uses:
        if use.truncated_tokens:
            more = use.truncated_tokens / stage.pack_tokens
            said.append(
                f"{use.source.name}: the paper counts {use.truncated_tokens:,.0f} tokens that {use.packs:,} packs "
                f"cannot hold and never trained them; here they fill {more:,.0f} more packs an epoch"
            )
        if use.source.expected and "corrected" in use.source.expected.origin:
            said.append(f"{use.source.name}: {use.source.expected.origin}")
    if all(use.packs for use in uses):
        steps = f"{one.packs:,} // {stage.batch_packs} + 1 = {one.steps:,} steps"
        rule = f"{steps}, upstream's rule, draw {one.packs_drawn:,} packs"
        here = f"; here fuller packs and whole texts make {one.packs_here:,} packs, {one.steps_here:,} steps"
        said.append(rule + (here if one.steps != one.steps_here else ""))
    if any(use.assumed for use in uses):
        n = sum(use.assumed for use in uses)
        said.append(
            f"{n} sources have no token counts in the paper: {TEXT_TOKENS_OF_A_CONVERSATION} text tokens a record and "
            f"{PATCHES_OF_AN_IMAGE} patches an image are assumed"
        )
    return [f"{stage.name}: {text}" for text in said]


def _of_mix(mix: MixSpec, uses: Sequence[Use]) -> Iterator[str]:
    """What of a mix only its ledgers can tell, and what its counts foresee of its limits."""
    if mix.sql is not None:
        yield "its sql says what is drawn: each source is taken once here; curate counts it"
    for m in mix.sources:
        for name in m.quotas:
            yield f"{m.source}: quota {name} needs the classes of the ledger: taken as leaving out nothing here"
    if mix.quotas:
        there = {use.source.name: (max(1, round(use.samples)), max(1, round(use.held))) for use in uses}
        for category, q in amounts.of(mix, there)[1].items():
            bites = "cuts" if q["asked"] > q["most"] else "does not cut"
            yield f"quota of {category}, {q['most']:,} {q['unit']}, {bites} the {q['asked']:,} asked for"
    if mix.text_share is not None:
        text = sum(use.tokens * use.epochs for use in uses if use.source.modality == "text")
        share = text / max(1.0, sum(use.tokens * use.epochs for use in uses))
        need = f"{mix.text_share.least:g} ... {mix.text_share.most:g}"
        inside = mix.text_share.least <= share <= mix.text_share.most
        yield f"text-only sources give {share:.3f} of the tokens, {'inside' if inside else 'OUTSIDE'} {need}"


def _made(stage: Stage, manifest: Manifest) -> StageEstimate:
    """Counts of the pack artifact made last."""
    stats: Mapping[str, Any] = manifest.stats
    n_packs, patches = int(stats["n_packs"]), int(stats["n_patches"])
    steps = n_packs // stage.batch_packs
    text = int(stats["n_tokens"]) - patches
    return StageEstimate(
        stage.name,
        "made",
        packs=n_packs,
        steps=steps,
        packs_drawn=n_packs,
        packs_here=n_packs,
        steps_here=steps,
        text_tokens=text,
        vision_tokens=patches,
        trained_tokens=text + patches,
        trained_vision_tokens=patches,
    )


def _price(one: StageEstimate, model: ModelSpec) -> None:
    """GPU-hours at the stated utilisation, and dollars of GPUs (A100) and CPUs together."""
    if one.trained_tokens is None:
        return
    flops = 6 * parameters(model)[1] * one.trained_tokens
    one.gpu_hours = round(flops / (A100_FLOPS * A100_MFU) / 3600, 3)
    one.gpu_hours_h100 = round(flops / (H100_FLOPS * H100_MFU) / 3600, 3)
    one.dollars = round(one.gpu_hours * A100_DOLLARS + (one.cpu_hours or 0.0) * CPU_DOLLARS, 2)
