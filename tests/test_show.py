"""Show: every token of a pack in one stretch, loss as the plan counts it, nothing in the text that acts."""

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_proof import inputs, job
from test_tokens import TOKENIZER

from solo import artifact
from solo.artifact import Artifact
from solo.pack import part as pack
from solo.pack import show
from solo.sample import Sample, make_key
from solo.sample import text as item
from solo.sequence.tokens import tokenize

__all__ = ["inputs"]  # the fixture: shards of captions and dialogues, and a mix that takes all of them twice


@pytest.fixture
def root(inputs: dict[str, Artifact]) -> Path:
    return inputs["curate/toy"].path.parents[2]


@pytest.fixture
def made(root: Path, inputs: dict[str, Artifact]) -> Artifact:
    return artifact.make(job(root, inputs, by="mix"), pack.run)[0]


def test_every_token_is_shown_once_with_its_loss(root: Path, made: Artifact) -> None:
    plan = pq.read_table(made.path / "plan.parquet").to_pylist()
    for number in range(made.manifest.stats["n_packs"]):
        seen = show.pack(root, "toy", number)
        assert [d.row for d in seen.documents] == [r for r in plan if r["pack"] == number]
        assert seen.step == number // 2 + 1
        for d in seen.documents:
            assert sum(s.n_tokens for s in d.stretches) == d.row["n_tokens"]
            assert sum(s.n_tokens for s in d.stretches if s.has_loss) == d.row["n_loss_tokens"]
            patches = [re.fullmatch(r"(\d+) x (\d+) patches", s.text) for s in d.stretches if s.kind == "image"]
            assert sum(int(m[1]) * int(m[2]) for m in patches if m) == d.row["n_patches"]
            assert len(d.thumbnails) == len(patches)
            assert all(s.kind == "assistant" for s in d.stretches if s.has_loss)


def test_the_forms_hold_the_same(root: Path, made: Artifact) -> None:
    seen = show.pack(root, "toy", 0)
    text, markdown, html = show.text(seen), show.markdown(seen), show.html(seen)
    for d in seen.documents:
        assert all(d.row["key"] in form for form in (text, markdown, html))
    assert f"{seen.total('n_loss_tokens'):,} tokens with loss" in text
    assert html.count("<img ") == sum(len(d.thumbnails) for d in seen.documents) > 0
    assert not re.search(r"""(src|href)=["'](?!data:)""", html)
    assert re.search(r"^ +[+] assistant \d+: ", text, re.MULTILINE)
    assert "<strong>" in html


def test_text_of_the_data_does_not_act() -> None:
    evil = "\x1b[2J\u202e<img src=x onerror=alert(1)> [a](http://b) | **x**\n# h"
    said = ({"role": "user", "content": [item(evil)]}, {"role": "assistant", "content": [item(evil)]})
    sample = Sample(make_key("web", "evil"), "web", (), said, {})
    n = len(tokenize(sample, [], TOKENIZER, "inst").ids)
    row = {"slot": 0, "key": sample.key, "source": "web", "begin": 0, "end": n, "exposure": 0, "template": "inst"}
    row |= {"n_tokens": n, "n_patches": 0, "n_loss_tokens": n // 2}
    seen = show.PackView("toy", 0, 1, 1, 512, [show.view(row, sample, TOKENIZER)])
    assert "\x1b" not in show.text(seen) and "\u202e" not in show.text(seen)
    assert len(show.text(seen).splitlines()) == 3 + len(seen.documents[0].stretches)
    page = show.html(seen)
    assert "<img" not in page and "<a " not in page and page.count("<h1>") == 1
    assert page.count("<tr>") == 2


def test_a_piece_of_a_long_text_shows_its_own_part() -> None:
    sample = Sample(make_key("t", "1"), "t", (), ({"role": "assistant", "content": [item("one two three four")]},), {})
    document = tokenize(sample, [], TOKENIZER, "plain")
    parts = list(show.stretches(document, TOKENIZER, 2, 4))
    assert [(p.kind, p.text, p.n_tokens, p.has_loss) for p in parts] == [
        ("assistant", "two", 1, False),  # nothing in this pack predicts it
        ("assistant", "three", 1, True),
    ]


def test_what_is_not_there_is_said(root: Path, made: Artifact, tmp_path: Path) -> None:
    n = made.manifest.stats["n_packs"]
    with pytest.raises(ValueError, match=rf"mix 'toy' has packs 0 to {n - 1}, not {n}"):
        show.pack(root, "toy", n)
    with pytest.raises(ValueError, match=r"no packs of mix 'toys' under .*; there are packs of \['toy'\]"):
        show.pack(root, "toys", 0)
    with pytest.raises(ValueError, match=r"shard/chat with content 0123abcd is gone .*; run its part again"):
        show.find(tmp_path, "shard/chat", "0123abcd")
