"""Causal attention over packed sequences: one FlashAttention call on a GPU, one fused call a sequence elsewhere.

Nothing is padded, and no mask is made but for windows on a CPU. Both ways are torch's own kernels.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_FLASH_MULTIPLE = 8  # heads are padded with zeros up to a multiple of it, which changes no score
_FLASH_WIDEST = 256
_FLASH_CAPABILITY = (8, 0)


def packed_causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """query [t, heads, d], key and value [t, groups, d] -> [t, heads, d]; sequence i is bounds[i] .. bounds[i + 1] - 1.

    window: how many of the last keys a query sees, its own included; None for all. offsets: `bounds` as int32 on the query's
    device, made here if not given. Equal inputs give equal bits, gradients included.
    """
    if flash_takes(query, key, value):
        offsets = torch.tensor(bounds, dtype=torch.int32, device=query.device) if offsets is None else offsets
        longest = max(stop - start for start, stop in itertools.pairwise(bounds))
        width, missing = query.shape[-1], -query.shape[-1] % _FLASH_MULTIPLE
        q, k, v = (pad(tensor, (0, missing)) if missing else tensor for tensor in (query, key, value))
        flash: Any = _FlashAttention
        out: Tensor = flash.apply(q, k, v, offsets, longest, scale, -1 if window is None else window - 1)
        return out[..., :width]
    return attention_of_each(query, key, value, bounds, scale=scale, window=window)


def flash_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch's FlashAttention computes these: 16-bit numbers, heads of one width up to 256, an Ampere GPU or newer."""
    return (
        query.is_cuda
        and query.dtype in _FLASH_DTYPES
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == value.shape[-1] <= _FLASH_WIDEST
        and torch.cuda.get_device_capability(query.device) >= _FLASH_CAPABILITY
    )


def attention_of_each(
    query: Tensor, key: Tensor, value: Tensor, bounds: Sequence[int], *, scale: float, window: int | None = None
) -> Tensor:
    """The same, one sequence after the other, on any device and in any floating-point format."""
    parts = []
    for start, stop in itertools.pairwise(bounds):
        q, k, v = (tensor[start:stop].transpose(0, 1)[None] for tensor in (query, key, value))
        seen = None if window is None or window >= stop - start else _window_mask(stop - start, window, query.device)
        part = scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=True)
        parts.append(part[0].transpose(0, 1))
    return torch.cat(parts)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril().triu(1 - window)


class _FlashAttention(torch.autograd.Function):
    """apply(query, key, value, offsets, longest, scale, left) -> out; left: earlier keys that a query sees, -1 for all.

    The operators behind torch.nn.attention.varlen, called directly: they take grouped queries in every release, varlen_attn
    from 2.12 on, and here the backward alone is told to be deterministic, not every operator of a step.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, scale: float, left: int
    ) -> Tensor:
        """One kernel for all sequences."""
        ctx.longest, ctx.causal = longest, left < 0
        ctx.settings = {"scale": scale, "window_size_left": left, "window_size_right": 0}
        out, log_sum, state, unused, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, offsets, offsets, longest, longest, 0.0, ctx.causal, False, **ctx.settings
        )
        ctx.save_for_backward(query, key, value, out, log_sum, offsets, state, unused)
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """By default the query's gradients are added up in the order in which blocks happen to end."""
        query, key, value, out, log_sum, offsets, state, unused = ctx.saved_tensors
        longest = ctx.longest
        with _deterministic():
            found = torch.ops.aten._flash_attention_backward(
                gradient, query, key, value, out, log_sum, offsets, offsets, longest, longest, 0.0, ctx.causal, state, unused,
                **ctx.settings,
            )  # fmt: skip
        return *found, None, None, None, None


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """torch's deterministic algorithms, for as long as it lasts; what it allocates meanwhile is not filled first."""
    settings: Any = torch.utils.deterministic  # a module with a property, which its stubs do not declare
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill
