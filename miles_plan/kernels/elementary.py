"""exp and log whose bits depend on the argument alone, never on where in a tensor it stands.

torch's CPU loops evaluate the body of a tensor with vector instructions and its tail with libm, and strided tensors take
yet another path; these may differ in the last bit, so a row could change with its place in the batch. The functions here are
built from IEEE additions, multiplications and divisions only, which are correctly rounded on every path and on every machine.
"""

from __future__ import annotations

import torch
from torch import Tensor

# 2^r = 1 + r q(r) for |r| <= 1/2: q by interpolation at Chebyshev nodes, relative error of 2^r below 2.2e-12.
_EXP2 = (
    1.325080551750225e-06,
    1.5303700711365693e-05,
    0.00015403475186530786,
    0.0013333478473685416,
    0.00961812913523614,
    0.055504109063258665,
    0.24022650695888503,
    0.6931471805568324,
)
_LOG2_E = 1.4426950408889634
_ROUND_64 = 6755399441055744.0  # 1.5 x 2^52: adding it leaves the nearest integer in the low mantissa bits
_EXPONENT_64 = 52

# Cephes expf: e^r = 1 + r + r^2 p(r) for |r| <= ln(2)/2, about one unit in the last place of float32.
_EXPF = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_ROUND_32 = 12582912.0  # 1.5 x 2^23
_EXPONENT_32 = 23


def exp(x: Tensor) -> Tensor:
    """e^x in x's dtype, float32 or float64, bit for bit the same at every place of every tensor.

    Relative error below 3e-12 (float64) or 2e-7 (float32). The result neither overflows nor underflows: x counts as at most
    693 (87 in float32) and at least minus that. ValueError for another dtype.
    """
    if x.dtype == torch.float64:
        return _exp_float64(x)
    if x.dtype == torch.float32:
        return _exp_float32(x)
    raise ValueError(f"x must be float32 or float64, got {x.dtype}")


def log(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal float64 numbers, to about 1e-15 relative, the same at every place of a tensor.

    log(m 2^e) = e ln 2 + 2 artanh((m - 1) / (m + 1)) with m in [0.7, 1.42). ValueError for another dtype.
    """
    if x.dtype != torch.float64:
        raise ValueError(f"x must be float64, got {x.dtype}")
    bits = x.contiguous().view(torch.int64)
    exponent = (bits - 0x3FE6A09E667F3BCD) >> _EXPONENT_64  # counted from sqrt(1/2), so that m - 1 stays small
    mantissa = (bits - (exponent << _EXPONENT_64)).view(torch.float64)
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    square = ratio * ratio
    series = torch.full_like(square, 1.0 / 23.0)
    for odd in range(21, 0, -2):
        series.mul_(square).add_(1.0 / odd)
    return exponent.double() * 0.6931471805599453 + 2.0 * ratio * series


def _exp_float64(x: Tensor) -> Tensor:
    scaled = (x * _LOG2_E).clamp_(-1000.0, 1000.0)
    rounded = scaled + _ROUND_64
    rest = scaled.sub_(rounded - _ROUND_64)
    value = rest * _EXP2[0]
    for coefficient in _EXP2[1:]:
        value.add_(coefficient).mul_(rest)
    value.add_(1.0)
    value.view(torch.int64).add_(rounded.view(torch.int64).bitwise_left_shift_(_EXPONENT_64))
    return value


def _exp_float32(x: Tensor) -> Tensor:
    clamped = x.clamp(-87.0, 87.0)
    rounded = (clamped * _LOG2_E).add_(_ROUND_32)
    whole = rounded - _ROUND_32
    rest = clamped.sub_(whole * _LN2_HIGH).sub_(whole.mul_(_LN2_LOW))
    value = rest * _EXPF[0]
    for coefficient in _EXPF[1:-1]:
        value.add_(coefficient).mul_(rest)
    value.add_(_EXPF[-1]).mul_(rest).mul_(rest).add_(rest).add_(1.0)
    value.view(torch.int32).add_(rounded.view(torch.int32).bitwise_left_shift_(_EXPONENT_32))
    return value
