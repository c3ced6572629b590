"""The sum a Hopper tensor core computes, in torch on any device: the reference that CPU tests and the GPU's bits share.

A k16 step of a bf16 or fp16 product adds sixteen exact products and the accumulator in one fused operation: every addend is
aligned to the largest exponent among them (a product's exponent is the sum of its factors', so its significand is in
[1, 4)), cut to 25 fractional bits, summed exactly, and the sum truncated to float32. FP8 steps take 32 products, keep 13
fractional bits and cut the result to 13 fraction bits. Read in the simulator of Xie et al., "MMA-Sim: Bit-Accurate Reference
Model of Tensor Cores and Matrix Cores" (arXiv 2511.10909; microsoft/MMA-Sim), and checked against an H200 by
tests/kernels/cuda/test_tensor_core.py.
"""

from __future__ import annotations

import torch

FRACTION_BITS = 25
FP8_FRACTION_BITS = 13
STEP = 16
FP8_STEP = 32
_SMALLEST_EXPONENT = {torch.bfloat16: -126, torch.float16: -14, torch.float8_e4m3fn: -6, torch.float32: -126}


def _split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Significand in (-2, 2) and exponent, subnormals at the format's smallest exponent; float64 and float64."""
    fraction, exponent = torch.frexp(x.double())
    fraction, exponent = fraction * 2, (exponent - 1).double()
    lowest = float(_SMALLEST_EXPONENT[x.dtype])
    shift = torch.clamp(exponent - lowest, max=0)
    fraction = torch.ldexp(fraction, shift)
    return fraction, torch.where(fraction == 0, lowest, torch.clamp(exponent, min=lowest))


def _truncate(x: torch.Tensor, fraction_bits: int) -> torch.Tensor:
    """Cut float64 values to `fraction_bits` bits after the leading one (float32's exponent range)."""
    fraction, exponent = torch.frexp(x)
    exponent = torch.clamp(exponent, min=-125)
    scaled = torch.ldexp(x, fraction_bits + 1 - exponent)
    return torch.ldexp(torch.trunc(scaled), exponent - fraction_bits - 1)


def mma_step(a: torch.Tensor, b: torch.Tensor, acc: torch.Tensor, *, fp8: bool = False) -> torch.Tensor:
    """One fused step: acc[M, N] + a[M, k] b[N, k]^T with k up to 16 (32 for FP8); float32 in, float32 out."""
    fraction_bits = FP8_FRACTION_BITS if fp8 else FRACTION_BITS
    a_fraction, a_exponent = _split(a)
    b_fraction, b_exponent = _split(b)
    acc_fraction, acc_exponent = _split(acc)
    fraction = a_fraction[:, None, :] * b_fraction[None, :, :]
    exponent = a_exponent[:, None, :] + b_exponent[None, :, :]
    exponent = torch.where(fraction == 0, -1000.0, exponent)
    acc_exponent = torch.where(acc_fraction == 0, -1000.0, acc_exponent)
    largest = torch.maximum(exponent.amax(-1), acc_exponent).clamp(min=-400.0)
    aligned = torch.trunc(torch.ldexp(fraction, exponent - largest[..., None] + fraction_bits)).sum(-1)
    aligned = aligned + torch.trunc(torch.ldexp(acc_fraction, acc_exponent - largest + fraction_bits))
    total = torch.ldexp(aligned, largest - fraction_bits)
    return _truncate(total, 13 if fp8 else 23).float()


def mma_chain(a: torch.Tensor, b: torch.Tensor, acc: torch.Tensor | None = None) -> torch.Tensor:
    """a[M, K] b[N, K]^T in float32 by one accumulator over ascending K, bit for bit as `wgmma` does on Hopper.

    float32 inputs take one fused multiply-add an element instead (no tensor core), each rounded once.
    """
    total = torch.zeros(a.shape[0], b.shape[0], device=a.device) if acc is None else acc
    if a.dtype == torch.float32:
        for k in range(a.shape[1]):
            total = (a[:, k, None].double() * b[None, :, k].double() + total.double()).float()
        return total
    fp8 = a.dtype == torch.float8_e4m3fn
    step = FP8_STEP if fp8 else STEP
    for k in range(0, a.shape[1], step):
        total = mma_step(a[:, k : k + step], b[:, k : k + step], total, fp8=fp8)
    return total


def mma_tree(a: torch.Tensor, b: torch.Tensor, leaves: int) -> torch.Tensor:
    """As `mma_chain`, but K is cut into `leaves` equal chains that are added as a balanced binary tree."""
    width = a.shape[1] // leaves
    parts = [mma_chain(a[:, i * width : (i + 1) * width], b[:, i * width : (i + 1) * width]) for i in range(leaves)]
    return add_tree(parts)


def add_tree(parts: list[torch.Tensor]) -> torch.Tensor:
    """Sum a power of two of tensors as a balanced binary tree in their order."""
    while len(parts) > 1:
        parts = [parts[i] + parts[i + 1] for i in range(0, len(parts), 2)]
    return parts[0]
