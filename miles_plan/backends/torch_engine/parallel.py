"""Collectives that gradients pass through: the identity into a tensor-parallel region, and rows sent between expert ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from miles_plan.kernels.autograd import apply
from miles_plan.kernels.collectives import RankGroup


def enter_tensor_parallel(x: Tensor, group: RankGroup) -> Tensor:
    """x itself; its gradient is summed over the ranks, each of which used x for its own slice (Megatron-LM's f)."""
    if group.size == 1:
        return x
    result: Tensor = apply(_EnterTensorParallel, x, group)
    return result


def exchange_rows(x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int], group: RankGroup) -> Tensor:
    """All-to-all of rows: the first send_rows[0] rows go to rank 0, and so on; gradients travel the same way back."""
    if group.size == 1:
        return x
    result: Tensor = apply(_ExchangeRows, x, tuple(send_rows), tuple(receive_rows), group)
    return result


class _EnterTensorParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: RankGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total = ctx.group.all_reduce_sum(grad.to(torch.float32, copy=True))
        return total.to(grad.dtype), None


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: tuple[int, ...], receive: tuple[int, ...], group: RankGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return group.all_to_all(x, send, receive)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.all_to_all(grad, ctx.receive, ctx.send), None, None, None
