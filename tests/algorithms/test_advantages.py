from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from miles_plan.algorithms.advantages import (
    compute_advantages,
    discounted_returns,
    generalized_advantages,
    group_normalized,
    leave_one_out,
    token_rewards,
    whiten,
)

REWARDS = np.array([1.0, 0.0, 0.0, 1.0, 2.0, 5.0])
PROMPTS = np.array([7, 7, 7, 7, 3, 3])


def test_grpo_by_hand():
    centered = group_normalized(REWARDS, PROMPTS, divide_by_std=False)
    np.testing.assert_allclose(centered, [0.5, -0.5, -0.5, 0.5, -1.5, 1.5])
    deviation = [np.sqrt(1 / 3)] * 4 + [np.sqrt(4.5)] * 2  # sums of squares 1.0 and 4.5 over n - 1
    expected = centered / (np.array(deviation) + 1e-6)
    np.testing.assert_allclose(group_normalized(REWARDS, PROMPTS, divide_by_std=True), expected, rtol=1e-12)


def test_leave_one_out_by_hand():
    expected = [1 - 1 / 3, 0 - 2 / 3, 0 - 2 / 3, 1 - 1 / 3, -3.0, 3.0]
    np.testing.assert_allclose(leave_one_out(REWARDS, PROMPTS), expected, rtol=1e-12)


@pytest.mark.parametrize("divide_by_std", [True, False])
def test_groups_without_signal_are_exactly_zero(divide_by_std):
    # The mean of three times 0.1 is not 0.1 in binary: without the exact rule the deviation would blow the rest up.
    rewards = np.array([0.1, 0.1, 0.1, 4.0, 1.0, 0.0])
    prompts = np.array([0, 0, 0, 1, 2, 2])
    assert (group_normalized(rewards, prompts, divide_by_std=divide_by_std)[:4] == 0.0).all()
    assert (leave_one_out(rewards, prompts)[:4] == 0.0).all()


@given(arrays(np.float64, 12, elements=st.floats(-10, 10)), arrays(np.int64, 12, elements=st.integers(0, 3)))
def test_group_advantages_sum_to_zero_and_ignore_sample_order(rewards, prompts):
    advantages = group_normalized(rewards, prompts, divide_by_std=True)
    for prompt in np.unique(prompts):
        assert abs(advantages[prompts == prompt].sum()) < 1e-6
    order = np.random.default_rng(0).permutation(12)
    np.testing.assert_allclose(
        group_normalized(rewards[order], prompts[order], divide_by_std=True), advantages[order], atol=1e-6
    )


def test_token_rewards_sit_on_the_last_token_of_answered_samples():
    penalty = np.array([0.1, 0.2, 0.3])
    shaped = token_rewards(np.array([1.0, 9.0, 2.0]), np.array([2, 0, 1]), penalty)
    np.testing.assert_allclose(shaped, [-0.1, 0.8, 1.7])


def test_discounted_returns_by_hand():
    returns = discounted_returns(np.array([0.0, 0.0, 1.0, 2.0, 3.0]), np.array([3, 0, 2]), 0.5)
    np.testing.assert_allclose(returns, [0.25, 0.5, 1.0, 3.5, 3.0])


def test_gae_by_hand():
    rewards, values = np.array([0.0, 1.0, 2.0]), np.array([0.5, 0.25, 1.0])
    advantages, returns = generalized_advantages(rewards, values, np.array([2, 1]), 0.9, 0.8)
    last = 1.0 - 0.25
    first = 0.9 * 0.25 - 0.5 + 0.9 * 0.8 * last
    np.testing.assert_allclose(advantages, [first, last, 1.0])
    np.testing.assert_allclose(returns, advantages + values)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 2**31))
def test_gae_with_lambda_one_is_return_minus_value(response_length, seed):
    lengths = np.array(response_length)
    draw = np.random.default_rng(seed)
    rewards, values = draw.normal(size=lengths.sum()), draw.normal(size=lengths.sum())
    advantages, returns = generalized_advantages(rewards, values, lengths, 0.95, 1.0)
    np.testing.assert_allclose(returns, discounted_returns(rewards, lengths, 0.95), atol=1e-9)
    np.testing.assert_allclose(advantages, returns - values, atol=1e-9)


def test_whiten_by_hand_and_without_spread():
    np.testing.assert_allclose(whiten(np.array([1.0, 2.0, 3.0])), [-1.0, 0.0, 1.0], atol=1e-8)
    assert (whiten(np.full(5, 0.1)) == 0.0).all()


def test_reinforce_plus_plus_takes_the_kl_from_the_reward(make_batch):
    batch = make_batch(
        [0, 1], [2, 1], reward=[1.0, 0.0], old_log_probs=[-1.0, -2.0, -3.0], reference_log_probs=[-1.5, -2.0, -2.0]
    )
    kl = np.array([0.5, 0.0, -1.0])
    returns = np.array([1.0 - 0.1 * kl[0] - 0.1 * kl[1], 1.0 - 0.1 * kl[1], -0.1 * kl[2]])
    advantages = compute_advantages(batch, "reinforce_plus_plus", kl_reward_coef=0.1)
    np.testing.assert_allclose(advantages, whiten(returns), rtol=1e-6)


def test_reinforce_plus_plus_baseline_whitens_centered_rewards_over_tokens(make_batch):
    batch = make_batch([0, 0], [3, 1], reward=[1.0, 0.0])
    expected = whiten(np.array([0.5, 0.5, 0.5, -0.5]))
    np.testing.assert_allclose(compute_advantages(batch, "reinforce_plus_plus_baseline"), expected, rtol=1e-6)


def test_every_estimator_gives_one_float32_per_response_token(make_batch):
    batch = make_batch([0, 0, 1], [2, 3, 0], reward=[1.0, 0.0, 1.0], values=[0.0] * 5)
    for estimator in ("group", "leave_one_out", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gae"):
        advantages = compute_advantages(batch, estimator)
        assert advantages.shape == (5,)
        assert advantages.dtype == np.float32


def test_bad_rewards_and_misplaced_penalties_are_refused(make_batch):
    batch = make_batch([0, 0], [1, 1], reward=[1.0, np.nan])
    with pytest.raises(ValueError, match="'reward' holds 1 values that are not finite"):
        compute_advantages(batch, "group")
    with pytest.raises(ValueError, match="no column 'reward'"):
        compute_advantages(replace(batch, columns={}), "group")
    with pytest.raises(ValueError, match="put the KL penalty into the loss"):
        compute_advantages(make_batch([0], [1], reward=[1.0]), "group", kl_reward_coef=0.1)
