"""Linear layers split over tensor-parallel ranks, whose outputs and gradients have the bits of one rank.

A *column-parallel* layer owns rows of the weight: its product is a chain over the whole of K, so splitting cannot show; the
gradient of its input sums over all rows of the weight, hence over ranks, and takes the tree family. A *row-parallel* layer
owns columns of the weight: its product sums over ranks and takes the tree; the gradient of its input is a chain. Gradients
of weights sum over tokens, never over tensor-parallel ranks.

Sums over ranks are `matmul.tree_all_reduce`, or `tree_reduce_scatter` with sequence parallelism (Korthikanti et al. 2022,
arXiv 2205.05198), where tokens are split between layers. The tree is that of Zhang et al. (arXiv 2511.17826).
"""

from __future__ import annotations

from typing import Any

import torch

from . import arguments
from .device import runs_triton
from .gemm import TREE_LEAVES, gemm
from .matmul import (
    TENSOR_PARALLEL_SIZES,
    input_gradient,
    matmul,
    matmul_reference,
    require_operands,
    tree_all_reduce,
    tree_partial,
    weight_gradient,
)
from .tensor_core import add_tree


def column_parallel_linear(
    x: torch.Tensor, weight: torch.Tensor, group: Any = None, *, sequence_parallel: bool = False
) -> torch.Tensor:
    """x @ weight.T for a weight whose rows (N) are split over `group`: [tokens, ..., K] to [tokens, ..., N / ranks].

    x, weight: the same one of bf16, fp16 and fp32, last dimension contiguous. group: a process group of 1, 2, 4 or 8 ranks, or
    None for one. sequence_parallel: x holds this rank's tokens; the ranks' tokens are gathered along the first dimension.

    Order of the sum: a chain over K. Differentiable: dx is a tree over N and over ranks, so N must be a multiple of 128;
    dweight is a chain over the tokens. Raises ValueError naming a wrong argument.
    """
    ranks = _check(x, weight, group)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        if weight.shape[0] * ranks % (16 * TREE_LEAVES):
            allowed = f"a multiple of {16 * TREE_LEAVES} over all ranks"
            raise ValueError(f"weight has N = {weight.shape[0]} on each of {ranks} ranks; allowed: {allowed}")
        return _ColumnParallel.apply(x, weight, group, sequence_parallel)  # type: ignore[no-any-return, no-untyped-call]  # torch's apply is untyped
    return matmul(_gather_tokens(x, group) if sequence_parallel else x, weight)


def row_parallel_linear(
    x: torch.Tensor, weight: torch.Tensor, group: Any = None, *, sequence_parallel: bool = False
) -> torch.Tensor:
    """x @ weight.T for a weight whose columns (K) are split over `group`: [tokens, ..., K / ranks] to [tokens, ..., N].

    Arguments as `column_parallel_linear`'s. sequence_parallel: each rank gets its share of the tokens, which their number
    must divide into.

    Order of the sum: the tree over K that `matmul(order="tree")` takes, on any number of ranks; K a multiple of 128 over all
    ranks. Differentiable: dx is a chain over N, dweight a chain over the tokens. Raises ValueError naming a wrong argument.
    """
    ranks = _check(x, weight, group)
    if sequence_parallel and x.shape[0] % ranks:
        raise ValueError(f"x has {x.shape[0]} tokens with sequence_parallel; allowed: a multiple of {ranks}, the size of group")
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RowParallel.apply(x, weight, group, sequence_parallel)  # type: ignore[no-any-return, no-untyped-call]  # torch's apply is untyped
    return _row_forward(x, weight, group, sequence_parallel)


