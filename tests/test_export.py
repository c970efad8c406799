"""export: a folder that Hugging Face loads, with the trainer's logits, and a card whose figures are the manifests'."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from tiny_stage import joined, make_job, make_plan

from solo import artifact
from solo.artifact import CHECKOUT, Artifact, Job, Manifest
from solo.model import export
from solo.spec import Stage
from solo.train import launch
from solo.train import part as train

IDS = [[1, 272, 5255, 28705, 28740, 2310]]
FRESH = """
import json, sys
from transformers import AutoModelForCausalLM, AutoProcessor, GenerationConfig
import torch

torch.set_num_threads(1)
sys.modules["solo"] = None  # as where it is not installed
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
except ImportError as error:
    missing = str(error)
del sys.modules["solo"]
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
GenerationConfig.from_pretrained(sys.argv[1])
given = processor(text=["the cat 1 sat on"])
answer = model.generate(**given, max_new_tokens=2)
with torch.no_grad():
    logits = model(torch.tensor(json.loads(sys.argv[2]))).logits
print(json.dumps({"logits": logits.tolist(), "answer": answer.shape[1] - given["input_ids"].shape[1],
                  "missing": missing, "classes": [type(model).__module__, type(processor).__module__]}))
"""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Artifact, list]]:
    """A trained stage, and its trainer's logits."""
    import torch

    folder = tmp_path_factory.mktemp("export")
    job = make_job(folder, make_plan(folder, 2))
    logits: list = []

    def run(job: Job) -> artifact.Result:
        from solo.train import trainer

        rows: list[dict] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "emit", rows.append)
            ours = trainer.Trainer(train._task(job, Stage.model_validate(job.spec["stage"]), device="cpu", ranks=1))
            assert ours.run()
        with torch.no_grad():
            logits.extend(ours.engine.module.solo.eval()(torch.tensor(IDS)).logits.tolist())
        (job.out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if "loss" in row))
        return train.run(job)

    with joined():
        made, _ = artifact.make(job, run)
    yield made, logits


def write(root: Path, manifest: Manifest) -> None:
    folder = root / manifest.id / manifest.fingerprint
    folder.mkdir(parents=True)
    (folder / artifact.MANIFEST).write_text(json.dumps(asdict(manifest)))


def test_a_fresh_process_has_the_trainer_s_logits(stage: tuple[Artifact, list], tmp_path: Path) -> None:
    made, logits = stage
    to = export.run(made.path / "checkpoint", tmp_path / "new" / "solo-tiny")
    names = {p.name for p in to.iterdir()}
    assert names >= {"README.md", "config.json", "generation_config.json", "model.safetensors", "processor_config.json"}
    for path in to.iterdir():
        for place in (made.path, CHECKOUT):
            assert str(place).encode() not in path.read_bytes(), path
    env = launch.environment(1, "cpu") | {"HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", FRESH, str(to), json.dumps(IDS)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["logits"] == logits and found["answer"] > 0
    assert found["classes"] == ["solo.model.causal_lm", "solo.model.processor"]
    assert (
        found["missing"].startswith("this model's code is not installed (") and "pip install -e ." in found["missing"]
    )


def test_the_card_has_the_figures_of_the_manifests(stage: tuple[Artifact, list], tmp_path: Path) -> None:
    made, _ = stage
    root, own = made.path.parents[2], made.manifest
    stats = {"n_questions": 40, "score": 0.625, "chance": 0.25, "blind": 0.3, "protocol": "p" * 64}
    evaluated = replace(
        own, part="evaluate", name="digits", fingerprint="e" * 8, inputs={own.id: own.digest}, stats=stats
    )
    write(root, evaluated)
    write(root, replace(artifact.read_manifest(root / "pack" / "tiny"), fingerprint="b" * 8))
    write(root, replace(evaluated, fingerprint="f" * 8, inputs={own.id: "0" * 64}, stats=stats | {"score": 0.999}))
    spec = {"recipe": "toy", "title": "A | toy", "licences": {"caption": "CC0-1.0"}}
    write(root, replace(own, part="report", name="toy", fingerprint="a" * 8, spec=spec, inputs={own.id: own.digest}))
    card = (export.run(made.path, tmp_path / "out") / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["tags"] == ["solo", "toy"]
    assert "# A \\| toy" in body or "A &#124; toy" in body
    lock = "2" * 64  # of the curate artifact that the plan was made from
    for figure in ("0.625", own.digest, lock, "CC0-1.0", own.fingerprint, f"{own.stats['n_loss_tokens']:,}"):
        assert figure in body, figure
    assert "0.999" not in body  # of another checkpoint


def test_what_cannot_be_exported_is_told(stage: tuple[Artifact, list], tmp_path: Path) -> None:
    made, _ = stage
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ValueError, match="is not an empty folder; give another"):
        export.run(made.path, tmp_path / "full")
    with pytest.raises(ValueError, match=r"neither it nor its parent has the manifest.json of a finished train"):
        export.run(tmp_path, tmp_path / "to")
    weights = made.path / "checkpoint" / "model.safetensors"
    raw = weights.read_bytes()
    try:
        weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        with pytest.raises(ValueError, match=r"model.safetensors: does not match its sha256; run train again"):
            export.run(made.path, tmp_path / "to")
        weights.unlink()
        with pytest.raises(ValueError, match=r"model.safetensors: is missing"):
            export.run(made.path, tmp_path / "to")
    finally:
        weights.write_bytes(raw)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]  # nothing half-written is left
