from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from miles_plan.algorithms.sample_filters import groups_with_signal, mask_truncated, overlong_penalty


def test_dynamic_sampling_keeps_groups_whose_rewards_differ():
    keep = groups_with_signal(np.array([1.0, 1.0, 0.0, 1.0, 0.0, 0.0]), np.array([0, 0, 1, 1, 2, 2]))
    assert keep.tolist() == [False, False, True, True, False, False]


def test_truncated_responses_are_masked_token_by_token(make_batch):
    batch = replace(make_batch([0, 0, 1], [2, 1, 3]), stopped=np.array([True, False, True]))
    assert mask_truncated(batch).tolist() == [True, True, False, True, True, True]


def test_overlong_penalty_falls_linearly_in_the_buffer():
    penalty = overlong_penalty(np.array([0, 80, 90, 100, 150]), max_tokens=100, buffer_tokens=20)
    np.testing.assert_allclose(penalty, [0.0, 0.0, -0.5, -1.0, -1.0])
    with pytest.raises(ValueError, match="buffer_tokens"):
        overlong_penalty(np.array([1]), max_tokens=10, buffer_tokens=11)
