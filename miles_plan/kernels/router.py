"""Expert choice of a mixture-of-experts layer, its own or replayed (rollout routing replay, arXiv 2510.11370)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_plan.kernels.autograd import apply
from miles_plan.kernels.checks import check_integer, check_shape
from miles_plan.kernels.elementary import exp
from miles_plan.kernels.exact import exact_sum


def choose_experts(logits: Tensor, top_k: int) -> Tensor:
    """The top_k experts of each row, int64 [M, top_k], largest logit first, ties to the lower index. logits float32 [M, E]."""
    _check_logits(logits)
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k must lie in [1, {logits.shape[1]}], got {top_k}")
    order = torch.sort(logits.detach(), dim=-1, descending=True, stable=True).indices
    return order[:, :top_k].contiguous()


def gate_weights(logits: Tensor, experts: Tensor, *, normalise: bool) -> Tensor:
    """Softmax probabilities of the given experts, float32 [M, top_k]; divided by their sum with `normalise`.

    The experts may come from `choose_experts` or from a rollout's record; the weights are always computed from these
    logits, so gradients reach the router. Batch-invariant: exact sums in float64. ValueError for bad shapes or dtypes.
    """
    _check_logits(logits)
    check_integer("experts", experts)
    check_shape("experts", experts, (logits.shape[0], None))
    result: Tensor = apply(_GateWeights, logits, experts, normalise)
    return result


def count_mismatches(chosen: Tensor, replayed: Tensor) -> int:
    """Rows whose two sets of experts differ, whatever the order inside a row."""
    check_shape("replayed", replayed, tuple(chosen.shape))
    differs = chosen.sort(dim=-1).values != replayed.sort(dim=-1).values
    return int(differs.any(dim=-1).sum())


def _check_logits(logits: Tensor) -> None:
    if logits.dtype != torch.float32:
        raise ValueError(f"logits must be float32, got {logits.dtype}")
    check_shape("logits", logits, (None, None))


class _GateWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, experts: Tensor, normalise: bool) -> Tensor:
        wide = logits.double()
        # relative to the largest of the terms in the denominator, so that at least one of them is 1
        chosen = wide.gather(1, experts)
        terms = chosen if normalise else wide
        largest = terms.amax(dim=-1, keepdim=True)
        total = exact_sum(exp(terms - largest), bound=1.0, max_terms=terms.shape[1])
        weights = exp(chosen - largest).div_(total).float()
        ctx.save_for_backward(logits, experts, weights)
        ctx.normalise = normalise
        return weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, experts, weights = ctx.saved_tensors
        weighted = grad * weights
        total = weighted.sum(dim=-1, keepdim=True)
        if ctx.normalise:
            grad_logits = torch.zeros_like(logits).scatter_add_(1, experts, weighted - weights * total)
        else:
            grad_logits = (torch.softmax(logits, dim=-1) * -total).scatter_add_(1, experts, weighted)
        return grad_logits, None, None
