"""The Hopper kernel of block-scaled FP8 products, plain and grouped.

The scheme is DeepSeek-V3's (arXiv 2412.19437, section 3.3.2): e4m3 operands, one float32 scale for each 1 x 128 of the
activations and each 128 x 128 of the weights.

Order of the sum, for every output element: each 128 of K is one FP8 tensor-core chain of four k32 steps from zero, which keeps
13 fractional bits (`tensor_core`); times the product of the two scales it is added to the float32 accumulator by one fused
multiply-add, blocks in ascending order. A tile is 64 or 128 tokens by a part of one block of 128 weight rows, or 64 weight rows
by a few tokens; neither that choice nor which operand is called A shows, because the sums have no order within a step and the
scales multiply each other first.
"""

from __future__ import annotations

from .gemm_kernel import locate, row_tiles, tile_position
from .gemm_store import store_tile
from .overlap import begin
from .toolchain import (
    fence_async_shared,
    gl,
    gluon_jit,
    grid_release,
    grid_wait,
    jit,
    mbarrier,
    tl,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

SCALE_BLOCK = 128
LARGEST_E4M3 = 448.0


@gluon_jit
def _produce(
    descs: gl.tensor, rings: gl.tensor, bars: gl.tensor, plan: gl.tensor, M: gl.tensor, N: gl.tensor, K: gl.tensor,
    GROUPED: gl.constexpr, GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, COLS: gl.constexpr,
) -> None:  # fmt: skip
    """The producer warp: a block of 128 K for every consumer's rows and the shared columns."""
    a_desc, b_desc = descs
    a_ring, b_ring = rings
    ready, empty = bars
    TILE: gl.constexpr = 64 * CONSUMERS
    BYTES: gl.constexpr = a_desc.block_type.nbytes * CONSUMERS + b_desc.block_type.nbytes
    num_m = row_tiles(plan, M, TILE, GROUPED)
    num_n = gl.cdiv(N, COLS)
    step = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, num_m, num_n, GROUP)
        row, _, expert = locate(plan, tile_m, M, TILE, GROUPED)
        for k in range(0, K, 128):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = ready.index(stage)
            mbarrier.expect(bar, BYTES)
            for c in gl.static_range(CONSUMERS):
                tma.async_copy_global_to_shared(a_desc, [row + c * 64, k], bar, a_ring.index(stage * CONSUMERS + c))
            tma.async_copy_global_to_shared(b_desc, [expert * N + tile_n * COLS, k], bar, b_ring.index(stage))
            step += 1


