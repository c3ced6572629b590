"""Batches for trainer tests."""

from __future__ import annotations

import numpy as np

from miles_plan.backends.engine import RankLogProbs
from miles_plan.data.batch import Array, SampleBatch, ragged_rows


def random_batch(*, samples: int = 10, moe_layers: int = 0, experts: int = 8, topk: int = 2, seed: int = 0) -> SampleBatch:
    """Samples of two prompts with random answers, the fifth empty; with moe_layers, random experts for every token."""
    draw = np.random.default_rng(seed)
    prompt_length = np.repeat(draw.integers(1, 6, size=2), samples // 2).astype(np.int32)
    response_length = draw.integers(1, 9, size=samples).astype(np.int32)
    response_length[4] = 0
    length = prompt_length + response_length
    total, count = int(length.sum()), int(response_length.sum())
    routing = None
    if moe_layers:
        routing = np.argsort(draw.random((total, moe_layers, experts)), axis=-1)[..., :topk].astype(np.uint8)
    batch = SampleBatch(
        sample_id=np.arange(samples, dtype=np.int64),
        prompt_id=np.repeat(np.arange(2), samples // 2),
        tokens=draw.integers(3, 41, size=total).astype(np.int32),
        prompt_length=prompt_length,
        length=length,
        stopped=np.ones(samples, dtype=bool),
        rollout_log_probs=np.zeros(count, dtype=np.float32),
        weight_version=np.zeros(count, dtype=np.int32),
        routing=routing,
    )
    advantage = np.repeat(np.where(np.arange(samples) % 2, 1.0, -1.0), response_length).astype(np.float32)
    return batch.with_columns(advantage=advantage, old_log_probs=np.full(count, -3.7, dtype=np.float32))


def in_batch_order(batch: SampleBatch, found: list[RankLogProbs]) -> Array:
    """What ranks scored, flat in the batch's order, [2, R]: log-probs and entropies; NaN where nobody did."""
    flat = np.full((2, len(batch.rollout_log_probs)), np.nan, dtype=np.float32)
    for each in found:
        index = each.sample_index
        rows = ragged_rows(batch.response_start[index], batch.response_length[index])
        flat[:, rows] = np.stack([each.log_probs, each.entropy])
    return flat
