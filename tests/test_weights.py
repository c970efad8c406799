"""Checkpoints in the layout in which SOLO-7B is released: sharded, bf16, a config.json of 2024."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import PIECES, SPEC, _one_thread
from test_tokens import TOKENS
from transformers import AutoConfig, AutoModelForCausalLM

from solo.model.causal_lm import SoloForCausalLM
from solo.sequence.loader import side_by_side

__all__ = ["_one_thread"]

N_SHARDS = 3
LOST = "model.layers.1.mlp.up_proj.weight"


def released(folder, vocab_size=33_029):
    """Write a small checkpoint just as SOLO-7B lies on the hub; returns its tensors."""
    model = SoloForCausalLM.from_spec(SPEC.model_copy(update={"vocab_size": vocab_size}), TOKENS, 3)
    tensors = {name: t.to(torch.bfloat16) for name, t in model.state_dict().items()}
    config = {
        "architectures": ["SoloForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": SPEC.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": SPEC.intermediate_size,
        "max_position_embeddings": 32768,
        "model_type": "solo",
        "num_attention_heads": SPEC.num_attention_heads,
        "num_hidden_layers": SPEC.num_hidden_layers,
        "num_key_value_heads": SPEC.num_key_value_heads,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.2",
        "use_cache": True,
        "vocab_size": vocab_size,
    }
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.40.2"}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    names = [f"model-{i + 1:05d}-of-{N_SHARDS:05d}.safetensors" for i in range(N_SHARDS)]
    placed = {name: names[i * N_SHARDS // len(tensors)] for i, name in enumerate(tensors)}
    for shard in names:
        save_file({n: tensors[n] for n, s in placed.items() if s == shard}, folder / shard, metadata={"format": "pt"})
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def rewrite(folder, change):
    """Apply `change` to the tensors of the shard that holds LOST, and to the index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = index["weight_map"][LOST]
    tensors = load_file(folder / shard)
    change(tensors)
    save_file(tensors, folder / shard, metadata={"format": "pt"})
    index["weight_map"] = {n: s for n, s in index["weight_map"].items() if s != shard} | dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("vocab_size", [33_029, 33_031])
def test_the_released_layout_loads_with_every_bit(tmp_path, vocab_size):
    tensors = released(tmp_path, vocab_size)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(model, SoloForCausalLM) and model.dtype == torch.bfloat16 and not model.training
    assert model.state_dict().keys() == tensors.keys()
    assert all(torch.equal(model.state_dict()[n], t) for n, t in tensors.items())
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.n_text_ids, config.patch_px, config.max_side_px) == (32_000, 32, 1024)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0} and config.sliding_window == 5
    rows = side_by_side(PIECES, 2)
    said = model.generate(**rows, max_new_tokens=4, do_sample=False)[:, rows["input_ids"].shape[1] :]
    assert said.max() < 32_000  # also the two chat ids of the larger vocabulary are SOLO's own
    spec = SPEC.model_copy(update={"vocab_size": vocab_size, "init": str(tmp_path)})
    trained_from_it = SoloForCausalLM.from_spec(spec, TOKENS, 0).state_dict()
    assert all(torch.equal(trained_from_it[n], t.float()) for n, t in tensors.items())


def both_ways(folder):
    """To talk to it, and to train from it."""
    yield lambda: AutoModelForCausalLM.from_pretrained(folder)
    yield lambda: SoloForCausalLM.from_spec(SPEC.model_copy(update={"init": str(folder)}), TOKENS, 0)


DAMAGE = {
    "missing": (lambda t: t.pop(LOST), f"{LOST} missing"),
    "unknown": (lambda t: t.update({"model.layers.1.mlp.router.weight": torch.zeros(2)}), "mlp.router.weight"),
    "misshapen": (lambda t: t.update({LOST: t[LOST][:-1].contiguous()}), LOST),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_tensor_that_is_missing_or_unknown_is_named(tmp_path, what):
    released(tmp_path)
    change, message = DAMAGE[what]
    rewrite(tmp_path, change)
    for load in both_ways(tmp_path):
        with pytest.raises(ValueError, match=message.replace(".", r"\.")):
            load()


def test_a_lost_or_cut_file_is_named(tmp_path):
    released(tmp_path)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    for content in (whole[: len(whole) // 2], None):
        shard.write_bytes(content) if content else shard.unlink()
        for load in both_ways(tmp_path):
            with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors.*fetch the"):
                load()


def test_a_smaller_vocabulary_is_no_damage_but_a_larger_one_is(tmp_path):
    released(tmp_path, 33_031)
    with pytest.raises(ValueError, match=r"embed_tokens.weight is \[33031, 32\], the model has \[33029, 32\]"):
        list(both_ways(tmp_path))[1]()
