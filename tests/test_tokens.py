import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from solo.sample import IMAGE, Sample, text
from solo.sequence.patches import grid
from solo.sequence.tokenizer import SOLO, Tokenizer, Vocabulary
from solo.sequence.tokenizer_file import SentencePieces
from solo.sequence.tokens import tokenize
from solo.spec import Tokens

TOKENS = Tokens.model_validate(
    {
        "tokenizer": "mistral_common:data/tokenizer.model.v1",
        "tokenizer_sha256": "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
        "patch_px": 32,
        "max_side_px": 1024,
        "image_close": {"plain": "</vision>", "inst": "<vision>"},
    }
)
TOKENIZER = Tokenizer(TOKENS)
HELLO = [22557, 1526]  # "Hello world"
OPEN, CLOSE = [733, 16289, 28793], [733, 28748, 16289, 28793]  # "[INST]", "[/INST]"
V, P, SEP, END = 32_000, 32_001, 32_002, 32_004


def sample(*turns):
    messages = tuple({"role": role, "content": list(items)} for role, *items in turns)
    return Sample("web-0123456789ab", "web", (), messages, {})


def ids(template, grids, *turns):
    return tokenize(sample(*turns), grids, TOKENIZER, template).ids.tolist()


def test_vocabulary():
    assert TOKENIZER.vocabulary == Vocabulary(32_000, 1, 2) == SOLO and SOLO.size == 33_029
    assert TOKENIZER.encode("Hello world") == HELLO
    assert TOKENIZER.encode("") == []


def test_plain_layout():
    turn = ("assistant", IMAGE, text("Hello world"))
    assert ids("plain", [(2, 3)], turn) == [1, V, P, P, P, SEP, P, P, P, END, *HELLO]
    document = tokenize(sample(turn), [(2, 3)], TOKENIZER, "plain")
    assert document.is_target.tolist() == [False] * 10 + [True] * 2
    assert document.patch_index.tolist() == [-1, -1, 0, 1, 2, -1, 3, 4, 5, -1, -1, -1]
    assert (document.n_patches, document.n_text_tokens, document.n_loss_tokens) == (6, 6, 2)
    assert (document.ids.dtype, document.is_target.dtype, document.patch_index.dtype) == (
        np.int32,
        bool,
        np.int32,
    )


def test_plain_documents_end_in_eos_only_where_the_spec_says_so():
    ending = Tokenizer(TOKENS.model_copy(update={"plain_eos": True}))
    document = tokenize(sample(("assistant", text("Hello world"))), [], ending, "plain")
    assert document.ids.tolist() == [1, *HELLO, 2] and document.is_target.tolist() == [False, True, True, True]
    asked = tokenize(sample(("user", text("Hello world"))), [], ending, "plain")
    assert asked.ids.tolist() == [1, *HELLO]  # nobody's answer ends
    upstream = Tokenizer(TOKENS.model_copy(update={"plain_eos": False}))
    assert tokenize(sample(("assistant", text("Hello world"))), [], upstream, "plain").ids.tolist() == [1, *HELLO]


def test_plain_keeps_images_where_they_stand_between_words():
    turns = ("user", text("Hello world"), IMAGE, text("Hello world"), IMAGE), ("assistant", text("Hello world"))
    assert ids("plain", [(1, 1), (2, 1)], *turns) == [*(1, *HELLO, V, P, END, *HELLO, V, P, SEP, P, END, *HELLO)]
    document = tokenize(sample(*turns), [(1, 1), (2, 1)], TOKENIZER, "plain")
    assert np.flatnonzero(document.is_target).tolist() == [13, 14]  # the user's words have no loss
    assert document.patch_index[[4, 9, 11]].tolist() == [0, 1, 2]


def test_inst_layout():
    turns = ("user", IMAGE, text("Hello world")), ("assistant", text("Hello world"))
    block = [V, P, P, V]  # closed by <vision>, as the demo does
    assert ids("inst", [(1, 2)], *turns) == [*block, 1, *OPEN, *HELLO, *CLOSE, *HELLO, 2]
    document = tokenize(sample(*turns), [(1, 2)], TOKENIZER, "inst")
    assert np.flatnonzero(document.is_target).tolist() == [14, 15, 16]  # the answer and its EOS


def test_inst_several_images_and_turns():
    turns = (
        ("user", IMAGE, text("Hello world "), IMAGE),
        ("assistant", text("Hello world")),
        ("user", text("Hello world")),
        ("assistant", text("Hello world")),
    )
    ask = [*OPEN, *HELLO, *CLOSE]
    assert ids("inst", [(1, 1), (2, 1)], *turns) == [*(V, P, V, V, P, SEP, P, V, 1, *ask, *HELLO, 2, *ask, *HELLO, 2)]


def test_inst_joins_text_items_and_the_system_turn():
    joined = [1, *TOKENIZER.encode("[INST] Be brief.\n\nHello\nworld [/INST]")]
    turns = ("system", text("Be brief.")), ("user", text("Hello"), IMAGE, text(""), text("world"))
    assert ids("inst", [(1, 1)], *turns) == [V, P, V, *joined]  # ends with a user turn: a prompt to complete
    with pytest.raises(ValueError, match="turn 1 is 'system'"):
        ids("inst", [], ("user", text("a")), ("system", text("b")))


