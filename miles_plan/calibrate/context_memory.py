"""Device memory that a process takes before it allocates anything: its CUDA context and the kernels of its first tensor."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.connection import Connection

import torch

from miles_plan.calibrate.points import MemoryPoint

WAIT_S = 60.0


def measure_context(device: torch.device) -> tuple[MemoryPoint, ...]:
    """The fall of free memory, seen from here, as another process makes its first tensor. () if that process fails."""
    if device.type != "cuda":
        return ()
    torch.cuda.synchronize(device)
    before, _ = torch.cuda.mem_get_info(device)
    here, there = multiprocessing.get_context("spawn").Pipe()
    other = multiprocessing.get_context("spawn").Process(target=_hold_a_context, args=(there, device.index or 0), daemon=True)
    other.start()
    try:
        there.close()
        if not here.poll(WAIT_S):
            return ()
        here.recv()
        during, _ = torch.cuda.mem_get_info(device)
    except EOFError:
        return ()
    finally:
        other.kill()  # it has nothing to finish
        other.join()
    return (MemoryPoint(what="context", size_bytes=before - during),)


def _hold_a_context(link: Connection, index: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    torch.ones(1, device=f"cuda:{index}").add_(1)
    torch.cuda.synchronize(index)
    link.send("ready")
    link.recv()
