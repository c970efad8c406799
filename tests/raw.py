"""An acquire artifact written by the test: raw tars and outcome rows, made through `artifact.make` like a real one."""

import hashlib
import io
import pickle
import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from solo.acquire.part import SCHEMA
from solo.artifact import Artifact, Job, Result, make
from solo.filter import part as filter_part
from solo.sample import IMAGE, Sample, end_tar, text, write_sample
from solo.shard import part as shard_part

SOURCE = "web"
TOKENS = {
    "tokenizer": "mistral_common:data/tokenizer.model.v1",
    "tokenizer_sha256": "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
    "patch_px": 32,
    "max_side_px": 128,
    "image_close": {"plain": "</vision>", "inst": "<vision>"},
}


def picture(width, height, *, seed=0, kind="PNG", **save):
    """A picture of blocks of noise: small as a file, unlike any other seed's."""
    noise = Image.frombytes("RGB", (8, 8), random.Random(seed).randbytes(192))
    out = io.BytesIO()
    noise.resize((width, height)).save(out, kind, **save)
    return out.getvalue()


def sample(i, *, images=(), caption="a small cat on a mat", question=None, **meta):
    """Sample `web-<i>`: its images and the caption in one assistant turn, after a user turn where one is asked for."""
    content = [*(IMAGE for _ in images), *([text(caption)] if caption is not None else [])]
    turns = [{"role": "assistant", "content": content}]
    if question is not None:
        content = [*(IMAGE for _ in images), text(question)]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [text(caption)]}]
    return Sample(f"{SOURCE}-{i:012x}", SOURCE, tuple(images), tuple(turns), meta)


def acquired(root: Path, samples: Sequence[Sample], *, per_shard: int = 4, n_failed: int = 2) -> Artifact:
    """The samples in raw tars of `per_shard`, in the order given, and `n_failed` outcome rows without one."""

    def run(job: Job) -> Result:
        rows = []
        (job.out / "raw").mkdir(parents=True)
        for shard, first in enumerate(range(0, len(samples), per_shard)):
            with (job.out / "raw" / f"{shard:05d}.tar").open("wb") as tar:
                for one in samples[first : first + per_shard]:
                    offset = tar.tell()
                    length = write_sample(tar, one)
                    place = {"raw_shard": shard, "offset": offset, "length": length}
                    rows.append({"identity": one.key, "key": one.key, "status": "ok", **place})
                end_tar(tar)
        rows += [{"identity": f"row {i}", "key": f"{SOURCE}-f{i:011x}", "status": "http_404"} for i in range(n_failed)]
        # A repeat upstream has the key of the sample that was kept, and no place.
        rows += [{"identity": "again", "key": one.key, "status": "duplicate_row"} for one in samples[:1]]
        rows.sort(key=lambda r: (r["key"], r["identity"]))
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), job.out / "outcomes.parquet")
        dropped = {"http_404": n_failed, "duplicate_row": len(samples[:1])}
        return Result(len(rows), len(samples), dropped, {})

    content = hashlib.sha256(pickle.dumps((samples, per_shard))).hexdigest()
    return make(job("acquire", {"source": SOURCE, "revision": content}, [], root), run)[0]


def job(part, spec, inputs, root, *, workers=1, version=1):
    """A job of this source."""
    by_id = {artifact.manifest.id: artifact for artifact in inputs}
    return Job(part, SOURCE, version, spec, by_id, root, root / "specs", workers)


def filtered(root, source, *, signals=("image.size", "image.hashes", "text.size"), workers=1, **fields):
    """Run filter over an acquire artifact."""
    spec = {"signals": list(signals), "keep": {}} | fields
    return make(job("filter", {"filter": spec}, [source], root, workers=workers), filter_part.run)[0]


def sharded(root, samples, *, size=4, template="plain", workers=1, tokens=TOKENS, jpeg_quality=None, **how):
    """Acquire, filter and shard these samples; returns the shard artifact."""
    source = acquired(root, samples, per_shard=how.pop("per_shard", 5))
    inputs = [source, filtered(root, source, **how)]
    grid = {"grid_pictures": {"jpeg_quality": jpeg_quality}} if jpeg_quality else {}
    spec = {"shard": {"samples_per_shard": size, "template": template} | grid, "tokens": tokens}
    return make(job("shard", spec, inputs, root, workers=workers), shard_part.run)[0]


def rows(path: Path) -> list[dict]:
    """Rows of a Parquet file."""
    return pq.read_table(path).to_pylist()


def same_files(one: Artifact, other: Artifact) -> bool:
    """Whether two artifacts hold the same bytes under the same names."""
    return [(f["path"], f["sha256"]) for f in one.manifest.files] == [
        (f["path"], f["sha256"]) for f in other.manifest.files
    ]
