import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_tokens import TOKENS
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from solo.model.attention import attend, build_mask, visible
from solo.model.causal_lm import SoloConfig, SoloForCausalLM
from solo.sequence.loader import Piece, assemble, side_by_side
from solo.spec import ModelSpec

WINDOW = 5
SPEC = ModelSpec(
    init="random",
    vocab_size=33_029,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_theta=10_000.0,
    rms_norm_eps=1e-5,
    sliding_window=WINDOW,
    max_position_embeddings=128,
    init_std=0.1,
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Matrices this small are ten times slower on two busy cores than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model():
    return SoloForCausalLM.from_spec(SPEC, TOKENS, 0)


def piece(seed, n_words, n_patches=0, key=None):
    """<vision>, patches, </vision>, then words; the words carry loss."""
    rng = np.random.default_rng(seed)
    head = [1, *([32_000] + [32_001] * n_patches + [32_004] if n_patches else [])]
    ids = np.array([*head, *rng.integers(3, 32_000, n_words)], np.int32)
    is_patch = ids == 32_001
    return Piece(
        source="web",
        key=key or f"web-{seed}",
        ids=ids,
        is_target=np.arange(len(ids)) >= len(head),
        patch_index=np.where(is_patch, np.cumsum(is_patch) - 1, -1).astype(np.int32),
        patches=rng.integers(0, 256, (n_patches, 3072), np.uint8),
    )


def packed(*pieces, padding=0):
    return assemble(pieces, index=0, pack_tokens=sum(len(p.ids) for p in pieces) + padding)


PIECES = [piece(1, 9), piece(2, 12, n_patches=3), piece(3, 1), piece(4, 20, n_patches=2), piece(5, 7)]


def test_packed_losses_are_those_of_each_document_alone(model):
    pack = packed(*PIECES, padding=11)
    together = model.pack_losses(pack)
    assert together.dtype == torch.float32 and len(together) == 9 + 12 + 1 + 20 + 7 == pack.n_loss_tokens
    ranges = pack.loss_ranges()
    assert [(key, last - first) for _, key, first, last in ranges] == [(p.key, p.n_loss_tokens) for p in PIECES]
    for document, (_, _, first, last) in zip(PIECES, ranges, strict=True):
        alone = model.pack_losses(packed(document))
        assert (together[first:last] - alone).abs().max() < 1e-5


@pytest.mark.parametrize("changed", range(len(PIECES)))
def test_a_changed_document_changes_no_bit_of_another(model, changed):
    before = model.pack_losses(packed(*PIECES, padding=11))
    other = list(PIECES)
    ids = other[changed].ids.copy()
    ids[ids < 32_000] = (ids[ids < 32_000] + 77) % 31_000 + 3
    other[changed] = replace(other[changed], ids=ids, patches=255 - other[changed].patches)
    after = model.pack_losses(packed(*other, padding=11))
    for i, (_, _, first, last) in enumerate(packed(*PIECES).loss_ranges()):
        assert torch.equal(before[first:last], after[first:last]) == (i != changed)


def test_the_mask_by_hand():
    seen = build_mask(torch.tensor([0, 0, 0, 1, 1, -1, -1], dtype=torch.int32), 1).int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0],  # window 1: itself and one before
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],  # padding sees itself alone
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert build_mask(torch.zeros(9, dtype=torch.int32), None).sum() == 45


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_block_mask_of_cuda_is_the_mask_of_cpu():
    document_ids = torch.tensor([0] * 100 + [1] * 70 + [2] * 80 + [-1] * 50, dtype=torch.int32)
    n = len(document_ids)
    q, k, v = (torch.randn(heads, n, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    blocks = create_block_mask(visible(document_ids, 30), None, None, n, n, device="cpu")
    flex = flex_attention(q[None], k[None], v[None], block_mask=blocks, enable_gqa=True)[0]
    assert (flex - attend(q, k, v, build_mask(document_ids, 30))).abs().max() < 1e-5


@pytest.mark.gpu
def test_cuda_gives_the_losses_and_gradients_of_cpu():
    spec = SPEC.model_copy(update={"hidden_size": 128, "num_attention_heads": 4, "sliding_window": 40})
    pack = packed(*PIECES, piece(6, 90), padding=11)
    results = []
    for device in ("cpu", "cuda"):
        model = SoloForCausalLM.from_spec(spec, TOKENS, 0).to(device)
        losses = model.pack_losses(pack)
        losses.mean().backward()
        results.append([losses.cpu(), *(p.grad.cpu() for p in model.parameters())])
    assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-3) for a, b in zip(*results, strict=True))


