"""evaluate: the scorer's truth table, answers of a tiny model, equal bytes, kills, drops, and protocols that differ."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import finished
import pyarrow.parquet as pq
import pytest
import tiny
import yaml

from solo import artifact
from solo.acquire.part import content_sha256
from solo.artifact import Artifact, Job, Result, canonical, damage
from solo.benchmarks.exact import match
from solo.evaluate import judge
from solo.evaluate import part as evaluate
from solo.spec import BenchmarkSpec, Tokens

RECIPE = yaml.safe_load((Path(__file__).parents[1] / "datasets_spec" / "recipes" / "sample.yaml").read_text())
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
MODEL = RECIPE["model"] | SHAPE | {"num_key_value_heads": 1}
N_GOOD = 24
BAD = ("cut.png", "thin.png", "gone.png")
RUN = """
import json, sys
from pathlib import Path
from solo import artifact
from solo.evaluate import part as evaluate
from solo.artifact import Artifact, Job, read_manifest
job = json.load(open(sys.argv[1]))
trained = Path(job.pop("trained"))
inputs = {"train/last": Artifact(trained, read_manifest(trained))}
artifact.make(Job(inputs=inputs, **job | {k: Path(job[k]) for k in ("root", "specs")}), evaluate.run)
"""


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("four", "four", True),
        ("Four", "four", True),
        ("  four\n", "four", True),
        ("four.", "four", True),
        ("fish  tank", "Fish tank.", True),
        ("the answer is four", "four", False),
        ("four five", "four", False),
        ("four..", "four", False),
        ("4", "four", False),
        ("", "four", False),
        ("f our", "four", False),
        ("yes, it is", "yes", False),
    ],
)
def test_exact_match(response: str, answer: str, right: bool) -> None:
    assert match(response, answer) is right


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads on a busy machine wait for each other far longer than the sums of this model take."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A question set of 24 good questions in two categories and three that cannot be asked."""
    specs = tmp_path_factory.mktemp("specs")
    names = list(tiny.COLOURS)
    members = {f"{i}.png": tiny.picture(tiny.COLOURS[names[i % 6]], i) for i in range(N_GOOD)}
    members |= {"cut.png": members["0.png"][:40], "thin.png": thin()}
    tiny.write_tar(specs / "bench" / "images.tar", members)
    rows = [
        {
            "question_id": f"q{i}",
            "image": image,
            "question": f"{i % 3}?",
            "answer": names[i % 6],
            "category": f"c{i % 2}",
        }
        for i, image in enumerate([*(f"{i}.png" for i in range(N_GOOD)), *BAD])
    ]
    (specs / "bench" / "questions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    spec = BenchmarkSpec(
        name="toy",
        title="Toy",
        licence={"id": "CC0-1.0", "url": "made by the test"},
        revision="sha256:" + content_sha256(specs / "bench").removeprefix("sha256:"),
        location="bench",
        adapter="questions.read",
        template="inst",
        scorer="exact.match",
        max_new_tokens=3,
        chance=1 / 6,
    )
    return {"specs": specs, "spec": spec.model_dump(mode="json")}


def thin() -> bytes:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (4000, 1)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    root = tmp_path_factory.mktemp("train")

    def run(job: Job) -> Result:
        finished.save_model(job, MODEL)
        return Result(1, 1, {}, {})

    spec = {"tokens": RECIPE["tokens"], "seed": 1}
    return artifact.make(Job("train", "last", 1, spec, {}, root, root, 1, lambda line: None), run)[0]


def job_of(benchmark: dict[str, Any], trained: Artifact, root: Path, lines: list[str] | None = None) -> Job:
    spec = {"benchmark": benchmark["spec"], "tokens": RECIPE["tokens"]}
    progress = lines.append if lines is not None else lambda line: None
    return Job(
        "evaluate", "toy", evaluate.VERSION, spec, {"train/last": trained}, root, benchmark["specs"], 1, progress
    )


@pytest.fixture(scope="module")
def answered(
    benchmark: dict[str, Any], trained: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Artifact, list[str]]:
    lines: list[str] = []
    made, _ = artifact.make(job_of(benchmark, trained, tmp_path_factory.mktemp("root"), lines), evaluate.run)
    return made, lines


