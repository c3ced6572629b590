"""The loss of a whole batch, evaluated one micro-batch at a time: the counts of the whole are inside the weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from miles_plan.algorithms.aggregation import response_mask, token_weights
from miles_plan.algorithms.policy_loss import PolicyTargets, policy_loss
from miles_plan.algorithms.sft_loss import sft_loss
from miles_plan.backends.training.packed_samples import PackedSamples, on_device, pack_samples
from miles_plan.data.batch import SampleBatch
from miles_plan.ir.options import LossOptions


class BatchLoss:
    """What a training step minimises over `batch`; num_tokens: response tokens that count in it."""

    def __init__(self, batch: SampleBatch, options: LossOptions) -> None:
        self.batch = batch
        self.options = options
        self.num_tokens = int(response_mask(batch).sum())
        self._weights = token_weights(batch, options.aggregation, constant=options.aggregation_constant)

    def of(self, part: PackedSamples, log_probs: Tensor, entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one micro-batch and what it adds to each metric, from the policy's log-probs and entropies, float32 [r]."""
        weights = part.column(self._weights)
        if self.options.kind == "sft":
            return sft_loss(log_probs, weights)
        columns = self.batch.columns
        optional = {
            name: part.column(columns[name]) for name in ("reference_log_probs", "importance_weight") if name in columns
        }
        targets = PolicyTargets(
            old_log_probs=part.column(columns["old_log_probs"]),
            advantages=part.column(columns["advantage"]),
            weights=weights,
            response_length=on_device(self.batch.response_length[part.samples].astype(np.int64), weights.device),
            num_tokens=self.num_tokens,
            reference_log_probs=optional.get("reference_log_probs"),
            importance_weights=optional.get("importance_weight"),
        )
        return policy_loss(log_probs, targets, self.options, entropy=entropy)

    def metrics_of_nothing(self) -> dict[str, float]:
        """Every metric at 0: where the sums of a rank start, also of one that computes no loss."""
        nothing = pack_samples(self.batch, np.zeros(0, dtype=np.int64), replay_routing=False)
        _, metrics = self.of(nothing, torch.zeros(0), torch.zeros(0))
        return dict.fromkeys(metrics, 0.0)


def missing_columns(batch: SampleBatch, options: LossOptions) -> Iterator[str]:
    """The columns that this loss reads and the batch lacks."""
    if options.kind == "policy_gradient":
        needed = ("advantage", "old_log_probs", *(("reference_log_probs",) if options.kl_coef else ()))
        yield from (name for name in needed if name not in batch.columns)
