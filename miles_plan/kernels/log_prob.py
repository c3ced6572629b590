"""Log-probabilities and entropy of a softmax over the vocabulary, whole or sharded over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_plan.kernels.autograd import apply
from miles_plan.kernels.checks import check_integer, check_shape
from miles_plan.kernels.collectives import RankGroup
from miles_plan.kernels.elementary import exp, log
from miles_plan.kernels.exact import all_reduce_max, all_reduce_sum, exact_sum


def log_prob(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    vocab_start: int = 0,
    group: RankGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each row under softmax(logits / temperature), both float32 [M].

    logits float32 [M, V], targets int64 [M]; temperature 0 counts as 1. With `group`, a rank holds columns vocab_start
    .. vocab_start + V - 1 of `vocab_size`, and every rank gets the same result. Batch-invariant and invariant to the number of
    ranks: the denominator is an exact sum on a static grid, since exp(x - max) lies in [0, 1]. Differentiable in logits.
    ValueError for other dtypes, shapes or a negative temperature.
    """
    if logits.dtype != torch.float32:
        raise ValueError(f"logits must be float32, got {logits.dtype}")
    check_shape("logits", logits, (None, None))
    check_integer("targets", targets)
    check_shape("targets", targets, (logits.shape[0],))
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if group is not None and vocab_size is None:
        raise ValueError("vocab_size is needed when a group shards the vocabulary")
    result: tuple[Tensor, Tensor] = apply(
        _LogProb, logits, targets, temperature or 1.0, vocab_size or logits.shape[1], vocab_start, group
    )
    return result


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        temperature: float,
        vocab_size: int,
        vocab_start: int,
        group: RankGroup | None,
    ) -> tuple[Tensor, Tensor]:
        local = targets - vocab_start
        own = (local >= 0) & (local < logits.shape[1])
        local = torch.where(own, local, 0)
        largest = all_reduce_max(logits.amax(dim=-1, keepdim=True), group).double()
        below = logits.double().sub_(largest).div_(temperature)
        weights = exp(below)
        total = exact_sum(weights, bound=1.0, max_terms=vocab_size)
        # |u e^-u| <= 1/e for u >= 0, so these terms too have a static bound
        moment = exact_sum(weights.mul_(below), bound=0.5, max_terms=vocab_size)
        chosen = below.gather(1, local[:, None]).mul_(own[:, None])  # another rank's token adds an exact zero
        total, moment, chosen = all_reduce_sum(torch.stack([total, moment, chosen]), group)
        log_total = log(total)
        log_probs = (chosen - log_total).squeeze(1).float()
        entropy = (log_total - moment / total).squeeze(1).float()
        ctx.save_for_backward(logits, local, own, (largest / temperature + log_total).float(), entropy)
        ctx.temperature = temperature
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_prob: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        logits, local, own, log_normaliser, entropy = ctx.saved_tensors
        log_probs = logits / ctx.temperature - log_normaliser
        probabilities = log_probs.exp()
        grad = -(log_probs + entropy[:, None]).mul_(probabilities).mul_(grad_entropy[:, None])
        grad -= probabilities * grad_log_prob[:, None]
        grad.scatter_add_(1, local[:, None], (grad_log_prob * own)[:, None])
        return grad.div_(ctx.temperature), None, None, None, None, None
