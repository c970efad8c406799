"""Bench of training, the stage: what each way of `bench_train` trains, and what of that is measured.

In: a profile, a folder. Out: shards, plan and task of each way in the folder; a way's seconds, losses and memory; all
ways compared. Invariant: packs (`bench_mix`, 54 % of tokens are patches), loader, weights, optimizer, engine, schedule
and log are the same for all ways, so the losses must be too. Cost: see `bench_train`.

MFU is strict (solo/train/flops.py).
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import shutil
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from solo.artifact import CHECKOUT
from solo.bench import machine as bench_machine
from solo.bench.loader import TOKENS
from solo.bench.mix import make_mix
from solo.bench.train import GOAL, Profile, Way
from solo.pack.part import PACKS, PLAN
from solo.spec import ModelSpec, Stage, Tokens
from solo.train import part as train
from solo.train.flops import flops, peak

AFTER = 2  # steps trained while the checkpoint is written; what they take longer is its stall too
TRACED = 1  # steps more, under torch's profiler, where a trace is asked for
KERNELS = 40  # the costliest ones, in the table beside the trace
PACKS_A_STEP = 128  # of the recipe that `h100-7b-offload` stands for


def prepare(profile: Profile, folder: Path) -> None:
    """Shards and plan, and the task of each way."""
    tokens = Tokens.model_validate(TOKENS)
    mix = make_mix(folder / "mix", tokens, profile.n_packs, profile.pack_tokens)
    (folder / "mix.json").write_text(json.dumps(mix))
    _repeat(folder / "mix", (profile.steps + TRACED + AFTER) * profile.batch_packs)
    numbers = {"seed": 1, "batch_packs": profile.batch_packs, "pack_tokens": profile.pack_tokens}
    manifest = {"digest": "0" * 64, "inputs": {}, "spec": numbers}
    (folder / "mix" / "manifest.json").write_text(json.dumps(manifest))
    stage = stage_of(profile)
    given = Path(os.environ.get("SOLO_DEEPSPEED") or CHECKOUT / "infra" / "deepspeed" / profile.deepspeed)
    for way in profile.ways:
        (folder / way).mkdir()
        task = {
            "stage": stage.model_dump(mode="json"),
            "model": model_of(profile).model_dump(mode="json"),
            "tokens": TOKENS,
            "seed": 1,
            "deepspeed": train.deepspeed_config(given, stage, 1),
            "plan": str(folder / "mix"),
            "plan_digest": "",
            "shards": {"bench": str(folder / "mix")},
            "init": "random",
            "resume": None,
            "first_step": 0,
            "work": str(folder / way),
            "out": str(folder / way),
        }
        (folder / f"{way}.task.json").write_text(json.dumps(task))


def stage_of(profile: Profile) -> Stage:
    """The stage that is measured."""
    return Stage.model_validate(
        {
            "name": f"bench-{profile.name}",
            "mix": "bench",
            "pack_tokens": profile.pack_tokens,
            "pack_by": "mix",
            "batch_packs": profile.batch_packs,
            "learning_rate": 1e-4,
            "min_learning_rate": 1e-5,
            "schedule": "cosine",
            "warmup_steps": 2,
            "betas": (0.9, 0.95),
            "eps": 1e-8,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
            "loss_average": "pack",
            "precision": profile.precision,
            "checkpoint_every_steps": 1_000_000,
            "decode": "fast",
        }
    )


def model_of(profile: Profile) -> ModelSpec:
    """The model that is measured; its vocabulary has the 33,031 rows of the measured anchors."""
    return ModelSpec.model_validate(
        {
            "init": "random",
            "vocab_size": 33_031,
            **profile.shape,
            "rope_theta": 10_000.0,
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "max_position_embeddings": 32_768,
            "init_std": 0.02,
        }
    )


def _repeat(folder: Path, n_packs: int) -> None:
    """Make the plan `n_packs` long by repeating its packs in turn."""
    rows, heads = (pq.read_table(folder / f"{name}.parquet").to_pylist() for name in ("plan", "packs"))
    of_pack: dict[int, list[dict[str, Any]]] = {head["pack"]: [] for head in heads}
    for row in rows:
        of_pack[row["pack"]].append(row)
    new_rows: list[dict[str, Any]] = []
    new_heads: list[dict[str, Any]] = []
    for i in range(n_packs):
        head = heads[i % len(heads)]
        new_heads.append(head | {"pack": i, "first_row": len(new_rows)})
        new_rows += [row | {"pack": i, "exposure": i // len(heads)} for row in of_pack[head["pack"]]]
    pq.write_table(pa.Table.from_pylist(new_rows, PLAN), folder / "plan.parquet")
    pq.write_table(pa.Table.from_pylist(new_heads, PACKS), folder / "packs.parquet")


def result(profile: Profile, folder: Path) -> dict[str, Any]:
    """What the ways wrote, compared where there is more than one."""
    tokens = Tokens.model_validate(TOKENS)
    model = model_of(profile)
    plan = pq.read_table(folder / "mix" / "plan.parquet", columns=["pack", "n_tokens"])
    per_step = []
    for step in range(profile.steps):
        own = pc.equal(pc.divide(plan["pack"], profile.batch_packs), step)
        per_step.append(flops(model, tokens.patch_px, plan.filter(own)["n_tokens"].to_pylist()))
    written = {way: folder / f"{way}.json" for way in profile.ways}
    measured: dict[Way, Any] = {way: json.loads(path.read_bytes()) for way, path in written.items() if path.exists()}
    found: dict[str, Any] = {"bench": "train", "profile": asdict(profile), "goal": GOAL}
    for way, row in measured.items():
        found[way] = _figures(profile, row, per_step)
    if len(measured) == 2:
        found["ratio"] = round(found["solo"]["tokens_per_s"] / found["hugging_face"]["tokens_per_s"], 2)
        apart = [abs(x - y) for x, y in zip(*(row["losses"] for row in measured.values()), strict=True)]
        found["loss_difference"] = {"after": profile.steps, "last": round(apart[-1], 6), "most": round(max(apart), 6)}
    if "solo" in measured:
        found |= {"graphs": measured["solo"]["graphs"], "memory_plan_gib": measured["solo"]["planned"]}
    machine = next(iter(measured.values()))["machine"]
    return found | {"mix": json.loads((folder / "mix.json").read_bytes()), "machine": machine}


def _figures(profile: Profile, row: dict[str, Any], per_step: list[float]) -> dict[str, Any]:
    timed = slice(profile.warm, None)
    step_s, counts = row["step_s"][timed], row["tokens"][timed]
    rates = sorted(n / s for n, s in zip(counts, step_s, strict=True))
    done = sorted(f / s for f, s in zip(per_step[timed], step_s, strict=True))
    most = peak(row["machine"]["device"])
    typical_s, update_s = statistics.median(step_s), statistics.median(row["update_s"][timed])
    whole_s = (typical_s - update_s) * PACKS_A_STEP / profile.batch_packs + update_s
    at_once = statistics.median(per_step) * PACKS_A_STEP / profile.batch_packs / whole_s
    saved = row["checkpoint"]
    stall_s = saved and max(saved["with_steps_s"] - AFTER * typical_s, saved["waited_s"])
    return {
        "tokens_per_s": round(statistics.median(rates), 1),
        "lowest": round(rates[0], 1),
        "highest": round(rates[-1], 1),
        "tflops": round(statistics.median(done) / 1e12, 3),
        "mfu": most and round(statistics.median(done) / most, 4),
        "step_s": round(typical_s, 4),
        "update_s": round(update_s, 4),
        f"mfu_at_{PACKS_A_STEP}_packs": most and round(at_once / most, 4),
        "input_stall_share": round(sum(row["stall_s"][timed]) / sum(step_s), 5),
        "checkpoint_stall_steps": saved and round(stall_s / typical_s, 2),
        "checkpoint_s": saved and round(saved["whole_s"], 2),
        "peak_gib": row["peak_gib"],
        "reserved_gib": row["reserved_gib"],
        "host_gib": row["host_gib"],
        "loss": [round(row["losses"][0], 5), round(row["losses"][-1], 5)],
        "warm_s": round(sum(row["step_s"][: profile.warm]), 1),
    }


def measure(profile: Profile, way: Way, folder: Path, *, trace: Path | None = None) -> None:
    """Train one way in this process, which has joined its (one-rank) group; figures of every step to the folder.

    They are written before the trace and the checkpoint, so that neither can cost them.
    """
    import torch

    from solo.model.hugging_face import PackedMistral
    from solo.train import engine
    from solo.train.trainer import Trainer

    task = json.loads((folder / f"{way}.task.json").read_bytes())
    machine = bench_machine.facts() | {"matmul_tflops": bench_machine.matmul_tflops()}
    trainer = Trainer(task, engine.PackLoss if way == "solo" else PackedMistral)
    update_s = _clock_updates(trainer.engine)
    row: dict[str, Any] = {"losses": [], "step_s": [], "tokens": [], "stall_s": [], "update_s": []}
    packs = trainer.packs()
    for _ in range(profile.steps):
        update_s.clear()
        sums, _ = trainer.advance(packs)
        for name, value in (("losses", sums["loss"]), ("tokens", sums["tokens"]), ("stall_s", sums["input_stall_s"])):
            row[name].append(value)
        row["step_s"].append(trainer.seconds[-1])
        row["update_s"].append(sum(update_s))
    cuda = torch.cuda.is_available()
    row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None
    row["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2) if cuda else None
    row["host_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    row["planned"] = trainer.planned.gib() if trainer.planned and way == "solo" else None
    row |= {"graphs": _graphs(), "machine": machine, "checkpoint": None}
    out = folder / f"{way}.json"
    out.write_text(json.dumps(row))
    if trace:
        _trace(trainer, packs, trace / f"{profile.name}-{way}")
    if way == "solo" and profile.checkpoint:
        row["checkpoint"] = _checkpoint(trainer, packs)
        out.write_text(json.dumps(row))


def _trace(trainer: Any, packs: Any, stem: Path) -> None:  # noqa: ANN401 - torch is not loaded here
    """One step more under torch's profiler: STEM.json.gz for chrome://tracing or Perfetto, STEM.txt for the eye."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        for _ in range(TRACED):
            trainer.advance(packs)
    by = "self_device_time_total" if cuda else "self_cpu_time_total"
    table = seen.key_averages().table(sort_by=by, row_limit=KERNELS, max_name_column_width=90)
    stem.with_suffix(".txt").write_text(table + "\n")
    plain = stem.with_suffix(".json")
    seen.export_chrome_trace(str(plain))
    with plain.open("rb") as file, gzip.open(f"{plain}.gz", "wb") as packed:
        shutil.copyfileobj(file, packed)
    plain.unlink()


