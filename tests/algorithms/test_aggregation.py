from __future__ import annotations

import numpy as np
import pytest

from miles_plan.algorithms.aggregation import token_weights


def test_weights_by_hand(make_batch):
    batch = make_batch([0, 0, 1], [3, 1, 2])
    np.testing.assert_allclose(token_weights(batch, "token_mean"), np.full(6, 1 / 6), rtol=1e-6)
    np.testing.assert_allclose(token_weights(batch, "sequence_mean"), np.array([1 / 3] * 3 + [1] + [1 / 2] * 2) / 3, rtol=1e-6)
    np.testing.assert_allclose(token_weights(batch, "prompt_mean"), np.array([1 / 4] * 4 + [1 / 2] * 2) / 2, rtol=1e-6)
    np.testing.assert_allclose(token_weights(batch, "constant", constant=10.0), np.full(6, 1 / 30), rtol=1e-6)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "prompt_mean"])
def test_means_add_up_to_one_and_skip_masked_tokens(make_batch, aggregation):
    batch = make_batch([0, 0, 1, 2], [3, 1, 2, 0], loss_mask=[1, 0, 1, 0, 1, 1])
    weights = token_weights(batch, aggregation)
    assert weights.sum() == pytest.approx(1.0)
    assert ((weights > 0) == np.array([1, 0, 1, 0, 1, 1], dtype=bool)).all()


def test_an_empty_batch_and_bad_options(make_batch):
    assert (token_weights(make_batch([0], [2], loss_mask=[0, 0]), "token_mean") == 0.0).all()
    assert len(token_weights(make_batch([0], [0]), "sequence_mean")) == 0
    with pytest.raises(ValueError, match="positive constant"):
        token_weights(make_batch([0], [1]), "constant")
    with pytest.raises(ValueError, match="other than 0 and 1"):
        token_weights(make_batch([0], [1], loss_mask=[0.5]), "token_mean")