def test_a_token_reaches_window_tokens_back_and_no_further():
    model = SoloForCausalLM.from_spec(SPEC.model_copy(update={"num_hidden_layers": 1}), TOKENS, 0)
    document = piece(1, 15)
    base = model.hidden(packed(document))
    for k in range(16):
        ids = document.ids.copy()
        ids[k] += 1
        moved = (model.hidden(packed(replace(document, ids=ids))) != base).any(-1).nonzero()[:, 0].tolist()
        assert moved == [q for q in range(16) if 0 <= q - k <= WINDOW]


def test_it_is_transformers_mistral_for_text(model):
    config = MistralConfig(
        **SPEC.model_dump(exclude={"init", "init_std", "rope_theta", "rope_scaling", "sliding_window"}),
        rope_parameters={"rope_type": "default", "rope_theta": SPEC.rope_theta},
        sliding_window=WINDOW + 1,  # transformers counts the token itself
        attn_implementation="sdpa",
    )
    mistral = MistralForCausalLM(config)
    weights = {n: t for n, t in model.state_dict().items() if "vision" not in n}
    mistral.load_state_dict(weights, strict=True)
    document = piece(3, 30)
    theirs = mistral(torch.from_numpy(document.ids).long()[None], use_cache=False).logits[0]
    ours = model.logits(packed(document), torch.arange(31))
    assert (ours - theirs).abs().max() < 1e-5


def test_a_patch_is_added_to_its_token(model):
    document = piece(2, 2, n_patches=2)
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.hidden(packed(piece(1, 3), document))  # the second document's patches, behind another document
    pixels = torch.from_numpy(document.patches).float().view(2, 3, 32, 32) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normal = ((pixels - mean[:, None, None]) / std[:, None, None]).flatten(1)
    weights = model.state_dict()
    expected = weights["model.embed_tokens.weight"][32_001] + normal @ weights["model.embed_vision_patch.weight"].T
    assert torch.allclose(seen[0][6:8], expected, atol=1e-5)
    assert torch.equal(seen[0][5], weights["model.embed_tokens.weight"][32_000])


def test_the_gradient_reaches_the_patch_projection(model):
    projection = model.model.embed_vision_patch.weight
    model.pack_losses(packed(*PIECES)).mean().backward()
    assert projection.grad.abs().sum() > 0
    model.zero_grad()
    model.pack_losses(packed(piece(1, 9))).mean().backward()
    assert not projection.grad.any()  # zero, not absent: ranks without images join the same reduction


def test_recomputed_layers_give_the_same_gradient(model):
    grads = []
    for n_layers in (0, 1, 2):
        model.zero_grad()
        model.train().model.recompute_layers = n_layers
        model.pack_losses(packed(*PIECES)).mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads, strict=True))


def test_save_and_load_return_the_same_bits(model, tmp_path):
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    layer = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    layer += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
    stem = {"model.embed_tokens", "model.embed_vision_patch", "model.norm", "lm_head"}
    stem |= {f"model.layers.{i}.{part}" for i in range(2) for part in layer}
    assert names == {f"{name}.weight" for name in stem}
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "solo"
    assert isinstance(AutoConfig.from_pretrained(tmp_path), SoloConfig)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, SoloForCausalLM) and again.config.sliding_window == WINDOW
    pack = packed(*PIECES)
    assert torch.equal(again.pack_losses(pack), model.pack_losses(pack))
    assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())


