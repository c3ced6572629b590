"""tree_all_reduce over real process groups: the bits of one rank."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from miles_plan.kernels.cuda.matmul import matmul, tree_all_reduce, tree_partial


def rank_main(rank: int, ranks: int, port: int, backend: str) -> None:
    """One rank: its slice of K, the sum over all, compared with the whole product."""
    torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", world_size=ranks, rank=rank)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    generator = torch.Generator().manual_seed(0)
    k = 1024 if backend == "nccl" else 256
    x, weight = (torch.randn(n, k, generator=generator).bfloat16().to(device) for n in (5, 24))
    width = k // ranks
    mine = slice(rank * width, (rank + 1) * width)
    partial = tree_partial(x[:, mine].contiguous(), weight[:, mine].contiguous(), ranks)
    assert torch.equal(tree_all_reduce(partial), matmul(x, weight, order="tree"))
    dist.destroy_process_group()


def spawn(ranks: int, backend: str) -> Any:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.spawn(rank_main, (ranks, port, backend), ranks)  # type: ignore[no-untyped-call]  # torch's spawn is untyped


def test_two_ranks_on_cpus() -> None:
    spawn(2, "gloo")


@pytest.mark.slow
def test_four_ranks_on_cpus() -> None:
    spawn(4, "gloo")


@pytest.mark.multi_gpu
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_on_gpus(ranks: int) -> None:
    pytest.importorskip("triton")
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices")
    spawn(ranks, "nccl")
