"""RMSNorm, with the residual addition that usually stands before it.

Zhang & Sennrich 2019 (arXiv 1910.07467). A row has the one layout of its width, so its bits depend on the row alone.
"""

from __future__ import annotations

from typing import Any

import torch

from . import arguments
from .device import runs_triton, steady
from .overlap import ahead, begin_alone, overlap, ready, release
from .toolchain import jit, tl

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_WIDTH = 32_768
# Bytes written that stay in a Hopper's L2 for their reader if what is read does not push them out; below the first both fit.
KEPT_BYTES = range(8 << 20, 40 << 20)
# A program's narrow rows, together and in number, and how many programs make that worth it; a row's bits are the same either way.
PROGRAM_COLUMNS, MOST_ROWS, FEWEST_PROGRAMS = 2048, 16, 256
GRADIENT_ROWS = 64  # rows whose weight gradients are added before anything else; fixed, so the order is
SUM_COLUMNS, SUM_ROWS = 32, 32  # of their sums, a program's: a warp waits for memory once every 32 rows


@jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x: tl.tensor, residual: tl.tensor, weight: tl.tensor, y: tl.tensor, total: tl.tensor, inverse: tl.tensor, rows: tl.tensor,
    x_stride: tl.tensor, residual_stride: tl.tensor, eps: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, ADD: tl.constexpr, KEEP: tl.constexpr, EVICT: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
) -> None:  # fmt: skip
    """y = t * rsqrt(mean(t^2) + eps) * weight with t = x, or x + residual rounded to its dtype, in float32.

    Program: ROWS rows, each for itself. Their loads and the weight's are all under way before the first sum. AHEAD: rows are
    multiples of 16 bytes, so that what no kernel shortly before this one writes can be asked for before the wait.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    x += first * x_stride
    residual += first * residual_stride
    ready(x, OVERLAP)
    if ADD:
        ready(residual, OVERLAP)
    if AHEAD:
        if first == 0:
            ahead(weight, WIDTH * weight.dtype.element_ty.primitive_bitwidth // 8, OVERLAP)
        if ADD:
            ahead(residual, WIDTH * residual.dtype.element_ty.primitive_bitwidth // 8, OVERLAP)
    begin_alone(OVERLAP)
    xs: tl.tensor = ()
    residuals: tl.tensor = ()
    for i in tl.static_range(ROWS):
        there = mask
        if ROWS > 1:
            there = mask & (first + i < rows)
        xs = xs + (tl.load(x + i * x_stride + column, mask=there, other=0.0, eviction_policy=EVICT),)
        if ADD:
            other = tl.load(residual + i * residual_stride + column, mask=there, other=0.0, eviction_policy=EVICT)
            residuals = residuals + (other,)
    w = tl.load(weight + column, mask=mask, other=0.0)
    release(OVERLAP)
    for i in tl.static_range(ROWS):
        row = first + i
        there = mask
        if ROWS > 1:
            there = mask & (row < rows)
        t = xs[i]
        if ADD:
            t = (t.to(tl.float32) + residuals[i].to(tl.float32)).to(total.dtype.element_ty)
            tl.store(total + row * WIDTH + column, t, mask=there)
        t = t.to(tl.float32)
        scale = 1.0 / tl.sqrt_rn(tl.sum(t * t, axis=0) / WIDTH + eps)
        if KEEP:
            tl.store(inverse + row, scale, mask=row < rows)
        tl.store(y + row * WIDTH + column, (t * scale * w.to(tl.float32)).to(y.dtype.element_ty), mask=there)


@jit
def _gradient_row(
    grad: tl.tensor, t: tl.tensor, inverse: tl.tensor, at: tl.tensor, grad_stride: tl.tensor, t_stride: tl.tensor,
    column: tl.tensor, mask: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """What a row's gradient reads."""
    g = tl.load(grad + at * grad_stride + column, mask=mask, other=0.0)
    value = tl.load(t + at * t_stride + column, mask=mask, other=0.0)
    return g, value, tl.load(inverse + at)


