"""Processor: conversations and pictures to the inputs of SOLO's `forward` and `generate`, in Hugging Face's form.

In: text and images as `solo.model.conversation` takes them. Out: `input_ids` and `attention_mask` (B, n), LEFT padded
with the EOS; `vision_patches` (P, 3 * patch_px**2) uint8 of the whole batch, which the model normalises;
`vision_patch_indices` (B, n), -1 or a row of `vision_patches`. Invariant: a row is what the loader reads in training;
marks are put in by id, so no text can forge one. Cost: a decode and a resize an image.

`import solo.model` registers this class with `AutoProcessor`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError
from transformers import BatchFeature, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template
from transformers.utils.hub import cached_file

from solo.model.conversation import CHAT_TEMPLATE, Rendered, conversations, prompts
from solo.sample import Sample
from solo.sequence.loader import read_piece, side_by_side
from solo.sequence.tokenizer import Tokenizer, read_pinned
from solo.spec import Template, Tokens

CONFIG_FILE, TEMPLATE_FILE = "processor_config.json", "chat_template.jinja"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
# The released SOLO-7B has no such file. Its SFT code closes an image with the opening token, its pre-training does not.
DEFAULTS = {"patch_px": 32, "max_side_px": 1024, "image_close": {"plain": "</vision>", "inst": "<vision>"}}
HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
IGNORED = ("_from_auto", "code_revision", "config", "trust_remote_code")  # what AutoProcessor hands on


class SoloProcessor(ProcessorMixin):
    """A tokenizer and the image rules of its `Tokens`."""

    tokenizer: Tokenizer
    chat_template: str

    def __init__(self, tokenizer: Tokenizer, chat_template: str = CHAT_TEMPLATE) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template

    @classmethod
    def from_tokens(cls, tokens: Tokens) -> SoloProcessor:
        """The processor of models trained with these tokens."""
        return cls(Tokenizer(tokens))

    @property
    def model_input_names(self) -> list[str]:
        """Keys of a batch."""
        return ["input_ids", "attention_mask", "vision_patches", "vision_patch_indices"]

    def __call__(
        self,
        images: Any = None,  # noqa: ANN401
        text: str | Sequence[str] | None = None,
        *,
        template: Template = "plain",
        padding: bool = True,
        return_tensors: Literal["pt", "np"] = "pt",
    ) -> BatchFeature:
        """Texts to go on from, each after its images: what a pre-trained model completes; `inst` makes it a question.

        For one text `images` is None, an image or a list; for a list of texts one such entry a row.
        """
        if isinstance(text, Rendered) or (isinstance(text, list) and any(isinstance(t, Rendered) for t in text)):
            raise ValueError(
                "processor: this text is a rendered conversation, whose marks would be read as letters; "
                "call apply_chat_template(conversation, tokenize=True, return_dict=True)"
            )
        rows, _ = prompts(text, images)
        return self._batch(rows, template, padding=padding, return_tensors=return_tensors)

    def apply_chat_template(  # type: ignore[override]  # noqa: PLR0913, Hugging Face's arguments
        self,
        conversation: Any,  # noqa: ANN401
        *,
        images: Any = None,  # noqa: ANN401
        template: Template = "inst",
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        return_dict: bool = False,
        padding: bool = True,
        return_tensors: Literal["pt", "np"] = "pt",
    ) -> Any:  # noqa: ANN401 - as `tokenize` and `return_dict` say
        """A conversation, or a list of them, as model inputs, as their `input_ids` alone, or as text to read.

        One that ends with a user's turn is a prompt already, so `add_generation_prompt` adds nothing to it.
        """
        rows, is_batch = conversations(conversation, images)
        if tokenize:
            batch = self._batch(rows, template, padding=padding, return_tensors=return_tensors)
            return batch if return_dict else batch["input_ids"]
        tokens: Any = {"bos_token": self.tokenizer.bos_token, "eos_token": self.tokenizer.eos_token}
        said: Any = [list(row.messages) for row in rows]
        texts: Any = render_jinja_template(said, chat_template=self.chat_template, form=template, **tokens)
        rendered = [Rendered(value) for value in texts[0]]
        return rendered if is_batch else rendered[0]

    def decode(self, token_ids: Any, skip_special_tokens: bool = True) -> str:  # noqa: ANN401
        """The text in the ids of one row; control and vision ids are never shown."""
        if not skip_special_tokens:
            raise ValueError("decode: control and vision ids have no text; leave skip_special_tokens true")
        ids: list[int] = np.atleast_1d(np.asarray(token_ids)).tolist()
        return self.tokenizer.decode(ids)

    def batch_decode(self, token_ids: Any, skip_special_tokens: bool = True) -> list[str]:  # noqa: ANN401
        """The text in the ids of each row."""
        return [self.decode(row, skip_special_tokens) for row in token_ids]

    def post_process_image_text_to_text(  # type: ignore[override]
        self,
        generated_outputs: Any,  # noqa: ANN401
        skip_special_tokens: bool = True,
    ) -> list[str]:
        """`batch_decode`, under the name by which generic code asks for it."""
        return self.batch_decode(generated_outputs, skip_special_tokens)

    def to_dict(self) -> dict[str, Any]:
        """What processor_config.json says."""
        fields: dict[str, Any] = self.tokenizer.tokens.model_dump(mode="json", exclude={"tokenizer"})
        return {"processor_class": type(self).__name__, "tokenizer_file": self.tokenizer.file_name} | fields

    def save_pretrained(self, save_directory: str | Path) -> list[str]:  # type: ignore[override]
        """Write processor_config.json, the tokenizer's file and chat_template.jinja; returns their paths."""
        folder = Path(save_directory)
        data = read_pinned(self.tokenizer.tokens)
        folder.mkdir(parents=True, exist_ok=True)
        written = {
            self.tokenizer.file_name: data,
            TEMPLATE_FILE: self.chat_template.encode(),
            CONFIG_FILE: (json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n").encode(),
        }
        for name, content in written.items():
            (folder / name).write_bytes(content)
        return [str(folder / name) for name in written]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        image_close: Literal["</vision>", "<vision>"] | None = None,
        **kwargs: Any,
    ) -> SoloProcessor:
        """The processor saved in a checkpoint's folder; SOLO-7B's own values where the folder holds only a tokenizer.

        `image_close`: the token that closes an image in a chat, where it is not what the folder says.
        """
        if unknown := sorted(set(kwargs) - {*HUB, *IGNORED}):
            raise TypeError(f"SoloProcessor.from_pretrained: no argument {unknown}; there is image_close")
        folder = _Folder(str(pretrained_model_name_or_path), {k: kwargs[k] for k in HUB if k in kwargs})
        fields = folder.fields()
        if image_close is not None:
            fields["image_close"] = fields["image_close"] | {"inst": image_close}
        try:
            tokens = Tokens.model_validate(fields)
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ValueError(f"{folder.name}/{CONFIG_FILE}: {faults}") from None
        processor = cls.from_tokens(tokens)
        n_ids, n_rows = processor.tokenizer.vocabulary.n_text_ids, folder.json("config.json").get("n_text_ids")
        if n_rows not in (None, n_ids):
            raise ValueError(
                f"{folder.name}: its tokenizer has {n_ids} text ids, its config.json {n_rows}; not of one model"
            )
        if template := folder.find(TEMPLATE_FILE):
            processor.chat_template = template.read_text(encoding="utf-8")
        return processor

    def _batch(
        self, rows: Sequence[Sample], template: Template, *, padding: bool, return_tensors: Literal["pt", "np"]
    ) -> BatchFeature:
        if return_tensors not in ("pt", "np"):
            raise ValueError(f"processor: return_tensors is {return_tensors!r}; choose one of 'pt', 'np'")
        pieces = [read_piece(row, self.tokenizer, template) for row in rows]
        lengths = [len(piece.ids) for piece in pieces]
        if not padding and len(set(lengths)) > 1:
            raise ValueError(f"processor: rows of {lengths} tokens make no tensor; leave padding true")
        batch = side_by_side(pieces, self.tokenizer.vocabulary.eos)
        return BatchFeature(batch if return_tensors == "pt" else {name: t.numpy() for name, t in batch.items()})


