"""Real process groups for tests: ranks on CPUs, or on a GPU each."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Case = TypeVar("Case")
Check = Callable[[Case, int, int, torch.device], None]  # a case, this rank, how many there are, this rank's device


def on_ranks(check: Check[Case], cases: tuple[Case, ...], ranks: int, *, gpus: bool = False) -> None:
    """Run the check of each case on every rank of a process group; skipped where there are fewer GPUs."""
    if gpus:
        pytest.importorskip("triton")
        if torch.cuda.device_count() < ranks:
            pytest.skip(f"needs {ranks} CUDA devices")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.spawn(_rank, (check, cases, ranks, port, gpus), ranks)  # type: ignore[no-untyped-call]  # torch's spawn is untyped


def _rank(rank: int, check: Check[Case], cases: tuple[Case, ...], ranks: int, port: int, gpus: bool) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    backend = "nccl" if gpus else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", world_size=ranks, rank=rank)
    for case in cases:
        check(case, rank, ranks, device)
    dist.destroy_process_group()
