"""The matrix kernel for a handful of tokens: each program streams a few rows of the weights past all of them.

Plain pointer loads, nothing to set up, so it starts sooner than the TMA kernels; few rows a program, so that a narrow layer
still fills the device. The order of the sum is the one `gemm_kernel` documents, and on Hopper so are the bits: `mma.sync` and
`wgmma` k16 steps are the same function there.
"""

from __future__ import annotations

from .overlap import begin
from .toolchain import jit, tl


@jit
def _stream(
    w: tl.tensor, x: tl.tensor, there: tl.tensor, k_first: tl.tensor, k_end: tl.tensor, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    DEPTH: tl.constexpr, STAGES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """One accumulator over [k_first, k_end); w and x point at the first element of each row, and only tokens `there` load."""
    k = tl.arange(0, DEPTH)
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for k0 in tl.range(k_first, k_end, DEPTH, num_stages=STAGES):
        w_tile = tl.load(w + (k0 + k)[None, :], eviction_policy="evict_first")
        x_tile = tl.load(x + (k0 + k)[:, None], mask=there, other=0.0)
        acc = tl.dot(w_tile, x_tile, acc)
    return acc


@jit(do_not_specialize=["M"])
def gemm_skinny_kernel(
    w: tl.tensor, x: tl.tensor, out: tl.tensor, M: tl.tensor, N: tl.tensor, K: tl.tensor, w_stride: tl.tensor,
    x_stride: tl.tensor, out_stride: tl.tensor,
    LEAVES: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:  # fmt: skip
    """out[M, N] = x[M, K] w[N, K]^T for K a multiple of DEPTH (of each leaf's, with LEAVES). Program: ROWS of w, TOKENS of x."""
    begin(OVERLAP)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    w_rows = w + tl.minimum(n, N - 1).to(tl.int64)[:, None] * w_stride
    x_rows = x + m.to(tl.int64)[None, :] * x_stride
    there = (m < M)[None, :]
    if LEAVES == 0:
        total = _stream(w_rows, x_rows, there, 0, K, ROWS, TOKENS, DEPTH, STAGES)
    else:
        level0 = tl.zeros((ROWS, TOKENS), tl.float32)
        level1 = tl.zeros((ROWS, TOKENS), tl.float32)
        level2 = tl.zeros((ROWS, TOKENS), tl.float32)
        total = tl.zeros((ROWS, TOKENS), tl.float32)
        leaf_k = K // LEAVES
        for leaf in range(LEAVES):
            total = _stream(w_rows, x_rows, there, leaf * leaf_k, (leaf + 1) * leaf_k, ROWS, TOKENS, DEPTH, STAGES)
            if leaf & 1 == 0:
                level0 = total
            else:
                total = level0 + total
                if leaf & 2 == 0:
                    level1 = total
                else:
                    total = level1 + total
                    if leaf & 4 == 0:
                        level2 = total
                    else:
                        total = level2 + total
    to = out + m[None, :].to(tl.int64) * out_stride + n[:, None]
    tl.store(to, total.to(out.dtype.element_ty), mask=there & (n < N)[:, None])