def test_every_question_is_answered_or_counted(answered: tuple[Artifact, list[str]], trained: Artifact) -> None:
    made, lines = answered
    m = made.manifest
    assert m.counts == {"in": 27, "kept": 24, "dropped": {"image_too_thin": 1, "missing_image": 1, "undecodable": 1}}
    rows = pq.read_table(made.path / "answers.parquet").to_pylist()
    assert [r["question_id"] for r in rows] == [f"q{i}" for i in range(N_GOOD)]
    assert all(r["correct"] == match(r["response"], r["answer"]) for r in rows)
    assert m.stats["n_questions"] == 27 and m.stats["score"] == round(sum(r["correct"] for r in rows) / 27, 6)
    assert abs(m.stats["score"] - m.stats["chance"]) < 0.35  # a model that knows nothing
    assert {r["checkpoint_digest"] for r in rows} == {trained.manifest.digest} == {m.stats["checkpoint_digest"]}
    assert {r["protocol"] for r in rows} == {m.stats["protocol"]}
    assert set(m.stats["by_category"]) == {"c0", "c1"}
    assert len(lines) == 1 and "24 answered" in lines[0]


def test_the_answer_is_not_in_the_prompt(benchmark: dict[str, Any], trained: Artifact) -> None:
    spec = BenchmarkSpec.model_validate(benchmark["spec"])
    one = judge.Judge(spec, Tokens.model_validate(RECIPE["tokens"]), trained)
    sample = next(iter(evaluate.questions(spec, benchmark["specs"] / "bench")))
    piece = one.prompt(sample)
    other = one.prompt(replace(sample, messages=(*sample.messages[:-1], finished.ANSWER)))
    assert piece.ids.tolist() == other.ids.tolist()
    assert one.tokenizer.decode(piece.ids).strip() == "[INST] 0? [/INST]"


def test_blind_answers_depend_on_the_question_alone(answered: tuple[Artifact, list[str]]) -> None:
    rows = pq.read_table(answered[0].path / "answers.parquet").to_pylist()
    assert len({(r["prompt"], r["blind_response"]) for r in rows}) == 3  # three questions, one size of picture
    assert len({r["response"] for r in rows}) > 3  # the guard: pictures do change what is said


def test_batching_changes_no_answer(
    answered: tuple[Artifact, list[str]],
    benchmark: dict[str, Any],
    trained: Artifact,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(judge.BATCH_TOKENS, "cpu", 60)
    monkeypatch.setattr(evaluate, "CHUNK_QUESTIONS", 7)
    again, _ = artifact.make(job_of(benchmark, trained, root), evaluate.run)
    assert again.manifest.digest == answered[0].manifest.digest


def test_killed_between_chunks_and_run_again(
    answered: tuple[Artifact, list[str]], benchmark: dict[str, Any], trained: Artifact, root: Path, tmp_path: Path
) -> None:
    job = job_of(benchmark, trained, root)
    told = {k: str(getattr(job, k)) for k in ("part", "name", "root", "specs")}
    told |= {"version": job.version, "spec": job.spec, "workers": 1, "trained": str(trained.path)}
    (tmp_path / "job.json").write_bytes(canonical(told))
    code = RUN.replace("artifact.make(", "evaluate.CHUNK_QUESTIONS = 6; artifact.make(")
    command = [sys.executable, "-c", code, str(tmp_path / "job.json")]
    child = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while not list(job.work.glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert list(job.work.glob("*.json")) and damage(job.out) == "not made yet"
    subprocess.run(command, check=True)
    again = artifact.read_manifest(job.out)
    assert again is not None and again.digest == answered[0].manifest.digest


def test_other_data_than_pinned_is_refused(benchmark: dict[str, Any], trained: Artifact, root: Path) -> None:
    other = {**benchmark, "spec": benchmark["spec"] | {"revision": "sha256:" + "0" * 64}}
    with pytest.raises(ValueError, match="restore the data, or pin the new revision"):
        artifact.make(job_of(other, trained, root), evaluate.run)


def record(benchmark: dict[str, Any], right: float, **fields: Any) -> dict[str, Any]:
    spec = BenchmarkSpec.model_validate(benchmark["spec"] | fields)
    return {
        "score": right,
        "standard_error": 0.03,
        "checkpoint_digest": "x",
        "protocol_fields": evaluate.protocol(spec),
    }


def test_compare(benchmark: dict[str, Any]) -> None:
    a, b = record(benchmark, 0.25), record(benchmark, 0.5, title="Another title", location="elsewhere")
    assert evaluate.compare(a, b)["difference"] == 0.25
    for field, value in (("max_new_tokens", 9), ("template", "plain"), ("revision", "sha256:" + "1" * 64)):
        with pytest.raises(ValueError, match=field):
            evaluate.compare(a, record(benchmark, 0.5, **{field: value}))
