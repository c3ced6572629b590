"""A core attention for Megatron's layers without Transformer Engine: Megatron's own takes no packed sequences there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_plan.backends.training.packed_attention import packed_causal_attention


class PackedTorchAttention(torch.nn.Module):
    """Causal inside each packed sequence, grouped queries, no dropout."""

    def __init__(self, config: Any, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        """Takes whatever Megatron passes to a core attention; the mask is always causal."""
        super().__init__()
        self.scale = softmax_scale if softmax_scale is not None else float(config.kv_channels**-0.5)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: Any, **__: Any) -> Tensor:
        """query [t, heads, d], key and value [t, groups, d] -> [t, heads x d]."""
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        return packed_causal_attention(query, key, value, bounds, scale=self.scale).flatten(1)
