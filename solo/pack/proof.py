"""Proof: documents of a pack cannot see each other, shown on packs of the plan just made.

In: a plan, its shards, the tokens of the recipe. Out: how much was examined and the largest differences found.
Invariants, or `ProofError`: (1) documents lie where the plan says, positions restart at 0 in each, the target of a
token is the next token of its own document; (2) after every token and patch of a document has changed, no bit of any
logit of another document or of the padding has, and the rule that a GPU compiles lets no pair across; (3) the loss of a
token in the pack is its loss in its document alone, within TOLERANCE. (2) and (3) are run on a CPU by a small random
SOLO model, through the attention code of the trainer.
Cost: N_PACKS packs, N_TOKENS tokens of each: 0.1 to 0.4 s a pack of 1,024 tokens, 2 s one of 32K, and loading torch.

Torch comes with the model, inside `prove`: importing this module costs nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from solo.artifact import LedgerError
from solo.spec import ModelSpec, Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from solo.model.causal_lm import SoloForCausalLM
    from solo.sequence.loader import Pack

N_PACKS = 4  # of each source in turn, the first in hash order
# Of a longer pack, consecutive documents from a slot given by a hash, of each its first N_TOKENS / N_SHARES tokens at
# most: what comes later in a document cannot move what comes before. 2,048 tokens are a mask of 4 million pairs.
N_TOKENS = 2048
N_SHARES = 8
N_PADDING = 16  # tokens of padding examined, where there is any

# What an id means does not matter to attention, so ids are taken modulo a vocabulary that keeps the head cheap.
N_IDS = 1021

# fp32 sums of another order differ by 1e-6 of a loss near 7; a leaked token moves it by 0.01 and more.
TOLERANCE = 1e-4  # nats a token

# Weights far larger than a real model's first ones: attention is then sharp, so a leak shows.
MODEL = ModelSpec(
    init="random",
    vocab_size=N_IDS,
    n_text_ids=N_IDS,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    rope_theta=10_000.0,
    rms_norm_eps=1e-5,
    sliding_window=4096,
    max_position_embeddings=32_768,
    init_std=0.3,
)


class ProofError(LedgerError):
    """A document of a pack sees another, or is not what it is alone."""


def prove(plan: Path, shards: dict[str, Path], tokens: Tokens, *, pack_tokens: int, seed: int) -> dict[str, Any]:
    """Examine some packs of a plan; what was examined and found, or `ProofError`."""
    import torch

    from solo.model.causal_lm import SoloForCausalLM
    from solo.sequence.loader import PackLoader

    loader = PackLoader(plan, shards, tokens, pack_tokens)
    sources = pq.read_table(plan / "packs.parquet", columns=["source"])["source"].to_pylist()
    model = SoloForCausalLM.from_spec(MODEL, tokens, seed=0).train(False)
    found: Counter[str] = Counter()
    worst = 0.0
    with torch.inference_mode(), _one_thread():
        for number in chosen(sources, seed):
            pack = loader.load(number)
            check_layout(pack, [row["n_tokens"] for row in loader.rows(number)])
            part = excerpt(pack, start=_hash(f"slot:{number}:{seed}") % len(pack.segments))
            check_rule(part)
            found["n_changes"] += check_isolation(model, part)
            worst = max(worst, check_losses(model, part))
            found["n_packs"] += 1
            found["n_documents"] += len(part.segments)
            found["n_tokens"] += part.n_tokens
    # A logit that moved would have raised, so that difference is 0 and not merely small.
    return {**found, "max_logit_difference": 0.0, "max_loss_difference": float(f"{worst:.1e}"), "tolerance": TOLERANCE}


def chosen(sources: list[str], seed: int) -> list[int]:
    """Packs to examine: by hash, one of each source before a second of any."""
    order = sorted(range(len(sources)), key=lambda i: (_hash(f"{i}:{seed}"), i))
    turn: Counter[str] = Counter()
    ranked = []
    for place, i in enumerate(order):
        ranked.append((turn[sources[i]], place, i))
        turn[sources[i]] += 1
    return [i for _, _, i in sorted(ranked)[:N_PACKS]]


def check_layout(pack: Pack, lengths: list[int]) -> None:
    """The tensors of a whole pack are the plan's documents, one after the other, and nothing points across a border."""
    n, n_pad = sum(lengths), len(pack.input_ids) - sum(lengths)
    documents = np.append(np.repeat(np.arange(len(lengths)), lengths), np.full(n_pad, -1))
    positions = np.concatenate([np.arange(length) for length in lengths])
    following, targets = pack.input_ids.numpy()[1:], pack.targets.numpy()
    aimed = np.flatnonzero(targets >= 0)
    wrong = None
    if not np.array_equal(pack.document_ids.numpy(), documents):
        wrong = "documents do not lie where the plan says"
    elif not np.array_equal(pack.position_ids.numpy()[:n], positions):
        wrong = "positions do not restart at 0 in each document"
    elif len(aimed) and (aimed[-1] >= n - 1 or (documents[aimed] != documents[aimed + 1]).any()):
        wrong = "a target lies in another document"
    elif (targets[aimed] != following[aimed]).any():
        wrong = "a target is not the next token"
    elif (pack.patch_index.numpy()[n:] >= 0).any():
        wrong = "padding holds a patch"
    if wrong:
        raise ProofError(f"pack {pack.index}: {wrong}; this is a bug in the loader, please report it")


