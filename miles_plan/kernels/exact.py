"""An exact sum has no order: reductions that no batch, tile, thread count, padding or tensor-parallel split can change.

Numbers are rounded once to a grid (multiples of a power of two) that depends on their own row alone. A product of a row on
a grid of b_x bits with a column on a grid of b_w bits is then an integer below 2^(b_x + b_w) in units of the product grid, and
K of them add up below 2^53 when b_x + b_w + ceil(log2 K) <= 53: every partial sum is exact in float64, so BLAS, threads and
ranks may add in any order they like. The idea is the pre-rounding of reproducible BLAS (Demmel and Nguyen, "Fast Reproducible
Floating-Point Summation", ARITH 2013), with the grid taken per row so that rows never meet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miles_plan.kernels.collectives import RankGroup

MANTISSA_BITS = 53
_EXPONENT_MASK = 0x7FF0000000000000
_SMALLEST = 2.0**-149  # the least positive float32: bounds stay normal, and zero rows get a bound too


def bits_for(num_terms: int) -> tuple[int, int]:
    """Bits of the two factors of a dot product of `num_terms` terms, so that its sum is exact in float64.

    128 terms leave 23 bits each, 4,096 leave 20 and 21. ValueError when num_terms is below 1.
    """
    if num_terms < 1:
        raise ValueError(f"num_terms must be at least 1, got {num_terms}")
    budget = MANTISSA_BITS - ceil_log2(num_terms)
    return budget // 2, budget - budget // 2


def ceil_log2(n: int) -> int:
    """Smallest b with 2^b >= n, for n >= 1."""
    return (n - 1).bit_length()


def power_of_two_above(magnitude: Tensor) -> Tensor:
    """The least power of two above each |magnitude|, float64, at least 2^-148. Infinity and NaN give infinity."""
    at_least = magnitude.double().clamp_min(_SMALLEST)
    return (at_least.view(torch.int64) & _EXPONENT_MASK).view(torch.float64).mul_(2.0)


def row_bound(x: Tensor, group: RankGroup | None = None) -> Tensor:
    """A power of two above every |element| of each row (last dimension), shape [..., 1], float64.

    With a process group the row is sharded over its ranks and the bound is the whole row's.
    """
    # amax of abs, not aminmax: torch's CPU aminmax along a dimension was measured ten times slower
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    return power_of_two_above(all_reduce_max(largest.double(), group))


def round_to_grid(x: Tensor, bound: Tensor | float, bits: int) -> Tensor:
    """x in float64, rounded (ties to even) to multiples of bound x 2^-bits; bound is a power of two with |x| <= bound.

    Adding and taking away 1.5 x 2^52 grid steps lets the addition itself round. `bits` is at most 51.
    """
    if not 1 <= bits <= MANTISSA_BITS - 2:
        raise ValueError(f"bits must lie in [1, {MANTISSA_BITS - 2}], got {bits}")
    shift = bound * (1.5 * 2.0 ** (MANTISSA_BITS - 1 - bits))
    return (x.double() + shift).sub_(shift)


def exact_sum(x: Tensor, *, bound: float, max_terms: int, group: RankGroup | None = None) -> Tensor:
    """Sum over the last dimension of numbers in [-bound, bound], kept as [..., 1], float64, whatever the order.

    `max_terms` is a constant of the model (vocabulary, maximum context), never the length at hand, and fixes the grid;
    `bound` is a power of two. With a process group the terms are sharded over its ranks and every rank gets the whole sum.
    """
    bits = min(MANTISSA_BITS - 2, MANTISSA_BITS - ceil_log2(max_terms))
    return all_reduce_sum(round_to_grid(x, bound, bits).sum(dim=-1, keepdim=True), group)


def all_reduce_max(x: Tensor, group: RankGroup | None) -> Tensor:
    """Elementwise maximum over the ranks, in place; x itself without a group."""
    if group is not None:
        group.all_reduce_max(x)
    return x


def all_reduce_sum(x: Tensor, group: RankGroup | None) -> Tensor:
    """Elementwise sum over the ranks, in place; the same bits in any order when the terms lie on one grid."""
    if group is not None:
        group.all_reduce_sum(x)
    return x
