"""Loader: a pack plan and shards to tensors, any pack at once.

In: the plan of a mix, the shards of its sources. Out: `Pack`s. Invariants: pack i is a pure function of the plan;
optimizer step s is packs [s * batch_packs, (s + 1) * batch_packs) for every world size, so a loader's whole state is
one integer; counts that differ from the plan's are an error that names the key; a document that cannot be read names
key and place and stops the run, or is left out and counted up to a number the recipe allows. Cost: per document one
read, one tokenisation and its decodes, written straight to the pack's patches.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from solo.pack.plan import Plan
from solo.sample import Sample, parse_sample
from solo.sequence.patches import ImageError, grid, image_size, patchify
from solo.sequence.raster import BYTES, Raster, Recycled, Room
from solo.sequence.shards import Shards
from solo.sequence.tokenizer import SOLO, Tokenizer
from solo.sequence.tokens import tokenize
from solo.spec import Decode, Template, Tokens

log = logging.getLogger(__name__)

NO_TARGET = -100
PADDING = -1  # as document id


class DamagedSampleError(ValueError):
    """A document's bytes are not what was sharded; the message names key, shard and offset."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A document, or a token range of one, ready to lie in a pack."""

    source: str
    key: str
    ids: np.ndarray  # (n,) int32
    is_target: np.ndarray  # (n,) bool; never at 0: nothing in the piece predicts its first token
    patch_index: np.ndarray  # (n,) int32, -1 or a row of `patches`
    patches: np.ndarray  # (n_patches, 3 * patch_px**2) uint8; inside `PackLoader` also a Room

    @property
    def n_loss_tokens(self) -> int:
        """Tokens that carry loss."""
        return int(np.count_nonzero(self.is_target))

    def extended(self, ids: Sequence[int]) -> Piece:
        """The piece with these text ids after it, without loss."""
        new = np.asarray(ids, np.int32)
        return replace(
            self,
            ids=np.concatenate([self.ids, new]),
            is_target=np.concatenate([self.is_target, np.zeros(len(new), bool)]),
            patch_index=np.concatenate([self.patch_index, np.full(len(new), -1, np.int32)]),
        )


@dataclass(frozen=True, eq=False)
class Pack:
    """One training sequence of n = pack_tokens tokens: documents end to end, then padding."""

    index: int
    input_ids: Tensor  # (n,) int64; padding is EOS
    position_ids: Tensor  # (n,) int64, from 0 in each document
    document_ids: Tensor  # (n,) int32, 0, 1, ... in order, -1 in padding
    patches: Tensor | Raster  # (n_patches, 3 * patch_px**2) uint8; a Raster is cut where it is indexed
    patch_index: Tensor  # (n,) int64, -1 or a row of `patches`
    targets: Tensor  # (n,) int64: the id to predict AT this position (already shifted), -100 = none
    segments: list[tuple[str, str, int, int]]  # (source, key, first, last): tokens first <= i < last are its own
    left_out: tuple[dict[str, Any], ...] = ()  # rows of the plan whose documents were damaged

    @property
    def n_tokens(self) -> int:
        """Tokens without padding; 0 where every document was damaged."""
        return self.segments[-1][3] if self.segments else 0

    @property
    def n_loss_tokens(self) -> int:
        """Positions with a target."""
        return int((self.targets != NO_TARGET).sum())

    def pinned(self) -> Pack:
        """The same in memory that a GPU reads by itself: see `solo.sequence.upload`."""
        tensors = ("input_ids", "position_ids", "document_ids", "patches", "patch_index", "targets")
        return replace(self, **{name: getattr(self, name).pin_memory() for name in tensors})

    def bare(self) -> Pack:
        """The same without its patches, up to 134 MB: what is told of a pack needs none."""
        return replace(self, patches=torch.zeros(0, self.patches.shape[1], dtype=torch.uint8))

    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [last - first for _, _, first, last in self.segments]

    def has_image(self) -> bool:
        """Whether any token shows a patch."""
        return bool((self.patch_index >= 0).any())

    def loss_ranges(self) -> list[tuple[str, str, int, int]]:
        """(source, key, first, last): `SoloForCausalLM.pack_losses(pack)[first:last]` are that document's."""
        n_before = np.cumsum(np.append(0, self.targets.numpy() != NO_TARGET))
        return [(source, key, int(n_before[a]), int(n_before[b])) for source, key, a, b in self.segments]


