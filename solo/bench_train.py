"""Bench of training: tokens a second of a stage's own trainer, against Hugging Face's model in the same trainer.

In: a profile (a model's shape, a pack's length, packs a step). Out: one dict. Both ways run one after the other, each
in a process of its own so that neither inherits the other's memory: (a) MistralForCausalLM with sdpa, documents told
by position ids, gradient checkpointing; (b) SOLO. Packs (`bench_mix`, 54 % of tokens are patches), loader, weights,
optimizer, engine, schedule and log are the same, so the losses must be too. Cost: toy, a minute on a CPU; not
run yet on a GPU: h100-slice should take 6 minutes of one H100, h100-7b-offload 10, without (a).

Away from a checkout's environment (say torch 2.11, transformers 5.17, Python 3.12) it needs the packages that
infra/README.md lists, and `python -m solo.bench_train PROFILE` instead of the `solo` command.

MFU is strict (solo/flops.py).
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from solo import devices, launch, train
from solo.bench_loader import TOKENS
from solo.bench_mix import make_mix
from solo.flops import flops, peak
from solo.pack import PACKS, PLAN
from solo.spec import ModelSpec, Stage, Tokens

Way = Literal["hugging_face", "solo"]
WAYS: tuple[Way, ...] = get_args(Way)
GOAL = {"mfu": 0.6, "ratio": 5.0, "input_stall_share": 0.005, "checkpoint_stall_steps": 1.0}
SLICE = {"hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32, "num_key_value_heads": 8}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"num_hidden_layers": 2}


@dataclass(frozen=True)
class Profile:
    """What is trained; everything else is the trainer's."""

    name: str
    shape: dict[str, int]
    pack_tokens: int
    batch_packs: int
    steps: int  # compared; the first `warm` of them are not timed
    warm: int
    n_packs: int  # different ones; the plan repeats them
    precision: Literal["fp32", "bf16"]
    deepspeed: str
    ways: tuple[Way, ...] = WAYS
    checkpoint: bool = True


PROFILES = {
    p.name: p
    for p in (
        Profile("toy", SMALL, 1024, 2, 20, 1, 2, "fp32", "cpu.json"),
        Profile("h100-slice", SLICE | {"num_hidden_layers": 8}, 32_768, 4, 20, 3, 8, "bf16", "zero1.json"),
        # 20 steps of 128 packs are two hours: 8 packs a step are timed, and a step of 128 is computed from the times
        # of a pack and of an update. No checkpoint: it would be 100 GB. Not (a), which takes five times as long.
        Profile(
            "h100-7b-offload",
            SLICE | {"num_hidden_layers": 32},
            32_768,
            8,
            3,
            1,
            8,
            "bf16",
            "offload.json",
            ("solo",),
            checkpoint=False,
        ),
    )
}
AFTER = 2  # steps trained while the checkpoint is written; what they take longer is its stall too
TOY = "-toy"
PACKS_A_STEP = 128  # of the recipe that `h100-7b-offload` stands for


def run(profile: str = "toy", *, log: Path | None = None, toy: bool = False) -> dict[str, Any]:
    """Every way of a profile, and how they compare; the ranks' log goes to `log`, `toy` is for a CPU."""
    name = profile + TOY if toy and not profile.endswith("toy") else profile
    chosen = find(name)
    device = "cpu" if chosen.precision == "fp32" else "cuda"
    if device == "cuda":
        if not len(devices.names()):
            raise ValueError(f"bench train: profile {profile} needs a GPU, none is visible; add --toy")
        train.check_compiler()
    with tempfile.TemporaryDirectory(prefix="solo-bench-") as made:
        folder = Path(made)
        prepare(chosen, folder)
        out = log or folder / "train.log"
        for way in chosen.ways:
            command = [sys.executable, "-m", "solo.bench_train", name, way, str(folder)]
            env = launch.environment(1, device) | {"SOLO_SUPERVISED": ""}  # type: ignore[arg-type]
            with out.open("ab") as file:
                code = subprocess.run(command, stdout=file, stderr=file, env=env, check=False).returncode
            if code:
                last = out.read_text(errors="replace").splitlines()[-12:]
                raise RuntimeError(f"bench train: {way} ended with code {code}; its last lines:\n" + "\n".join(last))
        return result(chosen, folder)


def find(profile: str) -> Profile:
    """A profile by its name; with `-toy` at its end, its way of running at a size for a CPU, in 20 equal steps."""
    chosen = PROFILES.get(profile) or PROFILES.get(profile.removesuffix(TOY))
    if chosen is None:
        raise ValueError(f"profile is {profile!r}; choose one of {', '.join(PROFILES)}")
    if profile in PROFILES:
        return chosen
    size = {name: getattr(PROFILES["toy"], name) for name in ("shape", "pack_tokens", "steps", "warm", "n_packs")}
    size |= {"name": profile, "batch_packs": 2, "precision": "fp32", "ways": WAYS, "checkpoint": True}
    return replace(chosen, **size)


