"""Bench of training: tokens a second of a stage's own trainer, against Hugging Face's model in the same trainer.

In: a profile (a model's shape, a pack's length, packs a step). Out: one dict. Both ways run one after the other, each
in a process of its own so that neither inherits the other's memory: (a) SOLO; (b) MistralForCausalLM with sdpa,
documents told by position ids, gradient checkpointing. `bench_stage` says what is the same for both and measures.
A way that fails costs only its own figures: `errors` has its last lines. Cost: toy, a minute on a CPU; not run yet on a
GPU: h100-slice should take 6 minutes of one H100, h100-7b-offload 8, without (b).

Away from a checkout's environment (say torch 2.11, transformers 5.17, Python 3.12) it needs the packages that
infra/README.md lists, and `python -m solo.bench.train PROFILE` instead of the `solo` command.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from solo.bench import machine as bench_machine

Way = Literal["solo", "hugging_face"]
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
        # The toy's shape as a GPU trains it: a minute that shows whether all of it runs there.
        Profile("gpu-toy", SMALL | {"hidden_size": 256}, 1024, 2, 6, 2, 2, "bf16", "zero1.json"),
        # Twelve steps, as (b) takes 13 s for each.
        Profile("h100-slice", SLICE | {"num_hidden_layers": 8}, 32_768, 4, 12, 2, 8, "bf16", "zero1.json"),
        # 20 steps of 128 packs are two hours: 8 packs a step are timed, and a step of 128 is computed from the times
        # of a pack and of an update. No checkpoint: it would be 100 GB. Not (b), which takes five times as long.
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
TOY = "-toy"
LINES = 12  # of a log, in an error


def run(
    profile: str = "toy",
    *,
    log: Path | None = None,
    toy: bool = False,
    trace: Path | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Every way of a profile, and how they compare.

    The ranks' log goes to `log`, a trace of a step and a table of its kernels to the folder `trace`, what is known so
    far to `out` after each way; `toy` is for a CPU. An error only where no way can be measured.
    """
    chosen = find(profile + TOY if toy and not profile.endswith("toy") else profile)
    check(chosen, profile)
    from solo.bench import stage as bench_stage  # what it imports may be missing before that check

    errors: dict[str, str] = {}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="solo-bench-") as made:
        folder = Path(made)
        bench_stage.prepare(chosen, folder)
        for way in chosen.ways:
            if error := _run_way(chosen, way, folder, log=log or folder / "train.log", trace=trace):
                errors[way] = error
                sys.stderr.write(f"bench train: {way}: {error}\n")
            if any((folder / f"{w}.json").exists() for w in chosen.ways):
                found = bench_stage.result(chosen, folder) | ({"errors": errors} if errors else {})
                sys.stderr.write(f"bench train: {way}: {json.dumps(found.get(way))}\n")
                if out:
                    out.write_text(json.dumps(found) + "\n")
    if not found:
        raise RuntimeError("bench train: no way was measured; " + "; ".join(f"{w}: {e}" for w, e in errors.items()))
    return found


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


def check(chosen: Profile, asked: str) -> None:
    """Say what is here; refuse what cannot work, with the remedy, before anything is made."""
    bench_machine.check_packages()
    from solo.train import devices
    from solo.train import part as train

    needs_gpu = chosen.precision != "fp32"
    if needs_gpu and not len(devices.names()):
        raise ValueError(f"bench train: profile {asked} needs a GPU, none is visible; add --toy")
    facts = bench_machine.facts()
    sys.stderr.write(f"bench train: {json.dumps(facts)}\n")
    if not needs_gpu:
        return
    train.check_compiler()
    if facts["gpu_gib"] is None:
        raise ValueError(
            f"bench train: torch {facts['packages']['torch']} (CUDA {facts['cuda']}) sees no GPU although the machine "
            "has one; install a CUDA build of torch that fits the driver, see nvidia-smi"
        )
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if chosen.checkpoint and chosen.shape.items() >= SLICE.items() and free < bench_machine.AT_LEAST_BYTES:
        raise ValueError(
            f"bench train: {tempfile.gettempdir()} has {free / 2**30:.0f} GiB free < "
            f"{bench_machine.AT_LEAST_BYTES / 2**30:.0f} for a checkpoint; set TMPDIR to a larger disk"
        )


def _run_way(profile: Profile, way: Way, folder: Path, *, log: Path, trace: Path | None) -> str | None:
    """Measure a way in a process of its own; None, or why it ended early with the last lines of its log."""
    from solo.train import launch

    command = [sys.executable, "-m", "solo.bench.train", profile.name, "--way", way, "--folder", str(folder)]
    if trace:
        trace.mkdir(parents=True, exist_ok=True)
        command += ["--trace", str(trace.resolve())]
    device: launch.Device = "cpu" if profile.precision == "fp32" else "cuda"
    env = launch.environment(1, device) | {"SOLO_SUPERVISED": ""}
    with log.open("ab") as file:
        begin = file.tell()
        code = subprocess.run(command, stdout=file, stderr=file, env=env, check=False).returncode
    if not code:
        return None
    with log.open("rb") as file:
        file.seek(begin)
        last = file.read().decode(errors="replace").splitlines()[-LINES:]
    return f"ended with code {code}; its last lines:\n" + "\n".join(last)


def _measure(profile: Profile, way: Way, folder: Path, trace: Path | None) -> None:
    """One way in a process of its own."""
    import logging
    import socket

    from solo.bench import stage as bench_stage
    from solo.train import engine

    logging.basicConfig(level=logging.INFO)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(one)
    engine.connect("cpu" if profile.precision == "fp32" else "cuda")
    bench_stage.measure(profile, way, folder, trace=trace)


def main() -> int:
    """The command, and what it runs for each way; 1 where a way has no figures."""
    parser = argparse.ArgumentParser(prog="python -m solo.bench.train", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("profile", nargs="?", default="toy", help=", ".join(PROFILES))
    parser.add_argument("--toy", action="store_true", help="the profile's way at a size for a CPU")
    parser.add_argument("--log", type=Path, help="where the trainers' own lines go")
    parser.add_argument("--trace", type=Path, help="a folder for a trace of one step and the table of its kernels")
    parser.add_argument("--out", type=Path, help="a file for the result, written after each way")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.way:
        _measure(find(told.profile), told.way, told.folder, told.trace)
        return 0
    try:
        found = run(told.profile, log=told.log, toy=told.toy, trace=told.trace, out=told.out)
    except (ValueError, RuntimeError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps(found) + "\n")
    return int("errors" in found)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no wait for loader threads that still read ahead
