"""SwiGLU: silu(gate) * up, elementwise in float32 with one exponential (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

from typing import Any

import torch

from . import arguments
from .device import runs_triton
from .overlap import begin_alone, overlap
from .toolchain import jit, tl

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK = 2048


@jit
def swiglu_kernel(
    x: tl.tensor, y: tl.tensor, x_stride: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
) -> None:
    """Program (row, block of columns): y = gate / (1 + exp(-gate)) * up."""
    begin_alone(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    gate = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y + row * WIDTH + column, value.to(y.dtype.element_ty), mask=mask)


@jit
def swiglu_gradient_kernel(
    grad: tl.tensor, x: tl.tensor, dx: tl.tensor, grad_stride: tl.tensor, x_stride: tl.tensor, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Program (row, block of columns): the gradients of gate and up."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    g = tl.load(grad + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    d_gate = g * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(dx + row * 2 * WIDTH + column, d_gate.to(dx.dtype.element_ty), mask=mask)
    tl.store(dx + row * 2 * WIDTH + WIDTH + column, (g * silu).to(dx.dtype.element_ty), mask=mask)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for x = [gate | up]: [..., 2 * width] to [..., width], bf16, fp16 or fp32.

    The last dimension must be contiguous; gate is its first half. Elementwise in float32, rounded once. Differentiable.
    Raises ValueError naming a wrong argument.
    """
    arguments.require_dtype("x", x, DTYPES)
    arguments.require_contiguous_rows("x", x)
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(f"x has shape {list(x.shape)}; allowed: an even last dimension, gate and up")
    if torch.is_grad_enabled() and x.requires_grad:
        return _Swiglu.apply(x)  # type: ignore[no-any-return, no-untyped-call]  # torch's apply is untyped
    return _forward(x)


def swiglu_reference(x: torch.Tensor) -> torch.Tensor:
    """The same in plain torch."""
    gate, up = x.float().chunk(2, -1)
    return (gate / (1.0 + torch.exp(-gate)) * up).to(x.dtype)


def _forward(x: torch.Tensor) -> torch.Tensor:
    if not runs_triton(x.device):
        return swiglu_reference(x)
    rows = x.reshape(-1, x.shape[-1])
    width = rows.shape[1] // 2
    y = torch.empty(rows.shape[0], width, device=x.device, dtype=x.dtype)
    if y.numel():
        swiglu_kernel[(rows.shape[0], -(-width // BLOCK))](
            rows, y, rows.stride(0), WIDTH=width, BLOCK=BLOCK, num_warps=8, **overlap(x.device),
        )  # fmt: skip
    return y.view(*x.shape[:-1], width)


class _Swiglu(torch.autograd.Function):
    """swiglu with its gradient kernel."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return _forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        if not runs_triton(x.device):
            gate, up = x.float().chunk(2, -1)
            sigmoid = 1.0 / (1.0 + torch.exp(-gate))
            g = grads[0].float()
            d_gate = g * up * (sigmoid + gate * sigmoid * (1.0 - sigmoid))
            return torch.cat((d_gate, g * gate * sigmoid), -1).to(x.dtype)
        rows, g = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, x.shape[-1] // 2)
        g = g if g.stride(-1) == 1 else g.contiguous()
        dx = torch.empty(rows.shape, device=x.device, dtype=x.dtype)
        width = rows.shape[1] // 2
        swiglu_gradient_kernel[(rows.shape[0], -(-width // BLOCK))](
            g, rows, dx, g.stride(0), rows.stride(0), WIDTH=width, BLOCK=BLOCK, num_warps=8
        )
        return dx.view(x.shape)
