"""The products of a mixture of experts: rows sorted by expert, each expert its own weight.

A row's sum is one chain over K with its expert's weight, as `gemm_kernel` states it; which rows travel beside it, how many the
expert has, and which rank holds the expert cannot show. Rows past an expert's end that share its tile are computed and not
stored. The tile list is made on the device, so nothing waits for the counts and CUDA graphs can capture the call.
"""

from __future__ import annotations

from typing import Any

import torch

from . import arguments
from .device import multiprocessors, runs_gluon, runs_triton
from .gemm import HALF, gemm
from .overlap import begin, overlap
from .tensor_core import mma_chain
from .toolchain import jit, tl
from .tuning import GemmProblem, choose

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PORTABLE_HEIGHT = 64


@jit
def plan_kernel(
    counts: tl.tensor, plan: tl.tensor, EXPERTS: tl.constexpr, EXPERTS_PAD: tl.constexpr, HEIGHT: tl.constexpr,
    AT_ONCE: tl.constexpr, OVERLAP: tl.constexpr,
) -> None:  # fmt: skip
    """One program: the row tiles of all experts, as (first row, row to stop before, expert), and their number before them."""
    begin(OVERLAP)
    e = tl.arange(0, EXPERTS_PAD)
    rows = tl.load(counts + e, mask=e < EXPERTS, other=0)
    tiles = (rows + HEIGHT - 1) // HEIGHT
    tl.store(plan, tl.sum(tiles))
    first_tile = (tl.cumsum(tiles, 0) - tiles)[:, None]
    first_row = (tl.cumsum(rows, 0) - rows)[:, None]
    ahead = tl.arange(0, AT_ONCE)[None, :]
    for base in range(0, tl.max(tiles), AT_ONCE):
        tile = base + ahead
        there = tile < tiles[:, None]
        entry = plan + 1 + 3 * (first_tile + tile)
        tl.store(entry, first_row + tile * HEIGHT, mask=there)
        tl.store(entry + 1, first_row + rows[:, None] + tile * 0, mask=there)
        tl.store(entry + 2, e[:, None] + tile * 0, mask=there)


