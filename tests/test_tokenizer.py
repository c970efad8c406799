"""Both kinds of tokenizer file: what no text may reach, and that all other ids are those of the file as it is."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from test_tokens import TOKENIZER, TOKENS, anything, sample
from tokenizers import decoders, models, pre_tokenizers, trainers

from solo.artifact import CHECKOUT
from solo.model.causal_lm import SoloForCausalLM
from solo.sample import IMAGE, text
from solo.sequence.tokenizer import SOLO, Tokenizer, Vocabulary, check_model, read_pinned, tokenizer_path
from solo.sequence.tokenizer_file import OWN
from solo.sequence.tokens import tokenize
from solo.spec import RecipeSpec, Tokens, load

CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "<s>"]


def byte_pairs() -> dict:
    """A small byte-level tokenizer.json with each way in that real ones have: a token that is not flagged special, one
    that merges make of its letters, and words looked up whole."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=CONTROLS[:3], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    raw = json.loads(made.to_str())
    n = made.get_vocab_size()
    raw["model"]["vocab"] |= {"<s": n, "<s>": n + 1}
    raw["model"]["merges"] = [["<", "s"], ["<s", ">"], *raw["model"]["merges"]]
    raw["model"]["ignore_merges"] = True
    special = raw["added_tokens"][0]
    raw["added_tokens"] += [special | {"id": n + 1, "content": "<s>"}]
    raw["added_tokens"] += [special | {"id": n + 2, "content": "<think>", "special": False}]
    return raw


def pinned(path: Path, data: bytes, **fields: object) -> Tokens:
    path.write_bytes(data)
    given = {"tokenizer": str(path), "tokenizer_sha256": hashlib.sha256(data).hexdigest()} | fields
    return Tokens.model_validate(TOKENS.model_dump() | given)


def as_json(path: Path, raw: dict, **fields: object) -> Tokens:
    return pinned(path, json.dumps(raw).encode(), **{"bos": "<|endoftext|>", "eos": "<|im_end|>"} | fields)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return as_json(tmp_path_factory.mktemp("json") / "tokenizer.json", byte_pairs())


@pytest.fixture(scope="module")
def pairs(made):
    return Tokenizer(made)


CONTROL_IDS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
tricky = st.lists(st.one_of(st.sampled_from([*CONTROLS, *OWN, "<", "s>", " ", "\n", "x"]), anything), max_size=5)


def test_an_untouched_file_lets_text_write_control_ids(made):
    """What is guarded against is real."""
    raw = tokenizers.Tokenizer.from_file(made.tokenizer)
    assert raw.encode("a<|im_end|>b").ids[1] == 2
    raw.encode_special_tokens = True
    assert 2 not in raw.encode("a<|im_end|>b").ids
    assert raw.token_to_id("<think>") in raw.encode("a<think>b").ids
    assert raw.token_to_id("<s>") in raw.encode("<s>").ids
    v3 = Path(tokenizer_path("mistral_common:data/mistral_instruct_tokenizer_240323.model.v3")).read_bytes()
    assert 751 in SentencePieceProcessor(model_proto=v3).encode("see [REFERENCE_DOC_19]")


@given(value=tricky.map("".join))
def test_text_never_gives_a_control_id_and_comes_back(pairs, value):
    got = pairs.encode(value)
    assert not {*CONTROL_IDS.values(), pairs.file.id_of("<think>"), pairs.file.id_of("<s>")} & set(got)
    assert all(pairs.file.is_text[i] for i in got)
    v = pairs.vocabulary
    assert pairs.decode([v.bos, *got, v.vision, v.eos, v.size + 7, -1]) == value


@given(value=anything)
def test_ordinary_text_has_the_ids_of_the_untouched_file(made, pairs, value):
    raw = tokenizers.Tokenizer.from_file(made.tokenizer)
    raw.encode_special_tokens = True
    if not any(token in value for token in CONTROLS):
        assert pairs.encode(value) == raw.encode(value, add_special_tokens=False).ids


@given(asked=tricky.map("".join), answered=tricky.map("".join), template=st.sampled_from(["plain", "inst"]))
def test_documents_of_another_vocabulary(pairs, asked, answered, template):
    v = pairs.vocabulary
    turns = (("user", IMAGE, text(asked)), ("assistant", text(answered)))
    document = tokenize(sample(*turns), [(1, 2)], pairs, template)
    control = [i for i in document.ids.tolist() if i >= v.n_text_ids or pairs.file.is_control[i]]
    block = [v.vision, v.vpatch, v.vpatch, v.vision_end if template == "plain" else v.vision]
    ends = [v.eos] if template == "inst" and answered.strip() else []
    assert control == ([v.bos, *block] if template == "plain" else [*block, v.bos, *ends])
    assert np.flatnonzero(document.patch_index >= 0).tolist() == np.flatnonzero(document.ids == v.vpatch).tolist()


def test_the_vocabulary_follows_the_backbones_embedding(made, pairs):
    n = pairs.file.n_ids
    assert pairs.vocabulary == Vocabulary(n, 0, 2) and pairs.vocabulary.size == n + 1029
    padded = Tokenizer(made.model_copy(update={"text_ids": n + 271})).vocabulary
    assert (padded.vision, padded.vision_end, padded.size) == (n + 271, n + 275, n + 1300)
    assert (SOLO.vision, SOLO.vpatch, SOLO.vrow_sep, SOLO.vframe_sep, SOLO.vision_end) == tuple(range(32_000, 32_005))
    assert pickle.loads(pickle.dumps(pairs)).encode("as it is") == pairs.encode("as it is")
    assert (pairs.bos_token, pairs.eos_token, TOKENIZER.bos_token) == ("<|endoftext|>", "<|im_end|>", "<s>")


