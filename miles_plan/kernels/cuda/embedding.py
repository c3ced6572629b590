"""Embedding lookup, exact on any number of ranks, with a gradient that adds tokens in their order.

A forward lookup copies rows. A vocabulary shard returns zeros for tokens it does not own, so the sum over ranks has one
nonzero term and is exact in any order (a row's -0.0 may come back as 0.0).
"""

from __future__ import annotations

from typing import Any

import torch

from . import arguments
from .device import runs_triton
from .overlap import begin_in_turn, overlap
from .toolchain import jit, tl

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INDEX_DTYPES = (torch.int32, torch.int64)


@jit
def embedding_kernel(
    ids: tl.tensor, weight: tl.tensor, out: tl.tensor, first: tl.tensor, rows: tl.tensor, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
) -> None:  # fmt: skip
    """Program (token, block of columns): copy the token's row, or zeros where another shard owns it."""
    begin_in_turn(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + token).to(tl.int64) - first
    mask = (column < WIDTH) & (row >= 0) & (row < rows)
    values = tl.load(weight + row * WIDTH + column, mask=mask, other=0.0)
    tl.store(out + token * WIDTH + column, values, mask=column < WIDTH)


@jit
def embedding_gradient_kernel(
    grad: tl.tensor, order: tl.tensor, starts: tl.tensor, ids: tl.tensor, out: tl.tensor, first: tl.tensor, rows: tl.tensor,
    grad_stride: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Program (distinct id, block of columns): add the gradients of its tokens in ascending token order, in float32."""
    which = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    row = tl.load(ids + which).to(tl.int64) - first
    if (row >= 0) & (row < rows):
        total = tl.zeros((BLOCK,), tl.float32)
        for i in range(tl.load(starts + which), tl.load(starts + which + 1)):
            token = tl.load(order + i).to(tl.int64)
            total += tl.load(grad + token * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + row * WIDTH + column, total.to(out.dtype.element_ty), mask=mask)


def embedding(ids: torch.Tensor, weight: torch.Tensor, vocab_start: int = 0) -> torch.Tensor:
    """Rows of `weight` for each id: [...] to [..., width].

    ids: int32 or int64, of the whole vocabulary. weight: [rows, width] bf16, fp16 or fp32, contiguous: the whole table, or the
    shard that begins at row `vocab_start`, which gives zeros for ids outside it; sum the ranks' results.

    The gradient of a row adds its tokens in ascending order in float32. Differentiable in weight.
    Raises ValueError naming a wrong argument.
    """
    arguments.require_dtype("ids", ids, INDEX_DTYPES)
    arguments.require_dtype("weight", weight, DTYPES)
    arguments.require_dims("weight", weight, 2, "[rows, width]")
    arguments.require_contiguous("weight", weight)
    arguments.require_same_device(weight=weight, ids=ids)
    if vocab_start < 0:
        raise ValueError(f"vocab_start is {vocab_start}; allowed: 0 or more")
    if torch.is_grad_enabled() and weight.requires_grad:
        return _Embedding.apply(ids, weight, vocab_start)  # type: ignore[no-any-return, no-untyped-call]  # torch's apply is untyped
    return _forward(ids, weight, vocab_start)


def embedding_reference(ids: torch.Tensor, weight: torch.Tensor, vocab_start: int) -> torch.Tensor:
    """The same in plain torch."""
    row = ids.long() - vocab_start
    mine = (row >= 0) & (row < weight.shape[0])
    return torch.where(mine[..., None], weight[row.clamp(0, weight.shape[0] - 1)], torch.zeros((), dtype=weight.dtype))


def _forward(ids: torch.Tensor, weight: torch.Tensor, vocab_start: int) -> torch.Tensor:
    if not runs_triton(weight.device):
        return embedding_reference(ids, weight, vocab_start)
    flat = ids.reshape(-1).contiguous()
    rows, width = weight.shape
    out = torch.empty(flat.numel(), width, device=weight.device, dtype=weight.dtype)
    if out.numel():
        block = min(2048, 1 << (width - 1).bit_length())
        embedding_kernel[(flat.numel(), -(-width // block))](
            flat, weight, out, vocab_start, rows, WIDTH=width, BLOCK=block, num_warps=4, **overlap(weight.device)
        )
    return out.view(*ids.shape, width)


def _gradient(grad: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, vocab_start: int) -> torch.Tensor:
    flat, g = ids.reshape(-1), grad.reshape(-1, weight.shape[1])
    g = g if g.stride(-1) == 1 else g.contiguous()
    ordered, order = torch.sort(flat, stable=True)
    distinct, counts = torch.unique_consecutive(ordered, return_counts=True)
    starts = torch.zeros(distinct.numel() + 1, device=flat.device, dtype=torch.int64)
    starts[1:] = torch.cumsum(counts, 0)
    out = torch.zeros_like(weight)
    if not runs_triton(weight.device):
        for which, row in enumerate((distinct - vocab_start).tolist()):
            if 0 <= row < weight.shape[0]:
                total = torch.zeros(weight.shape[1])
                for token in order[starts[which] : starts[which + 1]].tolist():
                    total = total + g[token].float()
                out[row] = total.to(weight.dtype)
        return out
    if distinct.numel():
        width = weight.shape[1]
        block = min(2048, 1 << (width - 1).bit_length())
        embedding_gradient_kernel[(distinct.numel(), -(-width // block))](
            g, order, starts, distinct, out, vocab_start, weight.shape[0], g.stride(0), WIDTH=width, BLOCK=block, num_warps=4
        )
    return out


class _Embedding(torch.autograd.Function):
    """embedding with the ordered gradient."""

    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, weight: torch.Tensor, vocab_start: int) -> torch.Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.vocab_start = vocab_start
        return _forward(ids, weight, vocab_start)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ids, weight = ctx.saved_tensors
        return None, _gradient(grads[0], ids, weight, ctx.vocab_start), None
