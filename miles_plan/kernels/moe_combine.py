"""Weighted sum of the experts' outputs of each token, in slot order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_plan.kernels.autograd import apply
from miles_plan.kernels.checks import check_float, check_shape


def moe_combine(rows: Tensor, weights: Tensor) -> Tensor:
    """out[t] = sum over slots s of weights[t, s] x rows[t, s], in float32, in slot order, rounded once to rows' dtype.

    rows [M, top_k, H] float32 or bfloat16, weights float32 [M, top_k] -> [M, H]. Batch-invariant: the order is the slot's, so
    neither the experts' loads nor the ranks they live on matter. Differentiable. ValueError for other dtypes or shapes.
    """
    check_float("rows", rows)
    check_shape("rows", rows, (None, None, None))
    check_shape("weights", weights, tuple(rows.shape[:2]))
    if weights.dtype != torch.float32:
        raise ValueError(f"weights must be float32, got {weights.dtype}")
    result: Tensor = apply(_MoeCombine, rows, weights)
    return result


class _MoeCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        return _forward(rows, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights = ctx.saved_tensors
        outer = grad.float()[:, None, :]
        return (outer * weights[:, :, None]).to(rows.dtype), (outer * rows.float()).sum(dim=-1)


def _forward(rows: Tensor, weights: Tensor) -> Tensor:
    """The one place that chooses the implementation: a product, then an addition, never fused."""
    weighted = rows.float() * weights[:, :, None]
    total = weighted[:, 0].clone()
    for slot in range(1, rows.shape[1]):
        total += weighted[:, slot]
    return total.to(rows.dtype)
