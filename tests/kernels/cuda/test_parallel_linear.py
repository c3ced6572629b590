"""Linear layers over real process groups: outputs and gradients of one rank, with and without sequence parallelism."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from miles_plan.kernels.cuda.linear_log_prob import linear_log_prob
from miles_plan.kernels.cuda.matmul import matmul, tree_all_reduce, tree_partial
from miles_plan.kernels.cuda.parallel_linear import column_parallel_linear, row_parallel_linear, tree_reduce_scatter

TOKENS, WIDTH, INNER = 8, 128, 256


def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, the two weights of a block of two layers, and the gradient of its output; float32, where another order shows."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, 1, WIDTH), (INNER, WIDTH), (WIDTH, INNER), (TOKENS, 1, WIDTH))
    x, up, down, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, up, down, grad


def block_gradients(
    x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, grad: torch.Tensor, group: object = None, sequence: bool = False
) -> list[torch.Tensor]:
    """The output of a column-parallel layer followed by a row-parallel one, and the gradients of x and both weights."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, up, down)]
    hidden = column_parallel_linear(leaves[0], leaves[1], group, sequence_parallel=sequence)
    out = row_parallel_linear(hidden, leaves[2], group, sequence_parallel=sequence)
    out.backward(grad)  # type: ignore[no-untyped-call]  # torch's backward is untyped
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def rank_main(rank: int, ranks: int, port: int, backend: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", world_size=ranks, rank=rank)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    x, up, down, grad = (tensor.to(device) for tensor in drawn())
    want = block_gradients(x, up, down, grad)
    rows, tokens = (
        slice(rank * INNER // ranks, (rank + 1) * INNER // ranks),
        slice(rank * TOKENS // ranks, (rank + 1) * TOKENS // ranks),
    )
    my_up, my_down = up[rows].contiguous(), down[:, rows].contiguous()
    for sequence in (False, True):
        mine = tokens if sequence else slice(None)
        out, dx, dup, ddown = block_gradients(x[mine], my_up, my_down, grad[mine], dist.group.WORLD, sequence)
        assert torch.equal(out, want[0][mine]), sequence
        assert torch.equal(dx, want[1][mine]), sequence
        assert torch.equal(dup, want[2][rows]), sequence
        assert torch.equal(ddown, want[3][:, rows]), sequence
    partial = tree_partial(
        x[:, 0, rows_of(WIDTH, rank, ranks)].contiguous(), up[:, rows_of(WIDTH, rank, ranks)].contiguous(), ranks
    )
    whole = matmul(x[:, 0], up, order="tree")
    assert torch.equal(tree_all_reduce(partial, torch.float32), whole)
    assert torch.equal(tree_reduce_scatter(partial, torch.float32), whole[tokens])
    hidden, targets = x[:, 0], torch.arange(TOKENS, device=device) * 30
    alone = scored(hidden, up, targets)
    together = scored(hidden, my_up, targets, vocab_start=rows.start, vocab_size=INNER, group=dist.group.WORLD)
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])
    assert torch.equal(together[2], alone[2][rows])
    dist.destroy_process_group()


def scored(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, **shard: Any) -> list[torch.Tensor]:
    """Log-probabilities of a head, and the gradients of the hidden states and of the head, two blocks of rows."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (hidden, weight)]
    found = linear_log_prob(*leaves, targets, rows_at_once=5, **shard)
    return [found.detach(), *torch.autograd.grad(found.sum(), leaves)]


def rows_of(size: int, rank: int, ranks: int) -> slice:
    return slice(rank * size // ranks, (rank + 1) * size // ranks)


def spawn(ranks: int, backend: str) -> None:
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


def test_one_rank_is_the_plain_product() -> None:
    x, up, down, grad = drawn()
    out, dx, dup, ddown = block_gradients(x, up, down, grad)
    hidden = matmul(x, up)
    assert torch.equal(out, matmul(hidden, down, order="tree"))
    leaves = [tensor.double().requires_grad_() for tensor in (x, up, down)]
    ((leaves[0] @ leaves[1].T) @ leaves[2].T).backward(grad.double())  # type: ignore[no-untyped-call]
    for ours, leaf in zip((dx, dup, ddown), leaves, strict=True):
        assert leaf.grad is not None
        assert (ours.double() - leaf.grad).norm() < 1e-6 * leaf.grad.norm()
