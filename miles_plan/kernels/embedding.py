"""Token embedding, whole or with the vocabulary sharded over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_plan.kernels.autograd import apply
from miles_plan.kernels.checks import check_float, check_integer, check_shape
from miles_plan.kernels.collectives import RankGroup
from miles_plan.kernels.exact import all_reduce_sum


def embedding(token_ids: Tensor, weight: Tensor, *, vocab_start: int = 0, group: RankGroup | None = None) -> Tensor:
    """Rows of the table: token_ids int64 [M], weight [V, H] holding tokens vocab_start .. vocab_start + V - 1 -> [M, H].

    With `group`, ranks hold consecutive slices of the vocabulary and every rank gets all rows: all but one rank add
    exact zeros, so the bits are those of one rank. Differentiable in weight. ValueError for other dtypes or shapes.
    """
    check_integer("token_ids", token_ids)
    check_shape("token_ids", token_ids, (None,))
    check_float("weight", weight)
    check_shape("weight", weight, (None, None))
    result: Tensor = apply(_Embedding, token_ids, weight, vocab_start, group)
    return result


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token_ids: Tensor, weight: Tensor, vocab_start: int, group: RankGroup | None) -> Tensor:
        local = token_ids - vocab_start
        own = (local >= 0) & (local < weight.shape[0])
        local = torch.where(own, local, 0)
        ctx.save_for_backward(local, own)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        rows = weight.index_select(0, local)
        if group is None:
            return rows
        return all_reduce_sum(rows.masked_fill_(~own[:, None], 0.0), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        local, own = ctx.saved_tensors
        total = grad.new_zeros(ctx.shape, dtype=torch.float32)
        total.index_add_(0, local[own], grad[own].float())
        return None, total.to(ctx.dtype), None, None
