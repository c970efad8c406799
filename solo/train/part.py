"""train: one stage on DeepSpeed, launched and watched as a process group of its own.

In: a pack plan, the shards it names, the weights of the stage before. Out: `checkpoint/` (Hugging Face layout),
`trained.parquet` (one row per pack), where steps were sick `sick.jsonl`, and, volatile, `metrics.jsonl`,
`metrics.parquet`, `suspects.parquet` and `train.log`. Invariants: what was trained, with the documents left out as
damaged, is the plan, pack by pack; a stage killed at any step and run again gives the bytes of an undisturbed run (same
ranks, same kind of machine; on a GPU its losses, as there the rows of ids sum their gradients in any order); no process
outlives this one. No torch here: it costs two seconds, and the ranks load it anyway.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from solo.artifact import CHECKOUT, Job, Result, canonical, write_atomic
from solo.pack.plan import Plan
from solo.sequence.tokenizer import Tokenizer, check_model
from solo.spec import ModelSpec, Stage, Tokens
from solo.store import mirror
from solo.train import checkpoint, devices, fp8, hosts, launch, memory, realised, sick, start, suspects, track, trained
from solo.train import metrics as metrics_table
from solo.train.hostfile import Hostfile
from solo.train.launch import Device, Interrupted
from solo.train.watch import Metrics, Watch

# 2: trained.parquet names the documents left out; counts are of documents. 3: a saved processor says plain_eos
# 4: trained.parquet says why a document was left out; a step that is sick is skipped or passed over
VERSION = 5  # 5: sick.jsonl names the documents of the highest loss

log = logging.getLogger(__name__)

DEEPSPEED = {"cpu": "infra/deepspeed/cpu.json", "cuda": "infra/deepspeed/zero1.json"}

# What a DeepSpeed file may say: how to run. Everything else it knows changes the weights, and the recipe says that.
HOW_KEYS = {
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "aio",
    "comms_logger",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "wall_clock_breakdown",
}
# Their owners, for the error message.
OWNERS = {
    "train_batch_size": "batch_packs",
    "train_micro_batch_size_per_gpu": "batch_packs (one pack a micro-step)",
    "gradient_accumulation_steps": "batch_packs",
    "gradient_clipping": "clip_norm",
    "optimizer": "learning_rate, betas, eps and weight_decay",
    "scheduler": "schedule, warmup_steps, learning_rate and min_learning_rate",
    "bf16": "precision",
    "fp16": "precision",
}


def run(
    job: Job,
    on_metric: Callable[[Metrics], None] | None = None,
    on_sick: Callable[[Metrics, Path], None] | None = None,
    stop_asked: Callable[[], bool] = bool,
) -> Result:
    """Train the stage to its end, from the newest complete checkpoint of an attempt before, if there is one.

    `on_metric` takes each step's metrics, `on_sick` each sick step (`solo.train.sick`) and the folder of its suspects;
    once `stop_asked`, the ranks end with a checkpoint and this with `Interrupted`.
    """
    stage = Stage.model_validate(job.spec["stage"])
    plan = pq.read_table(job.one("pack").path / "packs.parquet")
    if plan.num_rows < stage.batch_packs:
        raise ValueError(
            f"train/{job.name}: the plan has {plan.num_rows} packs, one step needs batch_packs = {stage.batch_packs}; "
            f"add data to mix {stage.mix!r} or lower pack_tokens or batch_packs"
        )
    vocabulary = Tokenizer(Tokens.model_validate(job.spec["tokens"])).vocabulary
    check_model(ModelSpec.model_validate(job.spec["model"]), vocabulary)
    assert plan.num_rows % stage.batch_packs == 0, f"pack left {plan.num_rows} packs, batches of {stage.batch_packs}"
    n_steps = plan.num_rows // stage.batch_packs
    checkpoint.Keep.from_env()
    n_gpus = len(devices.names())
    ranks = rank_count(n_gpus, stage, hosts.count())
    device: Device = "cuda" if n_gpus else "cpu"
    if device == "cuda":
        check_compiler()
        if machine := memory.Machine.from_env() or memory.Machine.here(ranks, hosts.count()):
            pack = {"patch_px": job.spec["tokens"]["patch_px"], "n_targets": pc.max(plan["n_loss_tokens"]).as_py()}
            machine = replace(machine, n_gpus=ranks, n_hosts=hosts.count())
            memory.of_stage(stage, ModelSpec.model_validate(job.spec["model"]), machine, **pack)
    fp8.check_machine(stage, n_gpus)
    if not (job.out / "checkpoint").is_dir():  # made last: where it is, only the manifest is missing
        mirror.bring(job)
        task = _task(job, stage, device=device, ranks=ranks)
        with track.follow(job, on_metric) as tell:
            tell_sick = partial(_tell_sick, job, on_sick)
            watch = Watch(job, n_steps, tell, first_step=task["first_step"], tell_sick=tell_sick, stop_asked=stop_asked)
            _train(job, task, watch, ranks=ranks, device=device)
    return _result(job, plan, n_steps=n_steps, ranks=ranks)


def check_compiler() -> None:
    """Refuse to start on a GPU without a C compiler: attention is compiled there. A CPU needs none."""
    compilers = [os.environ.get("CC") or "gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        raise ValueError(f"no C compiler, none of {compilers}; a GPU's attention is compiled: install gcc or set CC")


def rank_count(n_gpus: int, stage: Stage, n_hosts: int = 1) -> int:
    """Ranks of all hosts; of each $SOLO_RANKS, else its slots, else one per GPU, else two (or the one core there is).

    They must divide the batch.
    """
    asked = os.environ.get("SOLO_RANKS")
    if asked is not None and not (asked.isdigit() and int(asked) > 0):
        raise ValueError(f"SOLO_RANKS: {asked!r} is not a number of processes; set 1 or more, or unset it")
    listed = Hostfile.from_env()
    of_host = int(asked) if asked else listed.slots if listed else n_gpus or min(2, launch.core_count())
    if n_gpus and of_host > n_gpus:
        raise ValueError(f"SOLO_RANKS: {of_host} processes need as many GPUs, {n_gpus} are visible; unset it")
    ranks = of_host * n_hosts
    if stage.batch_packs % ranks:
        fitting = [n for n in range(1, stage.batch_packs // n_hosts + 1) if stage.batch_packs % (n * n_hosts) == 0]
        many, remedy = (f" on {n_hosts} hosts", " or change SOLO_HOSTS") if n_hosts > 1 else ("", "")
        raise ValueError(
            f"{stage.name}: batch_packs = {stage.batch_packs} = {stage.batch_packs // ranks} x {ranks} ranks{many} + "
            f"{stage.batch_packs % ranks}; every rank must train as many packs, so set SOLO_RANKS to one of {fitting}"
            f"{remedy}"
        )
    return ranks


def deepspeed_file(device: Device) -> Path:
    """$SOLO_DEEPSPEED, else ours for the device."""
    return Path(os.environ.get("SOLO_DEEPSPEED") or CHECKOUT / DEEPSPEED[device])


def deepspeed_config(path: Path, stage: Stage, ranks: int) -> dict[str, Any]:
    """A DeepSpeed file (how to run) completed by the stage (what to train); a key both own is an error."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable DeepSpeed configuration ({error}); see $SOLO_DEEPSPEED") from None
    for key in given:
        if key not in HOW_KEYS:
            owner = f"the stage's {OWNERS[key]} says that" if key in OWNERS else "it may change the weights"
            raise ValueError(f"{path}: key {key!r} does not belong here, {owner}; keys allowed: {sorted(HOW_KEYS)}")
    zero = _zero_stage(path, given.get("zero_optimization", {}), stage)
    config: dict[str, Any] = given | {
        "zero_optimization": given.get("zero_optimization", {}) | {"stage": zero},
        "train_batch_size": stage.batch_packs,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": stage.batch_packs // ranks,
        "gradient_clipping": stage.clip_norm if zero else 0.0,  # without ZeRO it is ours: `engine.own_norm`
    }
    if "offload_optimizer" in config["zero_optimization"]:
        if zero != 1:
            raise ValueError(f"{path}: offload_optimizer needs zero_optimization.stage 1, not {zero}; see engine.py")
        # `engine.accumulation` sums gradients; the optimizer is torch's own fused AdamW, which runs on both devices.
        config |= {"train_batch_size": ranks, "gradient_accumulation_steps": 1, "zero_force_ds_cpu_optimizer": False}
    if stage.precision != "fp32":
        # Sums over a batch of packs would lose their last bits in bf16, so gradients are kept and summed in fp32.
        fp32 = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
        config |= {"bf16": {"enabled": True}} | fp32
    return config