def read_piece(  # noqa: PLR0913, the last two only say where and how
    sample: Sample,
    tokenizer: Tokenizer,
    template: Template,
    *,
    begin: int = 0,
    end: int | None = None,
    decode: Decode = "exact",
    out: np.ndarray | Room | None = None,
) -> Piece:
    """A sample's tokens [begin, end) with its patches; a range that cuts a document with images is an error.

    The patches are written to `out` where it has just their number of rows.
    """
    px = {"patch_px": tokenizer.tokens.patch_px, "max_side_px": tokenizer.tokens.max_side_px}
    grids = [grid(*image_size(data, path=decode), **px) for data in sample.images]
    document = tokenize(sample, grids, tokenizer, template)
    n = len(document.ids)
    end = n if end is None else end
    if not 0 <= begin < end <= n or (grids and end - begin != n):
        raise ValueError(f"{sample.key}: cannot cut {begin}:{end} from {n} tokens with {len(grids)} images; pack again")
    if out is None or len(out) != document.n_patches:
        out = np.empty((document.n_patches, 3 * px["patch_px"] ** 2), np.uint8)
    at = 0
    for data, (rows, cols) in zip(sample.images, grids, strict=True):
        patchify(data, **px, path=decode, out=out[at : at + rows * cols])
        at += rows * cols
    is_target = document.is_target[begin:end].copy()
    is_target[0] = False
    return Piece(
        sample.source,
        sample.key,
        document.ids[begin:end],
        is_target,
        document.patch_index[begin:end],
        cast(np.ndarray, out),
    )


def assemble(
    pieces: Sequence[Piece],
    *,
    index: int,
    pack_tokens: int,
    padding: int = SOLO.eos,
    patches: np.ndarray | Room | None = None,
) -> Pack:
    """Pieces end to end in one pack, padded to `pack_tokens` with the vocabulary's EOS.

    `patches`: all of theirs, where they lie together.
    """
    assert pieces, f"pack {index} is empty"
    lengths = np.array([len(p.ids) for p in pieces], np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    if total > pack_tokens:
        raise ValueError(
            f"pack {index}: {total} tokens in {len(pieces)} documents > pack_tokens {pack_tokens}; pack again"
        )
    input_ids = np.full(pack_tokens, padding, np.int64)
    targets = np.full(pack_tokens, NO_TARGET, np.int64)
    position_ids = np.zeros(pack_tokens, np.int64)
    document_ids = np.full(pack_tokens, PADDING, np.int32)
    patch_index = np.full(pack_tokens, -1, np.int64)
    input_ids[:total] = np.concatenate([p.ids for p in pieces])
    document_ids[:total] = np.repeat(np.arange(len(pieces), dtype=np.int32), lengths)
    position_ids[:total] = np.arange(total) - np.repeat(ends - lengths, lengths)
    targeted = np.flatnonzero(np.concatenate([p.is_target for p in pieces]))
    targets[targeted - 1] = input_ids[targeted]
    n_before = np.cumsum([0] + [len(p.patches) for p in pieces[:-1]])
    local = np.concatenate([p.patch_index for p in pieces])
    patch_index[:total] = np.where(local >= 0, local + np.repeat(n_before, lengths), -1)
    if patches is None:
        patches = np.concatenate([p.patches for p in pieces])
    segments = [(p.source, p.key, int(b - n), int(b)) for p, n, b in zip(pieces, lengths, ends, strict=True)]
    return Pack(
        index=index,
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        document_ids=torch.from_numpy(document_ids),
        patches=patches.raster() if isinstance(patches, Room) else torch.from_numpy(patches),
        patch_index=torch.from_numpy(patch_index),
        targets=torch.from_numpy(targets),
        segments=segments,
    )


def side_by_side(pieces: Sequence[Piece], pad_id: int) -> dict[str, Tensor]:
    """Pieces as rows of a batch, padded on the left: what `SoloForCausalLM.forward` and `generate` take."""
    n = max(len(p.ids) for p in pieces)
    input_ids = torch.full((len(pieces), n), pad_id, dtype=torch.int64)
    indices = torch.full((len(pieces), n), -1, dtype=torch.int64)
    attention_mask = torch.zeros((len(pieces), n), dtype=torch.int64)
    n_patches = 0
    for row, piece in enumerate(pieces):
        own = slice(n - len(piece.ids), n)
        input_ids[row, own] = torch.from_numpy(piece.ids.astype(np.int64))
        indices[row, own] = torch.from_numpy(np.where(piece.patch_index < 0, -1, piece.patch_index + n_patches))
        attention_mask[row, own] = 1
        n_patches += len(piece.patches)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "vision_patches": torch.from_numpy(np.concatenate([p.patches for p in pieces])),
        "vision_patch_indices": indices,
    }