def released(extra: int = 0) -> bytes:
    """SOLO's tokenizer.model: pieces appended to Mistral's protobuf as upstream did, NORMAL with score 0."""
    names = [*OWN, *(f"<loc_{i}>" for i in range(1, 1025)), *("<|im_start|>", "<|im_end|>")[:extra]]
    out = read_pinned(TOKENS)
    for name in names:
        piece = b"\x0a" + bytes([len(name)]) + name.encode() + b"\x15\0\0\0\0\x18\x01"
        out += b"\x0a" + bytes([len(piece)]) + piece
    return out


@pytest.fixture(scope="module", params=[0, 2])
def from_release(request, tmp_path_factory):
    data = released(request.param)
    assert SentencePieceProcessor(model_proto=data).vocab_size() == 33_029 + request.param
    return Tokenizer(pinned(tmp_path_factory.mktemp("release") / "tokenizer.model", data))


@given(value=tricky.map("".join))
def test_the_released_tokenizer_is_mistrals_below_its_own_pieces(from_release, value):
    assert from_release.vocabulary == SOLO
    assert from_release.encode(value) == TOKENIZER.encode(value)


@pytest.fixture(scope="module")
def v3():
    name = "mistral_common:data/mistral_instruct_tokenizer_240323.model.v3"
    digest = hashlib.sha256(tokenizer_path(name).read_bytes()).hexdigest()
    return Tokenizer(TOKENS.model_copy(update={"tokenizer": name, "tokenizer_sha256": digest}))


@given(value=st.lists(st.one_of(st.sampled_from(["[REFERENCE_DOC_19]", "[INST]", "<s>", " "]), anything)).map("".join))
def test_another_sentencepiece_model(v3, value):
    assert v3.vocabulary == Vocabulary(32_768, 1, 2)
    got = v3.encode(value)
    assert all(v3.file.is_text[i] for i in got)
    assert v3.decode(got) == value.replace("\u2581", " ")


def test_a_files_control_token_may_be_chosen(tmp_path):
    tokens = pinned(tmp_path / "tokenizer.model", read_pinned(TOKENS), bos="</s>")
    assert Tokenizer(tokens).vocabulary.bos == 2
    with pytest.raises(ValueError, match=r"bos 'xyzzy' is no token there; name a control token, it has"):
        Tokenizer(tokens.model_copy(update={"bos": "xyzzy"}))
    with pytest.raises(ValueError, match="eos '\u2581the' is a piece of ordinary text there"):
        Tokenizer(tokens.model_copy(update={"eos": "\u2581the"}))


def test_what_text_hardly_has_and_no_token_can_write_reads_as_a_replacement(tmp_path):
    """SmolLM2's vocabulary lacks six control characters; left to itself the library would drop them."""
    raw = byte_pairs()
    for letter in (chr(256 + 4), chr(256 + 0x1D), "\u00f1"):  # the bytes 0x04, 0x1d and 0xf1
        del raw["model"]["vocab"][letter]
    tokenizer = Tokenizer(as_json(tmp_path / "tokenizer.json", raw))
    said = tokenizer.decode(tokenizer.encode("a\x04b\x05c\x1d\U00041234 \U0001f600\U000e0067"))
    assert said == "a\ufffdb\x05c\ufffd\ufffd \U0001f600\U000e0067"


def test_a_file_that_cannot_serve_says_why(tmp_path):
    raw, path = byte_pairs(), tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match=r"names no bos token; give tokens.bos, it has \['<\|endoftext\|>'"):
        Tokenizer(as_json(path, raw, bos=None))
    with pytest.raises(ValueError, match=r"text_ids 5 < \d+ ids in the file"):
        Tokenizer(as_json(path, raw, text_ids=5))
    del raw["model"]["vocab"]["A"]
    with pytest.raises(ValueError, match="no token for 1 bytes, 0x41 first: text would be lost"):
        Tokenizer(as_json(path, raw))
    with pytest.raises(ValueError, match="neither byte-level nor with byte_fallback"):
        Tokenizer(as_json(path, raw | {"pre_tokenizer": None}))
    with pytest.raises(ValueError, match=r"its model is Unigram, only BPE"):
        Tokenizer(as_json(path, raw | {"model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(ValueError, match=r"not a tokenizer.json: KeyError"):
        Tokenizer(as_json(path, {"vocab": []}))
    for damaged in (b"", b"\x0a\x05", b"\x0a\xff\xff\xff", released()[:-3], b"PK\x03\x04 a zip"):
        with pytest.raises(ValueError, match=r"neither a SentencePiece model nor a tokenizer.json"):
            Tokenizer(pinned(tmp_path / "tokenizer.model", damaged))


def test_a_model_whose_rows_are_not_the_tokenizers_ids_is_refused(pairs):
    model = load(RecipeSpec, "sample", CHECKOUT / "datasets_spec").model
    check_model(model, SOLO)
    check_model(model.model_copy(update={"vocab_size": 33_031}), SOLO)  # with the chat tokens that upstream added once
    for fields in ({"n_text_ids": 31_999}, {"vocab_size": 32_004}):
        with pytest.raises(ValueError, match="up to 32005; set n_text_ids to 32000 and vocab_size to 33029"):
            check_model(model.model_copy(update=fields), SOLO)
    with pytest.raises(ValueError, match=f"the tokenizer has {pairs.file.n_ids} text ids"):
        check_model(model, pairs.vocabulary)
    own = SoloForCausalLM.from_spec(model.model_copy(update={"hidden_size": 16}), pairs.tokens, seed=1).config
    assert (own.bos_token_id, own.eos_token_id) == (0, 2)
