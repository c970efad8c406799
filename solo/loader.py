"""Loader: a pack plan and shards to tensors, any pack at once.

In: `plan.parquet` and `packs.parquet` of a mix, the shard folders of its sources. Out: `Pack`s. Invariants:
pack i is a pure function of the plan; optimizer step s is packs [s * batch_packs, (s + 1) * batch_packs) for
every world size, so a loader's whole state is one integer; counts that differ from the plan's are an error that
names the key. Cost: per document one seek and read, one tokenisation and its decodes; the plan's row groups are
read when needed and cached.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from solo.patches import grid, image_size, patchify
from solo.sample import Sample, read_sample
from solo.spec import Template, Tokens
from solo.tokens import EOS, Tokenizer, tokenize

NO_TARGET = -100
PADDING = -1  # as document id
ROW_GROUPS_KEPT = 4


@dataclass(frozen=True, eq=False)
class Piece:
    """A document, or a token range of one, ready to lie in a pack."""

    source: str
    key: str
    ids: np.ndarray  # (n,) int32
    is_target: np.ndarray  # (n,) bool; never at 0: nothing in the piece predicts its first token
    patch_index: np.ndarray  # (n,) int32, -1 or a row of `patches`
    patches: np.ndarray  # (n_patches, 3 * patch_px**2) uint8

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
    patches: Tensor  # (n_patches, 3 * patch_px**2) uint8
    patch_index: Tensor  # (n,) int64, -1 or a row of `patches`
    targets: Tensor  # (n,) int64: the id to predict AT this position (already shifted), -100 = none
    segments: list[tuple[str, str, int, int]]  # (source, key, first, last): tokens first <= i < last are its own

    @property
    def n_tokens(self) -> int:
        """Tokens without padding."""
        return self.segments[-1][3]

    @property
    def n_loss_tokens(self) -> int:
        """Positions with a target."""
        return int((self.targets != NO_TARGET).sum())

    def loss_ranges(self) -> list[tuple[str, str, int, int]]:
        """(source, key, first, last): `SoloForCausalLM.pack_losses(pack)[first:last]` are that document's."""
        n_before = np.cumsum(np.append(0, self.targets.numpy() != NO_TARGET)).tolist()
        return [(source, key, n_before[a], n_before[b]) for source, key, a, b in self.segments]


def read_piece(
    sample: Sample, tokenizer: Tokenizer, template: Template, *, begin: int = 0, end: int | None = None
) -> Piece:
    """A sample's tokens [begin, end) with its patches; a range that cuts a document with images is an error."""
    px = {"patch_px": tokenizer.tokens.patch_px, "max_side_px": tokenizer.tokens.max_side_px}
    grids = [grid(*image_size(data), **px) for data in sample.images]
    document = tokenize(sample, grids, tokenizer, template)
    n = len(document.ids)
    end = n if end is None else end
    if not 0 <= begin < end <= n or (grids and end - begin != n):
        raise ValueError(f"{sample.key}: cannot cut {begin}:{end} from {n} tokens with {len(grids)} images; pack again")
    cut = [patchify(data, **px) for data in sample.images]
    patches = np.concatenate(cut) if cut else np.empty((0, 3 * px["patch_px"] ** 2), np.uint8)
    is_target = document.is_target[begin:end].copy()
    is_target[0] = False
    return Piece(
        sample.source,
        sample.key,
        document.ids[begin:end],
        is_target,
        document.patch_index[begin:end],
        patches,
    )