@jit
def rms_norm_gradient_kernel(
    grad: tl.tensor, t: tl.tensor, weight: tl.tensor, inverse: tl.tensor, dt: tl.tensor, partial: tl.tensor, rows: tl.tensor,
    grad_stride: tl.tensor, t_stride: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """Program i: rows i * ROWS upwards, one after another; their weight gradients added in that order. The next row is on its
    way meanwhile."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    count = tl.minimum(ROWS, rows - first).to(tl.int32)
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    g_next, t_next, scale_next = _gradient_row(grad, t, inverse, first, grad_stride, t_stride, column, mask)
    for i in range(count):
        g, value, scale = g_next.to(tl.float32), t_next.to(tl.float32), scale_next
        follows = first + tl.minimum(i + 1, count - 1)
        g_next, t_next, scale_next = _gradient_row(grad, t, inverse, follows, grad_stride, t_stride, column, mask)
        normal = value * scale
        gw = g * w
        mean = tl.sum(gw * normal, axis=0) / WIDTH
        tl.store(dt + (first + i) * WIDTH + column, ((gw - normal * mean) * scale).to(dt.dtype.element_ty), mask=mask)
        dw += g * normal
    tl.store(partial + tl.program_id(0).to(tl.int64) * WIDTH + column, dw, mask=mask)


@jit(do_not_specialize=["rows"])
def ordered_sum_kernel(
    partial: tl.tensor, out: tl.tensor, rows: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr
) -> None:  # fmt: skip
    """out[c] = partial[0, c] + partial[1, c] + ... in that order. AT_ONCE rows are under way together; a zero after the last
    changes no sum, which begins at a zero and so is never -0."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    total = tl.zeros((BLOCK,), tl.float32)
    at = partial + column
    for first in range(0, rows, AT_ONCE):
        parts: tl.tensor = ()
        for i in tl.static_range(AT_ONCE):
            parts = parts + (tl.load(at + i * WIDTH, mask=mask & (first + i < rows), other=0.0),)
        for i in tl.static_range(AT_ONCE):
            total += parts[i]
        at += AT_ONCE * WIDTH
    tl.store(out + column, total.to(out.dtype.element_ty), mask=mask)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Root-mean-square norm over the last dimension, in float32, rounded once.

    x: [..., width] bf16, fp16 or fp32, rows of any stride, last dimension contiguous. weight: [width]. residual: like x.
    Returns y, or (y, x + residual) with a residual; the sum is rounded to x's dtype before it is squared, because that is
    what the residual stream stores.

    Order of the sum: the row's squares in the one layout of its width; rows never meet. The weight's gradient adds rows of
    blocks of 64 in ascending order, then the blocks. Differentiable. Raises ValueError naming a wrong argument.
    """
    _check(x, weight, eps, residual)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (residual is not None and residual.requires_grad)
    ):
        y, total = _RmsNorm.apply(x, weight, eps, residual)  # type: ignore[no-untyped-call]  # torch's apply is untyped
    else:
        y, total, _ = _forward(x, weight, eps, residual, keep=False)
    return y if residual is None else (y, total)


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same in plain torch: y, what was normalised, and 1 / rms."""
    t = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    wide = t.float()
    inverse = 1.0 / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse * weight.float()).to(x.dtype), t, inverse[..., 0]


