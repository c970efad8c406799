"""Judge: a checkpoint's answers to questions, with and without their pictures, right or wrong.

In: questions as samples whose last turn is the answer. Out: a row of each, and the reasons of what could not be asked.
Invariants: the answer is cut off before the prompt is tokenised; how prompts are batched changes no answer. Cost: the
model in memory, then two passes over all prompts, `max_new_tokens` steps each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from solo.artifact import Artifact
from solo.plugin import resolve
from solo.sample import Rejected, Sample
from solo.sequence.patches import ImageError
from solo.spec import BenchmarkSpec, Tokens

if TYPE_CHECKING:
    from solo.sequence.loader import Piece
    from solo.sequence.tokenizer import Tokenizer

BATCH_TOKENS = {"cpu": 2048, "cuda": 65_536}  # tokens of prompts answered at once, padding counted
BLANK = 128  # mid grey; resizing a constant picture gives the constant, so the blank is made of patches

Row = dict[str, Any]


class Judge:
    """A loaded model with the scorer of one benchmark; made only when a chunk is still to be answered."""

    def __init__(self, benchmark: BenchmarkSpec, tokens: Tokens, trained: Artifact) -> None:
        import torch
        from transformers.utils.logging import disable_progress_bar

        from solo.model.causal_lm import SoloForCausalLM
        from solo.sequence.tokenizer import Tokenizer

        disable_progress_bar()  # type: ignore[no-untyped-call]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = SoloForCausalLM.from_pretrained(trained.path / "checkpoint").to(device)  # type: ignore[arg-type]
        self.tokenizer: Tokenizer = Tokenizer(tokens)
        self.benchmark = benchmark
        self.scorer = resolve("benchmarks", benchmark.scorer)

    def answer(self, chunk: Sequence[Sample | Rejected]) -> Row:
        """Rows of a chunk and the reasons of what could not be asked."""
        asked: list[tuple[Sample, Piece]] = []
        dropped: Counter[str] = Counter()
        for sample in chunk:
            piece = sample.status if isinstance(sample, Rejected) else self.prompt(sample)
            if isinstance(piece, str):
                dropped[piece] += 1
            else:
                assert isinstance(sample, Sample)
                asked.append((sample, piece))
        pieces = [piece for _, piece in asked]
        blank = [replace(p, patches=np.full_like(p.patches, BLANK)) for p in pieces]
        responses, blind = self.complete(pieces), self.complete(blank)
        rows = [self.row(s, r, b) for (s, _), r, b in zip(asked, responses, blind, strict=True)]
        return {"rows": rows, "dropped": dict(dropped)}

    def prompt(self, sample: Sample) -> Piece | str:
        """What the model is given, or why the question cannot be asked."""
        from solo.sequence.loader import read_piece

        question = replace(sample, messages=sample.messages[:-1])  # the last turn is the answer
        try:
            piece = read_piece(question, self.tokenizer, self.benchmark.template)
        except ImageError:
            return "undecodable"
        except ValueError:  # an image that the resize rule cannot serve
            return "image_too_thin"
        longest = self.model.config.max_position_embeddings - self.benchmark.max_new_tokens
        return piece if len(piece.ids) <= longest else "over_long"

    def complete(self, pieces: Sequence[Piece]) -> list[str]:
        """Responses as text; equal prompts (a blind set has few others) are asked once, like lengths together."""
        unique = {p.ids.tobytes() + p.patches.tobytes(): p for p in pieces}
        order = sorted(unique, key=lambda key: (len(unique[key].ids), key))
        said: dict[bytes, str] = {}
        while order:
            longest = BATCH_TOKENS[self.model.device.type]
            n = max(1, sum((i + 1) * len(unique[key].ids) <= longest for i, key in enumerate(order)))
            batch, order = order[:n], order[n:]
            said |= dict(zip(batch, self._generate([unique[key] for key in batch]), strict=True))
        return [said[p.ids.tobytes() + p.patches.tobytes()] for p in pieces]

    def _generate(self, prompts: Sequence[Piece]) -> list[str]:
        """Greedy answers to a batch, up to the EOS that ends them."""
        from solo.sequence.loader import side_by_side

        eos = self.tokenizer.vocabulary.eos
        rows = {name: t.to(self.model.device) for name, t in side_by_side(prompts, eos).items()}
        n_new = self.benchmark.max_new_tokens
        ids = self.model.generate(**rows, max_new_tokens=n_new, do_sample=False, eos_token_id=eos)
        new = ids[:, rows["input_ids"].shape[1] :].tolist()
        return [self.tokenizer.decode(one[: one.index(eos)] if eos in one else one).strip() for one in new]

    def row(self, sample: Sample, response: str, blind: str) -> Row:
        """One answered question."""
        answer = said(sample, -1)
        return {
            "question_id": question_id(sample),
            "category": str(sample.meta.get("category", "all")),
            "prompt": "\n".join(said(sample, i) for i in range(len(sample.messages) - 1)),
            "answer": answer,
            "response": response,
            "blind_response": blind,
            "correct": bool(self.scorer(response, answer)),
            "blind_correct": bool(self.scorer(blind, answer)),
        }


def question_id(sample: Sample) -> str:
    """The set's own id of a question, or our key where it has none."""
    return str(sample.meta.get("question_id", sample.key))


def said(sample: Sample, turn: int) -> str:
    """The words of one turn."""
    return "\n".join(item["text"] for item in sample.messages[turn]["content"] if item["type"] == "text")
