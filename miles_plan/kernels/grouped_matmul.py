"""One matrix product per expert over rows sorted by expert, with exact sums.

Guarantee: a row's result is that of `matmul` with its expert's weight, whatever rows stand beside it and however many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from miles_plan.kernels.autograd import apply
from miles_plan.kernels.checks import check_float, check_shape
from miles_plan.kernels.collectives import RankGroup
from miles_plan.kernels.exact import all_reduce_sum, bits_for, round_to_grid, row_bound
from miles_plan.kernels.matmul import prepare_weight


def grouped_matmul(
    x: Tensor,
    weight: Tensor,
    rows_per_expert: Sequence[int],
    *,
    k_full: int | None = None,
    group: RankGroup | None = None,
    prepared: Tensor | None = None,
) -> Tensor:
    """y[r] = x[r] W[e]^T where expert e owns the next rows_per_expert[e] rows: x [M, K], weight [E, N, K] -> [M, N].

    Float32 or bfloat16, rounded once to x's dtype. With `group`, K of `k_full` is sharded over its ranks as in
    `row_parallel_matmul`. `prepared` is `prepare_weight(weight, ...)`. Differentiable. ValueError for shapes that do not fit.
    """
    check_float("x", x)
    check_float("weight", weight)
    check_shape("weight", weight, (None, None, x.shape[-1]))
    if len(rows_per_expert) != weight.shape[0] or sum(rows_per_expert) != x.shape[0]:
        raise ValueError(
            f"rows_per_expert must give {weight.shape[0]} counts that add up to {x.shape[0]} rows, "
            f"got {len(rows_per_expert)} adding up to {sum(rows_per_expert)}"
        )
    counts = tuple(int(count) for count in rows_per_expert)
    result: Tensor = apply(_GroupedMatmul, x, weight, counts, k_full or x.shape[-1], group, prepared)
    return result


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        counts: tuple[int, ...],
        k_full: int,
        group: RankGroup | None,
        prepared: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        return _forward(x, weight, counts, k_full, group, prepared)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, inputs = grad.float(), x.float()
        grad_x = torch.zeros_like(inputs) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for expert, own in _slices(ctx.counts):
            if grad_x is not None:
                torch.mm(rows[own], weight[expert].float(), out=grad_x[own])
            if grad_weight is not None:
                torch.mm(rows[own].T, inputs[own], out=grad_weight[expert])
        return (
            None if grad_x is None else grad_x.to(x.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None,
            None,
            None,
        )


def _forward(
    x: Tensor, weight: Tensor, counts: tuple[int, ...], k_full: int, group: RankGroup | None, prepared: Tensor | None
) -> Tensor:
    """The one place that chooses the implementation; exact sums in float64 run on every device."""
    if prepared is None:
        prepared = prepare_weight(weight, k_full=k_full, group=group)
    on_grid = round_to_grid(x, row_bound(x, group), bits_for(k_full)[0]) if len(x) else x.double()
    product = on_grid.new_empty(x.shape[0], weight.shape[1])
    for expert, own in _slices(counts):
        torch.mm(on_grid[own], prepared[expert].T, out=product[own])
    return all_reduce_sum(product, group).to(torch.float32).to(x.dtype)


def _slices(counts: tuple[int, ...]) -> list[tuple[int, slice]]:
    slices, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            slices.append((expert, slice(start, start + count)))
        start += count
    return slices
