import pytest
import torch
import torch.nn.functional as F
from test_model import PIECES, SPEC, _one_thread, packed, piece
from test_tokens import TOKENS
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache

from solo.model.attention import build_mask, visible
from solo.model.causal_lm import SoloForCausalLM, let_lengths_vary
from solo.model.decoder import normalised, padded_linear
from solo.sequence.loader import side_by_side

__all__ = ["_one_thread"]


@pytest.fixture(scope="module")
def model():
    return SoloForCausalLM.from_spec(SPEC, TOKENS, 0).eval()


def alone(model, one):
    return model.logits(packed(one), torch.arange(len(one.ids)))


def on_the_right(rows):
    """The same rows with their padding behind them."""
    first = rows["attention_mask"].argmax(1)
    turned = {
        name: torch.stack([row.roll(-int(n)) for row, n in zip(rows[name], first, strict=True)])
        for name in ("input_ids", "attention_mask", "vision_patch_indices")
    }
    return rows | turned


@pytest.mark.parametrize("side", [lambda rows: rows, on_the_right], ids=["left", "right"])
def test_a_row_of_a_batch_has_the_logits_it_has_alone(model, side):
    rows = side(side_by_side(PIECES, 2))
    logits = model(**rows).logits
    for row, one, mask in zip(logits, PIECES, rows["attention_mask"].bool(), strict=True):
        assert (row[mask] - alone(model, one)).abs().max() < 1e-5


def test_a_batch_without_patches_needs_none(model):
    ids = torch.tensor([PIECES[0].ids.tolist()])
    logits = model(input_ids=ids).logits
    assert (logits[0] - alone(model, PIECES[0])).abs().max() < 1e-5
    assert torch.equal(model(ids, vision_patches=torch.zeros(0, 3072)).logits, logits)
    with pytest.raises(ValueError, match="2 vision_patches but no vision_patch_indices"):
        model(ids, vision_patches=torch.zeros(2, 3072))


def test_normalised_patches_are_taken_as_they_are(model):
    rows = side_by_side([PIECES[1]], 2)
    given = rows | {"vision_patches": normalised(rows["vision_patches"], torch.float32)}
    assert torch.equal(model(**given).logits, model(**rows).logits)


def test_the_loss_of_labels_is_that_of_the_pack(model):
    rows = side_by_side(PIECES, 2)
    labels = torch.full_like(rows["input_ids"], -100)
    for row, one in zip(labels, PIECES, strict=True):
        row[len(row) - len(one.ids) :][torch.from_numpy(one.is_target)] = torch.from_numpy(
            one.ids[one.is_target]
        ).long()
    losses = model.pack_losses(packed(*PIECES))
    assert abs(model(**rows, labels=labels).loss - losses.mean()) < 1e-5
    assert abs(model(**rows, labels=labels, num_items_in_batch=10).loss - losses.sum() / 10) < 1e-4


def test_a_cache_filled_in_two_parts_changes_nothing(model):
    """Also far beyond the window of 5, where transformers' own cache would have dropped a token that SOLO sees."""
    rows = side_by_side([PIECES[1], PIECES[3]], 2)
    whole = model(**rows).logits
    cache = DynamicCache()
    parts = []
    for first, last in ((0, 7), (7, 8), (8, whole.shape[1])):
        cut = {name: rows[name][:, first:last] for name in ("input_ids", "vision_patch_indices")}
        out = model(
            **cut,
            vision_patches=rows["vision_patches"],
            attention_mask=rows["attention_mask"][:, :last],
            past_key_values=cache,
            use_cache=True,
        )
        assert out.past_key_values is cache and cache.get_seq_length() == last
        parts.append(out.logits)
    assert (torch.cat(parts, 1) - whole)[rows["attention_mask"].bool()].abs().max() < 1e-5


def new_ids(model, pieces, n=6, **how):
    rows = side_by_side(pieces, 2)
    return model.generate(**rows, max_new_tokens=n, **how)[:, rows["input_ids"].shape[1] :]


@pytest.mark.parametrize(
    "how", [{"do_sample": False}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str
)
def test_every_way_to_generate_is_the_same_without_a_cache_and_in_a_batch(model, how):
    cached = new_ids(model, PIECES, **how)
    assert torch.equal(cached, new_ids(model, PIECES, use_cache=False, **how))
    each = how.get("num_return_sequences", 1)
    for i, one in enumerate(PIECES):
        single = new_ids(model, [one], **how)
        assert torch.equal(
            F.pad(single, (0, cached.shape[1] - single.shape[1]), value=2), cached[i * each : i * each + each]
        )


def test_no_id_of_solos_own_is_ever_said(model):
    torch.manual_seed(0)
    said = new_ids(model, PIECES, n=40, do_sample=True, temperature=50.0)
    assert said.max() < 32_000 and len(said.unique()) > 100
    assert new_ids(model, PIECES, n=40, do_sample=True, temperature=50.0, suppress_tokens=[0]).max() >= 32_000


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask is \(1, 3\), but 1 rows have 0 cached and 16 new"),
        ({"vision_patch_indices": torch.full((1, 16), 3)}, "names patch 3, vision_patches has 3"),
        ({"vision_patch_indices": torch.zeros(1, 4)}, r"vision_patch_indices is \(1, 4\) and input_ids \(1, 16\)"),
    ],
    ids=["mask", "patch", "indices"],
)
def test_rows_that_do_not_fit_together_are_refused(model, wrong, message):
    rows = side_by_side([piece(2, 10, n_patches=3)], 2)
    assert rows["input_ids"].shape == (1, 16)
    with pytest.raises(ValueError, match=message):
        model(**(rows | wrong))


def test_a_padded_head_is_the_head():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 24, generator=generator, requires_grad=True) for n in (70, 331))
    plain, padded = F.linear(x, weight), padded_linear(x, weight, 128)
    assert padded.shape == plain.shape and torch.allclose(padded, plain, atol=1e-5)
    ours, theirs = (torch.autograd.grad(out.square().sum(), (x, weight)) for out in (padded, plain))
    assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-4) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("blocks", [False, True], ids=["cpu-mask", "cuda-mask"])
def test_one_compiled_graph_serves_packs_of_every_layout(model, blocks):
    """As on CUDA, where each new graph costs minutes; here without code generation, hence without its speed.

    One graph from ids to losses: cut before the head, as it once was, head and cross entropy ran uncompiled.
    """
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model._losses, backend=count, fullgraph=True)  # a cut is an error
    for pieces in (PIECES, PIECES[1:4], [PIECES[0]], [piece(9, 1)], PIECES[::-1]):
        pack = packed(*pieces, padding=128 - sum(len(p.ids) for p in pieces))
        at = (pack.targets != -100).nonzero()[:, 0]
        ids, positions, pixels, where, _ = model._on_device(pack)
        let_lengths_vary(at, pixels, where)
        rule = visible(pack.document_ids, SPEC.sliding_window)
        mask = create_block_mask(rule, None, None, 128, 128, device="cpu") if blocks else None
        mask = mask or build_mask(pack.document_ids, SPEC.sliding_window)
        with torch.no_grad():  # flex_attention has no backward pass on a CPU
            losses = compiled(at, pack.targets, ids, positions, pixels, where, mask)
        assert (losses - model.pack_losses(pack)).abs().max() < 1e-5
    assert len(graphs) == 1
    values = [node.meta.get("example_value") for node in graphs[0].graph.nodes]
    assert 33_152 in {value.shape[-1] for value in values if isinstance(value, torch.Tensor) and value.ndim == 2}
