"""Linear layers with exact sums: y = x W^T, also with K sharded over tensor-parallel ranks.

Guarantee: an output element depends on its row of x, its row of W, and K of the whole layer; not on other rows, their number,
threads, or how K or N is split over ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_plan.kernels.autograd import apply
from miles_plan.kernels.checks import check_float, check_shape
from miles_plan.kernels.collectives import RankGroup
from miles_plan.kernels.exact import all_reduce_sum, bits_for, round_to_grid, row_bound


def prepare_weight(weight: Tensor, *, k_full: int | None = None, group: RankGroup | None = None) -> Tensor:
    """Rows of a weight [..., N, K] on their grids, float64: done once per weight version and passed to `matmul`.

    `k_full` is K of the whole layer when `group` shards it (row-parallel); the grid is the whole row's.
    """
    check_float("weight", weight)
    bits = bits_for(k_full or weight.shape[-1])[1]
    return round_to_grid(weight.detach(), row_bound(weight, group), bits)


def exact_product(x: Tensor, prepared: Tensor, *, k_full: int | None = None, group: RankGroup | None = None) -> Tensor:
    """x [M, K] times a prepared weight [N, K], exact sums in float64 [M, N], summed over `group` when K is sharded."""
    bits = bits_for(k_full or x.shape[-1])[0]
    product = round_to_grid(x, row_bound(x, group), bits) @ prepared.T
    return all_reduce_sum(product, group)


def matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    prepared: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = x W^T + b for x [..., K], weight [N, K], bias [N]; float32 or bfloat16, rounded to `out_dtype` (default: x's).

    Batch-invariant and thread-count-invariant: sums are exact. With N sharded (column-parallel) each rank computes its own
    columns with the bits of the whole layer. `prepared` is `prepare_weight(weight)`, else it is computed here. Differentiable;
    the backward is plain float32 matrix products. ValueError for other dtypes or shapes that do not fit.
    """
    _check(x, weight, bias)
    result: Tensor = apply(_Matmul, x, weight, bias, prepared, weight.shape[-1], None, out_dtype or x.dtype)
    return result


def row_parallel_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    k_full: int,
    group: RankGroup | None,
    prepared: Tensor | None = None,
) -> Tensor:
    """`matmul` with K sharded over `group`: x [..., K / ranks], weight [N, K / ranks]; every rank gets the whole y.

    The grids are those of the whole rows and `k_full`, and the float64 partial sums are exact, so any number of ranks gives
    the bits of one. The bias is whole on every rank and is added once. The backward needs no communication.
    """
    _check(x, weight, bias)
    if (group is None or group.size == 1) and x.shape[-1] != k_full:
        raise ValueError(f"x has K={x.shape[-1]} but k_full={k_full} and no group shards it")
    result: Tensor = apply(_Matmul, x, weight, bias, prepared, k_full, group, x.dtype)
    return result


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_float("x", x)
    check_float("weight", weight)
    check_shape("weight", weight, (None, x.shape[-1]))
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],))


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        prepared: Tensor | None,
        k_full: int,
        group: RankGroup | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _forward(x, weight, bias, prepared, k_full, group).to(out_dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1]).float()
        grad_x = (rows @ weight.float()).to(x.dtype).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.T @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype)
        grad_bias = rows.sum(dim=0).to(weight.dtype) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, prepared: Tensor | None, k_full: int, group: RankGroup | None
) -> Tensor:
    """The one place that chooses the implementation; exact sums in float64 run on every device."""
    if prepared is None:
        prepared = prepare_weight(weight, k_full=k_full, group=group)
    product = exact_product(x.reshape(-1, x.shape[-1]), prepared, k_full=k_full, group=group)
    if bias is not None:
        product.add_(bias)
    return product.to(torch.float32).view(*x.shape[:-1], weight.shape[0])
