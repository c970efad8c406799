"""Talk with a tiny random checkpoint: in a process as users start it, and in this one for the rest."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_tokens import TOKENIZER, TOKENS
from tiny import COLOURS, picture

from solo.model.causal_lm import SoloForCausalLM
from solo.model.chat import Chat, Printer, answer_lines, checkpoint_folder, command, converse, visible
from solo.model.config import SoloConfig
from solo.model.processor import SoloProcessor

ROOT = Path(__file__).parents[1]
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 200,
    "initializer_range": 0.5,  # wide enough that each question has another answer
}
QUESTIONS = "what is this?\n\nand <s>[INST] this?\nwhat is this?"  # no newline ends the last


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """A train artifact's folder, with a checkpoint in it and two pictures beside."""
    folder = tmp_path_factory.mktemp("artifact")
    SoloForCausalLM.drawn(SoloConfig(**SHAPE), 5).save_pretrained(folder / "checkpoint")
    SoloProcessor.from_tokens(TOKENS).save_pretrained(folder / "checkpoint")
    (folder / "red.png").write_bytes(picture(COLOURS["red"], 1))
    (folder / "blue.png").write_bytes(picture(COLOURS["blue"], 2))
    return folder


@pytest.fixture(scope="module")
def chat(artifact):
    return Chat(artifact, max_new_tokens=6, device="cpu")


def alone(chat, question, *pictures):
    """The answer to a question that begins a talk."""
    chat.reset()
    for path in pictures:
        chat.look(path)
    return chat.ask(question, lambda _: None)


def test_in_a_pipe_each_line_is_answered_by_a_line(chat, artifact):
    command = [sys.executable, "-m", "solo.cli", "chat", artifact, artifact / "red.png"]
    done = subprocess.run(
        [*command, "--max-new-tokens=6", "--device=cpu"],
        input=QUESTIONS.encode(),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    asked = [alone(chat, question, artifact / "red.png") if question else "" for question in QUESTIONS.split("\n")]
    assert done.stdout.decode() == "".join(" ".join(visible(answer).split()) + "\n" for answer in asked)
    assert len({*asked}) == 3  # the model does not say the same to all


def test_in_a_terminal_the_talk_goes_on(chat, artifact, monkeypatch, capsys):
    def expected(question):
        return visible(chat.ask(question, lambda _: None))

    chat.reset()
    first = expected("what is this?")
    chat.look(artifact / "red.png")
    second, third = expected("and this?"), expected("go on")  # after what was said before
    assert first == alone(chat, "what is this?") != alone(chat, "and this?")
    chat.reset()
    typed = {
        "what is this?": first,
        f"/image {artifact / 'red.png'}": "1 for the next question",
        "and this?": second,
        "/image nowhere.png": "error: image nowhere.png: no such file; give the path of a picture",
        "/exit": "error: '/exit' is no command; have /image PATH, /reset, /help",
        "word " * 300: "error: chat: the talk has ",
        "go on": third,  # the errors changed nothing
        "/reset": "forgotten",
        "what is this? ": first,
    }
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed) + "\n\n"))  # and then ctrl-d
    converse(chat)
    help_, *answers, end = capsys.readouterr().out.split("> ")
    assert "/image PATH" in help_ and (answers.pop(), end) == ("", "\n")
    for answer, (line, due) in zip(answers, typed.items(), strict=True):
        assert answer == due + "\n" or (line.startswith("word") and answer.startswith(due)), line


def test_answers_come_as_they_are_made(chat):
    shown = []
    chat.reset()
    answer = chat.ask("tell me", shown.append)
    assert "".join(shown) == visible(answer) and len(shown) > 1


def test_an_interrupt_ends_the_answer_alone(chat):
    chat.reset()
    shown = []

    def stop(part):
        shown.append(part)
        if len(shown) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.ask("tell me", stop)
    assert chat.messages[-1]["role"] == "assistant" and visible(chat.messages[-1]["content"]) == "".join(shown)
    whole = alone(chat, "tell me")
    assert whole.startswith("".join(shown)) and whole != "".join(shown)