def test_first_weights_come_from_names(model):
    deeper = SoloForCausalLM.from_spec(SPEC.model_copy(update={"num_hidden_layers": 3}), TOKENS, 0).state_dict()
    assert all(torch.equal(deeper[n], t) for n, t in model.state_dict().items())
    other = SoloForCausalLM.from_spec(SPEC, TOKENS, 1).state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1:
            assert (tensor == 1).all()
        else:
            assert not torch.equal(other[name], tensor)
            assert abs(tensor.std() / SPEC.init_std - 1) < 0.1
    assert not torch.equal(deeper["model.layers.0.mlp.up_proj.weight"], deeper["model.layers.0.mlp.gate_proj.weight"])


def test_init_from_a_text_model_keeps_its_rows_and_draws_the_rest(model, tmp_path):
    given = {n: t + 1 for n, t in model.state_dict().items() if "vision" not in n}
    short = {n: t[:32_000].contiguous() if len(t) == 33_029 else t for n, t in given.items()}
    save_file(short, tmp_path / "model.safetensors")
    spec = SPEC.model_copy(update={"init": str(tmp_path)})
    got = SoloForCausalLM.from_spec(spec, TOKENS, 0).state_dict()
    assert all(torch.equal(got[n][: len(t)], t) for n, t in short.items())
    drawn = model.state_dict()
    assert torch.equal(got["lm_head.weight"][32_000:], drawn["lm_head.weight"][32_000:])
    assert torch.equal(got["model.embed_vision_patch.weight"], drawn["model.embed_vision_patch.weight"])
    save_file({"model.extra.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.extra.weight is .* no such tensor"):
        SoloForCausalLM.from_spec(spec, TOKENS, 0)
    with pytest.raises(ValueError, match=r"no \*.safetensors"):
        SoloForCausalLM.from_spec(SPEC.model_copy(update={"init": str(tmp_path / "none")}), TOKENS, 0)


def greedy(model, prompt, n):
    """One prompt, one token at a time, nothing clever."""
    answer = []
    for _ in range(n):
        document = prompt.extended(answer)
        logits = model.logits(packed(document), torch.tensor([len(document.ids) - 1]))[0]
        logits[32_000:] = -torch.inf
        answer.append(int(logits.argmax()))
        if answer[-1] == 2:
            return answer[:-1]
    return answer


def answers(model, prompts, n):
    """The same by `generate`: rows of one batch, a cache, padding on the left."""
    rows = side_by_side(prompts, 2)
    ids = model.generate(**rows, max_new_tokens=n, do_sample=False)[:, rows["input_ids"].shape[1] :].tolist()
    return [one[: one.index(2)] if 2 in one else one for one in ids]


@pytest.mark.parametrize("rows", [1, 5])
def test_completion_is_greedy_whatever_the_batch(model, rows):
    expected = [greedy(model, p, 4) for p in PIECES]
    with torch.no_grad():  # now one of SOLO's own ids would win everywhere, were it allowed to
        first = model.logits(packed(PIECES[0]), torch.tensor([len(PIECES[0].ids) - 1]))[0]
        model.lm_head.weight[32_005] = 10 * model.lm_head.weight[int(first[:32_000].argmax())]
        assert model.logits(packed(PIECES[0]), torch.tensor([len(PIECES[0].ids) - 1]))[0].argmax() == 32_005
    for batch in ([p] for p in PIECES) if rows == 1 else [PIECES]:
        assert answers(model, batch, 4) == [expected[PIECES.index(p)] for p in batch]


def test_it_learns_to_name_what_a_patch_shows_and_then_stops(model):
    def question(level, answer):
        prompt = replace(piece(1, 3, n_patches=1), patches=np.full((1, 3072), level, np.uint8))
        n = len(prompt.ids)
        return prompt, replace(prompt.extended([*answer, 2]), is_target=np.arange(n + len(answer) + 1) >= n)

    (black, black_said), (white, white_said) = question(0, [500, 600]), question(255, [700])
    pack = packed(black_said, white_said)
    assert pack.n_loss_tokens == 5
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = model.pack_losses(pack).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]
    assert answers(model.eval(), [white, black], 6) == [[700], [500, 600]]


def test_head_counts_must_divide():
    with pytest.raises(ValueError, match="num_attention_heads 4 is not a multiple of num_key_value_heads 3"):
        SoloForCausalLM.from_spec(SPEC.model_copy(update={"num_key_value_heads": 3}), TOKENS, 0)
