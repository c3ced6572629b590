"""The matrix kernel for every case the Hopper one leaves: other GPUs, float32, rows that TMA cannot address.

Pointer loads, one output tile a program. The order of the sum is the one `gemm_kernel` documents: one float32 accumulator
over ascending K, or LEAVES such chains added as a balanced binary tree. On Hopper its bf16 and fp16 bits equal the other
kernel's (`mma.sync` and `wgmma` k16 steps are the same function there); float32 multiplies and adds without TF32, one fused
multiply-add after another.
"""

from __future__ import annotations

from .toolchain import jit, tl


@jit
def _chain(
    a: tl.tensor, b: tl.tensor, m: tl.tensor, n: tl.tensor, m_in: tl.tensor, n_in: tl.tensor, k_first: tl.tensor,
    k_end: tl.tensor, stride_am: tl.tensor, stride_ak: tl.tensor, stride_bn: tl.tensor, stride_bk: tl.tensor,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """One accumulator over [k_first, k_end)."""
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k0 in range(k_first, k_end, BK):
        k = k0 + tl.arange(0, BK)
        k_in = k < k_end
        a_tile = tl.load(
            a + m[:, None] * stride_am + k[None, :].to(tl.int64) * stride_ak, mask=m_in[:, None] & k_in[None, :], other=0.0
        )
        b_tile = tl.load(
            b + n[None, :] * stride_bn + k[:, None].to(tl.int64) * stride_bk, mask=n_in[None, :] & k_in[:, None], other=0.0
        )
        acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee")
    return acc


@jit(do_not_specialize=["M"])
def gemm_portable_kernel(
    a: tl.tensor, b: tl.tensor, c: tl.tensor, plan: tl.tensor, M: tl.tensor, N: tl.tensor, K: tl.tensor,
    stride_am: tl.tensor, stride_ak: tl.tensor, stride_be: tl.tensor, stride_bn: tl.tensor, stride_bk: tl.tensor,
    stride_cm: tl.tensor, stride_cn: tl.tensor,
    GROUPED: tl.constexpr, LEAVES: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
) -> None:  # fmt: skip
    """C[M, N] = A[M, K] B[N, K]^T with any strides; GROUPED reads its row tiles and their expert from `plan`."""
    num_n = tl.cdiv(N, BN)
    num_m = tl.load(plan) if GROUPED else tl.cdiv(M, BM)
    tile = tl.program_id(0)
    if tile < num_m * num_n:
        width = GROUP * num_n
        first = (tile // width) * GROUP
        size = min(num_m - first, GROUP)
        tile_m = first + (tile % width) % size
        tile_n = (tile % width) // size
        row = tile_m * BM
        end = M
        if GROUPED:
            entry = plan + 1 + 3 * tile_m
            row = tl.load(entry)
            end = tl.load(entry + 1)
            b += tl.load(entry + 2).to(tl.int64) * stride_be
        m = (row + tl.arange(0, BM)).to(tl.int64)
        n = (tile_n * BN + tl.arange(0, BN)).to(tl.int64)
        m_in = m < end
        n_in = n < N
        if LEAVES == 0:
            total = _chain(a, b, m, n, m_in, n_in, 0, K, stride_am, stride_ak, stride_bn, stride_bk, BM, BN, BK)
        else:
            level0 = tl.zeros((BM, BN), dtype=tl.float32)
            level1 = tl.zeros((BM, BN), dtype=tl.float32)
            level2 = tl.zeros((BM, BN), dtype=tl.float32)
            total = tl.zeros((BM, BN), dtype=tl.float32)
            leaf_k = K // LEAVES
            for leaf in range(LEAVES):
                total = _chain(
                    a, b, m, n, m_in, n_in, leaf * leaf_k, (leaf + 1) * leaf_k, stride_am, stride_ak, stride_bn, stride_bk,
                    BM, BN, BK,
                )  # fmt: skip
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
        out = c + m[:, None] * stride_cm + n[None, :] * stride_cn
        tl.store(out, total.to(c.dtype.element_ty), mask=m_in[:, None] & n_in[None, :])
