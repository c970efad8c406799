"""Rank: one process of a stage, started by `solo.train.launch` as `python -m solo.train.rank JOBFILE` under torchrun.

In: a job file. Out: an exit code, and on stdout, where rank 0 tells its steps, why this rank failed. Invariants: it
does not outlive its launcher or its supervisor; a SIGTERM ends it with a checkpoint, and with `STOPPED`.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from pathlib import Path

import deepspeed
import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar

from solo.train import engine
from solo.train.trainer import Trainer, emit

PR_SET_PDEATHSIG = 1
STOPPED = 128 + signal.SIGTERM  # exit code of a rank that was told to stop and did so in good order


def _die_with_parents() -> None:
    """End this rank when its launcher or its supervisor is gone, also after SIGKILL: it would write beside a rerun."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # the launcher
    if os.environ.get("SOLO_SUPERVISED"):

        def wait() -> None:
            while os.read(0, 1):
                pass
            os._exit(1)

        threading.Thread(target=wait, name="supervisor", daemon=True).start()


def main(job_file: Path) -> int:
    """Run one rank; its exit code."""
    _die_with_parents()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", force=True)
    logging.getLogger("solo").setLevel(logging.INFO)
    deepspeed.utils.logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls, not ours
    disable_progress_bar()  # type: ignore[no-untyped-call]
    rank = int(os.environ["RANK"])
    told: list[Trainer | None] = [None]

    def stop(*_: object) -> None:
        if told[0] is None:
            os._exit(STOPPED)  # nothing is trained yet
        told[0].stop = True

    signal.signal(signal.SIGTERM, stop)
    try:
        task = json.loads(job_file.read_bytes())
        engine.connect(task["device"])
        trainer = told[0] = Trainer(task)
        if trainer.run():
            dist.destroy_process_group()
            return 0
        if rank == 0:
            emit({"event": "interrupted", "step": trainer.step})
        return STOPPED
    except Exception as error:  # whatever it is, the supervisor must learn this rank's reason
        sys.stderr.write(f"rank {rank}:\n{traceback.format_exc()}")  # in one write, as others write too
        emit({"event": "failed", "host": os.environ.get("SOLO_HOST"), "rank": rank, "error": engine.explained(error)})
        return 1


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(code)  # no wait for loader threads that still read ahead
