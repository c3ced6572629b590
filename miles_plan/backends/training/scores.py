"""Log-probs and entropies from logits whose vocabulary is split over tensor-parallel ranks; no rank ever holds all of a row.

The softmax is Megatron's vocab-parallel cross entropy (megatron.core.tensor_parallel.cross_entropy) with a temperature, entropy
and chunks of rows, so that float32 copies exist of one chunk only. With q = softmax(z / t), l its log-prob of the target and
H its entropy: dl/dz = (onehot - q) / t and dH/dz = -q (log q + H) / t.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ROWS = 1024  # of [rows, vocabulary / tp] in float32, two copies at a time: 0.6 GB each for 152k tokens on one rank


class VocabParallelScores(torch.autograd.Function):
    """apply(logits [r, v], targets int64 [r], first, stop, temperature, group) -> log-probs [r], entropies [r], float32.

    first .. stop - 1: the tokens that the rank's columns stand for; further columns are padding and never likely. group: the
    tensor-parallel ranks, None for one. Every rank of the group gets the same result and must pass on the same gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, first: int, stop: int, temperature: float, group: Any
    ) -> tuple[Tensor, Tensor]:
        """Scores chunk by chunk; what the backward needs is the logits and three numbers a row."""
        rows = len(logits)
        highest, log_sum, log_probs, entropy = (logits.new_empty(rows, dtype=torch.float32) for _ in range(4))
        for span in _chunks(rows):
            scaled = logits[span, : stop - first].float() / temperature
            top = scaled.amax(dim=-1) if scaled.shape[1] else scaled.new_full((len(scaled),), float("-inf"))
            _reduce(top, group, dist.ReduceOp.MAX)
            shifted = scaled.sub_(top[:, None])
            here, column = _own_targets(targets[span], first, stop)
            chosen = torch.where(here, shifted.gather(1, column[:, None]).squeeze(1), 0.0) if stop > first else top * 0
            weights = shifted.exp()
            sums = torch.stack([weights.sum(dim=-1), shifted.mul_(weights).sum(dim=-1), chosen])
            _reduce(sums, group, dist.ReduceOp.SUM)
            highest[span], log_sum[span] = top, sums[0].log()
            log_probs[span] = sums[2] - log_sum[span]
            entropy[span] = log_sum[span] - sums[1] / sums[0]
        ctx.save_for_backward(logits, targets, highest, log_sum, entropy)
        ctx.columns, ctx.temperature = (first, stop), temperature
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of this rank's columns."""
        logits, targets, highest, log_sum, entropy = ctx.saved_tensors
        first, stop = ctx.columns
        gradient = torch.zeros_like(logits)
        for span in _chunks(len(logits)):
            log_q = logits[span, : stop - first].float() / ctx.temperature - (highest[span] + log_sum[span])[:, None]
            q = log_q.exp()
            part = log_q.add_(entropy[span, None]).mul_(-grad_entropy[span, None]).sub_(grad_log_probs[span, None]).mul_(q)
            here, column = _own_targets(targets[span], first, stop)
            if stop > first:
                part.scatter_add_(1, column[:, None], torch.where(here, grad_log_probs[span], 0.0)[:, None])
            gradient[span, : stop - first] = part.div_(ctx.temperature).to(gradient.dtype)
        return gradient, None, None, None, None, None


class SumOverGroup(torch.autograd.Function):
    """apply(values, group): the sum over ranks that each hold a part; the gradient of the sum goes back to every part."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        """All-reduce of a copy."""
        total = values.clone()
        _reduce(total, group, dist.ReduceOp.SUM)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The ranks compute the same loss from the sum, so each takes the gradient once."""
        return gradient, None


def _chunks(rows: int) -> Iterator[slice]:
    for start in range(0, rows, CHUNK_ROWS):
        yield slice(start, min(start + CHUNK_ROWS, rows))


def _own_targets(targets: Tensor, first: int, stop: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in this rank's columns, and where (0 for the others)."""
    here = (targets >= first) & (targets < stop)
    return here, torch.where(here, targets - first, 0)


def _reduce(values: Tensor, group: Any, op: Any) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(values, op=op, group=group)
