"""Proof: it passes on packs as they are, and fails for every way in which documents could reach each other."""

import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_tokens import TOKENIZER, TOKENS
from torch import Tensor

from solo import artifact
from solo.artifact import Artifact, Job, Result
from solo.curate import part as curate
from solo.model import attention
from solo.model import causal_lm as model
from solo.model.attention import build_mask
from solo.pack import part as pack
from solo.pack import proof
from solo.pack.proof import ProofError
from solo.sample import IMAGE, Sample, end_tar, make_key, text, write_sample
from solo.sequence.loader import Pack, Piece, assemble, read_piece

PACK_TOKENS = 64
MASK = "lay_out" if hasattr(model, "lay_out") else "build_mask"  # what the model asks who sees whom
Mask = Callable[[Tensor, int | None], Tensor]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def small() -> model.SoloForCausalLM:
    return model.SoloForCausalLM.from_spec(proof.MODEL, TOKENS, 0).eval()


def picture(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 64, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def samples() -> list[Sample]:
    """Captions with a picture, and dialogues."""
    made = []
    for i in range(12):
        talk = ({"role": "assistant", "content": [IMAGE, text("a thing" + " again" * (i % 5))]},)
        made.append(Sample(make_key("caption", str(i)), "caption", (picture(i),), talk, {}))
        ask = {"role": "user", "content": [text("what" + " now" * (i % 3))]}
        answer = {"role": "assistant", "content": [text("that" * (i + 1))]}
        made.append(Sample(make_key("chat", str(i)), "chat", (), (ask, answer), {}))
    return made


def make(job: Job, files: dict[str, bytes]) -> Artifact:
    def run(job: Job) -> Result:
        for name, data in files.items():
            (job.out / name).parent.mkdir(exist_ok=True)
            (job.out / name).write_bytes(data)
        return Result(1, 1, {}, {})

    return artifact.make(job, run)[0]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Real shards of two sources and a lock that takes each of their samples twice."""
    root = tmp_path_factory.mktemp("inputs")
    rows: list[dict] = []
    made = {}
    for source, template in (("caption", "plain"), ("chat", "inst")):
        tar = io.BytesIO()
        for sample in (s for s in samples() if s.source == source):
            place = {"shard": 0, "offset": tar.tell(), "length": write_sample(tar, sample), "template": template}
            piece = read_piece(sample, TOKENIZER, template)
            counts = {"n_images": len(sample.images), "n_patches": len(piece.patches), "n_tokens": len(piece.ids)}
            counts |= {"n_text_tokens": len(piece.ids) - len(piece.patches), "n_loss_tokens": piece.n_loss_tokens}
            rows.append({"key": sample.key, "source": source, "n_repeats": 2} | place | counts)
        end_tar(tar)
        made[f"shard/{source}"] = make(
            Job("shard", source, 1, {}, {}, root, root, 1), {"shards/00000.tar": tar.getvalue()}
        )
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=curate.LOCK), sink)
    return made | {
        "curate/toy": make(Job("curate", "toy", 1, {}, {}, root, root, 1), {"lock.parquet": sink.getvalue()})
    }


def job(root: Path, inputs: dict[str, Artifact], *, by: str = "source") -> Job:
    spec = {"pack_tokens": PACK_TOKENS, "pack_by": by, "batch_packs": 2, "seed": 1}
    return Job("pack", "toy", 2, spec | {"tokens": TOKENS.model_dump(mode="json")}, inputs, root, root, 1)


def piece(seed: int, n: int, *, n_patches: int = 0) -> Piece:
    rng = np.random.default_rng(seed)
    shown = np.full(n, -1, np.int32)
    shown[1 : 1 + n_patches] = np.arange(n_patches)
    targets = np.arange(n) > n_patches
    ids = np.where(shown >= 0, 32_001, rng.integers(3, 32_000, n)).astype(np.int32)
    targets[0] = False
    return Piece("web", f"web-{seed}", ids, targets, shown, rng.integers(0, 256, (n_patches, 3072), np.uint8))


def packed(lengths: list[int], *, padding: int = 0, patches: int = 0) -> Pack:
    pieces = [piece(i, n, n_patches=min(patches, n - 1)) for i, n in enumerate(lengths)]
    return assemble(pieces, index=7, pack_tokens=sum(lengths) + padding)


def examine(small: model.SoloForCausalLM, pack: Pack) -> float:
    part = proof.excerpt(pack, start=0)
    proof.check_isolation(small, part)
    return proof.check_losses(small, part)


@pytest.mark.parametrize("by", ["source", "mix"])
def test_the_pack_part_proves_its_own_packs(root: Path, inputs: dict[str, Artifact], by: str) -> None:
    made, _ = artifact.make(job(root, inputs, by=by), pack.run)
    found = made.manifest.stats["proof"]
    assert found["n_packs"] == proof.N_PACKS
    assert found["n_documents"] > found["n_packs"], "packs of several documents were examined"
    assert found["n_changes"] >= 2 * found["n_packs"]
    assert found["max_logit_difference"] == 0
    assert 0 < found["max_loss_difference"] <= found["tolerance"] == proof.TOLERANCE


def all_causal(document_ids: Tensor, window: int | None) -> Tensor:
    """The leak of packing that forgets about documents."""
    n = len(document_ids)
    return torch.ones(n, n, dtype=torch.bool).tril()


def leak(q: int, k: int) -> Mask:
    """The right mask, but for one query that sees one key."""

    def mask(document_ids: Tensor, window: int | None) -> Tensor:
        seen = build_mask(document_ids, window)
        if len(seen) > max(q, k):
            seen[q, k] = True
        return seen

    return mask


def test_a_broken_mask_stops_the_pack_part(
    root: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, MASK, all_causal)
    with pytest.raises(
        ProofError, match=r"pack \d+: c\S+-\w+ is not alone: a logit moved by .* the attention mask leaks"
    ):
        artifact.make(job(root, inputs), pack.run)
    assert artifact.read_manifest(job(root, inputs).out) is None, "a plan without its proof is no artifact"


# Documents of 5, 9, 1, 20 and 7 tokens, then 11 of padding.
@pytest.mark.parametrize(
    ("mask", "culprit"),
    [
        (all_causal, "web-1"),
        (leak(5, 4), "web-1"),  # the first token of a document sees the last of the one before
        (leak(41, 0), "web-4"),  # the last of all sees the first of all
        (leak(0, 41), "web-0"),  # and the other way round, into the future
        (leak(14, 13), "web-2"),
        (leak(43, 30), "padding"),
        (leak(20, 50), "web-3"),  # a document sees padding
    ],
)
def test_one_leaking_pair_is_found(
    small: model.SoloForCausalLM, monkeypatch: pytest.MonkeyPatch, mask: Mask, culprit: str
) -> None:
    monkeypatch.setattr(model, MASK, mask)
    with pytest.raises(ProofError, match=f"pack 7: {culprit} is not alone"):
        examine(small, packed([5, 9, 1, 20, 7], padding=11, patches=2))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 12), min_size=2, max_size=9), st.integers(0, 5), st.integers(0, 3), st.data())
def test_packs_pass_and_with_any_one_leak_they_fail(
    small: model.SoloForCausalLM, lengths: list[int], padding: int, patches: int, data: st.DataObject
) -> None:
    pack = packed(lengths, padding=padding, patches=patches)
    assert examine(small, pack) <= proof.TOLERANCE
    owner = pack.document_ids.tolist()
    n = pack.n_tokens
    q, k = data.draw(
        st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda p: owner[p[0]] != owner[p[1]])
    )
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ProofError, match="is not alone"):
        patch.setattr(model, MASK, leak(q, k))
        proof.check_isolation(small, proof.excerpt(pack, start=0))


def test_a_rule_that_a_gpu_would_compile_is_looked_at_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = packed([5, 9, 1], padding=3)
    proof.check_rule(pack)
    monkeypatch.setattr(attention, "build_mask", leak(5, 4))
    with pytest.raises(ProofError, match="pack 7: token 5 of the part examined sees token 4"):
        proof.check_rule(pack)


def test_packed_losses_that_are_not_those_alone_are_found(small: model.SoloForCausalLM) -> None:
    pack = packed([9, 9, 9])
    stretched = replace(pack, position_ids=pack.position_ids * 2)
    proof.check_isolation(small, proof.excerpt(stretched, start=0))
    with pytest.raises(ProofError, match=r"pack 7: web-0: its loss in the pack and alone differ by .* > 0\.0001"):
        proof.check_losses(small, proof.excerpt(stretched, start=0))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: {"document_ids": p.document_ids.clamp(max=1)}, "documents do not lie where the plan says"),
        (lambda p: {"position_ids": torch.arange(len(p.input_ids))}, "positions do not restart at 0"),
        (lambda p: {"targets": p.targets.index_fill(0, torch.tensor([4]), 9)}, "a target lies in another document"),
        (lambda p: {"targets": p.targets.index_fill(0, torch.tensor([20]), 9)}, "a target lies in another document"),
        (lambda p: {"targets": torch.where(p.targets >= 0, 8, -100)}, "a target is not the next token"),
        (lambda p: {"patch_index": p.patch_index * 0}, "padding holds a patch"),
    ],
)
def test_tensors_that_are_not_the_plan_are_found(damage: Callable[[Pack], dict], says: str) -> None:
    pack = packed([5, 9, 7], padding=3, patches=2)
    proof.check_layout(pack, [5, 9, 7])
    with pytest.raises(ProofError, match=f"pack 7: {says}"):
        proof.check_layout(replace(pack, **damage(pack)), [5, 9, 7])


def test_a_long_pack_is_examined_in_part() -> None:
    lengths = [3000, 100, 700, 10, 900]
    pack = packed(lengths, padding=90, patches=3)
    part = proof.excerpt(pack, start=4)
    each = proof.N_TOKENS // proof.N_SHARES
    assert [(key, last - first) for _, key, first, last in part.segments] == [
        ("web-0", each),
        ("web-1", 100),
        ("web-2", each),
        ("web-3", 10),
        ("web-4", each),
    ]
    assert len(part.input_ids) == 3 * each + 110 + proof.N_PADDING
    assert len(part.patches) == 15
    assert torch.equal(part.patches, pack.patches), "with the patches they had"
    for (_, _, first, _), (_, _, was, _) in zip(part.segments, pack.segments, strict=True):
        assert torch.equal(part.input_ids[first : first + 5], pack.input_ids[was : was + 5] % proof.N_IDS)
    many = packed([100] * 60)
    part = proof.excerpt(many, start=50)
    assert part.n_tokens == proof.N_TOKENS
    numbers = [int(key.removeprefix("web-")) for _, key, _, _ in part.segments]
    assert numbers == [*range(11), *range(50, 60)], "consecutive, around the end"


def test_each_source_comes_before_a_second_pack_of_any() -> None:
    sources = ["a"] * 50 + ["b"] * 3 + ["c"]
    got = proof.chosen(sources, 1)
    assert [sources[i] for i in got][:3] in [list(p) for p in ("abc", "acb", "bac", "bca", "cab", "cba")]
    assert len(set(got)) == proof.N_PACKS
    assert got == proof.chosen(sources, 1) != proof.chosen(sources, 2)
    assert proof.chosen(["a"], 1) == [0]


def test_pack_does_not_load_torch_before_it_proves() -> None:
    code = "import solo.pack, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
