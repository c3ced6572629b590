"""Attention over packed sequences in plain torch, for layers without Transformer Engine: Megatron's own takes none."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class PackedTorchAttention(torch.nn.Module):
    """A core attention for Megatron's SelfAttention: causal inside each packed sequence, grouped queries, no dropout."""

    def __init__(self, config: Any, layer_number: int, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        """Takes whatever Megatron passes to a core attention; the mask is always causal."""
        super().__init__()
        self.scale = softmax_scale if softmax_scale is not None else float(config.kv_channels**-0.5)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: Any, **__: Any) -> Tensor:
        """query [t, heads, d], key and value [t, groups, d] -> [t, heads x d]."""
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        parts = []
        for start, stop in itertools.pairwise(bounds):
            q, k, v = (tensor[start:stop].transpose(0, 1)[None] for tensor in (query, key, value))
            output = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
            parts.append(output[0].transpose(0, 1).flatten(1))
        return torch.cat(parts)
