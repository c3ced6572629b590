"""DAPO's filters (arXiv 2503.14476): which samples are worth training on, and what a response that is too long costs."""

from __future__ import annotations

import numpy as np

from miles_plan.algorithms.advantages import all_equal_in_group
from miles_plan.data.batch import Array, SampleBatch


def groups_with_signal(rewards: Array, prompt_id: Array) -> Array:
    """True for each sample of a group whose rewards differ: the ones dynamic sampling keeps; bool [N]."""
    return ~all_equal_in_group(rewards, prompt_id)


def mask_truncated(batch: SampleBatch) -> Array:
    """False for every token of a response that the length limit cut (overlong filtering); bool [R], for `loss_mask`."""
    return np.repeat(batch.stopped.astype(bool), batch.response_length)


def overlong_penalty(response_length: Array, *, max_tokens: int, buffer_tokens: int) -> Array:
    """Soft overlong punishment, to be added to the reward; float64 [N] in [-1, 0].

    0 up to max_tokens - buffer_tokens, then falling linearly to -1 at max_tokens. ValueError unless 0 < buffer <= max.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(f"buffer_tokens must be in 1..max_tokens = {max_tokens}, got {buffer_tokens}")
    over = np.asarray(response_length, dtype=np.float64) - (max_tokens - buffer_tokens)
    return np.asarray(-np.clip(over / buffer_tokens, 0.0, 1.0)) + 0.0
