"""Loss curves of ZeRO 1, 2 and 3 on 1, 2 and 4 ranks, 1 to 4 packs a rank and step, over 50 steps on the CPU.

    .venv/bin/python tests/zero_grid.py

Each is compared with ZeRO 1 on one rank that trains as many packs a step. Prints a line each and one JSON line at the
end; exit code 1 if a loss differs by more than TOLERANCE of it, or a row of the ledger at all.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from ranks import task_of, train_on
from tiny_stage import made, make_job, make_plan

from solo.artifact import Job

TOLERANCE = 1e-5  # of the loss: sums over ranks and packs are taken in another order, which was seen to make 1e-7
LEDGER = ["pack", "step", "n_documents", "n_tokens", "n_loss_tokens"]
# A rate at which the losses fall from 10 to 2 in 50 steps and a rounding does not grow: what is compared is the sum
# over ranks, packs and parts, which is wrong by a factor if it is wrong.
STAGE = {"learning_rate": 3e-3, "min_learning_rate": 1e-3, "checkpoint_every_steps": 1000}


@dataclass(frozen=True)
class Case:
    """One of the grid."""

    zero: int
    ranks: int
    accumulation: int

    @property
    def batch(self) -> int:
        """Packs a step."""
        return self.ranks * self.accumulation

    @property
    def name(self) -> str:
        """For a folder."""
        return f"zero{self.zero}-{self.ranks}x{self.accumulation}"


def job_of(case: Case, root: Path, n_steps: int) -> Job:
    """The stage of a case; those with as many packs a step have the same."""
    plan = root / f"plan-{case.batch}"
    inputs = make_plan(root / f"{plan.name}.{case.name}", -(-n_steps * case.batch // 4))
    folder = inputs["pack/tiny"].path
    for name in ("packs", "plan"):
        rows = pq.read_table(folder / f"{name}.parquet")
        keep = [pack < n_steps * case.batch for pack in rows["pack"].to_pylist()]
        pq.write_table(rows.filter(keep), folder / f"{name}.parquet")
    inputs["pack/tiny"] = made(folder, "pack/tiny", 0, batch_packs=case.batch)
    return make_job(root / case.name, inputs, batch_packs=case.batch, **STAGE)


def run(cases: list[Case], root: Path, n_steps: int) -> dict[Case, tuple[list[dict], list[dict]]]:
    """Metrics and ledger of each."""
    found = {}
    for ranks in sorted({case.ranks for case in cases}):
        own = [case for case in cases if case.ranks == ranks]
        jobs = [job_of(case, root, n_steps) for case in own]
        zero = [{"zero_optimization": {"stage": case.zero}} for case in own]
        tasks = [task_of(job, n_ranks=ranks, deepspeed=config) for job, config in zip(jobs, zero, strict=True)]
        for case, job, rows in zip(own, jobs, train_on(ranks, tasks, root), strict=True):
            found[case] = rows, pq.read_table(job.out / "trained.parquet", columns=LEDGER).to_pylist()
    return found


def main() -> None:
    """The whole grid."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=50)
    options.add_argument("--zero", type=int, nargs="*", default=[1, 2, 3])
    options.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    options.add_argument("--accumulation", type=int, nargs="*", default=[1, 2, 3, 4])
    asked = options.parse_args()
    cases = [Case(z, r, a) for z in asked.zero for r in asked.ranks for a in asked.accumulation]
    references = {Case(1, 1, case.batch) for case in cases}
    with tempfile.TemporaryDirectory(prefix="solo-zero-") as folder:
        found = run(sorted({*cases, *references}, key=lambda c: c.name), Path(folder), asked.steps)
    most, wrong = {"loss": 0.0, "grad_norm": 0.0}, []
    for case in cases:
        (rows, ledger), (calm, expected) = found[case], found[Case(1, 1, case.batch)]
        apart = {
            key: max(abs(a[key] - b[key]) / (abs(b[key]) or 1.0) for a, b in zip(rows, calm, strict=True))
            for key in most
        }
        most = {key: max(value, apart[key]) for key, value in most.items()}
        losses = [row["loss"] for row in rows]
        fine = apart["loss"] <= TOLERANCE and ledger == expected and losses[-1] < 0.6 * max(losses)
        wrong += [] if fine else [case.name]
        sys.stdout.write(
            f"{case.name}  {max(losses):.3f} -> {losses[-1]:.3f}  apart: loss {apart['loss']:.1e} "
            f"gradient norm {apart['grad_norm']:.1e}  {'ok' if fine else 'FAIL'}\n"
        )
    sys.stdout.write(json.dumps({"cases": len(cases), "steps": asked.steps, "most_apart": most, "wrong": wrong}) + "\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