def test_an_empty_answer_is_no_lesson():
    document = tokenize(sample(("user", text("Hello")), ("assistant", text(" "))), [], TOKENIZER, "inst")
    assert document.n_loss_tokens == 0 and document.ids[-1] != 2


def test_image_close_is_the_specs_choice():
    other = TOKENS.model_copy(update={"image_close": TOKENS.image_close.model_copy(update={"inst": "</vision>"})})
    turn = ("user", IMAGE, text("Hello"))
    assert tokenize(sample(turn), [(1, 1)], Tokenizer(other), "inst").ids[2] == END


@pytest.mark.parametrize(
    ("size", "n_patches", "n_tokens"),
    [
        ((448, 448), 196, 211),
        ((640, 480), 300, 316),
        ((500, 375), 192, 205),
        ((1920, 1080), 576, 595),
        ((1080, 1920), 576, 609),
        ((336, 336), 121, 133),
        ((1025, 1024), 1024, 1057),
    ],
)
def test_checked_image_costs(size, n_patches, n_tokens):
    cell = grid(*size, patch_px=32, max_side_px=1024)
    document = tokenize(sample(("assistant", IMAGE)), [cell], TOKENIZER, "plain")
    assert document.n_patches == n_patches == int((document.ids == P).sum())
    assert len(document.ids) == 1 + n_tokens


SPECIAL = ["<s>", "</s>", "<unk>", "<vision>", "<vpatch>", "</vision>", "<vrow_sep>", "<loc_7>", "<|im_end|>"]
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
texts = st.lists(st.one_of(st.sampled_from(SPECIAL), anything), max_size=4).map("".join)


@given(texts)
def test_text_never_gives_a_control_id(value):
    got = TOKENIZER.encode(value)
    assert all(3 <= i < 32_000 for i in got)
    assert TOKENIZER.decode([32_000, *got, 2, 33_028, 99_999]) == value.replace(
        "\u2581", " "
    )  # sentencepiece's own space mark


spaced = st.lists(
    st.one_of(
        st.sampled_from([" ", "  ", "\t", "\n", "\r\n", "\u2581", "\u00a0", "\u3000", "\u200b", "\0", "a", "\ufb01"]),
        texts,
    )
).map("".join)


@given(spaced)
def test_word_by_word_is_the_whole_text_at_once(value):
    fresh = SentencePieces.__new__(SentencePieces)
    fresh.__dict__ = TOKENIZER.file.__dict__ | {"_words": {}}
    whole = TOKENIZER.file._model.encode(value)
    assert TOKENIZER.file._by_word
    assert fresh.encode(value) == TOKENIZER.encode(value) == whole  # words unknown, then known
    assert fresh.encode(value) == whole


def test_known_words_are_bounded_and_long_ones_are_not_kept(monkeypatch):
    monkeypatch.setattr("solo.sequence.tokenizer_file.WORDS_KEPT", 5)
    tokenizer = Tokenizer(TOKENS).file
    assert len(tokenizer._words) <= 5
    said = " ".join(f"word{i}" for i in range(50)) + " " + "x" * 500
    assert tokenizer.encode(said) == tokenizer._model.encode(said)
    assert len(tokenizer._words) == 5 and max(map(len, tokenizer._words)) <= 33


def test_a_vocabulary_whose_pieces_cross_words_is_encoded_whole():
    class Crossing:
        def id_to_piece(self, i):
            return "a\u2581b" if i == 77 else "a"

    tokenizer = Tokenizer(TOKENS).file
    real, tokenizer._model = tokenizer._model, Crossing()
    tokenizer._by_word = tokenizer._words_are_apart()
    tokenizer._model = real
    assert not tokenizer._by_word
    assert tokenizer.encode("Hello world") == HELLO


every = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)


@given(every)
def test_byte_fallback_round_trips_any_unicode(value):
    """Whatever is no piece becomes bytes, and those the character again; only the space mark reads as a space."""
    got = TOKENIZER.encode(value)
    assert 0 not in got  # never <unk>
    assert TOKENIZER.decode(got) == value.replace("\u2581", " ")


def test_byte_fallback_really_happens_in_every_plane():
    for value in ("\U0001faf6", "\U00020000", "\ue000", "\U0010fffd", "\u0e5b", "\x7f", "\x00"):
        got = TOKENIZER.encode(value)
        assert TOKENIZER.decode(got) == value
        fallback = [i for i in got if 3 <= i < 259]  # <0x00> ... <0xFF>
        assert bytes(i - 3 for i in fallback) == value.encode() or not fallback
    assert [i - 3 for i in TOKENIZER.encode("\U0001faf6")[1:]] == list("\U0001faf6".encode())


pieces_of_control = st.lists(
    st.sampled_from([*SPECIAL, "[INST]", "[/INST]", " ", "\n", "<0x0A>", "<", "s>", "x"]), max_size=6
)


