"""How per-token loss terms become one number: a weight for each token, with the counts of the whole batch inside.

The weights are computed once from the whole batch. A rank or a micro-batch then sums its own weighted terms, and the plain sum
over all of them is the loss of the whole batch: there is no mean of means to get wrong.
"""

from __future__ import annotations

import numpy as np

from miles_plan.data.batch import Array, SampleBatch
from miles_plan.ir.options import Aggregation


def token_weights(batch: SampleBatch, aggregation: Aggregation, *, constant: float = 0.0) -> Array:
    """Weight of each response token in the loss, float32 [R]; 0 where the optional column `loss_mask` [R] is 0.

    token_mean: 1 / counted tokens of the batch (DAPO, arXiv 2503.14476). sequence_mean: each sequence's tokens share
    1 / sequences (GRPO, arXiv 2402.03300). prompt_mean: each prompt's tokens, over all its samples, share 1 / prompts.
    constant: 1 / (constant x sequences), the constant being the longest response allowed (Dr.GRPO, arXiv 2503.20783).
    Sequences and prompts without a counted token are not counted. ValueError for a constant that is not positive.
    """
    mask = response_mask(batch)
    samples = np.repeat(np.arange(batch.num_samples), batch.response_length)
    if aggregation == "token_mean":
        weights = mask / max(mask.sum(), 1.0)
    elif aggregation == "sequence_mean":
        weights = _shared_by(samples, mask)
    elif aggregation == "prompt_mean":
        _, prompts = np.unique(batch.prompt_id, return_inverse=True)
        weights = _shared_by(prompts[samples], mask)
    elif constant > 0.0:
        sequences = len(np.unique(samples[mask > 0]))
        weights = mask / (constant * max(sequences, 1))
    else:
        raise ValueError(f"aggregation 'constant' needs a positive constant, got {constant}")
    return np.asarray(weights, dtype=np.float32)


def response_mask(batch: SampleBatch) -> Array:
    """1.0 for each response token that counts, 0.0 for the others, float64 [R]. ValueError for other values."""
    mask = np.asarray(batch.columns.get("loss_mask", np.ones(len(batch.rollout_log_probs))), dtype=np.float64)
    if not np.isin(mask, (0.0, 1.0)).all():
        raise ValueError("column 'loss_mask' holds values other than 0 and 1")
    return mask


def _shared_by(groups: Array, mask: Array) -> Array:
    """Each group's counted tokens share 1 / groups that have any."""
    counts = np.bincount(groups, weights=mask)
    num_groups = max(int((counts > 0).sum()), 1)
    return np.asarray(mask / (np.maximum(counts, 1.0)[groups] * num_groups))
