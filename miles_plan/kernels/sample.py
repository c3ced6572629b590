"""Draw the next token of each sequence with a counter-based generator, so that a sample's fate is its own.

One uniform number per (seed, sample_id, position), by three rounds of splitmix64's finaliser (Steele, Lea and Flood,
OOPSLA 2014), then inversion of a cumulative distribution whose sums are exact: no batch, schedule or rank enters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miles_plan.kernels.checks import check_integer, check_shape
from miles_plan.kernels.elementary import exp
from miles_plan.kernels.exact import MANTISSA_BITS, ceil_log2

_GOLDEN_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def sample(
    logits: Tensor,
    sample_ids: Tensor,
    positions: Tensor,
    *,
    seed: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """Next token of each row, int64 [M], from softmax(logits / temperature) cut to the top_k largest, then to mass top_p.

    logits float32 [M, V] over the whole vocabulary; sample_ids and positions int64 [M] key the generator with `seed`.
    Temperature 0 is greedy; equal logits are ordered by index; top_k 0 keeps all. Batch-invariant. ValueError for
    bad arguments.
    """
    if logits.dtype != torch.float32:
        raise ValueError(f"logits must be float32, got {logits.dtype}")
    check_shape("logits", logits, (None, None))
    for name, tensor in (("sample_ids", sample_ids), ("positions", positions)):
        check_integer(name, tensor)
        check_shape(name, tensor, (logits.shape[0],))
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(f"temperature >= 0, 0 < top_p <= 1 and top_k >= 0 are needed, got {temperature}, {top_p}, {top_k}")
    if temperature == 0:
        return _argmax(logits)
    counts = _counts(logits, temperature)
    if top_k or top_p < 1:
        counts = _keep_top(counts, logits, top_k or logits.shape[1], top_p)
    cumulative = counts.cumsum(dim=-1)
    total = cumulative[:, -1:]
    drawn = torch.minimum((uniform(seed, sample_ids, positions)[:, None] * total).floor(), total - 1.0)
    return torch.searchsorted(cumulative, drawn, right=True).squeeze(1)


def uniform(seed: int, sample_ids: Tensor, positions: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) with 53 bits, float64, a pure function of the three keys."""
    state = torch.full_like(sample_ids, _signed(seed))
    for key in (sample_ids, positions):
        state = _splitmix(state) ^ key
    return _logical_right_shift(_splitmix(state), 64 - MANTISSA_BITS).double() * 2.0**-MANTISSA_BITS


def _argmax(logits: Tensor) -> Tensor:
    largest = logits.amax(dim=-1, keepdim=True)
    index = torch.arange(logits.shape[1], device=logits.device)
    return torch.where(logits == largest, index, logits.shape[1] - 1).amin(dim=-1)


def _counts(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities as whole numbers (the largest is 2^bits), so that any sum of them is exact in float64."""
    wide = logits.double()
    bits = MANTISSA_BITS - ceil_log2(logits.shape[1])
    weights = exp(wide.sub_(wide.amax(dim=-1, keepdim=True)).div_(temperature))
    return weights.mul_(2.0**bits).round_()


def _keep_top(counts: Tensor, logits: Tensor, top_k: int, top_p: float) -> Tensor:
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :top_k]
    largest = counts.gather(1, order)
    cumulative = largest.cumsum(dim=-1)
    kept = cumulative - largest < cumulative[:, -1:] * top_p
    return torch.zeros_like(counts).scatter_(1, order, largest * kept)


def _splitmix(state: Tensor) -> Tensor:
    mixed = state + _GOLDEN_GAMMA
    mixed = (mixed ^ _logical_right_shift(mixed, 30)) * _MIX_1
    mixed = (mixed ^ _logical_right_shift(mixed, 27)) * _MIX_2
    return mixed ^ _logical_right_shift(mixed, 31)


def _logical_right_shift(bits: Tensor, by: int) -> Tensor:
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _signed(seed: int) -> int:
    low = seed & 0xFFFFFFFFFFFFFFFF
    return low - (1 << 64) if low >> 63 else low