def _zero_stage(path: Path, zero: Mapping[str, Any], stage: Stage) -> int:
    """The ZeRO stage of a DeepSpeed file, where it and all that the file says of it leaves the result alone."""
    asked = zero.get("stage", 0)
    if asked not in (0, 1, 2, 3):
        raise ValueError(f"{path}: zero_optimization.stage is {asked}; use 0, 1, 2 or 3")
    if asked == 0 and stage.precision != "fp32":
        raise ValueError(
            f"{path}: zero_optimization.stage is 0 and {stage.name}'s precision is {stage.precision}; use 1, 2 or 3: "
            "DeepSpeed sums bf16 gradients otherwise without ZeRO, and the losses would differ"
        )
    if asked == 3 and stage.precision == "fp8":
        raise ValueError(
            f"{path}: zero_optimization.stage is 3 and {stage.name}'s precision is fp8; use 1 or 2, or bf16"
        )
    for key in zero:
        if key.startswith("zero_quantized") or key == "offload_param":
            why = "rounds what ranks exchange" if key != "offload_param" else "is not tested; use offload_optimizer"
            raise ValueError(f"{path}: zero_optimization.{key} does not belong here, it {why}")
    return int(asked)


def _task(job: Job, stage: Stage, *, device: Device, ranks: int) -> dict[str, Any]:
    """All that a rank needs to know, as the JSON of its job file."""
    checkpoints = job.work / "checkpoints"
    found = checkpoint.newest(checkpoints)
    if found and found.world_size != ranks:
        log.info("%s was written by %d ranks, %d go on", found.path, found.world_size, ranks)
    plan = job.one("pack").path.resolve()
    return {
        "stage": job.spec["stage"],
        "model": job.spec["model"],
        "tokens": job.spec["tokens"],
        "seed": job.spec["seed"],
        "device": device,
        "deepspeed": deepspeed_config(deepspeed_file(device), stage, ranks),
        "plan": str(plan),
        "plan_digest": job.one("pack").manifest.digest,
        "shards": _places(job),
        "held_out_every_steps": job.spec.get("held_out_every_steps"),
        **start.of(job),
        "resume": str(found.path) if found else None,
        "first_step": Plan(plan).step_of(found.loader) if found else 0,
        "work": str(job.work.resolve()),
        "out": str(job.out.resolve()),
    }