def tree_reduce_scatter(partial: torch.Tensor, out_dtype: torch.dtype = torch.bfloat16, group: Any = None) -> torch.Tensor:
    """Add `tree_partial`s over the ranks of `group` as `tree_all_reduce` does; each rank keeps its share of the tokens.

    partial: float32 [tokens, ...], tokens a multiple of the ranks. group: None is the default group. Float32 crosses the
    network once; the network adds nothing.
    """
    ranks = torch.distributed.get_world_size(group)
    arguments.require_size("the size of group", ranks, TENSOR_PARALLEL_SIZES)
    arguments.require_dtype("partial", partial, (torch.float32,))
    if ranks == 1:
        return partial.to(out_dtype)
    if partial.shape[0] % ranks:
        raise ValueError(f"partial has {partial.shape[0]} tokens; allowed: a multiple of {ranks}, the size of group")
    received = torch.empty_like(partial, memory_format=torch.contiguous_format)
    torch.distributed.all_to_all_single(received, partial.contiguous(), group=group)
    return add_tree(list(received.view(ranks, partial.shape[0] // ranks, *partial.shape[1:]).unbind(0))).to(out_dtype)


def ranks_of(group: Any) -> int:
    """The size of a tensor-parallel group, 1 for None. Raises ValueError for other sizes than 1, 2, 4 and 8."""
    ranks = 1 if group is None else torch.distributed.get_world_size(group)
    arguments.require_size("the size of group", ranks, TENSOR_PARALLEL_SIZES)
    return ranks


def _check(x: torch.Tensor, weight: torch.Tensor, group: Any) -> int:
    require_operands(x, weight)
    if x.dim() < 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has shape {list(x.shape)}; allowed: [tokens, ..., {weight.shape[1]}], weight's K")
    return ranks_of(group)


def _gather_tokens(x: torch.Tensor, group: Any) -> torch.Tensor:
    ranks = ranks_of(group)
    if ranks == 1:
        return x
    gathered = torch.empty(ranks * x.shape[0], *x.shape[1:], device=x.device, dtype=x.dtype)
    torch.distributed.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    return gathered


def _sum(partial: torch.Tensor, dtype: torch.dtype, group: Any, sequence_parallel: bool) -> torch.Tensor:
    if group is None:
        return partial.to(dtype)
    return tree_reduce_scatter(partial, dtype, group) if sequence_parallel else tree_all_reduce(partial, dtype, group)


def _row_forward(x: torch.Tensor, weight: torch.Tensor, group: Any, sequence_parallel: bool) -> torch.Tensor:
    ranks = ranks_of(group)
    if ranks == 1:
        return matmul(x, weight, order="tree")
    return _sum(tree_partial(x, weight, ranks), x.dtype, group, sequence_parallel)


def partial_input_gradient(grad: torch.Tensor, weight: torch.Tensor, ranks: int) -> torch.Tensor:
    """This rank's subtree of grad [rows, N / ranks] @ weight [N / ranks, K], float32."""
    leaves = TREE_LEAVES // ranks
    if not runs_triton(grad.device):
        return matmul_reference(grad, weight.T.contiguous(), leaves)
    out = torch.empty(grad.shape[0], weight.shape[1], device=grad.device, dtype=torch.float32)
    gemm(grad, weight, out, leaves=leaves, b_kn=True)
    return out


def _column_input_gradient(
    grad: torch.Tensor, weight: torch.Tensor, group: Any, sequence_parallel: bool, leading: torch.Size
) -> torch.Tensor:
    """The tree over the weight's rows of all ranks; one rank's kernel rounds it where it adds it up."""
    ranks = ranks_of(group)
    if ranks == 1:
        return input_gradient(grad, weight, "tree").view(*leading, weight.shape[1])
    partial = partial_input_gradient(grad, weight, ranks).view(*leading, weight.shape[1])
    return _sum(partial, weight.dtype, group, sequence_parallel)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


class _ColumnParallel(torch.autograd.Function):
    """column_parallel_linear; the gathered input is gathered again in the backward rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, group: Any, sequence_parallel: bool) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        return matmul(_gather_tokens(x, group) if sequence_parallel else x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = _rows(grads[0]).contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _column_input_gradient(grad, weight, ctx.group, ctx.sequence_parallel, grads[0].shape[:-1])
        if ctx.needs_input_grad[1]:
            whole = _gather_tokens(x, ctx.group) if ctx.sequence_parallel else x
            dw = weight_gradient(grad, _rows(whole))
        return dx, dw, None, None


class _RowParallel(torch.autograd.Function):
    """row_parallel_linear."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, group: Any, sequence_parallel: bool) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        return _row_forward(x, weight, group, sequence_parallel)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        whole = _gather_tokens(grads[0], ctx.group) if ctx.sequence_parallel else grads[0]
        grad = _rows(whole).contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = input_gradient(grad, weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            dw = weight_gradient(grad, _rows(x))
        return dx, dw, None, None
