"""Small batches for the tests of advantages, weights and losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from miles_plan.data.batch import Array, SampleBatch


@pytest.fixture
def make_batch() -> Callable[..., SampleBatch]:
    def make(prompt_id: Sequence[int], response_length: Sequence[int], **columns: Array | list[float]) -> SampleBatch:
        """One prompt token per sample; the columns as given."""
        responses = np.asarray(response_length, dtype=np.int32)
        lengths = responses + 1
        num_response_tokens = int(responses.sum())
        batch = SampleBatch(
            sample_id=np.arange(len(responses), dtype=np.int64),
            prompt_id=np.asarray(prompt_id, dtype=np.int64),
            tokens=np.zeros(int(lengths.sum()), dtype=np.int32),
            prompt_length=np.ones(len(responses), dtype=np.int32),
            length=lengths.astype(np.int32),
            stopped=np.ones(len(responses), dtype=bool),
            rollout_log_probs=np.zeros(num_response_tokens, dtype=np.float32),
            weight_version=np.zeros(num_response_tokens, dtype=np.int32),
        )
        return batch.with_columns(**{name: np.asarray(values) for name, values in columns.items()})

    return make