def prepare(profile: Profile, folder: Path) -> None:
    """Shards and plan, and the task of each way."""
    tokens = Tokens.model_validate(TOKENS)
    mix = make_mix(folder / "mix", tokens, profile.n_packs, profile.pack_tokens)
    (folder / "mix.json").write_text(json.dumps(mix))
    _repeat(folder / "mix", (profile.steps + AFTER) * profile.batch_packs)
    numbers = {"seed": 1, "batch_packs": profile.batch_packs, "pack_tokens": profile.pack_tokens}
    manifest = {"digest": "0" * 64, "inputs": {}, "spec": numbers}
    (folder / "mix" / "manifest.json").write_text(json.dumps(manifest))
    stage = stage_of(profile)
    given = Path(os.environ.get("SOLO_DEEPSPEED") or train.REPOSITORY / "infra" / "deepspeed" / profile.deepspeed)
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
    """What the ways wrote, compared."""
    tokens = Tokens.model_validate(TOKENS)
    model = model_of(profile)
    plan = pq.read_table(folder / "mix" / "plan.parquet", columns=["pack", "n_tokens"])
    per_step = []
    for step in range(profile.steps):
        own = pc.equal(pc.divide(plan["pack"], profile.batch_packs), step)
        per_step.append(flops(model, tokens.patch_px, plan.filter(own)["n_tokens"].to_pylist()))
    measured = {way: json.loads((folder / f"{way}.json").read_bytes()) for way in profile.ways}
    found: dict[str, Any] = {"bench": "train", "profile": asdict(profile), "goal": GOAL}
    for way, row in measured.items():
        found[way] = _figures(profile, row, per_step)
    if len(measured) == 2:
        a, b = (found[way] for way in WAYS)
        found["ratio"] = round(b["tokens_per_s"] / a["tokens_per_s"], 2)
        apart = [abs(x - y) for x, y in zip(measured[WAYS[0]]["losses"], measured[WAYS[1]]["losses"], strict=True)]
        found["loss_difference"] = {"after": profile.steps, "last": round(apart[-1], 6), "most": round(max(apart), 6)}
    ours = measured["solo"]
    return found | {
        "graphs": ours["graphs"],
        "memory_plan_gib": ours["planned"],
        "mix": json.loads((folder / "mix.json").read_bytes()),
        "machine": ours["machine"],
    }


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
        "host_gib": row["host_gib"],
        "loss": [round(row["losses"][0], 5), round(row["losses"][-1], 5)],
        "warm_s": round(sum(row["step_s"][: profile.warm]), 1),
    }


def measure(profile: Profile, way: Way, folder: Path) -> dict[str, Any]:
    """Train one way in this process, which has joined its (one-rank) group; figures of every step."""
    import torch

    from solo import engine
    from solo.hugging_face import PackedMistral
    from solo.trainer import Trainer

    task = json.loads((folder / f"{way}.task.json").read_bytes())
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
    row["host_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    row["checkpoint"] = _checkpoint(trainer, packs) if way == "solo" and profile.checkpoint else None
    row["planned"] = trainer.planned.gib() if trainer.planned and way == "solo" else None
    row["graphs"] = _graphs()
    row["machine"] = _machine()
    return row


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

    from solo.model import SoloForCausalLM

    return {
        "loss": len(_debug_get_cache_entry_list(SoloForCausalLM._losses.__code__)),
        "all": int(counters["stats"]["unique_graphs"]),
        "breaks": sum(counters["graph_break"].values()),
    }


def _machine() -> dict[str, Any]:
    import torch

    names = ("torch", "transformers", "deepspeed")
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "gpu_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if cuda else None,
        "n_cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "packages": {name: version(name) for name in names} | {"python": sys.version.split()[0]},
    }


def _main(profile: str, way: Way, folder: Path) -> None:
    """One way in a process of its own."""
    import logging
    import socket

    from solo import engine

    logging.basicConfig(level=logging.INFO)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(one)
    chosen = find(profile)
    engine.connect("cpu" if chosen.precision == "fp32" else "cuda")
    (folder / f"{way}.json").write_text(json.dumps(measure(chosen, way, folder)))


if __name__ == "__main__":
    if len(sys.argv) == 4:
        _main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))  # type: ignore[arg-type]
        sys.stdout.flush()
        os._exit(0)  # no wait for loader threads that still read ahead
    sys.stdout.write(json.dumps(run(*sys.argv[1:])) + "\n")
