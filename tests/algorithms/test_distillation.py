from __future__ import annotations

import numpy as np
import pytest

from miles_plan.algorithms.distillation import distillation_advantages


def test_advantage_is_the_negative_reverse_kl_per_token(make_batch):
    batch = make_batch([0, 1], [2, 1], teacher_log_probs=[-1.0, -2.0, -3.0], old_log_probs=[-2.0, -2.0, -1.0])
    np.testing.assert_allclose(distillation_advantages(batch, coefficient=0.5), [0.5, 0.0, -1.0])
    with_reward = batch.with_columns(advantage=np.array([1.0, 1.0, -1.0], dtype=np.float32))
    np.testing.assert_allclose(distillation_advantages(with_reward, add_to_advantage=True), [2.0, 1.0, -3.0])


def test_missing_columns_and_infinite_log_probs_are_refused(make_batch):
    batch = make_batch([0], [1], teacher_log_probs=[-np.inf], old_log_probs=[-1.0])
    with pytest.raises(ValueError, match="not finite"):
        distillation_advantages(batch)
    with pytest.raises(ValueError, match=r"no columns \['advantage'\]"):
        distillation_advantages(batch, add_to_advantage=True)