def excerpt(pack: Pack, *, start: int) -> Pack:
    """The part of a pack that is run, by N_TOKENS and N_SHARES, with the tensors as they were loaded."""
    most = len(pack.input_ids)
    if most > N_TOKENS:
        most = N_TOKENS // N_SHARES
    n_documents, left = len(pack.segments), N_TOKENS
    taken: dict[int, int] = {}
    for slot in range(n_documents):
        slot = (start + slot) % n_documents  # noqa: PLW2901 - around the end
        _, _, first, last = pack.segments[slot]
        taken[slot] = min(last - first, most, left)
        left -= taken[slot]
        if not left:
            break
    segments: list[tuple[str, str, int, int]] = []
    kept: list[int] = []
    for slot, n in sorted(taken.items()):
        source, key, first, _ = pack.segments[slot]
        segments.append((source, key, len(kept), len(kept) + n))
        kept += range(first, first + n)
    n_padding = min(len(pack.input_ids) - pack.n_tokens, N_PADDING)
    return _select(pack, [*kept, *range(pack.n_tokens, pack.n_tokens + n_padding)], segments)


def _select(pack: Pack, kept: list[int], segments: list[tuple[str, str, int, int]]) -> Pack:
    """These tokens of a pack and the patches they show; a target whose token is not kept is none."""
    import torch

    at = torch.tensor(kept)
    targets = pack.targets[at]
    for _, _, _, last in segments:
        targets[last - 1] = -100
    # Numbered anew, so that documents left out leave no gap; what shared a number shares one still.
    numbers = torch.unique(pack.document_ids[at], return_inverse=True)[1].to(pack.document_ids.dtype)
    numbers -= int((pack.document_ids[at] < 0).any())
    shows = pack.patch_index[at]
    patches = pack.patches[shows[shows >= 0]]
    return replace(
        pack,
        input_ids=pack.input_ids[at] % N_IDS,
        position_ids=pack.position_ids[at],
        document_ids=numbers,
        patches=patches,
        patch_index=torch.where(shows >= 0, (shows >= 0).cumsum(0) - 1, -1),
        targets=torch.where(targets >= 0, targets % N_IDS, targets),
        segments=segments,
    )


