"""Linear layers over real process groups: outputs and gradients of one rank, with and without sequence parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from miles_plan.kernels.cuda.linear_log_prob import linear_log_prob
from miles_plan.kernels.cuda.matmul import matmul, tree_all_reduce, tree_partial
from miles_plan.kernels.cuda.parallel_linear import column_parallel_linear, row_parallel_linear, tree_reduce_scatter
from tests.kernels.cuda.ranks import on_ranks


@dataclass(frozen=True)
class Block:
    """Two layers, column-parallel and row-parallel, and how many tokens go through them."""

    tokens: int
    width: int
    inner: int
    dtype: torch.dtype

    def drawn(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, the two weights, and the gradient of the output."""
        generator = torch.Generator(device).manual_seed(0)
        shapes = (
            (self.tokens, 1, self.width),
            (self.inner, self.width),
            (self.width, self.inner),
            (self.tokens, 1, self.width),
        )
        x, up, down, grad = (torch.randn(shape, generator=generator, device=device).to(self.dtype) for shape in shapes)
        return x, up * self.width**-0.5, down * self.inner**-0.5, grad


SMALL = Block(8, 128, 256, torch.float32)  # where another order shows
QWEN3_8B = Block(512, 4096, 12_288, torch.bfloat16)  # on Hopper's kernels


def block_gradients(
    x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, grad: torch.Tensor, group: object = None, sequence: bool = False
) -> list[torch.Tensor]:
    """The output of a column-parallel layer followed by a row-parallel one, and the gradients of x and both weights."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, up, down)]
    hidden = column_parallel_linear(leaves[0], leaves[1], group, sequence_parallel=sequence)
    out = row_parallel_linear(hidden, leaves[2], group, sequence_parallel=sequence)
    out.backward(grad)  # type: ignore[no-untyped-call]  # torch's backward is untyped
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def split_over_ranks_as_whole(block: Block, rank: int, ranks: int, device: torch.device) -> None:
    """This rank's part of outputs and gradients against what it computes alone."""
    x, up, down, grad = block.drawn(device)
    want = block_gradients(x, up, down, grad)
    rows, tokens = (
        rows_of(block.inner, rank, ranks),
        rows_of(block.tokens, rank, ranks),
    )
    my_up, my_down = up[rows].contiguous(), down[:, rows].contiguous()
    for sequence in (False, True):
        mine = tokens if sequence else slice(None)
        out, dx, dup, ddown = block_gradients(x[mine], my_up, my_down, grad[mine], dist.group.WORLD, sequence)
        assert torch.equal(out, want[0][mine]), sequence
        assert torch.equal(dx, want[1][mine]), sequence
        assert torch.equal(dup, want[2][rows]), sequence
        assert torch.equal(ddown, want[3][:, rows]), sequence
    columns = rows_of(block.width, rank, ranks)
    partial = tree_partial(x[:, 0, columns].contiguous(), up[:, columns].contiguous(), ranks)
    whole = matmul(x[:, 0], up, order="tree")
    assert torch.equal(tree_all_reduce(partial, block.dtype), whole)
    assert torch.equal(tree_reduce_scatter(partial, block.dtype), whole[tokens])
    hidden, targets = x[:, 0], torch.arange(block.tokens, device=device) * 30 % block.inner
    alone = scored(hidden, up, targets)
    together = scored(hidden, my_up, targets, vocab_start=rows.start, vocab_size=block.inner, group=dist.group.WORLD)
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])
    assert torch.equal(together[2], alone[2][rows])


def scored(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, **shard: Any) -> list[torch.Tensor]:
    """Log-probabilities of a head, and the gradients of the hidden states and of the head, two blocks of rows."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (hidden, weight)]
    found = linear_log_prob(*leaves, targets, rows_at_once=-(-hidden.shape[0] * 5 // 8), **shard)
    return [found.detach(), *torch.autograd.grad(found.sum(), leaves)]


def rows_of(size: int, rank: int, ranks: int) -> slice:
    return slice(rank * size // ranks, (rank + 1) * size // ranks)


def test_two_ranks_on_cpus() -> None:
    on_ranks(split_over_ranks_as_whole, (SMALL,), 2)


@pytest.mark.slow
def test_four_ranks_on_cpus() -> None:
    on_ranks(split_over_ranks_as_whole, (SMALL,), 4)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_on_gpus(ranks: int) -> None:
    on_ranks(split_over_ranks_as_whole, (SMALL, QWEN3_8B), ranks, gpus=True)


def test_one_rank_is_the_plain_product() -> None:
    x, up, down, grad = SMALL.drawn(torch.device("cpu"))
    out, dx, dup, ddown = block_gradients(x, up, down, grad)
    hidden = matmul(x, up)
    assert torch.equal(out, matmul(hidden, down, order="tree"))
    leaves = [tensor.double().requires_grad_() for tensor in (x, up, down)]
    ((leaves[0] @ leaves[1].T) @ leaves[2].T).backward(grad.double())  # type: ignore[no-untyped-call]
    for ours, leaf in zip((dx, dup, ddown), leaves, strict=True):
        assert leaf.grad is not None
        assert (ours.double() - leaf.grad).norm() < 1e-6 * leaf.grad.norm()
