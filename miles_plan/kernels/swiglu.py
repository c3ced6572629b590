"""SwiGLU (arXiv 2002.05202): silu(gate) x up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_plan.kernels.autograd import apply
from miles_plan.kernels.checks import check_float, check_shape
from miles_plan.kernels.elementary import exp


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate / (1 + exp(-gate)) x up, elementwise, in float32, rounded once to gate's dtype (float32 or bfloat16).

    Batch-invariant: `exp` gives the same bits at every place of a tensor, which torch's own need not. Differentiable.
    ValueError for other dtypes or unequal shapes.
    """
    check_float("gate", gate)
    check_shape("up", up, tuple(gate.shape))
    result: Tensor = apply(_Swiglu, gate, up)
    return result


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = (saved.float() for saved in ctx.saved_tensors)
        outer = grad.float()
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        grad_gate = outer * up * (sigmoid + silu * (1.0 - sigmoid))
        return grad_gate.to(grad.dtype), (outer * silu).to(grad.dtype)


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    """The one place that chooses the implementation."""
    wide = gate.float()
    denominator = exp(-wide).add_(1.0)
    return torch.div(wide, denominator, out=denominator).mul_(up).to(gate.dtype)
