"""Supervised fine-tuning: the negative log-likelihood of the response tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def sft_loss(log_probs: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of -weight x log-prob over this micro-batch's response tokens, and what it adds to each metric.

    log_probs, weights: float32 [r], the weights from `aggregation.token_weights`. The sums over micro-batches and ranks are the
    batch's loss and metrics.
    """
    loss = -torch.dot(log_probs, weights)
    return loss, {"loss": loss.detach()}
