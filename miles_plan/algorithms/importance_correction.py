"""Correction for a rollout that did not sample from the trainer's policy: weights from the two sides' log-probs.

ratio = trainer probability / rollout probability. Truncating it is TIS (Yao et al., "Your Efficient RL Framework Secretly
Brings You Off-Policy RL Training", 2025; the estimator is Ionides 2008), dropping what lies outside the bounds is MIS (Liu et
al., "When Speed Kills Stability", 2025; per token it is IcePop, arXiv 2510.18855). Where both sides agree bit for bit, every
weight is exactly 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from miles_plan.data.batch import Array

CorrectionMethod = Literal["tis", "mis"]
RatioLevel = Literal["token", "sequence", "geometric"]

LOG_RATIO_LIMIT = 20.0  # exp beyond it says nothing more, and overflows float32 at 88


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What to weigh each response token with, and what the ratios looked like.

    weights: float32 [R] for the column `importance_weight`; kept: bool [R], False where a mask or the veto dropped the token
    (as `loss_mask` it takes the dropped ones out of the divisor too); metrics: means over tokens, and the largest difference.
    """

    weights: Array
    kept: Array
    metrics: Mapping[str, float]


def importance_correction(
    trainer_log_probs: Array,
    rollout_log_probs: Array,
    response_length: Array,
    *,
    method: CorrectionMethod,
    level: RatioLevel = "token",
    clip_low: float = 0.0,
    clip_high: float = 2.0,
    veto_below: float = 0.0,
) -> Correction:
    """Weight of each response token.

    level: the token's own ratio, the product over its sequence, or the geometric mean over its sequence. method: `tis` clips
    the ratio to [clip_low, clip_high], `mis` gives weight 0 to a ratio outside. A sequence with one token whose own ratio is
    below `veto_below` weighs 0 (the veto of MIS). ValueError for bounds that exclude a ratio of 1, and for log-probs that do
    not fit or are not finite.
    """
    if not 0.0 <= clip_low <= 1.0 <= clip_high:
        raise ValueError(f"bounds must satisfy 0 <= clip_low <= 1 <= clip_high, got {clip_low} and {clip_high}")
    difference = _difference(trainer_log_probs, rollout_log_probs, response_length)
    sample = np.repeat(np.arange(len(response_length)), response_length)
    ratio = np.exp(np.clip(_at_level(difference, sample, response_length, level), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    above, below = ratio > clip_high, ratio < clip_low
    vetoed = _vetoed(difference, sample, len(response_length), veto_below)
    kept = ~(vetoed | above | below) if method == "mis" else ~vetoed
    weights = np.where(kept, np.clip(ratio, clip_low, clip_high), 0.0)
    return Correction(
        weights=weights.astype(np.float32),
        kept=kept,
        metrics={
            **mismatch_metrics(difference),
            "importance_ratio_mean": _mean(ratio),
            "importance_weight_mean": _mean(weights),
            "importance_above_fraction": _mean(above),
            "importance_below_fraction": _mean(below),
            "importance_veto_fraction": _mean(vetoed),
        },
    )


def mismatch_metrics(difference: Array) -> dict[str, float]:
    """How far trainer and rollout are apart, from trainer minus rollout log-prob [R]: largest, mean, and KL (k3 estimate)."""
    bounded = np.clip(difference, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return {
        "max_abs_logprob_diff": float(np.abs(difference).max(initial=0.0)),
        "mean_abs_logprob_diff": _mean(np.abs(difference)),
        "rollout_trainer_kl": _mean(np.exp(bounded) - 1.0 - bounded),
    }


def _difference(trainer_log_probs: Array, rollout_log_probs: Array, response_length: Array) -> Array:
    trainer, rollout = (np.asarray(side, dtype=np.float64) for side in (trainer_log_probs, rollout_log_probs))
    if not len(trainer) == len(rollout) == int(response_length.sum()):
        raise ValueError(
            f"{len(trainer)} trainer and {len(rollout)} rollout log-probs for {int(response_length.sum())} response tokens"
        )
    difference = trainer - rollout
    if not np.isfinite(difference).all():
        raise ValueError(f"{int((~np.isfinite(difference)).sum())} log-prob differences are not finite")
    return difference


def _at_level(difference: Array, sample: Array, response_length: Array, level: RatioLevel) -> Array:
    if level == "token":
        return difference
    sums = np.bincount(sample, weights=difference, minlength=len(response_length))
    return np.asarray((sums / np.maximum(response_length, 1) if level == "geometric" else sums)[sample])


def _vetoed(difference: Array, sample: Array, num_samples: int, veto_below: float) -> Array:
    """True for each token of a sequence that holds a token the trainer finds all but impossible."""
    if veto_below <= 0.0:
        return np.zeros(len(difference), dtype=bool)
    impossible = np.bincount(sample, weights=difference < np.log(veto_below), minlength=num_samples) > 0
    return np.asarray(impossible[sample])


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else 0.0
