"""Locks of samples that exist in name alone, and the plans that are made of them."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from solo import artifact
from solo.artifact import Artifact, Job, Result
from solo.curate import part as curate
from solo.pack import part as pack

PACK_TOKENS = 100


def rows(source: str, n_tokens: list[int], *, template: str = "plain", images: int = 0, repeats: int = 1) -> list[dict]:
    """Lock rows; a text-only row is all answer, a row with images has 4 patches and 3 supervised tokens."""
    return [
        {
            "key": f"{source}-{i:012x}",
            "source": source,
            "shard": 0,
            "offset": 512 * i,
            "length": 512,
            "template": template,
            "n_images": images,
            "n_patches": 4 * images,
            "n_text_tokens": n - 4 * images,
            "n_loss_tokens": 3 if images else n - 1,
            "n_tokens": n,
            "n_repeats": repeats,
        }
        for i, n in enumerate(n_tokens)
    ]


def lengths(n: int, seed: int, low: int = 10, high: int = 60) -> list[int]:
    return np.random.default_rng(seed).integers(low, high, n).tolist()


def lock(root: Path, members: list[dict]) -> Artifact:
    def run(job: Job) -> Result:
        pq.write_table(pa.Table.from_pylist(members, schema=curate.LOCK), job.out / "lock.parquet")
        return Result(len(members), len(members), {}, {})

    spec = {"rows": hashlib.sha256(repr(members).encode()).hexdigest()}
    return artifact.make(Job("curate", "toy", 1, spec, {}, root, root, 1), run)[0]


def job(root: Path, members: list[dict], *, by: str = "source", batch: int = 1, workers: int = 1, seed: int = 1) -> Job:
    spec = {"pack_tokens": PACK_TOKENS, "pack_by": by, "batch_packs": batch, "seed": seed}
    return Job("pack", "toy", pack.VERSION, spec, {"curate/toy": lock(root, members)}, root, root, workers)


def run(root: Path, members: list[dict], **options) -> Artifact:
    """The plan alone: these locks name no real sample; tests/test_proof.py has shards."""
    return artifact.make(job(root, members, **options), pack.make_plan)[0]


def plan(made: Artifact) -> list[dict]:
    return pq.read_table(made.path / "plan.parquet").to_pylist()


def packs(made: Artifact) -> list[dict]:
    return pq.read_table(made.path / "packs.parquet").to_pylist()


def digests(made: Artifact) -> dict[str, str]:
    return {f["path"]: f["sha256"] for f in made.manifest.files}


def mixed() -> list[dict]:
    """Captions, text with documents longer than a pack, and a chat source with one that must be dropped."""
    chat = rows("chat", [*lengths(20, 3), 250], template="inst")
    return rows("captions", lengths(60, 1), images=1, repeats=2) + rows("text", [*lengths(30, 2), 100, 101, 350]) + chat
