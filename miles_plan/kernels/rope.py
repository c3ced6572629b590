"""Rotary position embedding (arXiv 2104.09864), in the half-split form of Llama and Qwen checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from miles_plan.kernels.autograd import apply
from miles_plan.kernels.checks import check_float, check_shape


def rope_table(inverse_frequencies: Sequence[float], max_positions: int, *, scaling: float = 1.0) -> Tensor:
    """cos and sin of position x frequency, float32 [max_positions, 2, D / 2].

    Angles are rounded to float32 as transformers does; cos and sin come from libm one by one, so an entry depends on its
    position alone.
    """
    frequencies = torch.tensor(list(inverse_frequencies), dtype=torch.float32)
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies[None, :]
    flat = angles.flatten().tolist()
    cosines = torch.tensor([math.cos(angle) for angle in flat], dtype=torch.float64).view_as(angles)
    sines = torch.tensor([math.sin(angle) for angle in flat], dtype=torch.float64).view_as(angles)
    return (torch.stack([cosines, sines], dim=1) * scaling).float()


def rope(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate x [M, heads, D] by `rotation` [M, 2, D / 2], rows of `rope_table` at each token's position.

    Computed in float32 and rounded once to x's dtype; elementwise, so batch-invariant. Differentiable in x. ValueError for
    other dtypes or shapes.
    """
    check_float("x", x)
    check_shape("x", x, (None, None, None))
    check_shape("rotation", rotation, (x.shape[0], 2, x.shape[2] // 2))
    result: Tensor = apply(_Rope, x, rotation)
    return result


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor) -> Tensor:
        ctx.save_for_backward(rotation)
        return _rotate(x, rotation[:, None, 0], rotation[:, None, 1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rotation,) = ctx.saved_tensors
        return _rotate(grad, rotation[:, None, 0], -rotation[:, None, 1]), None


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The one place that chooses the implementation: multiplications and additions kept apart, so nothing is fused."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return turned.to(x.dtype)
