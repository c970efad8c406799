"""The processor: its rows are the loader's, its chat template reads as the ids do, a saved folder gives it back."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_tokenizer import as_json, byte_pairs, released
from test_tokens import CLOSE, END, HELLO, OPEN, SEP, TOKENIZER, TOKENS, P, V
from tiny import COLOURS, picture
from transformers import AutoProcessor

import solo.model.causal_lm
from solo.model.processor import SoloProcessor
from solo.sample import IMAGE, Sample, text
from solo.sequence.loader import read_piece
from solo.sequence.patches import patchify
from solo.spec import Tokens

PROCESSOR = SoloProcessor.from_tokens(TOKENS)
PX = {"patch_px": 32, "max_side_px": 1024}
RED, WIDE = picture(COLOURS["red"], 1), picture(COLOURS["blue"], 2, side=70)  # 2 x 2 and 3 x 3 patches
ASK = [*OPEN, *HELLO, *CLOSE]


def encoded(conversation, **options):
    return PROCESSOR.apply_chat_template(conversation, tokenize=True, return_dict=True, **options)


def own(batch, row):
    """A row without its padding: ids, and the patches its ids name."""
    keep = batch["attention_mask"][row].bool()
    index = batch["vision_patch_indices"][row]
    assert (index[~keep] == -1).all() and (batch["input_ids"][row][~keep] == 2).all()
    assert not keep.diff().lt(0).any()  # padding on the left alone
    return batch["input_ids"][row][keep].tolist(), batch["vision_patches"][index[index >= 0]].numpy()


def user(*content):
    return {"role": "user", "content": list(content)}


def image(data):
    return {"type": "image", "image": data}


def test_a_conversation_by_hand():
    batch = encoded([user(image(RED), text("Hello world")), {"role": "assistant", "content": "Hello world"}])
    assert batch["input_ids"].tolist() == [[V, P, P, SEP, P, P, V, 1, *ASK, *HELLO, 2]]
    assert batch["vision_patch_indices"][0, :8].tolist() == [-1, 0, 1, -1, 2, 3, -1, -1]
    assert torch.equal(batch["vision_patches"], torch.from_numpy(patchify(RED, **PX)))
    kinds = {name: tensor.dtype for name, tensor in batch.items()}
    assert kinds == dict.fromkeys(("input_ids", "attention_mask", "vision_patch_indices"), torch.int64) | {
        "vision_patches": torch.uint8
    }
    assert list(batch) == PROCESSOR.model_input_names
    only_ids = PROCESSOR.apply_chat_template([user(text("Hello world"))], tokenize=True)
    assert only_ids.tolist() == [[1, *ASK]]


def test_a_text_to_go_on_with():
    one = PROCESSOR(text="Hello world", images=RED)
    assert one["input_ids"].tolist() == [[1, V, P, P, SEP, P, P, END, *HELLO]]
    rows = PROCESSOR(text=["Hello world", "", "a"], images=[[RED, WIDE], None, WIDE], return_tensors="np")
    assert isinstance(rows["input_ids"], np.ndarray) and rows["vision_patches"].shape == (4 + 9 + 9, 3072)
    assert rows["input_ids"][1].tolist() == [2] * (rows["input_ids"].shape[1] - 1) + [1]
    nothing = PROCESSOR(text="Hello world")
    assert nothing["vision_patches"].shape == (0, 3072) and (nothing["vision_patch_indices"] == -1).all()
    assert PROCESSOR(text="Hello world", template="inst")["input_ids"].tolist() == [[1, *ASK]]


pictures = st.sampled_from([RED, WIDE, picture(COLOURS["green"], 3, side=33)])
contents = st.lists(st.one_of(st.text("ab<s>[/INST] \n", max_size=12).map(text), pictures.map(image)), max_size=4)
turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": contents}), min_size=1, max_size=3
)


@settings(max_examples=40)
@given(st.lists(turns, min_size=1, max_size=3), st.sampled_from(["inst", "plain"]))
def test_each_row_of_a_batch_is_what_the_loader_reads(said, template):
    batch = encoded(said, template=template)
    for row, conversation in enumerate(said):
        items = [item for message in conversation for item in message["content"]]
        images = tuple(item["image"] for item in items if item["type"] == "image")
        bare = [m | {"content": [IMAGE if i["type"] == "image" else i for i in m["content"]]} for m in conversation]
        piece = read_piece(Sample("k", "s", images, tuple(bare), {}), TOKENIZER, template)
        ids, patches = own(batch, row)
        assert ids == piece.ids.tolist() and np.array_equal(patches, piece.patches)


def jpeg(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    Image.open(io.BytesIO(WIDE)).crop((0, 0, 70, 40)).save(out, "JPEG", exif=exif)
    return out.getvalue()


@pytest.mark.parametrize("data", [WIDE, jpeg(1), jpeg(6)], ids=["png", "jpeg", "turned"])
def test_a_picture_is_the_same_in_every_form(data, tmp_path):
    path = tmp_path / "a picture"
    path.write_bytes(data)
    letters = base64.b64encode(data).decode()
    forms = [
        {"image": data},
        {"image": Image.open(io.BytesIO(data))},
        {"image": path},
        {"path": str(path)},
        {"url": f"data:image/png;base64,{letters}"},
        {"base64": letters},
    ]
    whole = patchify(data, **PX)
    for form in forms:
        batch = encoded([user({"type": "image", **form})])
        assert np.array_equal(batch["vision_patches"].numpy(), whole), form
    beside = encoded([user({"type": "image"}, text("a"))], images=data)
    assert np.array_equal(beside["vision_patches"].numpy(), whole)


def test_palette_alpha_and_16_bits_as_an_opened_picture():
    grey16 = Image.fromarray((np.arange(48 * 40).reshape(40, 48) * 30).astype(np.uint16))
    for made in (grey16, Image.new("RGBA", (40, 40), (9, 9, 9, 99)), Image.open(io.BytesIO(WIDE)).convert("P")):
        out = io.BytesIO()
        made.save(out, "PNG")
        assert np.array_equal(PROCESSOR(text="", images=made)["vision_patches"], patchify(out.getvalue(), **PX))


words = st.lists(st.sampled_from(["a", "Hello", "world", "2", "two words", "line\nbreak", "  "]), max_size=3)
plain_contents = st.one_of(
    words.map(" ".join), st.lists(st.one_of(words.map(" ".join).map(text), st.just(image(RED))), max_size=3)
)
talks = st.tuples(
    st.one_of(st.just([]), plain_contents.map(lambda c: [{"role": "system", "content": c}])),
    st.lists(
        st.tuples(plain_contents, plain_contents).map(
            lambda c: [{"role": "user", "content": c[0]}, {"role": "assistant", "content": c[1]}]
        ),
        min_size=1,
        max_size=3,
    ),
).map(lambda talk: talk[0] + [turn for pair in talk[1] for turn in pair])


@settings(max_examples=60)
@given(talks, st.booleans())
def test_the_chat_template_reads_as_the_ids_do(talk, is_open):
    """Cut at its marks, the readable string gives the ids: for text that holds no mark itself."""
    talk = talk[:-1] if is_open else talk
    marks = {"<image>": [V, P, P, SEP, P, P, V], "<s>": [1], "</s>": [2], "": []}
    ids = []
    for part in re.split(r"(<image>|</?s>)", PROCESSOR.apply_chat_template(talk)):
        questions, answer = re.fullmatch(r"(?s)((?:\[INST\].*?\[/INST\])*) ?(.*)", part).groups()
        if part in marks:
            ids += marks[part]
        else:
            for question in re.findall(r"(?s)\[INST\].*?\[/INST\]", questions):
                ids += TOKENIZER.encode(question)
            ids += TOKENIZER.encode(answer)
    assert ids == encoded(talk)["input_ids"][0].tolist()


def test_a_rendering_is_for_readers():
    talk = [{"role": "system", "content": "Be brief."}, user(image(RED), text(" Hello "), text("world"))]
    shown = PROCESSOR.apply_chat_template([talk, talk[1:]])
    assert shown == ["<image><s>[INST] Be brief.\n\nHello \nworld [/INST]", "<image><s>[INST] Hello \nworld [/INST]"]
    assert PROCESSOR.apply_chat_template(talk[1:], template="plain") == "<s><image> Hello world"
    with pytest.raises(ValueError, match="a rendered conversation, whose marks would be read as letters"):
        PROCESSOR(text=shown, images=[RED, RED])
    with pytest.raises(Exception, match="turn 1 is system"):
        PROCESSOR.apply_chat_template([user(text("a")), talk[0]])


def test_decoding_leaves_out_what_is_no_text():
    ids = torch.tensor([[2, 1, V, P, END, *HELLO], [1, *HELLO, 2, 2, 2, 2]])
    assert PROCESSOR.batch_decode(ids) == ["Hello world"] * 2 == PROCESSOR.post_process_image_text_to_text(ids)
    assert PROCESSOR.decode(ids[0]) == PROCESSOR.decode(HELLO) == "Hello world"
    assert PROCESSOR.decode(torch.tensor(HELLO[0])) == "Hello"


def test_generated_rows_are_those_of_each_row_alone():
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = solo.model.SoloConfig(**shape, num_key_value_heads=1)
    model = solo.model.SoloForCausalLM.drawn(config, 3).eval()
    rows = [[user(image(WIDE), text("a"))], [user(text("Hello world " * 9))], [user(image(RED), image(RED))]]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": 2}
    together = model.generate(**encoded(rows), **options)[:, -5:]
    for row, alone in zip(together, rows, strict=True):
        assert row.tolist() == model.generate(**encoded(alone), **options)[0, -5:].tolist()


def test_a_saved_folder_gives_the_processor_back(tmp_path):
    changed = TOKENS.model_copy(update={"patch_px": 16, "max_side_px": 64})
    saved = SoloProcessor.from_tokens(changed)
    saved.chat_template += "{# kept #}"
    files = {Path(file).name for file in saved.save_pretrained(tmp_path / "a:b")}  # a colon is no package here
    assert files == {"processor_config.json", "tokenizer.model", "chat_template.jinja"}
    again = AutoProcessor.from_pretrained(tmp_path / "a:b")
    assert type(again) is SoloProcessor and again.to_dict() == saved.to_dict()
    assert again.chat_template == saved.chat_template
    assert again(text="a", images=RED)["vision_patches"].shape == (9, 3 * 16 * 16)
    before = (tmp_path / "a:b" / "tokenizer.model").read_bytes()
    again.save_pretrained(tmp_path / "a:b")
    assert (tmp_path / "a:b" / "tokenizer.model").read_bytes() == before
    (tmp_path / "a:b" / "tokenizer.model").write_bytes(before + b"\0")
    with pytest.raises(ValueError, match="sha256 is"):
        AutoProcessor.from_pretrained(tmp_path / "a:b")


def test_a_backbones_own_tokenizer(tmp_path):
    tokens = as_json(tmp_path / "mine.json", byte_pairs(), text_ids=1000)
    SoloProcessor.from_tokens(tokens).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text(json.dumps({"model_type": "solo", "n_text_ids": 1000}))
    again = AutoProcessor.from_pretrained(tmp_path / "saved")
    batch = again.apply_chat_template([[user(image(RED), text("<|im_end|>"))]], tokenize=True, return_dict=True)
    ids = batch["input_ids"][0].tolist()
    assert ids[:8] == [1000, 1001, 1001, 1002, 1001, 1001, 1000, 0] and 2 not in ids
    assert again.apply_chat_template([user(text("a"))]) == "<|endoftext|>[INST] a [/INST]"
    (tmp_path / "saved" / "processor_config.json").unlink()  # as a text model's folder has it
    beside = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}}
    (tmp_path / "saved" / "tokenizer_config.json").write_text(json.dumps(beside))
    assert AutoProcessor.from_pretrained(tmp_path / "saved").tokenizer.vocabulary == again.tokenizer.vocabulary
    (tmp_path / "saved" / "config.json").write_text(json.dumps({"model_type": "solo", "n_text_ids": 1001}))
    (tmp_path / "saved" / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"names no bos token; give tokens.bos"):
        AutoProcessor.from_pretrained(tmp_path / "saved")


@pytest.fixture
def release(tmp_path):
    """The files of the released SOLO-7B that a processor reads."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "solo", "vocab_size": 33_029}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (tmp_path / "tokenizer.model").write_bytes(released())
    return tmp_path


