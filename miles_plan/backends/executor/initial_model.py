"""Random initial weights, made in a process of their own while Ray starts: importing transformers takes about as long."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from miles_plan.ir.plan import Plan, read_plan

POLL_S = 0.02


def begin_initial_model(plan: Plan, plan_file: Path, folder: Path) -> int | None:
    """Start making the initial weights; returns the process, None where there is nothing to make."""
    if plan.run.model.checkpoint is not None or folder.exists():
        return None
    return subprocess.Popen(
        [sys.executable, "-m", __name__, str(plan_file), str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ).pid


def finish_initial_model(plan: Plan, folder: Path, process: int | None) -> None:
    """Wait for that process; where it failed or there is none, make the weights here. The folder appears when it is whole."""
    while process is not None and not folder.exists() and _alive(process):
        time.sleep(POLL_S)
    if plan.run.model.checkpoint is None and not folder.exists():
        import torch

        from miles_plan.backends.torch_engine.weights import initialise_checkpoint

        dtype = torch.float32 if plan.run.train_dtype == "fp32" else torch.bfloat16
        initialise_checkpoint(dict(plan.run.model.hf_config or {}), folder, plan.run.seed, large_dtype=dtype)


def _alive(process: int) -> bool:
    """Whether a process still works; one that has ended and that its parent has not asked about does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    except OSError:
        return _signalable(process)
    return state not in ("Z", "X")


def _signalable(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    finish_initial_model(read_plan(Path(sys.argv[1])), Path(sys.argv[2]), None)