def check_isolation(model: SoloForCausalLM, pack: Pack) -> int:
    """Change documents, look at the others; how many changed packs it took.

    Documents and the padding get numbers, and for each binary digit those with a 1 change while those with a 0 are
    watched, then the other way round. Two numbers differ in a digit, so every ordered pair is tried: D documents cost
    2 log2(D) runs instead of D.
    """
    import torch

    at, owner = torch.arange(len(pack.input_ids)), owners(pack)
    before = model.logits(pack, at)
    n_changes = 0
    for digit in range(len(pack.segments).bit_length()):
        for side in (0, 1):
            changes = (owner >> digit & 1) == side
            if changes.all() or not changes.any():  # no padding had the number that is missing here
                continue
            after = model.logits(changed(pack, changes), at)
            n_changes += 1
            moved = (after != before).any(1) & ~changes
            if moved.any():
                raise ProofError(_moved(pack, int(moved.nonzero()[0, 0]), (after - before)[moved].abs().max().item()))
            assert (after != before).any(1)[changes].any(), f"pack {pack.index}: the change changed nothing"
    return n_changes


def check_rule(pack: Pack) -> None:
    """The rule that flex_attention compiles for a GPU, pair by pair: a token sees its own document or only itself."""
    import torch

    from solo.model.attention import build_mask

    owner = owners(pack)
    seen = build_mask(pack.document_ids, MODEL.sliding_window)
    assert isinstance(seen, torch.Tensor), "a mask made on a CPU is a tensor"
    across = seen & (owner[:, None] != owner[None, :])
    if across.any():
        q, k = across.nonzero()[0].tolist()
        raise ProofError(
            f"pack {pack.index}: token {q} of the part examined sees token {k}, which is not of its document; "
            f"the attention mask leaks, do not train with it"
        )


def owners(pack: Pack) -> Tensor:
    """(n,) the segment that each token is of; what no segment has is padding, one number more."""
    import torch

    owner = torch.full((len(pack.input_ids),), len(pack.segments))
    for i, (_, _, first, last) in enumerate(pack.segments):
        owner[first:last] = i
    return owner


def _moved(pack: Pack, at: int, by: float) -> str:
    owner = next((key for _, key, first, last in pack.segments if first <= at < last), "padding")
    return (
        f"pack {pack.index}: {owner} is not alone: a logit moved by {by:.3g} when only other documents were changed; "
        f"the attention mask leaks, do not train with it"
    )


def changed(pack: Pack, where: Tensor) -> Pack:
    """The pack with another token and other pixels at every position of a mask."""
    import torch

    shown = pack.patch_index[where & (pack.patch_index >= 0)]
    patches = pack.patches.clone()
    patches[shown] = 255 - patches[shown]  # no byte is its own complement
    return replace(pack, input_ids=torch.where(where, (pack.input_ids + 1) % N_IDS, pack.input_ids), patches=patches)


def check_losses(model: SoloForCausalLM, pack: Pack) -> float:
    """The largest difference between a token's loss in the pack and in its document alone."""
    together = model.pack_losses(pack)
    worst, n = 0.0, 0
    for (_, key, _, _), alone in zip(pack.segments, alone_of(pack), strict=True):
        losses = model.pack_losses(alone)
        if not len(losses):
            continue
        by = (losses - together[n : n + len(losses)]).abs().max().item()
        n += len(losses)
        worst = max(worst, by)
        if not by <= TOLERANCE:  # also where it is not a number
            raise ProofError(
                f"pack {pack.index}: {key}: its loss in the pack and alone differ by {by:.3g} nats a token "
                f"> {TOLERANCE}; the attention mask or the positions are wrong, do not train with them"
            )
    assert n == len(together), f"pack {pack.index}: {len(together)} losses, {n} in its documents"
    return worst


def alone_of(pack: Pack) -> Iterator[Pack]:
    """Each document of a pack as a pack of its own, with positions counted here and not taken over."""
    import torch

    for source, key, first, last in pack.segments:
        part = _select(pack, list(range(first, last)), [(source, key, 0, last - first)])
        yield replace(part, position_ids=torch.arange(last - first), document_ids=part.document_ids * 0)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small take ten times as long on two busy cores as on one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.md5(name.encode(), usedforsecurity=False).digest(), "big")
