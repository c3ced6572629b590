"""Causal attention over packed sequences in plain torch: one fused call a sequence, so that nothing is padded or masked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def packed_causal_attention(query: Tensor, key: Tensor, value: Tensor, bounds: Sequence[int], *, scale: float) -> Tensor:
    """query [t, heads, d], key and value [t, groups, d] -> [t, heads, d]; sequence i is bounds[i] .. bounds[i + 1] - 1."""
    parts = []
    for start, stop in itertools.pairwise(bounds):
        q, k, v = (tensor[start:stop].transpose(0, 1)[None] for tensor in (query, key, value))
        parts.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(parts)
