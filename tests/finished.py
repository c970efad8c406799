"""A finished tiny recipe in a few seconds: every part is the real one but train, whose artifact is written by hand.

The captions and questions are hostile: each tries to become a picture, a link, a tag or a table cell of a page.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tiny

from solo import artifact, line
from solo.artifact import Artifact, Job, Result
from solo.sample import Message, text
from solo.spec import ModelSpec, Tokens
from solo.train import trained

HOSTILE = [
    "![x](http://evil.test/p.png)",
    "<img src=http://evil.test/q.png> | <script>alert(1)</script>",
    "a | b ` c ** d [e](http://evil.test)",
    "www.evil.test and me@evil.test &lt;b&gt; $x$",
    "# heading \\\\ ~~~ {a} &#60;i&#62;",
    "\u202eright to left\u202c \\u0007 ||| --- |",
]


ANSWER = Message(role="assistant", content=[text("another answer")])


@dataclass
class Recipe:
    """All artifacts by node id, and the jobs that make them."""

    specs: Path
    root: Path
    made: dict[str, Artifact] = field(default_factory=dict)
    nodes: dict[str, line.Node] = field(default_factory=dict)

    def job(self, node: str) -> Job:
        n = self.nodes[node]
        inputs = {i: self.made[i] for i in n.inputs}
        return Job(n.part, n.name, n.version, n.spec, inputs, self.root, self.specs, 1, lambda line: None)

    def of(self, part: str) -> list[Artifact]:
        return [a for a in self.made.values() if a.manifest.part == part]


def make(base: Path) -> Recipe:
    specs = tiny.write_specs(base / "specs")
    # A class name of the mapping holds no space; the adapter makes one of each underscore.
    mapping = "".join(f"n{i:08d} {name.replace(' ', '_')}\n" for i, name in enumerate(HOSTILE))
    (specs / "data" / "pictures" / "mapping.txt").write_text(mapping)
    asked = (specs / "data" / "bench" / "questions.jsonl").read_text().splitlines()
    hostile = [json.loads(q) | {"question": text} for q, text in zip(asked, HOSTILE, strict=True)]
    (specs / "data" / "bench" / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in hostile))
    tiny.pin(specs)
    recipe = Recipe(specs, base / "root")
    for node in line.nodes("toy", specs):
        recipe.nodes[node.id] = node
        run = train if node.part == "train" else line._module(node.part).run
        recipe.made[node.id], _ = artifact.make(recipe.job(node.id), run)
    return recipe


def train(job: Job) -> Result:
    """What a stage leaves behind, with weights that were never trained."""
    save_model(job, job.spec["model"])
    packs = pq.read_table(job.one("pack").path / "packs.parquet").to_pylist()
    steps = [
        {
            "step": i + 1,
            "n_steps": 7,
            "loss": 9 - i,
            "lr": 1e-3,
            "tokens_per_s": 50.0,
            "sources": {p["source"]: 9.0 - i},
        }
        for i, p in enumerate(packs[:7])
    ]
    artifact.write_atomic(job.out / "metrics.jsonl", "".join(json.dumps(s) + "\n" for s in steps).encode())
    planned = job.one("pack").manifest.stats
    plan = pq.read_table(job.one("pack").path / "plan.parquet").to_pylist()
    pq.write_table(trained_rows(plan), job.out / "trained.parquet")
    names = ("n_tokens", "n_loss_tokens")
    stats = {k: planned[k] for k in ("n_packs", *names)} | {"n_steps": 7, "loss_first": 9.0, "loss_last": 3.0}
    sources = {s: {k: v[k] for k in names} | {"loss_last": 3.0} for s, v in planned["sources"].items()}
    stats |= {"tokens_per_s": 50.0, "ranks": 1, "n_parameters": 7, "sources": sources}
    stats |= {"left_out": {"documents": 0, "tokens": 0, "loss_tokens": 0, "sources": {}}}
    n = job.one("pack").manifest.counts["kept"]
    return Result(n, n, {"damaged": 0}, stats, volatile=("metrics.jsonl",))


def trained_rows(plan: list[dict], missing: Sequence[dict] = ()) -> pa.Table:
    """What a stage says of a plan that it trained without the rows `missing`."""
    rows = []
    for pack in sorted({p["pack"] for p in plan}):
        own = [p for p in plan if p["pack"] == pack and p not in missing]
        sums = {n: sum(p[n] for p in own) for n in ("n_tokens", "n_loss_tokens")}
        sources = [
            {"source": s, "loss": 1.0}
            | {n: sum(p[n] for p in own if p["source"] == s) for n in ("n_tokens", "n_loss_tokens")}
            for s in sorted({p["source"] for p in own})
        ]
        lost = [p | {"reason": trained.DAMAGED} for p in missing if p["pack"] == pack]
        out = [{f.name: p[f.name] for f in trained.LEFT_OUT} for p in lost]
        row = {"pack": pack, "step": 1, "loss": 1.0, "n_documents": len(own), "sources": sources, "left_out": out}
        rows.append(row | sums)
    return pa.Table.from_pylist(rows, trained.ROW)


def save_model(job: Job, shape: dict[str, object]) -> None:
    """A checkpoint that was never trained."""
    from solo.model.causal_lm import SoloForCausalLM

    tokens = Tokens.model_validate(job.spec["tokens"])
    model = SoloForCausalLM.from_spec(ModelSpec.model_validate(shape), tokens, int(job.spec["seed"]))
    model.save_pretrained(job.out / "checkpoint")