def assemble(pieces: Sequence[Piece], *, index: int, pack_tokens: int) -> Pack:
    """Pieces end to end in one pack, padded to `pack_tokens`."""
    assert pieces, f"pack {index} is empty"
    lengths = np.array([len(p.ids) for p in pieces], np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    if total > pack_tokens:
        raise ValueError(
            f"pack {index}: {total} tokens in {len(pieces)} documents > pack_tokens {pack_tokens}; pack again"
        )
    input_ids = np.full(pack_tokens, EOS, np.int64)
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
    patches = np.concatenate([p.patches for p in pieces])
    segments = [(p.source, p.key, int(b - n), int(b)) for p, n, b in zip(pieces, lengths, ends, strict=True)]
    return Pack(
        index=index,
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        document_ids=torch.from_numpy(document_ids),
        patches=torch.from_numpy(patches),
        patch_index=torch.from_numpy(patch_index),
        targets=torch.from_numpy(targets),
        segments=segments,
    )


class PackLoader:
    """Packs of one plan by number; threads may share one."""

    def __init__(self, plan_dir: Path, shard_dirs: dict[str, Path], tokens: Tokens, pack_tokens: int) -> None:
        """`shard_dirs`: source -> its shard artifact, the folder that holds `shards/00000.tar`."""
        self.shard_dirs, self.pack_tokens = shard_dirs, pack_tokens
        self.tokenizer = Tokenizer(tokens)
        packs = pq.read_table(plan_dir / "packs.parquet", columns=["pack", "first_row", "n_rows"])
        self._first_row, self._n_rows = (packs[name].to_numpy() for name in ("first_row", "n_rows"))
        assert np.array_equal(packs["pack"].to_numpy(), np.arange(len(packs))), f"{plan_dir}: packs are not 0..n-1"
        self._plan = pq.ParquetFile(plan_dir / "plan.parquet", memory_map=True)
        meta = self._plan.metadata
        sizes = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
        self._group_ends = np.cumsum(sizes, dtype=np.int64)
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of packs."""
        return len(self._first_row)

    def rows(self, i: int) -> list[dict[str, Any]]:
        """The plan's rows of pack i."""
        first, left = int(self._first_row[i]), int(self._n_rows[i])
        found: list[dict[str, Any]] = []
        group = int(np.searchsorted(self._group_ends, first, side="right"))
        while left:
            table = self._row_group(group)
            offset = first - (int(self._group_ends[group]) - len(table))
            part = table.slice(offset, left).to_pylist()
            found += part
            first, left, group = first + len(part), left - len(part), group + 1
        assert {row["pack"] for row in found} <= {i}, f"pack {i}: first_row {self._first_row[i]} is not its own"
        return found

    def load(self, i: int) -> Pack:
        """Pack i, whatever was loaded before."""
        return assemble([self._piece(row) for row in self.rows(i)], index=i, pack_tokens=self.pack_tokens)

    def iterate(
        self, first_step: int, *, batch_packs: int, rank: int = 0, world_size: int = 1, workers: int = 0
    ) -> Iterator[Pack]:
        """This rank's packs from optimizer step `first_step` on: of each step's packs the rank-th, the next W on.

        `workers` threads load ahead (0: none); order and content do not depend on them.
        """
        if batch_packs % world_size or len(self) % batch_packs:
            raise ValueError(
                f"loader: {len(self)} packs, {batch_packs} a step, {world_size} ranks: each must be a multiple of "
                "the next; change the number of ranks"
            )
        order = range(first_step * batch_packs + rank, len(self), world_size)
        if workers == 0:
            yield from map(self.load, order)
            return
        ahead: deque[Future[Pack]] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
        try:
            for i in order:
                ahead.append(pool.submit(self.load, i))
                if len(ahead) > 2 * workers:  # a full pack of patches is 100 MB: bounded, not endless
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _row_group(self, group: int) -> pa.Table:
        with self._lock:
            if group not in self._groups:
                self._groups[group] = self._plan.read_row_group(group)
                while len(self._groups) > ROW_GROUPS_KEPT:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
            return self._groups[group]

    def _piece(self, row: dict[str, Any]) -> Piece:
        key, source = row["key"], row["source"]
        path = self.shard_dirs[source] / "shards" / f"{row['shard']:05d}.tar"
        try:
            sample = read_sample(path, row["offset"], row["length"])
        except Exception as error:
            raise ValueError(
                f"{key}: no sample at {path.name}[{row['offset']}:+{row['length']}] of {source}: "
                f"{type(error).__name__}: {error}; make the shards again"
            ) from error
        if sample.key != key:
            raise ValueError(f"{key}: {source} {path.name}@{row['offset']} holds {sample.key}; pack again")
        piece = read_piece(sample, self.tokenizer, row["template"], begin=row["begin"], end=row["end"])
        got = (len(piece.ids), len(piece.patches), piece.n_loss_tokens)
        planned = (row["n_tokens"], row["n_patches"], row["n_loss_tokens"])
        if got != planned:
            raise ValueError(
                f"{key}: (tokens, patches, loss tokens) are {got}, the plan says {planned}; "
                "the tokenizer or the image code changed, shard again"
            )
        return piece
