"""Log-probs and entropies from logits whose vocabulary is split over tensor-parallel ranks; no rank ever holds all of a row.

The softmax is Megatron's vocab-parallel cross entropy (megatron.core.tensor_parallel.cross_entropy) with a temperature and
entropy. Ranks exchange three numbers a row; what each computes of its columns is `miles_plan.kernels.cuda.vocab_scores`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from miles_plan.kernels.cuda.vocab_scores import row_statistics, scores_gradient


class VocabParallelScores(torch.autograd.Function):
    """apply(logits [r, v], targets int64 [r], first, stop, temperature, group) -> log-probs [r], entropies [r], float32.

    first .. stop - 1: the tokens that the rank's columns stand for; further columns are padding and never likely. group: the
    tensor-parallel ranks, None for one. Every rank of the group gets the same result and must pass on the same gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, first: int, stop: int, temperature: float, group: Any
    ) -> tuple[Tensor, Tensor]:
        """What the backward needs is the logits and two numbers a row."""
        columns: dict[str, Any] = {"first": first, "columns": stop - first, "temperature": temperature}
        top, sums = row_statistics(logits, targets, **columns)
        if group is not None and dist.get_world_size(group) > 1:
            sums = _over_ranks(top, sums, _own(targets, first, stop), group)
        log_sum = sums[0].log()
        log_probs = sums[2] - log_sum
        entropy = log_sum - sums[1] / sums[0]
        ctx.save_for_backward(logits, targets, top + log_sum, entropy)
        ctx.columns = columns
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of this rank's columns."""
        logits, targets, log_sum_exp, entropy = ctx.saved_tensors
        gradient = scores_gradient(logits, targets, log_sum_exp, entropy, grad_log_probs, grad_entropy, **ctx.columns)
        return gradient, None, None, None, None, None


def _own(targets: Tensor, first: int, stop: int) -> Tensor:
    return (targets >= first) & (targets < stop)


def _over_ranks(top: Tensor, sums: Tensor, own: Tensor, group: Any) -> Tensor:
    """The sums of all ranks' columns below the highest maximum of all, which `top` becomes."""
    highest = top.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    fall = torch.where(top == float("-inf"), 0.0, top - highest)
    shrink = fall.exp()
    found = torch.stack([sums[0] * shrink, (sums[1] + fall * sums[0]) * shrink, torch.where(own, sums[2] + fall, 0.0)])
    dist.all_reduce(found, group=group)
    top.copy_(highest)
    return found


class SumOverGroup(torch.autograd.Function):
    """apply(values, group): the sum over ranks that each hold a part; the gradient of the sum goes back to every part."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        """All-reduce of a copy."""
        total = values.clone()
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The ranks compute the same loss from the sum, so each takes the gradient once."""
        return gradient, None