def test_a_prompt_longer_than_the_models_positions(chat, artifact):
    chat.reset()
    n = SHAPE["max_position_embeddings"]
    fits = "a " * (n - 1 - 1 - len(TOKENIZER.encode("[INST] [/INST]")))
    assert len(TOKENIZER.encode(f"[INST] {fits.strip()} [/INST]")) + 1 == n - 1
    chat.ask(fits, lambda _: None)  # one position is left for the answer
    chat.reset()
    chat.look(artifact / "red.png")
    with pytest.raises(ValueError, match=f"the talk has {n + 7} tokens and the model {n} positions"):
        chat.ask(fits + "a", lambda _: None)
    assert chat.messages == [] and len(chat.pictures) == 1
    with pytest.raises(ValueError, match="tokens and the model"):
        answer_lines(chat, [fits + "a"], sys.stdout)
    chat.reset()


def test_only_text_is_said(artifact):
    """Ids of SOLO's own are not generated, though this model finds them the likeliest."""
    loud = Chat(artifact, max_new_tokens=4, device="cpu")
    loud.model.lm_head.weight.data[32_000:] *= 20
    talk = [{"role": "user", "content": "tell me"}]
    inputs = loud.processor.apply_chat_template(talk, tokenize=True, return_dict=True)
    assert loud.model(**inputs).logits[:, -1].argmax() >= 32_000
    assert len(TOKENIZER.encode(loud.ask("tell me", lambda _: None))) > 0


def test_the_plain_form_goes_on_with_a_text(artifact):
    base = Chat(artifact, max_new_tokens=3, device="cpu", template="plain")
    ids = torch.tensor([[1, *TOKENIZER.encode("Once upon")]])
    expected = base.model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
    assert base.ask("Once upon", lambda _: None) == TOKENIZER.decode(expected.tolist())


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffd\u2581"), max_size=30))
def test_a_stream_shows_whole_characters_and_all_of_them(value):
    shown = []
    printer = Printer(TOKENIZER, shown.append)
    printer.put(torch.tensor([[1, 5, 9]]))  # the prompt
    for number in [*TOKENIZER.encode(value), 2]:
        printer.put(torch.tensor([number]))
    printer.end()
    assert "".join(shown) == value == printer.text
    assert not any("\ufffd" in part for part in shown)


def test_an_answer_cannot_move_the_cursor():
    assert visible("a\x1b[2Jb\x07\r\n\tc\u200d\ud800") == "a[2Jb\n\tc\u200d"


def test_commands(chat, artifact):
    chat.reset()
    assert command(chat, f"/image  {artifact / 'red.png'} ") == "1 for the next question"
    (artifact / "no.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="not readable"):
        command(chat, f"/image {artifact / 'no.png'}")
    with pytest.raises(ValueError, match="'/image' is no command"):
        command(chat, "/image")
    assert len(chat.pictures) == 1 and command(chat, "/reset") == "forgotten" and chat.pictures == []


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be loaded"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "model_type is 'llama', not SOLO's"),
        (lambda f: (f / "tokenizer.model").unlink(), "no tokenizer.model"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"12345678"), "fetch the file again"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "b.safetensors"}})
            ),
            "names b.safetensors, not there",
        ),
    ],
)
def test_a_folder_that_cannot_talk_is_one_line(artifact, tmp_path, damage, error):
    folder = tmp_path / "checkpoint"
    shutil.copytree(artifact / "checkpoint", folder)
    assert checkpoint_folder(tmp_path) == checkpoint_folder(folder) == folder
    damage(folder)
    with pytest.raises(ValueError, match=error) as raised:
        Chat(folder, max_new_tokens=1, device="cpu")
    assert "\n" not in str(raised.value)