def _train(job: Job, task: dict[str, Any], watch: Watch, *, ranks: int, device: Device) -> None:
    """Launch the ranks and follow them to their end; whatever happens, none is left behind."""
    job_file = job.work / "job.json"
    write_atomic(job_file, canonical(task))
    if task["resume"]:
        job.progress(f"goes on after step {task['first_step']}/{watch.n_steps} from {task['resume']}")
    code, n_hosts = 0, hosts.count()
    try:
        with launch.sigterm_raises(), mirror.kept(job):
            code = launch.run(
                job_file, watch, ranks=ranks // n_hosts, device=device, n_hosts=n_hosts, root=job.root.resolve()
            )
    except Interrupted:
        watch.interrupted = True
    if watch.interrupted:
        raise Interrupted(f"train/{job.name}: stopped on request{_left(job)}; run again to go on")
    if code or not (job.out / "checkpoint").is_dir():
        why = watch.failure or f"the launcher ended with code {code}"
        raise RuntimeError(f"train/{job.name}: {why}; the whole story is in {watch.log}")


def _tell_sick(job: Job, on_sick: Callable[[Metrics, Path], None] | None) -> None:
    """Show the documents of the step that was sick last."""
    events = _suspects(job)
    if on_sick:
        on_sick(events[-1], job.out)


def _suspects(job: Job) -> list[dict[str, Any]]:
    """The sick steps so far, their worst documents written beside them."""
    events = sick.read(job.out)
    suspects.write(job.out, events, job.one("pack").path, _places(job))
    return events


def _places(job: Job) -> dict[str, str]:
    """Source -> where its shards are read, here or in a store."""
    return {name: shard.place for name, shard in sorted(job.of("shard").items())}


def _left(job: Job) -> str:
    names = sorted(p.name for p in (job.work / "checkpoints").glob("step-*"))
    return f", checkpoint {names[-1]} is complete" if names else ", before the first checkpoint"


def _result(job: Job, plan: pa.Table, *, n_steps: int, ranks: int) -> Result:
    """Compare what the ranks say they trained with the plan, pack by pack, and sum it up."""
    table = pq.read_table(job.out / "trained.parquet")
    trained.check(f"train/{job.name}", table, plan)
    realised.check(f"train/{job.name}", job.out / "trained.parquet", job.one("pack").path / "plan.parquet")
    left_out = trained.left_out(table)
    metrics = [json.loads(line) for line in (job.out / "metrics.jsonl").read_bytes().splitlines()]
    metrics_table.write(job.out, metrics)
    losses, events = [m["loss"] for m in metrics if m["loss"] is not None], _suspects(job)
    facts = json.loads((job.out / "checkpoint" / "solo.json").read_bytes())
    stats: dict[str, Any] = {
        "n_packs": table.num_rows,
        "n_steps": n_steps,
        "n_tokens": pc.sum(table["n_tokens"]).as_py(),
        "n_loss_tokens": pc.sum(table["n_loss_tokens"]).as_py(),
        "left_out": left_out,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "sick": {
            kind: sum(event["done"] == kind for event in events) for kind in ("skipped", "recorded", "quarantined")
        },
        "tokens_per_s": round(statistics.median(m["tokens_per_s"] for m in metrics), 1),
        "input_stall_share": round(sum(m["input_stall_s"] for m in metrics) / sum(m["step_s"] for m in metrics), 4),
        "ranks": ranks,
        "n_parameters": facts["n_parameters"],
        "sources": trained.by_source(table, metrics),
    } | trained.held_out(metrics)
    n_in, n_out = job.one("pack").manifest.counts["kept"], left_out["documents"]
    return Result(n_in, n_in - n_out, trained.dropped(table), stats, volatile=("metrics.*", "train.log", suspects.FILE))