@gluon_jit
def _block(
    rings: gl.tensor, ready: gl.tensor, step: gl.tensor, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    COLS: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Start one block's chain from zero."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 32])
    a_ring, b_ring = rings
    stage = step % STAGES
    mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
    part = gl.zeros((64, COLS), gl.float32, layout)
    return warpgroup_mma(
        a_ring.index(stage * CONSUMERS + ME), b_ring.index(stage).permute((1, 0)), part, use_acc=False, is_async=True
    )


@gluon_jit
def _scales(
    token_at: gl.tensor, weight_at: gl.tensor, there: gl.tensor, block: gl.tensor, blocks: gl.tensor, x_k: gl.tensor,
    w_k: gl.tensor,
) -> gl.tensor:  # fmt: skip
    """The tokens' scales of one block and the weights' one scale; the last block's again past the end."""
    at = gl.minimum(block, blocks - 1)
    return gl.load(token_at + at * x_k, mask=there, other=0.0), gl.load(weight_at + at * w_k)


@gluon_jit
def _promote(part: gl.tensor, tokens: gl.tensor, weight: gl.tensor, acc: gl.tensor, SWAP: gl.constexpr) -> gl.tensor:
    """Add one scaled block; a token's scale runs along a row, or along a column when the weights hold the rows."""
    scale = tokens * weight
    if SWAP:
        scale = scale[None, :]
    else:
        scale = scale[:, None]
    return gl.fma(part, scale, acc)


@gluon_jit
def _accumulate(
    rings: gl.tensor, bars: gl.tensor, step: gl.tensor, token_at: gl.tensor, weight_at: gl.tensor, there: gl.tensor,
    blocks: gl.tensor, x_k: gl.tensor, w_k: gl.tensor, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, COLS: gl.constexpr,
    SWAP: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """All blocks of a tile, two in flight. Scales are fetched two pairs ahead, since a pair of narrow blocks is done sooner
    than memory answers."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 32])
    ready, empty = bars
    acc = gl.zeros((64, COLS), gl.float32, layout)
    tokens0, weight0 = _scales(token_at, weight_at, there, 0, blocks, x_k, w_k)
    tokens1, weight1 = _scales(token_at, weight_at, there, 1, blocks, x_k, w_k)
    tokens2, weight2 = _scales(token_at, weight_at, there, 2, blocks, x_k, w_k)
    tokens3, weight3 = _scales(token_at, weight_at, there, 3, blocks, x_k, w_k)
    for block in range(0, blocks - 1, 2):
        first = _block(rings, ready, step, CONSUMERS, STAGES, COLS, ME)
        second = _block(rings, ready, step + 1, CONSUMERS, STAGES, COLS, ME)
        next0, next_weight0 = _scales(token_at, weight_at, there, block + 4, blocks, x_k, w_k)
        next1, next_weight1 = _scales(token_at, weight_at, there, block + 5, blocks, x_k, w_k)
        part = warpgroup_mma_wait(num_outstanding=1, deps=(first,))
        gl.thread_barrier()
        mbarrier.arrive(empty.index(step % STAGES), count=1)
        acc = _promote(part, tokens0, weight0, acc, SWAP)
        part = warpgroup_mma_wait(num_outstanding=0, deps=(second,))
        gl.thread_barrier()
        mbarrier.arrive(empty.index((step + 1) % STAGES), count=1)
        acc = _promote(part, tokens1, weight1, acc, SWAP)
        tokens0, weight0, tokens1, weight1 = tokens2, weight2, tokens3, weight3
        tokens2, weight2, tokens3, weight3 = next0, next_weight0, next1, next_weight1
        step += 2
    if blocks % 2 == 1:
        part = warpgroup_mma_wait(num_outstanding=0, deps=(_block(rings, ready, step, CONSUMERS, STAGES, COLS, ME),))
        gl.thread_barrier()
        mbarrier.arrive(empty.index(step % STAGES), count=1)
        acc = _promote(part, tokens0, weight0, acc, SWAP)
        step += 1
    return acc, step


@gluon_jit
def _consume(
    out: gl.tensor, rings: gl.tensor, bars: gl.tensor, plan: gl.tensor, scales: gl.tensor, scale_strides: gl.tensor,
    M: gl.tensor, N: gl.tensor, n_end: gl.tensor, K: gl.tensor, stride_m: gl.tensor, stride_n: gl.tensor,
    GROUPED: gl.constexpr, GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, COLS: gl.constexpr,
    COALESCE: gl.constexpr, SWAP: gl.constexpr, ME: gl.constexpr,
) -> None:  # fmt: skip
    """Consumer warp group ME: 64 rows of every tile."""
    x_scale, w_scale = scales
    x_row, x_k, w_expert, w_n, w_k = scale_strides
    TILE: gl.constexpr = 64 * CONSUMERS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 32])
    num_m = row_tiles(plan, M, TILE, GROUPED)
    num_n = gl.cdiv(N, COLS)
    blocks = gl.cdiv(K, 128)
    step = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, num_m, num_n, GROUP)
        row, end, expert = locate(plan, tile_m, M, TILE, GROUPED)
        row += ME * 64
        col = tile_n * COLS
        if SWAP:
            token = col + gl.arange(0, COLS, layout=gl.SliceLayout(0, layout))
            there = token < n_end
            weight_at = w_scale + (row // 128) * w_n
        else:
            token = row + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
            there = token < end
            weight_at = w_scale + expert * w_expert + (col // 128) * w_n
        token_at = x_scale + token.to(gl.int64) * x_row
        acc, step = _accumulate(
            rings, bars, step, token_at, weight_at, there, blocks, x_k, w_k, CONSUMERS, STAGES, COLS, SWAP, ME
        )
        limit = n_end
        if COALESCE:
            limit = N
        store_tile(out, stride_m, stride_n, acc, row, col, end, limit, COALESCE, 4)


@gluon_jit(do_not_specialize=["M", "n_end"])
def fp8_kernel(
    a_desc: gl.tensor, b_desc: gl.tensor, out: gl.tensor, plan: gl.tensor, x_scale: gl.tensor, w_scale: gl.tensor,
    x_row: gl.tensor, x_k: gl.tensor, w_expert: gl.tensor, w_n: gl.tensor, w_k: gl.tensor, M: gl.tensor, N: gl.tensor,
    n_end: gl.tensor, K: gl.tensor, stride_m: gl.tensor, stride_n: gl.tensor,
    GROUPED: gl.constexpr, GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, COLS: gl.constexpr,
    COALESCE: gl.constexpr, SWAP: gl.constexpr,
) -> None:  # fmt: skip
    """C[M, N] = A[M, K] B[N, K]^T with block scales: A the tokens and B the weights, or with SWAP the other way round."""
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES * CONSUMERS, 64, 128], a_desc.layout)
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES, COLS, 128], b_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    gl.thread_barrier()
    grid_release()
    grid_wait()
    rings = (a_ring, b_ring)
    bars = (ready, empty)
    scales = (x_scale, w_scale)
    strides = (x_row, x_k, w_expert, w_n, w_k)
    descs = (a_desc, b_desc)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (out, rings, bars, plan, scales, strides, M, N, n_end, K, stride_m, stride_n, GROUPED, GROUP,
                            CONSUMERS, STAGES, COLS, COALESCE, SWAP, 0)),
                (_consume, (out, rings, bars, plan, scales, strides, M, N, n_end, K, stride_m, stride_n, GROUPED, GROUP,
                            CONSUMERS, STAGES, COLS, COALESCE, SWAP, 1)),
                (_produce, (descs, rings, bars, plan, M, N, K, GROUPED, GROUP, CONSUMERS, STAGES, COLS)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (out, rings, bars, plan, scales, strides, M, N, n_end, K, stride_m, stride_n, GROUPED, GROUP,
                            CONSUMERS, STAGES, COLS, COALESCE, SWAP, 0)),
                (_produce, (descs, rings, bars, plan, M, N, K, GROUPED, GROUP, CONSUMERS, STAGES, COLS)),
            ],
            [1],
            [24],
        )  # fmt: skip


@jit(do_not_specialize=["M"])
def fp8_portable_kernel(
    x: tl.tensor, w: tl.tensor, out: tl.tensor, plan: tl.tensor, x_scale: tl.tensor, w_scale: tl.tensor, x_row: tl.tensor,
    x_k: tl.tensor, w_expert: tl.tensor, w_n: tl.tensor, w_k: tl.tensor, M: tl.tensor, N: tl.tensor, K: tl.tensor,
    stride_x: tl.tensor, stride_m: tl.tensor, GROUPED: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """The same blocks in the same order where the other kernel does not run; FP8 is widened to fp16, which is exact."""
    num_n = tl.cdiv(N, COLS)
    num_m = tl.load(plan) if GROUPED else tl.cdiv(M, 64)
    tile = tl.program_id(0)
    if tile < num_m * num_n:
        row = (tile // num_n) * 64
        end = M
        expert = 0
        if GROUPED:
            entry = plan + 1 + 3 * (tile // num_n)
            row = tl.load(entry)
            end = tl.load(entry + 1)
            expert = tl.load(entry + 2)
        m = row + tl.arange(0, 64)
        n = (tile % num_n) * COLS + tl.arange(0, COLS)
        m_at = m.to(tl.int64)
        n_at = n.to(tl.int64) + expert * N
        acc = tl.zeros((64, COLS), tl.float32)
        for block in range(tl.cdiv(K, 128)):
            k = block * 128 + tl.arange(0, 128)
            a = tl.load(x + m_at[:, None] * stride_x + k[None, :], mask=(m < end)[:, None] & (k < K)[None, :], other=0.0)
            b = tl.load(w + n_at[None, :] * K + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)
            part = tl.dot(a.to(tl.float16), b.to(tl.float16))
            scale = tl.load(x_scale + m_at * x_row + block * x_k, mask=m < end, other=0.0)
            scale = scale * tl.load(w_scale + expert * w_expert + ((tile % num_n) * COLS // 128) * w_n + block * w_k)
            acc = tl.fma(part, tl.zeros_like(part) + scale[:, None], acc)
        tl.store(
            out + m_at[:, None] * stride_m + n[None, :],
            acc.to(out.dtype.element_ty),
            mask=(m < end)[:, None] & (n < N)[None, :],
        )


@jit
def quantize_kernel(
    x: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    stride: tl.tensor,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Program (row, TILE blocks of 128): scale = largest magnitude / 448, value = x / scale rounded to e4m3."""
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    there = (block < BLOCKS)[:, None]
    v = tl.load(x + row * stride + column, mask=there, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(v), 1)
    scale = tl.where(largest > 0, tl.div_rn(largest, tl.zeros_like(largest) + 448.0), 1.0)
    scaled = tl.div_rn(v, tl.zeros_like(v) + scale[:, None])
    tl.store(values + row * (BLOCKS * 128) + column, scaled.to(values.dtype.element_ty), mask=there)
    tl.store(scales + row * BLOCKS + block, scale, mask=block < BLOCKS)