def _check(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None) -> None:
    arguments.require_dtype("x", x, DTYPES)
    arguments.require_dtype("weight", weight, DTYPES)
    arguments.require_contiguous_rows("x", x)
    arguments.require_same_device(x=x, weight=weight, residual=residual)
    if x.dim() == 0:
        raise ValueError("x has no dimensions; allowed: [..., width]")
    arguments.require_range("the width of x", x.shape[-1], 1, LARGEST_WIDTH)
    arguments.require_shape("weight", weight, (x.shape[-1],), "[width]")
    arguments.require_contiguous("weight", weight)
    if residual is not None:
        arguments.require_shape("residual", residual, x.shape, "x's shape")
        arguments.require_dtype("residual", residual, (x.dtype,))
        arguments.require_contiguous_rows("residual", residual)
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; allowed: 0 or more")


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x as [rows, width] without a copy where its strides allow it."""
    return x.reshape(-1, x.shape[-1])


def _warps(block: int) -> int:
    """Measured on an H200; a function of the width alone, because it decides the order of the sum."""
    return max(1, block // 512) if block <= 2048 else min(16, max(4, block // 1024))


def _rows_of_a_program(rows: int, block: int) -> int:
    """Several where a row is too little work for a program, as one head is, and where programs enough remain. Measured on an H200."""
    several = max(1, min(MOST_ROWS, PROGRAM_COLUMNS // block))
    return several if rows >= FEWEST_PROGRAMS * several else 1


def _forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not runs_triton(x.device):
        return rms_norm_reference(x, weight, eps, residual)
    rows = steady(rows_of(x))
    other = rows if residual is None else steady(rows_of(residual))
    weight = steady(weight)
    y = torch.empty_like(rows, memory_format=torch.contiguous_format)
    total = rows if residual is None else torch.empty_like(y)
    inverse = torch.empty(rows.shape[0] if keep else 1, device=x.device, dtype=torch.float32)
    width = rows.shape[1]
    block = 1 << (width - 1).bit_length()
    written = y.nbytes if residual is None else y.nbytes + total.nbytes
    each = _rows_of_a_program(rows.shape[0], block)
    if rows.shape[0]:
        rms_norm_kernel[(-(-rows.shape[0] // each),)](
            rows, other, weight, y, total, inverse, rows.shape[0], rows.stride(0), other.stride(0), eps, WIDTH=width, BLOCK=block,
            ROWS=each, ADD=residual is not None, KEEP=keep, EVICT="evict_first" if written in KEPT_BYTES else "",
            AHEAD=width % 16 == 0, num_warps=_warps(block), **overlap(x.device),
        )  # fmt: skip
    return y.view(x.shape), total.view(x.shape), inverse


def gradient_programs(rows: int) -> int:
    """How many blocks of GRADIENT_ROWS there are."""
    return -(-rows // GRADIENT_ROWS)


class _RmsNorm(torch.autograd.Function):
    """rms_norm with gradients for x, the residual and the weight."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, total, inverse = _forward(x, weight, eps, residual, keep=True)
        ctx.set_materialize_grads(False)  # or torch writes zeros as large as x for a sum that nobody used
        ctx.save_for_backward(total, weight, inverse)
        ctx.added = residual is not None
        if not ctx.added:
            total = total.detach()
            ctx.mark_non_differentiable(total)
        return y, total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        total, weight, inverse = ctx.saved_tensors
        normed, passed = grads
        if normed is None:
            return passed, None, None, passed if ctx.added else None
        dt, dw = _gradients(normed, total, weight, inverse)
        if passed is not None:
            dt = dt + passed
        return dt, dw, None, dt if ctx.added else None


def _gradients(
    grad: torch.Tensor, total: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if not runs_triton(total.device):
        normal = total.float() * inverse.reshape(*total.shape[:-1], 1)
        gw = grad.float() * weight.float()
        dt = (gw - normal * (gw * normal).mean(-1, keepdim=True)) * inverse.reshape(*total.shape[:-1], 1)
        return dt.to(total.dtype), rows_of(grad.float() * normal).sum(0).to(weight.dtype)
    rows, g = steady(rows_of(total)), rows_of(grad)
    g = steady(g if g.stride(-1) == 1 else g.contiguous())
    width = rows.shape[1]
    block = 1 << (width - 1).bit_length()
    programs = gradient_programs(rows.shape[0])
    dt = torch.empty_like(rows, memory_format=torch.contiguous_format)
    partial = torch.empty(programs, width, device=rows.device, dtype=torch.float32)
    dw = torch.empty_like(weight)
    rms_norm_gradient_kernel[(programs,)](
        g, rows, weight, inverse, dt, partial, rows.shape[0], g.stride(0), rows.stride(0), WIDTH=width, BLOCK=block,
        ROWS=GRADIENT_ROWS, num_warps=_warps(block),
    )  # fmt: skip
    ordered_sum_kernel[(-(-width // SUM_COLUMNS),)](
        partial, dw, programs, WIDTH=width, BLOCK=SUM_COLUMNS, AT_ONCE=SUM_ROWS, num_warps=1
    )
    return dt.view(total.shape), dw
