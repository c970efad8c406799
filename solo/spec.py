"""Specs: the YAML files of `datasets_spec/`, as frozen and strict types.

In: a spec folder with `sources/ mixes/ recipes/ benchmarks/`. Out: validated objects; anything a user can get wrong
is a `SpecError` that names file, field, value and remedy. Invariant: a spec says WHAT; a root, host, worker count,
executor or GPU count is no field of any spec, so none can reach a fingerprint.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, JsonValue, ValidationError, field_validator, model_validator

from solo.mix_spec import MixSource, MixSpec, Near
from solo.objective import Group, GroupName, HeldOut, check_continued, check_groups
from solo.strict import Spec, SpecError, off

# Of solo/strict.py and solo/mix_spec.py; every reader of specs knows them from here.
__all__ = ["MixSource", "MixSpec", "Near", "Spec", "SpecError"]

from solo.acquire.location import UNPINNED, check

PINNED = re.compile(r"sha256:[0-9a-f]{64}|[0-9a-f]{40}")

Template = Literal["plain", "inst"]
Decode = Literal["exact", "fast"]


def pinned(revision: str) -> str:
    """The revision, if it names bytes or a commit."""
    if not PINNED.fullmatch(revision):
        raise ValueError(f"revision {revision!r} is not pinned; use sha256:<64 hex digits> or a 40-digit commit hash")
    return revision


class Licence(Spec):
    """SPDX id (or the licence's own name) and where to read it."""

    id: str
    url: str


class Acquire(Spec):
    """Where one source's records come from and who reads them."""

    location: str = Field(
        description="a path (relative: below the spec folder), or what is fetched: http(s)://, s3://, "
        "huggingface:OWNER/NAME/FOLDER"
    )
    adapter: str = Field(description="`module.function` in solo/adapters/")
    args: dict[str, JsonValue] = Field(default={})
    samples_per_shard: int = Field(gt=0)
    files: tuple[str, ...] = Field(
        default=(), description="what to fetch below location; {00..99} counts, * but not on the web"
    )
    sha256: dict[str, str] = Field(default={}, description="name -> SHA-256 of a file that is fetched")
    loopback_ports: dict[str, int] = Field(default={}, description="host name -> port of 127.0.0.1: a local mirror")


class Filter(Spec):
    """Signals to compute, predicates that keep a sample, columns whose exact repeats are dropped, what is too alike."""

    signals: tuple[str, ...] = Field(description="`module.function` in solo/signals/, in order")
    arguments: dict[str, dict[str, JsonValue]] = Field(default={}, description="signal -> its own arguments")
    keep: dict[str, str] = Field(description="name -> SQL over signal columns; the first not true is the reason")
    unique: tuple[str, ...] = Field(default=(), description="columns, or `a + b`: equal in both")
    near: Near = Near()


class GridPictures(Spec):
    """Pictures resized once to the recipe's patch grid, stored so; solo/shard/regrid.py says what stays as it came."""

    jpeg_quality: int = Field(ge=1, le=100)


class Shard(Spec):
    """How kept samples become tars, and which token template their ledger counts."""

    samples_per_shard: int = Field(gt=0)
    template: Template = Field(description="plain: pieces concatenated; inst: SOLO's [INST] chat form")
    grid_pictures: GridPictures | None = Field(default=None, description="null: original bytes; the loader resizes")


class Upstream(Spec):
    """Where a source is published, and in what form: for people, and for `solo sources` and `solo check`."""

    id: str = Field(description="`huggingface:owner/name`, or the publisher's own name")
    url: str
    files: tuple[str, ...] = Field(description="what to fetch, as named there")
    layout: str = Field(description="the published form, in a line")
    download_bytes: int | None = Field(default=None, gt=0, description="of those files, where it is known")


class Expected(Spec):
    """What the paper counts of a source (Tables 1 and 2); the ledger of a run is compared with it."""

    samples: int | None = Field(default=None, gt=0)
    images: int | None = Field(default=None, ge=0)
    packs: int | None = Field(default=None, gt=0, description="of 32,768 tokens")
    text_tokens: int | None = Field(default=None, ge=0, description="image marks and row separators are text")
    vision_tokens: int | None = Field(default=None, ge=0, description="patches")
    origin: str = Field(description="where these numbers are from")


class Choice(Spec):
    """What upstream does not say, decided here."""

    choice: str
    reason: str


class SourceSpec(Spec):
    """One upstream dataset: one YAML, one licence, one revision. What describes it only changes no fingerprint."""

    name: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    title: str
    licence: Licence
    revision: str = Field(description="sha256:<64 hex> of the data at `location`, a 40-hex commit, or `unpinned`")
    modality: Literal["image-text", "text"]
    upstream: Upstream | None = None
    messages: str | None = Field(
        default=None, description="how a record becomes turns: roles, template, one QA or many"
    )
    expected: Expected | None = None
    choices: tuple[Choice, ...] = ()
    notes: tuple[str, ...] = Field(default=(), description="known traps")
    unchecked: tuple[str, ...] = Field(default=(), description="fields of this file not checked against upstream")
    acquire: Acquire
    filter: Filter
    shard: Shard

    @field_validator("revision")
    @classmethod
    def _named(cls, value: str) -> str:
        return value if value == UNPINNED else pinned(value)

    @model_validator(mode="after")
    def _fetchable(self) -> SourceSpec:
        check(self)
        return self


class ImageClose(Spec):
    """Token that closes an image, per template (upstream: pre-training `</vision>`, SFT and demo `<vision>`)."""

    plain: Literal["</vision>", "<vision>"]
    inst: Literal["</vision>", "<vision>"]


class Tokens(Spec):
    """Tokenizer and patch grid: everything a token count depends on."""

    tokenizer: str = Field(description="`package:path/in/package` or a file path; a .model or a tokenizer.json")
    tokenizer_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bos: str | None = Field(default=None, description="token that begins a document, where the file does not say it")
    eos: str | None = Field(default=None, description="token that ends an answer, where the file does not say it")
    text_ids: int | None = Field(default=None, gt=0, description="rows of the backbone's embedding, if more than ids")
    patch_px: int = Field(gt=0)
    max_side_px: int = Field(gt=0)
    image_close: ImageClose
    plain_eos: bool | None = Field(default=None, description="plain documents end in EOS, with loss; upstream: false")


class ModelSpec(Spec):
    """Shape of the decoder, and what it starts from."""

    init: str = Field(description="`random`, or a checkpoint folder in Hugging Face layout")
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rope_theta: float
    rms_norm_eps: float
    sliding_window: int | None
    max_position_embeddings: int
    init_std: float
    n_text_ids: int = Field(default=32_000, description="the backbone's own ids; those above are SOLO's")
    head_dim: int | None = Field(default=None, description="hidden_size / num_attention_heads where absent")
    qkv_bias: bool = Field(default=False, description="Qwen2 has it")
    qk_norm: bool = Field(default=False, description="Qwen3 has it")
    rope_scaling: dict[str, JsonValue] | None = Field(default=None, description="as in Hugging Face's config.json")
    tie_word_embeddings: bool = False
    init_projection: str | None = Field(
        default=None, exclude_if=off, description="of patches: `random`, `checkpoint` (init has it) or a folder with it"
    )

    @model_validator(mode="after")
    def _has_projection(self) -> ModelSpec:
        if self.init == "random" and self.init_projection == "checkpoint":
            raise ValueError("init_projection is checkpoint, but init is random and has none; name its folder here")
        return self


class Stage(Spec):
    """One training stage: its mix, its packs, its schedule."""

    name: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    mix: str
    pack_tokens: int = Field(gt=1)
    pack_by: Literal["source", "mix", "sample"] = Field(
        description="source: a pack holds one source, as upstream, but its last, not full, may be shared; mix: any; "
        "sample: one document a pack, as upstream's SFT"
    )
    batch_packs: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    min_learning_rate: float = Field(ge=0)
    schedule: Literal["cosine", "linear"]
    schedule_start: Literal["restart", "continue"] = Field(
        default="restart",
        exclude_if=lambda start: start == "restart",
        description="restart: from learning_rate, warmed up, as upstream; continue: the decay of the stage before "
        "goes on from its min_learning_rate. AdamW's moments start anew in either",
    )
    warmup_steps: int = Field(ge=0)
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_norm: float
    loss_average: Literal["pack", "token"]
    precision: Literal["fp32", "bf16", "fp8"] = Field(description="fp8: bf16, the layers' products in 8 bits (torchao)")
    checkpoint_every_steps: int = Field(gt=0)
    decode: Decode = Field(
        default="exact", description="exact: Pillow alone, as upstream; fast: solo/sequence/decode.py"
    )
    max_damaged: int = Field(default=0, ge=0, description="unreadable documents a rank leaves out; one more stops it")
    max_skipped: int = Field(default=0, ge=0, description="updates skipped for a loss or gradient that is not finite")
    spike_mads: float | None = Field(default=None, gt=0, description="a spike is a loss so many MADs above the median")
    spike_window: int = Field(default=50, ge=4, description="steps that median and MAD are of")
    on_spike: Literal["record", "quarantine"] = Field(
        default="record", description="quarantine: go back to the checkpoint before and pass the step's packs over"
    )
    max_quarantined: int = Field(default=3, ge=0, description="steps passed over so; one more stops the stage")
    groups: dict[GroupName, Group] | None = Field(
        default=None, exclude_if=off, description="other rates for parts of the model; left out: the stage's own"
    )

    @field_validator("groups")
    @classmethod
    def _learns(cls, groups: dict[GroupName, Group] | None) -> dict[GroupName, Group] | None:
        check_groups(groups or {})
        return groups


class RecipeSpec(Spec):
    """Ordered stages and the benchmarks that judge the last checkpoint."""

    name: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    title: str
    seed: int
    tokens: Tokens
    model: ModelSpec
    stages: tuple[Stage, ...] = Field(min_length=1)
    benchmarks: tuple[str, ...]
    held_out: HeldOut | None = Field(default=None, exclude_if=off)

    @model_validator(mode="after")
    def _stages(self) -> RecipeSpec:
        check_continued(self.stages)
        for what in ("name", "mix"):
            values = [getattr(s, what) for s in self.stages]
            if len(set(values)) != len(values):
                raise ValueError(f"two stages share a {what}: {values}; copy the mix under another name")
        return self


class BenchmarkSpec(Spec):
    """A held-out question set, its scorer, and the score of guessing."""

    name: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    title: str
    licence: Licence
    revision: str
    location: str
    adapter: str = Field(description="`module.function` in solo/adapters/; the assistant turn is the answer")
    args: dict[str, JsonValue] = Field(default={})
    template: Template
    scorer: str = Field(description="`module.function` in solo/benchmarks/")
    max_new_tokens: int = Field(gt=0)
    chance: float = Field(ge=0, le=1)

    _pinned = field_validator("revision")(pinned)


S = TypeVar("S", bound=Spec)

FOLDERS: dict[type[Spec], str] = {
    SourceSpec: "sources",
    MixSpec: "mixes",
    RecipeSpec: "recipes",
    BenchmarkSpec: "benchmarks",
}


def load(kind: type[S], name: str, specs: Path) -> S:
    """Read one spec by name, e.g. `load(MixSpec, "sample-stage-1", Path("datasets_spec"))`."""
    folder = specs / FOLDERS[kind]
    path = folder / f"{name}.yaml"
    if not path.is_file():
        have = sorted(p.stem for p in folder.glob("*.yaml"))
        raise SpecError(f"{path}: no such file; {folder} has {have}")
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise SpecError(f"{path}: expected a mapping of fields, got {type(raw).__name__}")
    try:
        spec = kind.model_validate(raw)
    except ValidationError as error:
        raise SpecError(f"{path}: {_explain(error, kind)}") from None
    if getattr(spec, "name", name) != name:
        raise SpecError(f"{path}: name is {spec.name!r} but the file is {name}.yaml; make them equal")  # type: ignore[attr-defined]
    return spec


def _explain(error: ValidationError, kind: type[Spec]) -> str:
    """All problems of one file on one line, each with its field and, for an unknown key, what exists."""
    lines = []
    for e in error.errors():
        where = ".".join(str(p) for p in e["loc"]) or "(file)"
        if e["type"] == "extra_forbidden":
            lines.append(f"unknown key {where!r}; fields here are {_fields_at(kind, e['loc'][:-1])}")
        elif e["type"] == "missing":
            lines.append(f"{where} is missing")
        else:
            lines.append(f"{where}: {e['msg'].removeprefix('Value error, ')}")
    return "; ".join(lines)


def _fields_at(kind: type[Spec], loc: tuple[int | str, ...]) -> list[str]:
    """Field names of the model that lies at `loc` inside `kind`."""
    for step in loc:
        if isinstance(step, int):
            continue
        annotation: Any = kind.model_fields[step].annotation
        for inner in (annotation, *getattr(annotation, "__args__", ())):
            if isinstance(inner, type) and issubclass(inner, Spec):
                kind = inner
    return list(kind.model_fields)
