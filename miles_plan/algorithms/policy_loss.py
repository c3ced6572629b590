"""The policy-gradient loss of one micro-batch: clipped surrogate, KL penalty to the reference, entropy bonus."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from miles_plan.ir.options import KlEstimator, LossOptions

LOG_RATIO_LIMIT = 20.0  # an exponent beyond it carries no signal and soon overflows float32; verl clamps at the same value


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTargets:
    """What the loss compares the policy with; float32 [r] over the micro-batch's response tokens unless said otherwise.

    weights: from `aggregation.token_weights`, 0 where a token does not count; response_length: int64 [n], each sequence whole;
    num_tokens: tokens that count in the whole batch, the divisor of the metrics; importance_weights multiply the surrogate.
    """

    old_log_probs: Tensor
    advantages: Tensor
    weights: Tensor
    response_length: Tensor
    num_tokens: int
    reference_log_probs: Tensor | None = None
    importance_weights: Tensor | None = None


def policy_loss(
    log_probs: Tensor, targets: PolicyTargets, options: LossOptions, *, entropy: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of this micro-batch (a scalar to call backward on) and what it adds to each metric.

    log_probs: float32 [r] with gradient; entropy: float32 [r], with gradient where entropy_coef is not 0. Sums over
    micro-batches and ranks are the loss and the token means of the batch. ValueError where options ask for a missing target.
    """
    counted = (targets.weights != 0).to(log_probs.dtype)
    log_ratio = log_probs - targets.old_log_probs
    if options.ratio_level == "sequence":
        log_ratio = _sequence_mean(log_ratio, counted, targets.response_length)
    surrogate, clipped = clipped_surrogate(log_ratio, targets.advantages, options)
    if targets.importance_weights is not None:
        surrogate = surrogate * targets.importance_weights
    loss = torch.dot(surrogate, targets.weights)
    per_token = {
        "policy_loss": surrogate,
        "clip_fraction": clipped,
        "ratio_mean": torch.exp(_bounded(log_ratio)),
        "old_policy_kl": -log_ratio,
    }
    if options.kl_coef:
        if targets.reference_log_probs is None:
            raise ValueError(f"kl_coef = {options.kl_coef} needs the reference model's log-probs")
        kl = kl_estimate(log_probs, targets.reference_log_probs, options.kl_estimator)
        loss = loss + options.kl_coef * torch.dot(kl, targets.weights)
        per_token["reference_kl"] = kl
    if options.entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef = {options.entropy_coef} needs the entropy of each position")
    if entropy is not None:
        per_token["entropy"] = entropy
        if options.entropy_coef:
            loss = loss - options.entropy_coef * torch.dot(entropy, targets.weights)
    means = {name: torch.dot(values.detach(), counted) / max(targets.num_tokens, 1) for name, values in per_token.items()}
    return loss, {"loss": loss.detach(), **means}


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """Per-token surrogate to minimise, and 1.0 where the clip decides it.

    max(-ratio x A, -clip(ratio, 1 - clip_low, 1 + clip_high) x A), and for A < 0 with dual_clip at most -dual_clip x A.
    """
    ratio = torch.exp(_bounded(log_ratio))
    plain = -ratio * advantages
    bounded = -ratio.clamp(1.0 - options.clip_low, 1.0 + options.clip_high) * advantages
    surrogate = torch.maximum(plain, bounded)
    clipped = bounded > plain
    if options.dual_clip:
        ceiling = -options.dual_clip * advantages
        over = (advantages < 0) & (surrogate > ceiling)
        surrogate, clipped = torch.where(over, ceiling, surrogate), clipped | over
    return surrogate, clipped.to(log_ratio.dtype)


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor, estimator: KlEstimator) -> Tensor:
    """KL(policy || reference) at each sampled token (Schulman, joschu.net/blog/kl-approx.html).

    With d = log policy - log reference: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d.
    """
    difference = log_probs - reference_log_probs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    difference = _bounded(difference)
    return torch.exp(-difference) - 1 + difference


def _sequence_mean(values: Tensor, counted: Tensor, response_length: Tensor) -> Tensor:
    """Each token gets the mean over its sequence's counted tokens: the log of GSPO's ratio (arXiv 2507.18071).

    Through a padded matrix, not a scatter-add, whose order of addition is not fixed on a GPU.
    """
    num_sequences = len(response_length)
    row = torch.repeat_interleave(torch.arange(num_sequences, device=values.device), response_length)
    start = torch.cumsum(response_length, 0) - response_length
    column = torch.arange(len(values), device=values.device) - start[row]
    longest = int(response_length.max()) if num_sequences else 0
    padded = values.new_zeros((2, num_sequences, longest))
    sums = padded.index_put((torch.zeros_like(row), row, column), values * counted)
    sums = sums.index_put((torch.ones_like(row), row, column), counted).sum(dim=2)
    return (sums[0] / sums[1].clamp_min(1.0))[row]


def _bounded(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
