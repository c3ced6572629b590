"""`algorithm:` what is optimised, and for how many steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from miles_plan.spec.model import ModelSpec
from miles_plan.spec.section import Section
from miles_plan.spec.types import AutoOr, Coefficient, Count, CountOrZero, Fraction, LearningRate

AlgorithmKind = Literal["sft", "grpo", "gspo", "ppo", "reinforce_plus_plus", "rloo", "dapo", "distillation"]
Clip = Annotated[float, Field(gt=0, le=100)]


class CriticSpec(Section):
    """The value model of PPO; it has the shape of the policy."""

    lr: LearningRate = 1e-5
    """Learning rate of the critic."""
    warmup_steps: CountOrZero = 0
    """Steps in which only the critic learns."""


class TeacherSpec(Section):
    """The model whose log-probs on-policy distillation follows."""

    model: ModelSpec
    """The teacher's network; its tokenizer must be the policy's."""


class AlgorithmSpec(Section):
    """The learning rule. Fields that the kind does not use are refused or reported, never ignored."""

    kind: AlgorithmKind
    """sft; grpo (arXiv 2402.03300); gspo (2507.18071); ppo (1707.06347); reinforce_plus_plus (2501.03262); rloo (2402.14740);
    dapo (2503.14476); distillation (on-policy, from a teacher)."""
    steps: Count = 100
    """Rollout steps of the run (for sft: optimizer steps)."""
    updates_per_rollout: Count = 1
    """Optimizer steps made of one rollout's samples; with 1 the training is on-policy."""
    clip: Clip = 0.2
    """The probability ratio is clipped below at 1 - clip."""
    clip_high: AutoOr[Clip] = "auto"
    """The ratio is clipped above at 1 + clip_high; `auto` is `clip` (clip-higher: arXiv 2503.14476)."""
    dual_clip: Annotated[float, Field(ge=0, le=1_000)] = 0.0
    """Bound of the loss of a negative advantage, as a multiple of it (arXiv 1912.09729); 0 is off, else above 1."""
    kl_loss_coef: Coefficient = 0.0
    """Weight of the KL divergence from the reference model in the loss; 0 needs no reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that KL divergence (Schulman, Approximating KL divergence)."""
    kl_reward_coef: Coefficient = 0.0
    """Weight of the KL divergence from the reference model as a penalty in the reward; excludes `kl_loss_coef`."""
    entropy_coef: Coefficient = 0.0
    """Weight of the entropy bonus in the loss."""
    normalize_std: AutoOr[bool] = "auto"
    """Divide group advantages by the group's standard deviation; `auto` is the algorithm's paper."""
    aggregation: Literal["auto", "token_mean", "sequence_mean", "prompt_mean", "constant"] = "auto"
    """How token losses become one number; `auto` is the algorithm's paper, `constant` divides by the longest response."""
    gamma: Fraction = 1.0
    """Discount per token (ppo, reinforce_plus_plus)."""
    gae_lambda: Fraction = 1.0
    """Lambda of generalised advantage estimation (ppo)."""
    critic: CriticSpec | None = None
    """The critic's own settings (ppo only; its defaults hold when absent)."""
    teacher: TeacherSpec | None = None
    """The teacher (distillation only, and needed there)."""
