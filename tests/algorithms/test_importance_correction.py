from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_plan.algorithms.importance_correction import importance_correction

ROLLOUT = np.log(np.array([0.5, 0.5, 0.25, 0.5, 0.5]))
TRAINER = np.log(np.array([0.5, 0.05, 1.0, 0.25, 1.0]))  # ratios 1, 0.1, 4 | 0.5, 2
LENGTHS = np.array([3, 2])


def weights(method, level, **bounds):
    return importance_correction(TRAINER, ROLLOUT, LENGTHS, method=method, level=level, **bounds).weights


def test_token_ratios_truncated_clipped_and_masked():
    np.testing.assert_allclose(weights("tis", "token", clip_high=2.0), [1, 0.1, 2, 0.5, 2], rtol=1e-6)
    np.testing.assert_allclose(weights("tis", "token", clip_high=2.0, clip_low=0.5), [1, 0.5, 2, 0.5, 2], rtol=1e-6)
    np.testing.assert_allclose(weights("mis", "token", clip_high=3.0, clip_low=0.3), [1, 0, 0, 0.5, 2], rtol=1e-6)


def test_sequence_is_a_product_and_geometric_its_root():
    np.testing.assert_allclose(weights("tis", "sequence", clip_high=5.0), [0.4] * 3 + [1.0] * 2, rtol=1e-6)
    np.testing.assert_allclose(weights("tis", "geometric", clip_high=5.0), [0.4 ** (1 / 3)] * 3 + [1.0] * 2, rtol=1e-6)
    np.testing.assert_allclose(weights("mis", "sequence", clip_high=2.0, clip_low=0.5), [0.0] * 3 + [1.0] * 2, rtol=1e-6)


def test_veto_drops_the_whole_sequence():
    corrected = importance_correction(TRAINER, ROLLOUT, LENGTHS, method="tis", clip_high=9.0, veto_below=0.2)
    assert corrected.weights[:3].tolist() == [0.0, 0.0, 0.0]
    assert corrected.kept.tolist() == [False] * 3 + [True] * 2
    assert corrected.metrics["importance_veto_fraction"] == pytest.approx(3 / 5)


def test_kept_tells_the_loss_mask_what_was_dropped():
    corrected = importance_correction(TRAINER, ROLLOUT, LENGTHS, method="mis", clip_high=3.0, clip_low=0.3)
    assert corrected.kept.tolist() == [True, False, False, True, True]
    assert corrected.metrics["importance_above_fraction"] == pytest.approx(1 / 5)
    assert corrected.metrics["importance_below_fraction"] == pytest.approx(1 / 5)
    assert corrected.metrics["max_abs_logprob_diff"] == pytest.approx(np.log(10))


@given(
    st.lists(st.floats(-30, 0, width=32), min_size=4, max_size=4),
    st.sampled_from(["token", "sequence", "geometric"]),
    st.sampled_from(["tis", "mis"]),
)
def test_equal_sides_weigh_exactly_one(log_probs, level, method):
    side = np.array(log_probs, dtype=np.float32)
    corrected = importance_correction(
        side, side, np.array([3, 0, 1]), method=method, level=level, clip_high=1.0, clip_low=1.0, veto_below=0.5
    )
    assert (corrected.weights == 1.0).all()
    assert corrected.metrics["max_abs_logprob_diff"] == 0.0


def test_bad_bounds_lengths_and_values_are_refused():
    with pytest.raises(ValueError, match="clip_low <= 1 <= clip_high"):
        weights("mis", "token", clip_high=0.9)
    with pytest.raises(ValueError, match="5 trainer and 4 rollout"):
        importance_correction(TRAINER, ROLLOUT[:4], LENGTHS, method="tis")
    with pytest.raises(ValueError, match="not finite"):
        importance_correction(TRAINER - np.inf, ROLLOUT, LENGTHS, method="tis")