class PackLoader:
    """Packs of one plan by number; threads may share one."""

    def __init__(
        self,
        plan_dir: Path,
        shard_dirs: Mapping[str, Path | str] | Shards,
        tokens: Tokens,
        pack_tokens: int,
        *,
        decode: Decode = "exact",
        max_damaged: int = 0,
    ) -> None:
        """`shard_dirs`: source -> its shard artifact, a folder or fsspec URL that holds `shards/00000.tar`.

        `max_damaged`: how many damaged documents this loader leaves out before one more is an error.
        """
        self.shards = shard_dirs if isinstance(shard_dirs, Shards) else Shards(shard_dirs)
        self.pack_tokens, self.decode, self.max_damaged = pack_tokens, decode, max_damaged
        self.tokenizer = Tokenizer(tokens)
        self.plan = Plan(plan_dir)
        self.n_left_out = 0
        self.pin = False  # whether packs are for a GPU
        self._memory = Recycled(pack_tokens * BYTES * tokens.patch_px**2)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of packs."""
        return len(self.plan)

    def rows(self, i: int) -> list[dict[str, Any]]:
        """The plan's rows of pack i."""
        return self.plan.rows(i)

    def load(self, i: int) -> Pack:
        """Pack i, whatever was loaded before."""
        rows = self.rows(i)
        ends = np.cumsum([row["n_patches"] for row in rows]).tolist()
        patches = self._room(ends[-1])
        pieces, left_out = [], []
        for row, end in zip(rows, ends, strict=True):
            try:
                pieces.append(self._piece(row, patches[end - row["n_patches"] : end]))
            except DamagedSampleError as error:
                self._leave_out(error)
                left_out.append(row)
        if not left_out:
            pack = self._assemble(pieces, i, patches)
        else:
            pack = self._assemble(pieces, i) if pieces else self._padding(i)
            pack = replace(pack, left_out=tuple(left_out))
        return pack.pinned() if self.pin else pack

    def iterate(
        self, first_step: int, *, batch_packs: int, rank: int = 0, world_size: int = 1, workers: int = 0
    ) -> Generator[Pack]:
        """This rank's packs from optimizer step `first_step` on: of each step's packs the rank-th, the next W on.

        `workers` threads load ahead (0: none); order and content do not depend on them.
        """
        if batch_packs % world_size or len(self) % batch_packs:
            raise ValueError(
                f"loader: {len(self)} packs, {batch_packs} a step, {world_size} ranks: each must be a multiple of "
                "the next; change the number of ranks"
            )
        yield from self.ahead(range(first_step * batch_packs + rank, len(self), world_size), workers=workers)

    def ahead(self, order: Iterable[int], *, workers: int) -> Generator[Pack]:
        """These packs, loaded ahead by so many threads."""
        if workers == 0:
            yield from map(self.load, order)
            return
        ahead: deque[Future[Pack]] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
        try:
            for i in order:
                ahead.append(pool.submit(self.load, i))
                if len(ahead) > workers + 1:  # a pack of patches is up to 100 MB: no more than keeps all at work
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _room(self, n_patches: int) -> np.ndarray | Room:
        """Memory for a pack's patches: cut here on the exact path, on the model's device on the fast one."""
        px = self.tokenizer.tokens.patch_px
        if self.decode == "exact":
            return self._memory.take((n_patches, 3 * px**2))
        return Room.of(self._memory.take((n_patches * px, BYTES * px)), px)

    def _piece(self, row: dict[str, Any], out: np.ndarray | Room) -> Piece:
        key, data = row["key"], None
        try:
            data = self.shards.read(row["source"], row["shard"], row["offset"], row["length"])
            sample = parse_sample(data)
        except Exception as error:  # damaged bytes may raise anything; the document must be named
            raise self._damaged(row, f"{type(error).__name__}: {error}") from error
        if sample.key != key:
            raise ValueError(
                f"{key}: {row['source']} {row['shard']:05d}.tar@{row['offset']} holds {sample.key}; pack again"
            )
        try:
            piece = read_piece(
                sample,
                self.tokenizer,
                row["template"],
                begin=row["begin"],
                end=row["end"],
                decode=self.decode,
                out=out,
            )
        except Exception as error:  # a flipped letter may raise anything
            self._check_bytes(row, data)
            if isinstance(error, ImageError):
                raise self._damaged(row, str(error)) from error
            raise
        got = (len(piece.ids), len(piece.patches), piece.n_loss_tokens)
        planned = (row["n_tokens"], row["n_patches"], row["n_loss_tokens"])
        if got != planned:
            self._check_bytes(row, data)
            raise ValueError(
                f"{key}: (tokens, patches, loss tokens) are {got}, the plan says {planned}; "
                "the tokenizer or the image code changed, shard again"
            )
        return piece

    def _check_bytes(self, row: dict[str, Any], data: bytes) -> None:
        """What does not fit the plan is damage where the ledger's SHA-256 says so, else the code changed."""
        found = self.shards.ledger_sha256(row["source"], row["shard"], row["key"])
        digest = hashlib.sha256(data).hexdigest()
        if found is not None and digest != found:
            raise self._damaged(row, f"sha256 is {digest[:8]}..., the ledger says {found[:8]}...")

    def _damaged(self, row: dict[str, Any], why: str) -> DamagedSampleError:
        place = f"{row['shard']:05d}.tar[{row['offset']}:+{row['length']}] of {row['source']}"
        return DamagedSampleError(f"{row['key']}: no sample at {place}: {why}; make the shards again")

    def _leave_out(self, error: DamagedSampleError) -> None:
        with self._lock:
            self.n_left_out += 1
            n = self.n_left_out
        if n > self.max_damaged:
            raise DamagedSampleError(f"{error} (damaged document {n}, max_damaged is {self.max_damaged})") from error
        log.warning("left out, %d of at most %d: %s", n, self.max_damaged, error)

    def _assemble(self, pieces: Sequence[Piece], i: int, patches: np.ndarray | Room | None = None) -> Pack:
        padding = self.tokenizer.vocabulary.eos
        return assemble(pieces, index=i, pack_tokens=self.pack_tokens, padding=padding, patches=patches)

    def _padding(self, i: int) -> Pack:
        """Pack i where nothing of it can be read."""
        nothing = np.zeros(0, np.int32)
        width = 3 * self.tokenizer.tokens.patch_px**2
        empty = Piece("", "", nothing, nothing.astype(bool), nothing, np.empty((0, width), np.uint8))
        return replace(self._assemble([empty], i), segments=[])