@jit
def weight_gradient_kernel(
    grad: tl.tensor, x: tl.tensor, ends: tl.tensor, out: tl.tensor, N: tl.tensor, K: tl.tensor, grad_stride: tl.tensor,
    x_stride: tl.tensor, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
) -> None:  # fmt: skip
    """Program (expert, tile of N, tile of K): one chain over the expert's rows in ascending order."""
    expert = tl.program_id(0)
    end = tl.load(ends + expert)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    n = tl.program_id(1) * BM + tl.arange(0, BM)
    k = tl.program_id(2) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(start, end, BR):
        row = first + tl.arange(0, BR)
        there = row < end
        at = row.to(tl.int64)
        g = tl.load(grad + at[None, :] * grad_stride + n[:, None], mask=there[None, :] & (n < N)[:, None], other=0.0)
        v = tl.load(x + at[:, None] * x_stride + k[None, :], mask=there[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(g, v, acc, input_precision="ieee")
    to = out + (expert.to(tl.int64) * N + n)[:, None] * K + k[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


def grouped_matmul(
    x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, *, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Row r of the result is x[r] @ weight[e].T for the expert e that row r belongs to.

    x: [rows, K], rows sorted by expert. weight: [experts, N, K], contiguous. Both the same one of bf16, fp16 and fp32.
    counts: int32 [experts], rows of each expert; they add up to `rows`. out_dtype: default x's; float32 keeps the accumulator.

    Differentiable: dx by a chain over N, dweight[e] by one chain over the expert's rows in ascending order.
    Raises ValueError naming a wrong argument.
    """
    _check(x, weight, counts, out_dtype)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _GroupedMatmul.apply(x, weight, counts, out_dtype)  # type: ignore[no-any-return, no-untyped-call]  # torch's apply is untyped
    return _forward(x, weight, counts, out_dtype)


def grouped_matmul_reference(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The float32 accumulator's bits on Hopper, in plain torch."""
    parts = [mma_chain(rows, weight[e]) for e, rows in enumerate(torch.split(x, counts.tolist()))]
    return torch.cat(parts)


def _check(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, out_dtype: torch.dtype | None) -> None:
    arguments.require_dims("x", x, 2, "[rows, K]")
    arguments.require_dims("weight", weight, 3, "[experts, N, K]")
    arguments.require_dtype("x", x, DTYPES)
    arguments.require_dtype("weight", weight, (x.dtype,))
    arguments.require_dtype("counts", counts, (torch.int32,))
    arguments.require_shape("counts", counts, (weight.shape[0],), "[experts]")
    arguments.require_contiguous_rows("x", x)
    arguments.require_contiguous("weight", weight)
    arguments.require_same_device(x=x, weight=weight, counts=counts)
    if x.shape[1] != weight.shape[2]:
        raise ValueError(f"x has K = {x.shape[1]}; allowed: weight's K, {weight.shape[2]}")
    if out_dtype is not None and out_dtype not in (x.dtype, torch.float32):
        raise ValueError(f"out_dtype is {out_dtype}; allowed: {x.dtype}, torch.float32 or None")


def plan_tiles(counts: torch.Tensor, rows: int, height: int) -> torch.Tensor:
    """The row tiles of all experts, int32 [1 + 3 * most]: their number, then (first row, row to stop before, expert) each."""
    experts = counts.numel()
    plan = torch.empty(1 + 3 * (rows // height + experts), device=counts.device, dtype=torch.int32)
    pad = 1 << (experts - 1).bit_length()
    each = max(1, min(32, 2 * rows // height // experts))  # twice an expert's even share, so that one step usually does
    at_once = 1 << (each - 1).bit_length()
    plan_kernel[(1,)](
        counts, plan, EXPERTS=experts, EXPERTS_PAD=pad, HEIGHT=height, AT_ONCE=at_once, num_warps=4, **overlap(counts.device)
    )
    return plan


def plan_height(problem: GemmProblem, device: torch.device) -> int:
    """Rows of a tile: the tuner's choice on Hopper."""
    if not (runs_gluon(device) and problem.dtype in HALF):
        return PORTABLE_HEIGHT
    return choose(problem, torch.cuda.get_device_name(device), multiprocessors(device)).height


def _run(
    x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, out_dtype: torch.dtype, *, transposed: bool
) -> torch.Tensor:
    """x[r] @ weight[e].T, or x[r] @ weight[e] when transposed."""
    experts, n, k = weight.shape
    if transposed:
        n, k = k, n
    out = torch.empty(x.shape[0], n, device=x.device, dtype=out_dtype)
    if x.shape[0] == 0:
        return out
    stacked = weight.view(-1, weight.shape[2])
    problem = GemmProblem(x.shape[0], n, k, x.dtype, out_dtype, 0, False, transposed, experts)
    height = plan_height(problem, x.device)
    plan = plan_tiles(counts, x.shape[0], height)
    gemm(x, stacked, out, b_kn=transposed, experts=experts, plan=plan, plan_height=height)
    return out


def _forward(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    if not runs_triton(x.device):
        return grouped_matmul_reference(x, weight, counts).to(out_dtype)
    return _run(x, weight, counts, out_dtype, transposed=False)


def grouped_weight_gradient(grad: torch.Tensor, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """grad_e^T @ x_e for each expert, [experts, N, K] in x's dtype."""
    if not runs_triton(x.device):
        pairs = zip(torch.split(grad, counts.tolist()), torch.split(x, counts.tolist()), strict=True)
        return torch.stack([mma_chain(g.T.contiguous(), v.T.contiguous()) for g, v in pairs]).to(x.dtype)
    n, k = grad.shape[1], x.shape[1]
    out = torch.empty(counts.numel(), n, k, device=x.device, dtype=x.dtype)
    ends = torch.cumsum(counts, 0, dtype=torch.int32)
    block, rows = (128, 64) if x.dtype in HALF else (64, 32)
    weight_gradient_kernel[(counts.numel(), -(-n // block), -(-k // block))](
        grad, x, ends, out, n, k, grad.stride(0), x.stride(0), BM=block, BN=block, BR=rows, num_warps=8, num_stages=3
    )
    return out


class _GroupedMatmul(torch.autograd.Function):
    """grouped_matmul with both gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(x, weight, counts)
        return _forward(x, weight, counts, out_dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, counts = ctx.saved_tensors
        grad = grads[0].to(x.dtype)
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            if runs_triton(x.device):
                dx = _run(grad, weight, counts, x.dtype, transposed=True)
            else:
                dx = grouped_matmul_reference(grad, weight.transpose(1, 2).contiguous(), counts).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dw = grouped_weight_gradient(grad, x, counts)
        return dx, dw, None, None