@given(pieces_of_control.map("".join), pieces_of_control.map("".join), st.sampled_from(["plain", "inst"]))
def test_no_text_of_any_role_moves_a_control_id(asked, answered, template):
    """The control and vision ids of a document are the same whatever its texts are, EOS after an answer apart."""
    turns = (("system", text(asked)), ("user", IMAGE, text(asked)), ("assistant", text(answered)))
    document = tokenize(sample(*turns), [(2, 2)], TOKENIZER, template)
    control = [i for i in document.ids.tolist() if i < 3 or i >= 32_000]
    block = [V, P, P, SEP, P, P, END if template == "plain" else V]
    ends = [2] if template == "inst" and answered.strip() else []
    assert control == ([1, *block] if template == "plain" else [*block, 1, *ends])
    assert (document.ids[document.is_target] != 1).all()
    assert int((document.ids[document.is_target] == 2).sum()) == len(ends)


grids = st.tuples(st.integers(1, 4), st.integers(1, 4))
items = st.lists(st.one_of(texts.map(text), st.just(IMAGE)), max_size=3)
turns = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), items), min_size=1, max_size=4)


@given(turns, st.sampled_from(["plain", "inst"]), st.data())
def test_targets_are_assistant_text_and_patches_are_counted(turns, template, data):
    record = sample(*((role, *content) for role, content in turns))
    n_images = sum(item is IMAGE for _, content in turns for item in content)
    cells = data.draw(st.lists(grids, min_size=n_images, max_size=n_images))
    document = tokenize(record, cells, TOKENIZER, template)
    targets = document.ids[document.is_target]
    assert not document.is_target[0]
    assert (targets < 32_000).all() and (targets != 1).all() and (template == "inst" or (targets != 2).all())
    assert (document.ids == 1).sum() == 1
    is_patch = document.ids == P
    assert document.patch_index[is_patch].tolist() == list(range(sum(r * c for r, c in cells)))
    assert (document.patch_index[~is_patch] == -1).all()
    said = [i["text"] for role, content in turns if role == "assistant" for i in content if i is not IMAGE]
    if template == "plain":
        assert targets.tolist() == [i for value in said for i in TOKENIZER.encode(value)]
    elif not any(value.strip() for value in said):
        assert len(targets) == 0


def test_user_errors_name_the_fact_and_the_remedy():
    with pytest.raises(ValueError, match="web-0123456789ab: 1 image items but 0 images"):
        ids("plain", [], ("assistant", IMAGE))
    with pytest.raises(ValueError, match="sha256 is dadfd56d"):
        Tokenizer(TOKENS.model_copy(update={"tokenizer_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="no package 'no_such_package'"):
        Tokenizer(TOKENS.model_copy(update={"tokenizer": "no_such_package:x"}))
    with pytest.raises(ValueError, match="is not there"):
        Tokenizer(TOKENS.model_copy(update={"tokenizer": "mistral_common:data/none.model"}))


def test_a_tokenizer_travels_to_other_processes():
    again = pickle.loads(pickle.dumps(TOKENIZER))
    assert again.encode("Hello world") == HELLO and dataclasses.is_dataclass(
        tokenize(sample(("user", text("a"))), [], again, "plain")
    )


def test_role_counts_by_hand():
    turns = (
        ("system", text("Hello world")),
        ("user", IMAGE, text("Hello world")),
        ("assistant", text("Hello world")),
    )
    plain = tokenize(sample(*turns), [(2, 3)], TOKENIZER, "plain")
    two = {"n_tokens": 2, "n_loss_tokens": 0}
    assert plain.by_role() == {"system": two, "user": two, "assistant": {"n_tokens": 2, "n_loss_tokens": 2}}
    inst = tokenize(sample(*turns), [(2, 3)], TOKENIZER, "inst")
    asked = len(
        TOKENIZER.encode("[INST] Hello world\n\nHello world [/INST]")
    )  # the system text stands in the user's turn
    none = {"n_tokens": 0, "n_loss_tokens": 0}
    answered = {"n_tokens": 3, "n_loss_tokens": 3}
    assert inst.by_role() == {"system": none, "user": {"n_tokens": asked, "n_loss_tokens": 0}, "assistant": answered}
    assert inst.role.tolist() == [-1] * 10 + [1] * asked + [2] * 3 and inst.role.dtype == np.int8


@given(turns, st.sampled_from(["plain", "inst"]))
def test_role_counts_close_and_only_the_assistant_is_labelled(turns, template):
    record = sample(*((role, *content) for role, content in turns))
    n_images = sum(item is IMAGE for _, content in turns for item in content)
    document = tokenize(record, [(1, 2)] * n_images, TOKENIZER, template)
    counts = document.by_role()
    marks = 1 + 2 * n_images  # BOS, and what opens and closes an image of one row
    assert sum(c["n_tokens"] for c in counts.values()) == document.n_text_tokens - marks
    assert counts["assistant"]["n_loss_tokens"] == document.n_loss_tokens
    assert counts["user"]["n_loss_tokens"] == counts["system"]["n_loss_tokens"] == 0
