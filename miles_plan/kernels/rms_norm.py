"""RMSNorm with an exact mean of squares (arXiv 1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_plan.kernels.autograd import apply
from miles_plan.kernels.checks import check_float, check_shape
from miles_plan.kernels.exact import bits_for, round_to_grid, row_bound


def rms_norm(x: Tensor, weight: Tensor, *, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) x weight over the last dimension; x [..., H], weight [H], float32 or bfloat16.

    As in transformers, the normalised row is rounded to x's dtype before the weight multiplies it. Batch-invariant: the sum
    of squares is exact, so a row's bits depend on that row alone. Differentiable. ValueError for other dtypes or shapes.
    """
    check_float("x", x)
    check_shape("weight", weight, (x.shape[-1],))
    result: Tensor = apply(_RmsNorm, x, weight, epsilon)
    return result


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        inverse = _inverse_rms(x, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return (x.double() * inverse).float().to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        scale = inverse.float()
        normalised = x.float() * scale
        outer = grad.float()
        inner = outer * weight.float()
        grad_x = (inner - normalised * (inner * normalised).mean(dim=-1, keepdim=True)) * scale
        grad_weight = (outer * normalised).reshape(-1, x.shape[-1]).sum(dim=0)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def _inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    """The one place that chooses the implementation: 1 / sqrt(mean(x^2) + epsilon), float64 [..., 1]."""
    hidden = x.shape[-1]
    on_grid = round_to_grid(x, row_bound(x), bits_for(hidden)[0])
    squares = on_grid.mul_(on_grid).sum(dim=-1, keepdim=True)
    return squares.div_(hidden).add_(epsilon).sqrt_().reciprocal_()
