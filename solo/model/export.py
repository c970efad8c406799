"""Export: a trained stage as a Hugging Face folder that says where it came from.

In: a train artifact, or the `checkpoint` folder in it, and the data root around it. Out: a folder with safetensors
under the released names, config, generation config, processor, the names of their classes for transformers' Auto
classes, and a model card whose every figure is a manifest's.
Invariants: weights are the artifact's bytes, each checked against its SHA-256 as it is copied; the folder appears whole
or not at all; nothing in it names a path of this machine. Cost: one copy and hash of the weights.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from solo.artifact import CHUNK_BYTES, MANIFEST, Artifact, Manifest, read_manifest
from solo.report.markdown import escape, table

CARD = "README.md"
CHECKPOINT = "checkpoint"
CLASSES = "solo_classes.py"
# What `trust_remote_code=True` loads: names of this package, not copies that would grow old.
CLASSES_TEXT = '''"""Where the Auto classes of transformers find this model: in the package that trained it."""

try:
    from solo.model.config import SoloConfig
    from solo.model.causal_lm import SoloForCausalLM
    from solo.model.processor import SoloProcessor
except ImportError as error:
    raise ImportError(
        f"this model's code is not installed ({error}); run `pip install -e .` in a checkout of the recipe that "
        "trained it, at the commit that README.md names"
    ) from error
'''
AUTO = {
    "config.json": {"AutoConfig": "SoloConfig", "AutoModelForCausalLM": "SoloForCausalLM"},
    "processor_config.json": {"AutoProcessor": "SoloProcessor"},
}


def run(checkpoint: Path, to: Path) -> Path:
    """Write the folder; where it was written."""
    source = artifact_of(checkpoint)
    if to.exists() and any(to.iterdir() if to.is_dir() else [to]):
        raise ValueError(f"{to}: is not an empty folder; give another or remove it")
    aside = to.with_name(f".{to.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        for entry in source.manifest.files:
            path = Path(entry["path"])
            if path.parts[0] == CHECKPOINT:
                _copy(source.path / path, aside / path.relative_to(CHECKPOINT), entry["sha256"])
        _generation_config(aside)
        _auto_classes(aside)
        (aside / CARD).write_text(card(source), encoding="utf-8")
        if to.is_dir():
            to.rmdir()
        aside.rename(to)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return to


def artifact_of(checkpoint: Path) -> Artifact:
    """The train artifact that a folder is, or is in."""
    for folder in (checkpoint, checkpoint.parent):
        manifest = read_manifest(folder)
        if manifest is not None and manifest.part == "train":
            return Artifact(folder.resolve(), manifest)
    raise ValueError(
        f"{checkpoint}: neither it nor its parent has the {MANIFEST} of a finished train artifact; give "
        "ROOT/train/STAGE/FINGERPRINT or the checkpoint folder in it"
    )


def _copy(source: Path, to: Path, sha256: str) -> None:
    """Copy a file and check what was copied."""
    to.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    try:
        with source.open("rb") as read, to.open("wb") as write:
            while chunk := read.read(CHUNK_BYTES):
                digest.update(chunk)
                write.write(chunk)
    except FileNotFoundError:
        raise ValueError(f"{source}: is missing; run train again") from None
    if digest.hexdigest() != sha256:
        raise ValueError(f"{source}: does not match its sha256; run train again")


def _generation_config(folder: Path) -> None:
    """`generate`'s defaults where the checkpoint has none: greedy, stop at EOS."""
    if not (folder / "generation_config.json").is_file():
        config = json.loads((folder / "config.json").read_bytes())
        ids = {name: config.get(name) for name in ("bos_token_id", "eos_token_id")}
        given = {"_from_model_config": True} | {name: value for name, value in ids.items() if value is not None}
        (folder / "generation_config.json").write_text(json.dumps(given, indent=1))


def _auto_classes(folder: Path) -> None:
    """Let the Auto classes of transformers find ours without an import before."""
    (folder / CLASSES).write_text(CLASSES_TEXT)
    for name, classes in AUTO.items():
        config = json.loads((folder / name).read_bytes())
        config["auto_map"] = {auto: f"{Path(CLASSES).stem}.{own}" for auto, own in classes.items()}
        (folder / name).write_text(json.dumps(config, indent=2) + "\n")


