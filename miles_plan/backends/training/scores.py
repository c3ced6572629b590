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
            top, sums = _chunk_scores(logits[span], targets[span], first, stop, temperature, group)
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
            log_norm = highest[span] + log_sum[span]
            given = grad_log_probs[span], grad_entropy[span], entropy[span]
            part = _chunk_gradient(logits[span], targets[span], first, stop, ctx.temperature, log_norm, given)
            gradient[span, : stop - first] = part
        return gradient, None, None, None, None, None


def _chunk_scores(
    logits: Tensor, targets: Tensor, first: int, stop: int, temperature: float, group: Any
) -> tuple[Tensor, Tensor]:
    """A chunk's maxima [r], and [3, r]: its sums of exponents, of shifted logits times exponents, and its targets' own.

    A function, so that its two float32 copies are gone when the next chunk makes its own.
    """
    shifted = logits[:, : stop - first].to(torch.float32, copy=True).div_(temperature)
    top = shifted.amax(dim=-1) if shifted.shape[1] else shifted.new_full((len(shifted),), float("-inf"))
    _reduce(top, group, dist.ReduceOp.MAX)
    shifted.sub_(top[:, None])
    here, column = _own_targets(targets, first, stop)
    chosen = torch.where(here, shifted.gather(1, column[:, None]).squeeze(1), 0.0) if stop > first else top * 0
    weights = shifted.exp()
    sums = torch.stack([weights.sum(dim=-1), shifted.mul_(weights).sum(dim=-1), chosen])
    _reduce(sums, group, dist.ReduceOp.SUM)
    return top, sums


def _chunk_gradient(
    logits: Tensor, targets: Tensor, first: int, stop: int, temperature: float, log_norm: Tensor, given: tuple[Tensor, ...]
) -> Tensor:
    """A chunk's gradient in the logits' dtype. given: gradients of log-probs and entropies, and the entropies, [r] each."""
    grad_log_probs, grad_entropy, entropy = given
    part = logits[:, : stop - first].to(torch.float32, copy=True).div_(temperature).sub_(log_norm[:, None])
    q = part.exp()
    part.add_(entropy[:, None]).mul_(-grad_entropy[:, None]).sub_(grad_log_probs[:, None]).mul_(q)
    del q
    here, column = _own_targets(targets, first, stop)
    if stop > first:
        part.scatter_add_(1, column[:, None], torch.where(here, grad_log_probs, 0.0)[:, None])
    return part.div_(temperature).to(logits.dtype)


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
