"""Putting a token's expert outputs together: a weighted sum over its slots, in slot order, in float32, without atomics."""

from __future__ import annotations

from typing import Any

import torch

from . import arguments
from .device import runs_triton
from .overlap import begin_in_turn, overlap
from .toolchain import jit, tl

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK = 1024


@jit
def combine_kernel(
    rows: tl.tensor, index: tl.tensor, weights: tl.tensor, out: tl.tensor, stride: tl.tensor, SLOTS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
) -> None:  # fmt: skip
    """Program (token, block of columns): fma over the slots, first to last; an index below zero is an absent slot."""
    begin_in_turn(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(SLOTS):
        row = tl.load(index + token * SLOTS + slot).to(tl.int64)
        weight = tl.load(weights + token * SLOTS + slot)
        value = tl.load(rows + row * stride + column, mask=mask & (row >= 0), other=0.0).to(tl.float32)
        total = tl.fma(value, tl.zeros_like(value) + weight, total)
    tl.store(out + token * WIDTH + column, total.to(out.dtype.element_ty), mask=mask)


@jit
def combine_gradient_kernel(
    grad: tl.tensor, rows: tl.tensor, index: tl.tensor, weights: tl.tensor, d_rows: tl.tensor, d_weights: tl.tensor,
    grad_stride: tl.tensor, stride: tl.tensor, SLOTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Program (token, slot): the row's gradient, and the weight's as one sum over blocks of columns in ascending order."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1)
    row = tl.load(index + token * SLOTS + slot).to(tl.int64)
    weight = tl.load(weights + token * SLOTS + slot)
    total = tl.zeros((BLOCK,), tl.float32)
    if row >= 0:
        for first in range(0, WIDTH, BLOCK):
            column = first + tl.arange(0, BLOCK)
            mask = column < WIDTH
            g = tl.load(grad + token * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
            value = tl.load(rows + row * stride + column, mask=mask, other=0.0).to(tl.float32)
            tl.store(d_rows + row * WIDTH + column, (g * weight).to(d_rows.dtype.element_ty), mask=mask)
            total = tl.fma(g, value, total)
    tl.store(d_weights + token * SLOTS + slot, tl.sum(total))


def moe_combine(rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """out[t] = sum over slots s of weights[t, s] * rows[index[t, s]], [tokens, width] in rows' dtype.

    rows: [any, width] bf16, fp16 or fp32, last dimension contiguous: the experts' outputs, each row of at most one slot.
    index: int32 [tokens, slots], contiguous; below zero where a slot is absent. weights: float32 [tokens, slots], contiguous.

    Order of the sum: slots first to last, fused multiply-adds in float32, rounded once. Differentiable in rows and weights.
    Raises ValueError naming a wrong argument.
    """
    arguments.require_dims("rows", rows, 2, "[any, width]")
    arguments.require_dtype("rows", rows, DTYPES)
    arguments.require_contiguous_rows("rows", rows)
    arguments.require_dims("index", index, 2, "[tokens, slots]")
    arguments.require_dtype("index", index, (torch.int32,))
    arguments.require_contiguous("index", index)
    arguments.require_dtype("weights", weights, (torch.float32,))
    arguments.require_shape("weights", weights, index.shape, "index's shape")
    arguments.require_contiguous("weights", weights)
    arguments.require_same_device(rows=rows, index=index, weights=weights)
    if torch.is_grad_enabled() and (rows.requires_grad or weights.requires_grad):
        return _Combine.apply(rows, index, weights)  # type: ignore[no-any-return, no-untyped-call]  # torch's apply is untyped
    return _forward(rows, index, weights)


def moe_combine_reference(rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The same in plain torch."""
    total = torch.zeros(index.shape[0], rows.shape[1], device=rows.device)
    for slot in range(index.shape[1]):
        there = (index[:, slot] >= 0)[:, None]
        value = torch.where(there, rows[index[:, slot].clamp(min=0).long()].double(), 0.0)
        total = (value * weights[:, slot, None].double() + total.double()).float()
    return total.to(rows.dtype)


def _forward(rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    if not runs_triton(rows.device):
        return moe_combine_reference(rows, index, weights)
    tokens, slots = index.shape
    width = rows.shape[1]
    out = torch.empty(tokens, width, device=rows.device, dtype=rows.dtype)
    if out.numel():
        combine_kernel[(tokens, -(-width // BLOCK))](
            rows, index, weights, out, rows.stride(0), SLOTS=slots, WIDTH=width, BLOCK=BLOCK, num_warps=4,
            **overlap(rows.device),
        )  # fmt: skip
    return out


class _Combine(torch.autograd.Function):
    """moe_combine with its gradients; a row that no slot names gets zeros."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, index, weights)
        return _forward(rows, index, weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, index, weights = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        d_rows, d_weights = torch.zeros_like(rows, memory_format=torch.contiguous_format), torch.zeros_like(weights)
        if not runs_triton(rows.device):
            for token, slot in (index >= 0).nonzero().tolist():
                row = int(index[token, slot])
                d_rows[row] = (grad[token].float() * weights[token, slot]).to(rows.dtype)
                d_weights[token, slot] = (grad[token].float() * rows[row].float()).sum()
        elif index.numel():
            combine_gradient_kernel[tuple(index.shape)](
                grad, rows, index, weights, d_rows, d_weights, grad.stride(0), rows.stride(0), SLOTS=index.shape[1],
                WIDTH=rows.shape[1], BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
        return d_rows, None, d_weights