def test_the_released_layout(release):
    ours = AutoProcessor.from_pretrained(release)
    talk = [user(image(WIDE), text("Hello <vision> world"))]
    expected = encoded(talk)
    batch = ours.apply_chat_template(talk, tokenize=True, return_dict=True)
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    other = AutoProcessor.from_pretrained(release, image_close="</vision>")
    ids = other.apply_chat_template(talk, tokenize=True)[0].tolist()
    assert (
        ids.count(V) == 1 and ids.count(END) == 1 and ids.index(END) == expected["input_ids"][0].tolist().index(1) - 1
    )


def test_a_folder_that_cannot_serve_says_why(release, tmp_path):
    with pytest.raises(ValueError, match=r"image_close.inst: Input should be"):
        SoloProcessor.from_pretrained(release, image_close="<eov>")
    with pytest.raises(TypeError, match=r"no argument \['image_closed'\]"):
        SoloProcessor.from_pretrained(release, image_closed="</vision>")
    (release / "config.json").write_text(json.dumps({"model_type": "solo", "n_text_ids": 32_768}))
    with pytest.raises(ValueError, match=r"has 32000 text ids, its config.json 32768; not of one model"):
        AutoProcessor.from_pretrained(release)
    (release / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config.json: not a JSON object"):
        SoloProcessor.from_pretrained(release)
    (release / "config.json").write_text("{}")
    (release / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer.model or tokenizer.json; save the processor there"):
        SoloProcessor.from_pretrained(release)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: encoded([]), "give a list of"),
        (lambda: encoded("Hello"), "give a list of"),
        (lambda: encoded([{"role": "user"}]), "conversation 0: turn 0 is no message"),
        (lambda: encoded([[user()], [user({"type": "video"})]]), "conversation 1: turn 0: an item of type 'video'"),
        (lambda: encoded([user({"type": "text"})]), "an item of type 'text'"),
        (lambda: encoded([user({"type": "image"})]), "an image item without an image"),
        (lambda: encoded([user(text("a"))], images=[RED]), "1 images more than"),
        (lambda: encoded([user({"type": "image", "url": "https://a.b/c.png"})]), "addresses are not fetched"),
        (lambda: encoded([user({"type": "image", "path": "/no/such.png"})]), "no such file"),
        (lambda: encoded([user({"type": "image", "base64": "?"})]), "not base64"),
        (lambda: encoded([user(image(3))]), "a int is no picture"),
        (lambda: encoded([user(image(b"no picture"))]), "not readable"),
        (lambda: encoded([user(image(Image.new("RGB", (5000, 3))))]), "too thin"),
        (lambda: encoded([user(text("a")), {"role": "tool", "content": "b"}]), "turn 1 is 'tool'"),
        (lambda: PROCESSOR(text=["a", "b"], images=[RED]), "1 entries for 2 rows"),
        (lambda: PROCESSOR(text=["a", "b"], images=RED), "1 entries for 2 rows"),
        (lambda: PROCESSOR(text=["a", "b c"], padding=False), r"rows of \[2, 3\] tokens make no tensor"),
        (lambda: PROCESSOR(text="a", return_tensors="tf"), "return_tensors is 'tf'"),
        (lambda: PROCESSOR.decode(HELLO, skip_special_tokens=False), "have no text"),
    ],
)
def test_a_callers_mistake_is_one_line(call, error):
    with pytest.raises(ValueError, match=error) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_the_spec_of_a_saved_processor_is_whole():
    assert {*Tokens.model_fields} - {"tokenizer"} <= {*PROCESSOR.to_dict()}