def card(source: Artifact) -> str:
    """The model card, from manifests alone."""
    root, stages = source.path.parents[2], list(_stages(source))
    report = next(_readers(root, "report", source.manifest), None)
    recipe, licences = (report.spec.get("recipe"), report.spec.get("licences", {})) if report else (None, {})
    own = source.manifest
    head = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["solo", own.name]}
    if recipe:
        head["tags"] = ["solo", recipe]
    blocks = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {escape(report.spec['title'] if report else own.name)}",
        "A single transformer for text and image patches (SOLO), trained from a data recipe. "
        + (f"Recipe `{recipe}`, stage `{own.name}`." if recipe else f"Stage `{own.name}`."),
        "```python\nfrom transformers import AutoModelForCausalLM, AutoProcessor\n\n"
        'model = AutoModelForCausalLM.from_pretrained("this-folder", trust_remote_code=True)\n'
        'processor = AutoProcessor.from_pretrained("this-folder", trust_remote_code=True)\n```\n\n'
        "The code is the package of the recipe that trained it (`pip install -e .` in its checkout, commit below); the "
        "folder holds no code but its names. After `import solo.model`, `trust_remote_code` is not needed.",
        "## Scores",
        table(list(_scores(root, own))) or "No benchmark was asked of this checkpoint.",
        "## Stages, the last one first",
        table([_stage(stage.manifest) for stage in stages]),
        "## Data",
        table(list(_data(root, stages, licences))),
        "## Mix locks",
        table(list(_locks(root, stages))),
        "## Model",
        table([{"field": name, "value": json.dumps(value)} for name, value in own.spec["model"].items()]),
        "## Identity",
        table(
            [
                {"what": "content of the train artifact", "value": own.digest},
                {"what": "fingerprint", "value": own.fingerprint},
                {"what": "commit of the code", "value": str(own.record.get("commit"))},
                {"what": "seed", "value": str(own.spec["seed"])},
                {"what": "tokenizer sha256", "value": own.spec["tokens"]["tokenizer_sha256"]},
            ]
        ),
    ]
    return "\n\n".join(blocks) + "\n"


def _stages(last: Artifact) -> Iterator[Artifact]:
    """The stage and those before it, each found by the content it was trained from."""
    found: Artifact | None = last
    while found is not None:
        yield found
        before = {node: d for node, d in found.manifest.inputs.items() if node.startswith("train/")}
        root = last.path.parents[2]
        found = next((a for node, digest in before.items() if (a := _by_digest(root, node, digest))), None)


def _by_digest(root: Path, node: str, digest: str) -> Artifact | None:
    """The artifact of this part and name with this content."""
    for path in sorted((root / node).glob(f"*/{MANIFEST}")):
        manifest = read_manifest(path.parent)
        if manifest is not None and manifest.digest == digest:
            return Artifact(path.parent, manifest)
    return None


def _readers(root: Path, part: str, read: Manifest) -> Iterator[Manifest]:
    """Artifacts of a part that were made from this content, the newest first."""
    found = [read_manifest(path.parent) for path in sorted((root / part).glob(f"*/*/{MANIFEST}"))]
    own = [m for m in found if m is not None and m.inputs.get(read.id) == read.digest]
    yield from sorted(own, key=lambda m: m.record.get("made_at", 0), reverse=True)


def _scores(root: Path, own: Manifest) -> Iterator[dict[str, Any]]:
    told: set[str] = set()
    for m in _readers(root, "evaluate", own):
        if m.name not in told:
            told.add(m.name)
            names = ("n_questions", "score", "chance", "blind")
            row = {"benchmark": m.name} | {name: m.stats[name] for name in names}
            yield row | {"protocol": str(m.stats["protocol"])[:16], "digest": m.digest[:16]}


def _stage(m: Manifest) -> dict[str, Any]:
    names = ("n_packs", "n_steps", "n_tokens", "n_loss_tokens", "loss_first", "loss_last")
    rates = {name: m.spec["stage"][name] for name in ("mix", "pack_tokens", "batch_packs", "learning_rate")}
    return {"stage": m.name} | rates | {name: m.stats[name] for name in names} | {"digest": m.digest[:16]}


def _data(root: Path, stages: list[Artifact], licences: dict[str, str]) -> Iterator[dict[str, Any]]:
    for stage in stages:
        for source, own in stage.manifest.stats["sources"].items():
            counts = {"tokens": own["n_tokens"], "loss tokens": own["n_loss_tokens"]}
            shard = str(stage.manifest.inputs.get(f"shard/{source}", ""))[:16]
            licence = licences.get(source, "see the recipe")
            yield {"stage": stage.manifest.name, "source": source, "licence": licence, **counts, "shards": shard}


def _locks(root: Path, stages: list[Artifact]) -> Iterator[dict[str, Any]]:
    for stage in stages:
        for node, digest in stage.manifest.inputs.items():
            if node.startswith("pack/"):
                pack = _by_digest(root, node, digest)
                locks = {} if pack is None else pack.manifest.inputs
                lock = next((value for name, value in locks.items() if name.startswith("curate/")), "not there")
                row = {"stage": stage.manifest.name, "mix": node.removeprefix("pack/")}
                yield row | {"mix lock": lock, "pack plan": digest}
