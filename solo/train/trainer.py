"""Trainer: what one rank of a stage does, from its first step to its weights.

In: a task (plan, shards, weights to start from, stage, DeepSpeed configuration). Out: one JSON line per optimizer
step on stdout (rank 0), checkpoints in the work folder, at the end `trained.parquet` and `checkpoint/`. Invariants:
optimizer step s trains packs [(s-1)B, sB) whatever the number of ranks; all ranks make the same collective calls, so
also a pack without targets or images is run; the loader's state and the rows of packs are part of a checkpoint. Cost:
the model's, plus one all-reduce of a few numbers a step, which also carries the wish to stop; one more, before the
first pass and after all packs of the step are loaded, where a token average must count documents left out.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor, nn

from solo.artifact import write_atomic
from solo.model.causal_lm import SoloForCausalLM
from solo.model.processor import SoloProcessor
from solo.sequence.loader import Pack, PackLoader
from solo.spec import ModelSpec, Stage, Tokens
from solo.train import engine, fp8, groups, memory, sick, state, trained
from solo.train.flops import peak
from solo.train.held_loss import HeldLoss
from solo.train.saver import Saver
from solo.train.tally import STOP, Tally
from solo.train.trained import ROW

log = logging.getLogger(__name__)

LEAVE_S = 10.0  # for a checkpoint that is being written when this rank fails


class Trainer:
    """State of one rank: engine, loader position (the step), rows of the packs it trained."""

    def __init__(self, task: dict[str, Any], wrap: Callable[[SoloForCausalLM], nn.Module] = engine.PackLoss) -> None:
        """`wrap`: what makes of the model a module that maps a pack to its losses."""
        self.task = task
        self.stage = Stage.model_validate(task["stage"])
        self.rank, self.n_ranks = dist.get_rank(), dist.get_world_size()
        self.work, self.out = Path(task["work"]), Path(task["out"])
        tokens = Tokens.model_validate(task["tokens"])
        plan, shards = Path(task["plan"]), task["shards"]
        self.loader = PackLoader(
            plan,
            shards,
            tokens,
            self.stage.pack_tokens,
            decode=self.stage.decode,
            max_damaged=self.stage.max_damaged,
        )
        self.loader.pin = torch.cuda.is_available()
        self.n_steps = len(self.loader) // self.stage.batch_packs
        batches = pq.read_table(plan / "packs.parquet")["n_loss_tokens"].to_numpy()
        self.step_targets = batches.reshape(self.n_steps, self.stage.batch_packs).sum(1)
        self.stop = False
        self.step = 0
        self.health = sick.Health(self.stage)
        self.rows: list[dict[str, Any]] = []
        self.losses: list[sick.Loss] = []  # of this rank's documents in the last step
        self.seconds: list[float] = []  # of the last steps
        self.planned: memory.Use | None = None
        self.stall_s, self.n_targets = 0.0, 0  # of the step: waiting for packs, supervised tokens over all ranks
        every = task.get("held_out_every_steps")
        self.held = HeldLoss(plan, self.loader.shards, tokens, self.stage, every_steps=every) if every else None
        start = {name: task[name] for name in ("init", "init_projection") if name in task}
        self.shape, self.patch_px = ModelSpec.model_validate(task["model"] | start), tokens.patch_px
        self.tally = Tally(sorted(shards), self.stage, self.shape, self.patch_px)
        model = SoloForCausalLM.from_spec(self.shape, tokens, task["seed"])
        groups.freeze(model, self.stage)
        if self.stage.precision == "fp8":
            fp8.check_gpu(self.stage.name)
            fp8.convert(model)
        model.model.recompute_layers, model.model.lean = self._recomputed(int(batches.max()))
        model.train()
        self.n_parameters = sum(p.numel() for p in model.parameters())
        self.engine = engine.start(wrap(model), self.stage, task["deepspeed"])
        self.saver = Saver(self.engine, self.work / "checkpoints", self.stage.name)
        if task["resume"]:
            self._load(Path(task["resume"]), int(task["first_step"]))

    def _recomputed(self, n_targets: int) -> tuple[int, bool]:
        """How many layers keep no activations, and whether the others keep few: the memory plan, for a GPU."""
        model, asked = self.shape, memory.policy()
        if not torch.cuda.is_available():
            return model.num_hidden_layers if asked == "full" else 0, False
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        pack: dict[str, Any] = {"patch_px": self.patch_px, "n_tokens": self.stage.pack_tokens, "n_targets": n_targets}
        pack["frozen"] = memory.frozen_groups(self.stage)
        n_hosts = self.n_ranks // int(os.environ.get("LOCAL_WORLD_SIZE", self.n_ranks))
        machine = memory.Machine(gpu, self.n_ranks, memory.host_bytes(), n_hosts)
        self.planned = memory.choose(self.stage.name, model, self.task["deepspeed"], machine, asked=asked, **pack)
        if self.rank == 0:
            log.info("memory plan, GiB of a GPU: %s", json.dumps(self.planned.gib()))
        return self.planned.recompute_layers, self.planned.lean

    def run(self) -> bool:
        """Train to the last step; False when told to stop before it (a checkpoint is then complete)."""
        try:
            return self._run()
        except Exception:
            self.saver.leave(LEAVE_S)
            raise

    def _run(self) -> bool:
        packs = self.packs()
        if self.stage.on_spike == "quarantine" and not self.step:
            self.save()  # else a spike before the first checkpoint had nowhere to go back to
        while self.step < self.n_steps:
            if self.step + 1 in self.health.quarantined:
                self._pass_over(packs)
                continue
            sums, stopping = self.advance(packs)
            verdict = self.health.judge(sums["loss"], applied=self.engine.was_step_applied())
            if verdict and self._treat(verdict, sums):
                packs.close()
                packs = self.packs()
                continue
            if stopping or self.step % self.stage.checkpoint_every_steps == 0 < self.n_steps - self.step:
                self.save()
            if stopping:
                self.saver.drain()
                return False
        self.saver.drain()
        self._finish()
        return True

    def advance(self, packs: Iterator[Pack]) -> tuple[dict[str, Any], bool]:
        """The next step, told in a line; its sums, and whether a rank was told to stop."""
        before = {} if self.step else self._held_out("held_out_before")
        began = time.monotonic()
        self.step += 1
        sums, stopping = self._step(packs)
        self.seconds = [*self.seconds[-20:], time.monotonic() - began]
        sums |= before | self._held_out("held_out")
        if self.rank == 0:
            self._say(sums, self.seconds)
        return sums, stopping

    def _held_out(self, name: str) -> dict[str, Any]:
        """The loss on what is held out, where it is due; a collective call, and due on every rank alike."""
        if self.held is None or not self.held.is_due(self.step, self.n_steps):
            return {}
        self.engine.eval()
        found = self.held.measure(self.engine, self._sum, rank=self.rank, n_ranks=self.n_ranks)
        self.engine.train()
        return {name: found}

    def _treat(self, verdict: sick.Verdict, sums: dict[str, Any]) -> bool:
        """Record a sick step; True where training went back to the checkpoint before it."""
        stage, size = self.stage, self.stage.batch_packs
        packs = range((self.step - 1) * size, self.step * size)
        worst = sick.worst(self.losses, self._sum, rank=self.rank, n_ranks=self.n_ranks)
        event = self.health.record(verdict, self.step, sums, {i: self.loader.rows(i) for i in packs}, worst)
        what = f"{stage.name}: step {self.step}, packs {packs[0]} to {packs[-1]}: "
        what += f"loss {sums['loss']:.4f} > {event['limit']:.4f}" if event["limit"] else "loss or gradient not finite"
        if self.rank == 0:
            self.health.write(self.out)
            log.warning("%s; %s, documents in %s", what, event["done"], self.out / sick.FILE)
            emit({"event": "sick", "step": self.step, "kind": verdict})
        if event["done"] == "recorded":
            return False
        if verdict == "skipped":
            if self.health.n_skipped > stage.max_skipped:
                raise ValueError(
                    f"{what}, max_skipped is {stage.max_skipped}; lower learning_rate, or look at the packs"
                )
            return False
        if len(self.health.quarantined) == stage.max_quarantined:
            raise ValueError(
                f"{what}, max_quarantined is {stage.max_quarantined}; lower learning_rate, or look at them"
            )
        self.health.quarantined.append(self.step)
        self._rewind()
        return True

    def _rewind(self) -> None:
        """Go back to the newest whole checkpoint, one for all ranks."""
        found = self.saver.newest()
        if found is None:
            raise ValueError(f"{self.stage.name}: no whole checkpoint before the spike; start the stage afresh")
        self._load(found.path, found.step, rewind=True)
        if self.rank == 0:
            emit({"event": "restarted", "step": self.step})

    def _pass_over(self, packs: Iterator[Pack]) -> None:
        """The next step without its packs; no collective, as every rank does it."""
        self.step += 1
        for _ in range(self.stage.batch_packs // self.n_ranks):
            index = next(packs).index
            self.rows.append(trained.passed_over(index, self.step, self.loader.rows(index)))

    def packs(self) -> Generator[Pack]:
        """This rank's packs from the next step on."""
        share = {"batch_packs": self.stage.batch_packs, "rank": self.rank, "world_size": self.n_ranks}
        return self.loader.iterate(self.step, **share, workers=_workers())

    def _step(self, packs: Iterator[Pack]) -> tuple[dict[str, Any], bool]:
        """One optimizer step: this rank's packs forward and backward, the update, the sums over ranks."""
        engine.set_rate(self.engine, self.step, self.stage, self.n_steps)
        self.stall_s = 0.0
        own: Iterable[Pack] = (self._next(packs) for _ in range(self.stage.batch_packs // self.n_ranks))
        self.n_targets = int(self.step_targets[self.step - 1])
        if self.stage.loss_average == "token" and self.stage.max_damaged:
            own = list(own)  # only then is it known which documents are left out, and the first backward pass needs it
            self.n_targets = int(self._sum([sum(pack.n_loss_tokens for pack in own)])[0])
        done: list[tuple[Pack, Tensor]] = []
        with engine.accumulation(self.engine, self.stage.batch_packs // self.n_ranks) as (share, step):
            for pack in own:
                losses = self.engine(pack)  # (n_supervised,)
                self.engine.backward(sound(losses.sum()) * self._scale(len(losses)) * share)
                if len(done) + 1 == self.stage.batch_packs // self.n_ranks:
                    self.saver.release()  # the update comes next
                step()
                done.append((pack.bare(), losses.detach()))  # stays on the device: no wait for the GPU between packs
        found = [(pack, losses.double().cpu().numpy()) for pack, losses in done]
        rows = [trained.row(pack, losses, self.step) for pack, losses in found]
        self.rows += rows
        self.losses = [loss for pack, losses in found for loss in sick.losses(pack, losses)]
        waits = {"stall_s": self.stall_s, "save_s": self.saver.take_stall_s()}
        total = self._sum(self.tally.of(rows, [pack for pack, _ in done], self._scale, stop=self.stop, **waits))
        return self.tally.sums(total, self.n_ranks), bool(total[STOP])

    def _next(self, packs: Iterator[Pack]) -> Pack:
        """The next pack, the wait for it counted."""
        began = time.monotonic()
        pack = next(packs)
        self.stall_s += time.monotonic() - began
        return pack

    def _sum(self, own: Sequence[float] | np.ndarray) -> list[float]:
        """Numbers of this rank, summed over all: a collective, so every rank calls it or none."""
        shared = torch.tensor(own, device=self.engine.device, dtype=torch.float64)
        dist.all_reduce(shared)
        summed: list[float] = shared.cpu().tolist()
        return summed

    def _scale(self, n_targets: int) -> float:
        """What a pack's summed losses are multiplied with, so that the mean over the batch is the step's loss."""
        if self.stage.loss_average == "pack":
            return 1.0 / max(n_targets, 1)
        return self.stage.batch_packs / max(self.n_targets, 1)

    def _say(self, sums: dict[str, Any], seconds: list[float]) -> None:
        typical_s = sum(seconds[-10:]) / len(seconds[-10:])
        lr, norm = engine.learning_rate(self.step, self.stage, self.n_steps), self.engine.get_global_grad_norm()
        rate = {"lr_groups": groups.rates(lr, self.stage)} if self.stage.groups else {}
        cuda, flops_s = torch.cuda.is_available(), sums["flops"] / seconds[-1] / self.n_ranks
        most = peak(torch.cuda.get_device_name()) if cuda else None
        emit(
            {"step": self.step, "n_steps": self.n_steps}
            | {name: value for name, value in sums.items() if name != "flops"}
            | {
                "loss": sick.finite(sums["loss"]),
                "lr": lr,
                **rate,
                "grad_norm": None if norm is None else sick.finite(float(norm)),
                "tokens_per_s": round(sums["tokens"] / seconds[-1], 1),
                "tflops": round(flops_s / 1e12, 4),
                "mfu": most and round(flops_s / most, 4),
                "step_s": round(seconds[-1], 4),
                "eta_s": round(typical_s * (self.n_steps - self.step), 1),
                "host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            }
            | ({"peak_gib": round(torch.cuda.max_memory_allocated() / memory.GIB, 2)} if cuda else {})
        )

    def save(self) -> None:
        """Begin a checkpoint of this step."""
        self.saver.save(self.loader.plan.state(self.step), self.rows, self.health)

    def _load(self, folder: Path, step: int, *, rewind: bool = False) -> None:
        self.step, self.rows = step, self.saver.load(folder)
        self.health.load(folder, rewind=rewind)
        # max_damaged is that of the stage, whatever was resumed
        self.loader.n_left_out = sum(r["reason"] == trained.DAMAGED for row in self.rows for r in row["left_out"])

    def _finish(self) -> None:
        """Rows of all ranks in pack order, then the weights; `checkpoint/` comes last and says that all is there."""
        pq.write_table(pa.Table.from_pylist(self.rows, ROW), self.work / f"rows-{self.rank:05d}.parquet")
        weights = state.whole_weights(self.engine, self.engine.module.solo)
        dist.barrier()
        if self.rank == 0:
            parts = [pq.read_table(self.work / f"rows-{rank:05d}.parquet") for rank in range(self.n_ranks)]
            aside = self.out / "trained.parquet.tmp"
            pq.write_table(pa.concat_tables(parts).sort_by("pack"), aside, compression="zstd")
            aside.replace(self.out / "trained.parquet")
            self.health.write(self.out)
            folder = self.work / "checkpoint"
            shutil.rmtree(folder, ignore_errors=True)
            self.engine.module.solo.save_pretrained(folder, state_dict=weights)
            SoloProcessor.from_tokens(Tokens.model_validate(self.task["tokens"])).save_pretrained(folder)
            facts = {
                "stage": self.stage.name,
                "n_steps": self.n_steps,
                "n_parameters": self.n_parameters,
                "plan": self.task["plan_digest"],
            }
            write_atomic(folder / "solo.json", json.dumps(facts, indent=1).encode())
            folder.replace(self.out / "checkpoint")
        dist.barrier()


def sound(loss: Tensor) -> Tensor:
    """The loss; where it is not finite neither is its gradient, so that every rank's engine skips the update.

    A target of probability 0 has an infinite loss and a finite gradient. The device decides: no wait, no collective.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


def _workers() -> int:
    """Threads that load ahead: the cores that the ranks leave over, one at least."""
    return min(8, max(1, int(os.environ.get("OMP_NUM_THREADS", "1")) - 1))


def emit(row: dict[str, Any]) -> None:
    """One JSON line for the supervisor, in one write, so that lines of other ranks cannot cut it."""
    sys.stdout.flush()
    os.write(1, json.dumps(row).encode() + b"\n")