def _clock_updates(engine: Any) -> list[float]:  # noqa: ANN401 - DeepSpeed is not typed
    """Seconds of each update of the weights from now on; a wait for the GPU before and after it, once a step."""
    import torch

    seconds: list[float] = []
    inner = engine.optimizer.step

    def wait() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(*args: Any) -> Any:  # noqa: ANN401
        began = wait()
        done = inner(*args)
        seconds.append(wait() - began)
        return done

    engine.optimizer.step = step
    return seconds


def _checkpoint(trainer: Any, packs: Any) -> dict[str, float]:  # noqa: ANN401 - torch is not loaded here
    """Seconds of a checkpoint and the steps that are trained while it is written, and until it is complete."""
    began = time.perf_counter()
    trainer.save()
    waited_s = sum(trainer.advance(packs)[0]["checkpoint_stall_s"] for _ in range(AFTER))
    after = time.perf_counter()
    trainer.saver.drain()
    return {"with_steps_s": after - began, "waited_s": waited_s, "whole_s": time.perf_counter() - began}


def _graphs() -> dict[str, int]:
    """Compiled graphs of the loss (1 is right, whatever the packs), all graphs, and breaks; 0 on a CPU."""
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo.utils import counters

    from solo.model.causal_lm import SoloForCausalLM

    return {
        "loss": len(_debug_get_cache_entry_list(SoloForCausalLM._losses.__code__)),
        "all": int(counters["stats"]["unique_graphs"]),
        "breaks": sum(counters["graph_break"].values()),
    }
