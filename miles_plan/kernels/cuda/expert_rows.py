"""Tokens copied to the rows that their experts multiply, and the sum of the copies' gradients in slot order.

The counterpart of `moe_combine`: that adds a token's expert outputs slot by slot, this hands a token to its slots. Going back,
a token's gradient is the sum over its slots, first to last, without atomics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import arguments
from .moe_combine import DTYPES, moe_combine


@dataclass(frozen=True, slots=True)
class ExpertOrder:
    """Where each (token, slot) stands once rows are sorted by expert.

    token: int64 [rows], the token of each row. place: int32 [tokens, slots], the row of each slot. counts: int32 [experts].
    """

    token: torch.Tensor
    place: torch.Tensor
    counts: torch.Tensor


def expert_order(ids: torch.Tensor, experts: int) -> ExpertOrder:
    """Sort (token, slot) pairs by expert, within an expert by token; ids int32 or int64 [tokens, slots]."""
    arguments.require_dims("ids", ids, 2, "[tokens, slots]")
    arguments.require_dtype("ids", ids, (torch.int32, torch.int64))
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(flat.numel(), device=flat.device)
    # bincount would wait for the device; integers add up the same in any order
    counts = torch.zeros(experts, device=flat.device, dtype=torch.int32)
    counts.scatter_add_(0, flat.long(), torch.ones_like(flat, dtype=torch.int32))
    return ExpertOrder(order // ids.shape[1], place.view(ids.shape).to(torch.int32), counts)


def expert_rows(x: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """Row r of the result is x[order.token[r]]: [tokens, width] to [tokens * slots, width].

    x: bf16, fp16 or fp32. Differentiable: the gradient of a token adds its slots first to last in float32, rounded once.
    """
    arguments.require_dims("x", x, 2, "[tokens, width]")
    arguments.require_dtype("x", x, DTYPES)
    if torch.is_grad_enabled() and x.requires_grad:
        return _ExpertRows.apply(x, order.token, order.place)  # type: ignore[no-any-return, no-untyped-call]  # torch's apply is untyped
    return x.index_select(0, order.token)


class _ExpertRows(torch.autograd.Function):
    """expert_rows with the ordered gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, token: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        ones = torch.ones(place.shape, device=place.device)
        return moe_combine(grads[0].contiguous(), place, ones), None, None
