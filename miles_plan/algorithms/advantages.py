"""Advantages from rewards, one estimator a function, on NumPy columns in float64.

Samples of one prompt form a group. A group whose rewards are all equal teaches nothing: its advantage is exactly 0 and not the
rounding error of a mean, which a division by a tiny deviation would blow up.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from miles_plan.data.batch import Array, SampleBatch

Estimator = Literal["group", "leave_one_out", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gae"]


def compute_advantages(
    batch: SampleBatch,
    estimator: Estimator,
    *,
    normalize_std: bool = True,
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
    kl_reward_coef: float = 0.0,
) -> Array:
    """Advantage of each response token, float32 [R], from the column `reward` [N].

    normalize_std: `group` divides by the group's deviation. kl_reward_coef > 0 takes that x (old - reference log-prob) from
    each token's reward and reads the columns `old_log_probs` and `reference_log_probs` [R]; only the estimators with token
    rewards (`reinforce_plus_plus`, `gae`) take it. `gae` reads the column `values` [R]. ValueError for a missing column or a
    reward that is not finite.
    """
    rewards = _finite(_column(batch, "reward"), "reward")
    lengths = batch.response_length
    if estimator in ("reinforce_plus_plus", "gae"):
        shaped = token_rewards(rewards, lengths, _kl_penalty(batch, kl_reward_coef))
        if estimator == "gae":
            values = _finite(_column(batch, "values"), "values")
            return generalized_advantages(shaped, values, lengths, gamma, gae_lambda)[0].astype(np.float32)
        return whiten(discounted_returns(shaped, lengths, gamma)).astype(np.float32)
    if kl_reward_coef:
        raise ValueError(f"'{estimator}' has one reward per sample: put the KL penalty into the loss, not into the reward")
    if estimator == "leave_one_out":
        return np.repeat(leave_one_out(rewards, batch.prompt_id), lengths).astype(np.float32)
    if estimator == "group":
        normalized = group_normalized(rewards, batch.prompt_id, divide_by_std=normalize_std)
        return np.repeat(normalized, lengths).astype(np.float32)
    return whiten(np.repeat(group_normalized(rewards, batch.prompt_id, divide_by_std=False), lengths)).astype(np.float32)


def group_normalized(rewards: Array, prompt_id: Array, *, divide_by_std: bool, epsilon: float = 1e-6) -> Array:
    """Reward minus its group's mean, over the group's standard deviation where asked; float64 [N].

    GRPO (arXiv 2402.03300) divides; Dr.GRPO (arXiv 2503.20783) does not. The deviation is the sample one (divisor n - 1), plus
    epsilon, as in Miles.
    """
    group, size = _groups(prompt_id)
    mean = np.bincount(group, weights=rewards) / size
    centered = rewards - mean[group]
    if divide_by_std:
        variance = np.bincount(group, weights=centered**2) / np.maximum(size - 1, 1)
        centered = centered / (np.sqrt(variance)[group] + epsilon)
    return np.where(all_equal_in_group(rewards, prompt_id), 0.0, centered)


def leave_one_out(rewards: Array, prompt_id: Array) -> Array:
    """Reward minus the mean of the group's other samples (RLOO, arXiv 2402.14740); 0 for a group of one; float64 [N]."""
    group, size = _groups(prompt_id)
    others = (np.bincount(group, weights=rewards)[group] - rewards) / np.maximum(size - 1, 1)[group]
    return np.where(all_equal_in_group(rewards, prompt_id), 0.0, rewards - others)


def whiten(values: Array, *, epsilon: float = 1e-8) -> Array:
    """Values minus their mean over their deviation, over the whole batch (REINFORCE++, arXiv 2501.03262); all equal gives 0."""
    if len(values) < 2 or values.min() == values.max():
        return np.zeros_like(values, dtype=np.float64)
    return np.asarray((values - values.mean()) / np.sqrt(values.var(ddof=1) + epsilon))


def token_rewards(rewards: Array, response_length: Array, kl_penalty: Array | None = None) -> Array:
    """The sample's reward on its last response token, minus the penalty on every token; float64 [R]."""
    shaped = np.zeros(int(response_length.sum())) if kl_penalty is None else -np.asarray(kl_penalty, dtype=np.float64)
    answered = response_length > 0
    last = np.cumsum(response_length)[answered] - 1
    shaped[last] += rewards[answered]
    return shaped


def discounted_returns(rewards: Array, response_length: Array, gamma: float) -> Array:
    """G_t = r_t + gamma x G_(t+1) inside each response; float64 [R]."""
    return _backward_sums(np.asarray(rewards, dtype=np.float64), response_length, gamma)


def generalized_advantages(
    rewards: Array, values: Array, response_length: Array, gamma: float, gae_lambda: float
) -> tuple[Array, Array]:
    """Generalised advantage estimates and the returns a critic learns (GAE, arXiv 1506.02438); float64 [R] each.

    delta_t = r_t + gamma x V_(t+1) - V_t and A_t = delta_t + gamma x lambda x A_(t+1). The value after a response's last
    token is 0, whether it stopped or was cut.
    """
    next_values = np.append(values[1:], 0.0)
    next_values[np.cumsum(response_length)[response_length > 0] - 1] = 0.0
    advantages = _backward_sums(rewards + gamma * next_values - values, response_length, gamma * gae_lambda)
    return advantages, advantages + values


def all_equal_in_group(rewards: Array, prompt_id: Array) -> Array:
    """True for each sample whose whole group has one and the same reward; bool [N]."""
    group, size = _groups(prompt_id)
    low, high = np.full(len(size), np.inf), np.full(len(size), -np.inf)
    np.minimum.at(low, group, rewards)
    np.maximum.at(high, group, rewards)
    return np.asarray((low == high)[group])


def _backward_sums(terms: Array, response_length: Array, factor: float) -> Array:
    """S_t = terms_t + factor x S_(t+1) inside each response, all responses of a step at once."""
    sums = terms.copy()
    start = np.cumsum(response_length, dtype=np.int64) - response_length
    for step in range(int(response_length.max(initial=0)) - 2, -1, -1):
        here = start[response_length > step + 1] + step
        sums[here] += factor * sums[here + 1]
    return sums


def _groups(prompt_id: Array) -> tuple[Array, Array]:
    """Group number of each sample and size of each group."""
    _, group, size = np.unique(prompt_id, return_inverse=True, return_counts=True)
    return group, size


def _kl_penalty(batch: SampleBatch, kl_reward_coef: float) -> Array | None:
    if not kl_reward_coef:
        return None
    old, reference = _column(batch, "old_log_probs"), _column(batch, "reference_log_probs")
    return kl_reward_coef * _finite(old - reference, "old_log_probs - reference_log_probs")


def _column(batch: SampleBatch, name: str) -> Array:
    if name not in batch.columns:
        raise ValueError(f"the batch has no column '{name}'; it has {sorted(batch.columns)}")
    return np.asarray(batch.columns[name], dtype=np.float64)


def _finite(values: Array, name: str) -> Array:
    if not np.isfinite(values).all():
        raise ValueError(f"'{name}' holds {int((~np.isfinite(values)).sum())} values that are not finite")
    return values
