"""Chat: a talk with a checkpoint, in a terminal or line by line in a pipe.

In: the folder of a checkpoint, or of the train artifact that holds it; pictures; questions. Out: greedy answers, shown
as they come, without SOLO's own ids and up to the EOS. Invariant: a question is asked in the form the model was trained
on, the whole talk before it; what cannot be asked changes nothing. Cost: each question computes the talk again.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor
from transformers.generation.streamers import BaseStreamer
from transformers.utils.logging import disable_progress_bar

import solo.model.causal_lm  # noqa: F401 (SOLO's classes register themselves)
from solo.model.config import SoloConfig
from solo.sequence.patches import image_size
from solo.sequence.tokenizer import Tokenizer
from solo.spec import Template

HELP = """\
/image PATH  ask the next question about this picture too
/reset       forget the talk and its pictures
/help        this
ctrl-c stops an answer, ctrl-d ends\
"""
LOST = "\ufffd"  # a character whose bytes are not all there yet


class Chat:
    """A model and what was said."""

    def __init__(
        self, folder: Path, *, max_new_tokens: int, device: str | None = None, template: Template = "inst"
    ) -> None:
        folder = checkpoint_folder(folder)
        disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            config = AutoConfig.from_pretrained(folder)
            if not isinstance(config, SoloConfig):
                raise ValueError(f"{folder}: model_type is {config.model_type!r}, not SOLO's; give a SOLO checkpoint")
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            processors: Any = AutoProcessor
            self.processor = processors.from_pretrained(folder)
            model: Any = AutoModelForCausalLM.from_pretrained(folder)
            self.model = model.to(self.device).eval()
        except (OSError, RuntimeError, SafetensorError) as error:  # what these libraries say takes many lines
            raise ValueError(f"{folder}: cannot be loaded: {' '.join(str(error).split())}") from error
        self.max_new_tokens, self.template = max_new_tokens, template
        self.messages: list[dict[str, Any]] = []
        self.pictures: list[bytes] = []  # of the next question

    def look(self, path: Path) -> None:
        """Ask the next question about this picture, after those before it."""
        if not path.expanduser().is_file():
            raise ValueError(f"image {path}: no such file; give the path of a picture")
        data = path.expanduser().read_bytes()
        image_size(data)
        self.pictures.append(data)

    def reset(self) -> None:
        """Forget what was said and shown."""
        self.messages, self.pictures = [], []

    def ask(self, question: str, show: Callable[[str], object]) -> str:
        """The answer; `show` is given its text as it comes. What an interrupt leaves of it was said."""
        items = [{"type": "image", "image": picture} for picture in self.pictures]
        turn = {"role": "user", "content": [*items, {"type": "text", "text": question}]}
        asked = [*self.messages, turn]
        inputs = self.processor.apply_chat_template(asked, tokenize=True, return_dict=True, template=self.template)
        n, n_positions = inputs["input_ids"].shape[1], self.model.config.max_position_embeddings
        if n >= n_positions:
            raise ValueError(
                f"chat: the talk has {n} tokens and the model {n_positions} positions; ask less, or begin anew"
            )
        self.messages, self.pictures = asked, []
        printer = Printer(self.processor.tokenizer, show)
        try:
            self.model.generate(
                **inputs.to(self.device),
                max_new_tokens=min(self.max_new_tokens, n_positions - n),
                do_sample=False,
                eos_token_id=self.processor.tokenizer.vocabulary.eos,
                streamer=printer,
            )
        finally:
            self.messages.append({"role": "assistant", "content": printer.text})
        return printer.text


class Printer(BaseStreamer):
    """Hands on the text of an answer while it grows, whole characters only."""

    def __init__(self, tokenizer: Tokenizer, show: Callable[[str], object]) -> None:
        self.tokenizer, self.show = tokenizer, show
        self.ids: list[int] = []
        self.text = ""
        self.n_shown = 0
        self.prompt_is_past = False

    def put(self, value: Tensor) -> None:
        """The prompt first, then each new id."""
        if not self.prompt_is_past:
            self.prompt_is_past = True
            return
        self.ids += value.flatten().tolist()
        self.text = self.tokenizer.decode(self.ids)
        self._show(len(self.text.rstrip(LOST)))

    def end(self) -> None:
        """Nothing more will come."""
        self._show(len(self.text))

    def _show(self, end: int) -> None:
        if end > self.n_shown:
            self.show(visible(self.text[self.n_shown : end]))
            self.n_shown = end


def checkpoint_folder(path: Path) -> Path:
    """The folder that holds the weights, where `path` is it or the train artifact around it."""
    inside = path / "checkpoint"
    folder = inside if inside.is_dir() and not (path / "config.json").exists() else path
    if not folder.is_dir():
        raise ValueError(f"{path}: no such folder; give a checkpoint's, or that of a train artifact")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json; this is no checkpoint, or one that was never finished")
    return folder


def visible(text: str) -> str:
    """Without control characters: an answer may not move the cursor."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


def answer_lines(chat: Chat, questions: Iterable[str], out: TextIO) -> None:
    """Each line a question about the same pictures, each answer one line; none knows of the others."""
    pictures = chat.pictures
    for line in questions:
        question = line.strip()
        chat.messages, chat.pictures = [], pictures
        answer = chat.ask(question, lambda _: None) if question else ""
        out.write(" ".join(visible(answer).split()) + "\n")
        out.flush()


def converse(chat: Chat) -> None:
    """A talk in a terminal."""
    import readline  # noqa: F401 (gives `input` its arrow keys and its history)

    _print(HELP + "\n")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            _print("\n")
            return
        except KeyboardInterrupt:
            _print("\n")
            continue
        try:
            if line.startswith("/"):
                _print(command(chat, line) + "\n")
            elif line:
                chat.ask(line, _print)
                _print("\n")
        except KeyboardInterrupt:
            _print(" ...\n")
        except ValueError as error:
            _print(f"error: {error}\n")


def command(chat: Chat, line: str) -> str:
    """Do what a line that begins with a slash says; what to show for it."""
    name, _, rest = line.partition(" ")
    if name == "/image" and rest.strip():
        chat.look(Path(rest.strip()))
        return f"{len(chat.pictures)} for the next question"
    if name == "/reset":
        chat.reset()
        return "forgotten"
    if name == "/help":
        return HELP
    raise ValueError(f"{line!r} is no command; have /image PATH, /reset, /help")


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