class _Folder:
    """A checkpoint's folder, or a repository of the Hub, that may hold a processor."""

    def __init__(self, name: str, hub: Mapping[str, Any]) -> None:
        self.name, self.hub = name, hub

    def find(self, file: str) -> Path | None:
        found = cached_file(self.name, file, _raise_exceptions_for_missing_entries=False, **self.hub)
        return None if found is None else Path(found)

    def json(self, file: str) -> dict[str, Any]:
        """The JSON object of a file; empty where there is none."""
        path = self.find(file)
        if path is None:
            return {}
        try:
            return dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.name}/{file}: not a JSON object: {error}") from None

    def fields(self) -> dict[str, Any]:
        """The fields of `Tokens` that the folder's files tell, and SOLO's values for the rest."""
        saved, shape = self.json(CONFIG_FILE), self.json("config.json")
        names = [saved["tokenizer_file"]] if "tokenizer_file" in saved else list(TOKENIZER_FILES)
        path = next((found for name in names if (found := self.find(Path(name).name)) is not None), None)
        if path is None:
            raise ValueError(
                f"{self.name}: no {' or '.join(names)}; save the processor there: "
                "SoloProcessor.from_tokens(tokens).save_pretrained(folder)"
            )
        fields = DEFAULTS | {k: shape[k] for k in ("patch_px", "max_side_px") if k in shape}
        fields |= {"tokenizer": str(path), "tokenizer_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        if saved:
            return fields | {k: v for k, v in saved.items() if k in Tokens.model_fields}
        if path.suffix == ".json":  # what SentencePiece keeps in its model, Hugging Face keeps beside its own
            beside = self.json("tokenizer_config.json")
            fields |= {k: _token(beside.get(f"{k}_token")) for k in ("bos", "eos")}
            fields["text_ids"] = shape.get("n_text_ids")
        return fields


def _token(value: Any) -> Any:  # noqa: ANN401 - a string, or an object of Hugging Face's that holds it
    return value.get("content") if isinstance(value, dict) else value
