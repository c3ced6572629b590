"""Options that tasks carry and engines obey: sampling, loss, optimizer. Plain data, so a plan file holds all of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LossKind = Literal["sft", "policy_gradient"]
RatioLevel = Literal["token", "sequence"]
Aggregation = Literal["token_mean", "sequence_mean", "prompt_mean", "constant"]
KlEstimator = Literal["k1", "k2", "k3"]
LearningRateSchedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How the rollout samples. temperature 0 is greedy; a counter-based generator is keyed by (seed, sample_id, position)."""

    max_response_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = whole vocabulary
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """What a training step minimises.

    kind `sft`: mean negative log-likelihood of the response tokens. kind `policy_gradient`: the clipped surrogate of PPO
    (arXiv 1707.06347) on ratio = exp(log_prob - old_log_prob), per token (GRPO) or as the geometric mean over the sequence
    (GSPO, arXiv 2507.18071), clipped to [1 - clip_low, 1 + clip_high] (clip-higher: DAPO, arXiv 2503.14476); with dual_clip > 0
    a negative advantage's term is bounded by dual_clip x advantage (arXiv 1912.09729).
    kl_coef weighs a KL penalty to the reference model in the loss, estimated by `kl_estimator` (k1, k2, k3 of Schulman's note).
    entropy_coef rewards entropy. aggregation: mean over tokens (DAPO), mean of sequence means (GRPO's paper), mean of prompt
    means, or a constant divisor (Dr.GRPO, arXiv 2503.20783).
    """

    kind: LossKind
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    ratio_level: RatioLevel = "token"
    kl_coef: float = 0.0
    kl_estimator: KlEstimator = "k3"
    entropy_coef: float = 0.0
    aggregation: Aggregation = "token_mean"
    aggregation_constant: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerOptions:
    """AdamW with fp32 masters. Warm-up is linear over `warmup_steps`; the schedule then runs to `total_steps`.

    precision_aware: the update reads gradients in the format they add up in; moments: format of both moments.
    """

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_grad_norm: float = 1.0  # 0 = off
    warmup_steps: int = 0
    schedule: LearningRateSchedule = "constant"
    total_steps: int = 0
    min_learning_rate: float = 0.0
    precision_aware: bool = False
    moments: Literal["fp32", "bf16"] = "fp32"
