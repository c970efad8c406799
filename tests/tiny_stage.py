"""A stage of a few tiny packs: shards of two sources, a plan by hand, the job that trains it."""

import io
import json
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from solo import artifact
from solo.artifact import Artifact, Job, Manifest
from solo.pack.part import PACKS, PLAN
from solo.sample import IMAGE, Sample, end_tar, make_key, text, write_sample
from solo.sequence.patches import grid, image_size
from solo.sequence.tokens import Tokenizer, tokenize
from solo.spec import Stage, Tokens
from solo.train import part as train

RECIPE = yaml.safe_load((Path(__file__).parents[1] / "datasets_spec" / "recipes" / "sample.yaml").read_text())
TOKENS = Tokens.model_validate(RECIPE["tokens"])
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
MODEL = RECIPE["model"] | SMALL | {"num_key_value_heads": 1}
EVERY = 4
STAGE = RECIPE["stages"][0] | {
    "name": "tiny",
    "mix": "tiny",
    "pack_tokens": 64,
    "batch_packs": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "checkpoint_every_steps": EVERY,
}


def picture(seed: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 40), tuple(random.Random(seed).randbytes(3))).save(out, "PNG")
    return out.getvalue()


def samples() -> list[Sample]:
    """Eight captions with an image, eight texts, one prompt that nobody answers (it has no target)."""
    made = []
    for i in range(8):
        talk = {"role": "assistant", "content": [IMAGE, text(f"a picture of thing {i}")]}
        made.append(Sample(make_key("caption", str(i)), "caption", (picture(i),), (talk,), {}))
        talk = {"role": "assistant", "content": [text(f"the cat {i} sat on the mat and the dog sat on the cat")]}
        made.append(Sample(make_key("prose", str(i)), "prose", (), (talk,), {}))
    for i, words in enumerate(
        ("colourless green ideas sleep furiously tonight", "seven purple umbrellas argued about zinc")
    ):
        talk = {"role": "assistant", "content": [text(words)]}
        made.append(Sample(make_key("prose", f"odd {i}"), "prose", (), (talk,), {}))
    mute = {"role": "user", "content": [text("is anybody there")]}
    made.append(Sample(make_key("prose", "mute"), "prose", (), (mute,), {}))
    return made


def make_plan(root: Path, n_steps: int, odd: int | None = None) -> dict[str, Artifact]:
    """Shards of two sources and a plan that repeats four memorisable packs; pack 1 is one without a target.

    Pack `odd` is the only one with the two texts of no cat.
    """
    tokenizer = Tokenizer(TOKENS)
    rows, tars = {}, {}
    for sample in samples():
        tar = tars.setdefault(sample.source, io.BytesIO())
        offset = tar.tell()
        length = write_sample(tar, sample)
        grids = [grid(*image_size(d), patch_px=TOKENS.patch_px, max_side_px=TOKENS.max_side_px) for d in sample.images]
        d = tokenize(sample, grids, tokenizer, "plain")
        counts = {"n_tokens": len(d.ids), "n_patches": d.n_patches, "n_loss_tokens": d.n_loss_tokens}
        place = {"shard": 0, "offset": offset, "length": length, "template": "plain", "begin": 0, "end": len(d.ids)}
        rows.setdefault(sample.source, []).append({"key": sample.key, "source": sample.source} | place | counts)
    inputs = {}
    for source, tar in tars.items():
        folder = root / "shard" / source
        (folder / "shards").mkdir(parents=True)
        end_tar(tar)
        (folder / "shards" / "00000.tar").write_bytes(tar.getvalue())
        inputs[f"shard/{source}"] = made(folder, f"shard/{source}")
    mute = rows["prose"].pop()
    held = [rows["prose"][8:], rows["caption"][6:]]  # texts of no cat, two pictures: measured where a job asks for it
    kinds = [rows["caption"][:3], rows["prose"][:2], rows["prose"][2:4], rows["caption"][3:6] + rows["prose"][4:5]]
    plan, packs = [], []
    for pack in range(n_steps * STAGE["batch_packs"]):
        documents = [mute] if pack == 1 else rows["prose"][8:10] if pack == odd else kinds[pack % 4]
        sums = {c: sum(d[c] for d in documents) for c in ("n_tokens", "n_patches", "n_loss_tokens")}
        assert sums["n_tokens"] <= STAGE["pack_tokens"]
        packs.append({"pack": pack, "first_row": len(plan), "n_rows": len(documents), "source": "mix"} | sums)
        plan += [{"pack": pack, "slot": slot, "exposure": pack} | d for slot, d in enumerate(documents)]
    folder = root / "pack" / "tiny"
    write(folder, plan, packs)
    sums = [{c: sum(d[c] for d in ds) for c in ("n_tokens", "n_patches", "n_loss_tokens")} for ds in held]
    heads = [{"pack": i, "first_row": 2 * i, "n_rows": 2, "source": "mix"} | own for i, own in enumerate(sums)]
    own = [{"pack": i, "slot": slot, "exposure": 0} | d for i, ds in enumerate(held) for slot, d in enumerate(ds)]
    write(folder / "held_out", own, heads)
    return inputs | {"pack/tiny": made(folder, "pack/tiny", len(plan))}


def write(folder: Path, plan: list[dict], packs: list[dict]) -> None:
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(plan, PLAN), folder / "plan.parquet")
    pq.write_table(pa.Table.from_pylist(packs, PACKS), folder / "packs.parquet")


def made(folder: Path, node: str, n: int = 0, **spec: object) -> Artifact:
    part, name = node.split("/")
    spec = {"seed": 1, "batch_packs": STAGE["batch_packs"], "pack_tokens": STAGE["pack_tokens"]} | spec
    counts = {"in": n, "kept": n, "dropped": {}}
    manifest = Manifest(part, name, "0" * 8, 1, spec, {"curate/tiny": "2" * 64}, "1" * 64, [], counts, {}, {})
    (folder / artifact.MANIFEST).write_text(json.dumps(asdict(manifest)))
    return Artifact(folder, manifest)


def make_job(root: Path, inputs: dict[str, Artifact], **fields: object) -> Job:
    spec = {"stage": STAGE | fields, "model": MODEL, "tokens": TOKENS.model_dump(mode="json"), "seed": 3}
    return Job("train", "tiny", train.VERSION, spec, inputs, root, root / "specs", 2)


@contextmanager
def joined() -> Iterator[None]:
    """This process as the only rank of a group."""
    with pytest.MonkeyPatch.context() as patch:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in (one | {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}).items():
            patch.setenv(name, value)
        import torch

        from solo.train import engine, trainer

        torch.set_num_threads(1)  # two cost a tiny model more than they give
        if not trainer.dist.is_initialized():  # once a process, and never ended: DeepSpeed cannot join a second group
            engine.connect("cpu")
        yield


@contextmanager
def one_rank() -> Iterator[Callable[..., list[dict]]]:
    """What trains a job in this process, a launch costs five seconds, and gives its metrics."""
    with joined(), pytest.MonkeyPatch.context() as patch:
        from solo.train import trainer

        rows: list[dict] = []

        def run(job: Job, hook: Callable[[dict], object] = lambda row: None, **task: object) -> list[dict]:
            patch.setattr(trainer, "emit", lambda row: (rows.append(row), hook(row)))
            job.work.mkdir(parents=True, exist_ok=True)
            rows.clear()
            stage = Stage.model_validate(job.spec["stage"])
            assert trainer.Trainer(train._task(job, stage, device="cpu", ranks=1) | task).run()
            found = [row for row in rows if "loss" in row]
            with (job.out / "metrics.jsonl").open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
            return found

        yield run
