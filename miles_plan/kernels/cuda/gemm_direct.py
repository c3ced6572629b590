"""The Hopper matrix kernel for few tokens: no specialised warps, so it starts sooner and two fit a multiprocessor.

One output tile a program. The warps that multiply also start the loads: as soon as a step has left a stage, the tile for
`STAGES - 1` steps later is fetched into it. The order of the sum is the one `gemm_kernel` documents, and so are the bits.
"""

from __future__ import annotations

from .gemm_kernel import inside, tile_position
from .gemm_store import store_tile
from .toolchain import (
    fence_async_shared,
    gl,
    gluon_jit,
    grid_release,
    grid_wait,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon_jit
def _leaf_combine(leaf: gl.tensor, acc: gl.tensor, level0: gl.tensor, level1: gl.tensor, level2: gl.tensor) -> gl.tensor:
    """Carry one leaf into the levels of the tree, as a binary counter carries; `leaf` is not the last one."""
    if leaf & 1:
        acc = level0 + acc
        if leaf & 2:
            level2 = level1 + acc
        else:
            level1 = acc
    else:
        level0 = acc
    return level0, level1, level2


@gluon_jit
def _fetch(
    descs: gl.tensor, rings: gl.tensor, ready: gl.tensor, step: gl.tensor, steps: gl.tensor, row: gl.tensor,
    col: gl.tensor, STAGES: gl.constexpr, DEPTH: gl.constexpr,
) -> None:  # fmt: skip
    """Start the loads of one step into its stage; nothing past the last step."""
    a_desc, b_desc = descs
    a_ring, b_ring = rings
    stage = step % STAGES
    bar = ready.index(stage)
    there = step < steps
    mbarrier.expect(bar, a_desc.block_type.nbytes + b_desc.block_type.nbytes, pred=there)
    tma.async_copy_global_to_shared(a_desc, [row, step * DEPTH], bar, a_ring.index(stage), pred=there)
    tma.async_copy_global_to_shared(b_desc, [col, step * DEPTH], bar, b_ring.index(stage), pred=there)


@gluon_jit
def _chain(
    acc: gl.tensor, descs: gl.tensor, rings: gl.tensor, ready: gl.tensor, first: gl.tensor, last: gl.tensor,
    steps: gl.tensor, row: gl.tensor, col: gl.tensor, STAGES: gl.constexpr, DEPTH: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Steps [first, last) into the accumulator, one `wgmma` group in flight."""
    a_ring, b_ring = rings
    for step in range(first, last):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        acc = warpgroup_mma(a_ring.index(stage), b_ring.index(stage).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        gl.thread_barrier()  # every warp is done with the stage before this one
        _fetch(descs, rings, ready, step + STAGES - 1, steps, row, col, STAGES, DEPTH)
    return warpgroup_mma_wait(num_outstanding=0, deps=(acc,))


@gluon_jit(do_not_specialize=["M", "n_end"])
def gemm_direct_kernel(
    a_desc: gl.tensor, b_desc: gl.tensor, out: gl.tensor, M: gl.tensor,
    N: gl.tensor, n_end: gl.tensor, K: gl.tensor, stride_m: gl.tensor, stride_n: gl.tensor,
    GROUP: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, DEPTH: gl.constexpr,
    LEAVES: gl.constexpr, COALESCE: gl.constexpr, WARPS: gl.constexpr, RELEASE: gl.constexpr,
) -> None:  # fmt: skip
    """C[M, N] = A[M, K] B[N, K]^T, both operands row-major; arguments as `gemm_kernel`'s."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLS, 16])
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES, ROWS, DEPTH], a_desc.layout)
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES, COLS, DEPTH], b_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    descs = (a_desc, b_desc)
    rings = (a_ring, b_ring)
    tile_m, tile_n = tile_position(gl.program_id(0), gl.cdiv(M, ROWS), gl.cdiv(N, COLS), GROUP)
    row = inside(tile_m * ROWS, M, ROWS)
    columns = N if COALESCE else n_end  # whole rows need what the compiler knows of N
    col = inside(tile_n * COLS, columns, COLS)
    if RELEASE:
        grid_release()
    grid_wait()
    steps = gl.cdiv(K, DEPTH)
    for i in gl.static_range(STAGES - 1):
        _fetch(descs, rings, ready, i, steps, row, col, STAGES, DEPTH)
    zero = gl.zeros((ROWS, COLS), gl.float32, layout)
    if LEAVES == 0:
        total = _chain(zero, descs, rings, ready, 0, steps, steps, row, col, STAGES, DEPTH)
    else:
        level0 = zero
        level1 = zero
        level2 = zero
        leaf_steps = steps // LEAVES
        for leaf in range(LEAVES - 1):
            acc = _chain(zero, descs, rings, ready, leaf * leaf_steps, (leaf + 1) * leaf_steps, steps, row, col, STAGES, DEPTH)
            level0, level1, level2 = _leaf_combine(leaf, acc, level0, level1, level2)
        total = _chain(zero, descs, rings, ready, (LEAVES - 1) * leaf_steps, steps, steps, row, col, STAGES, DEPTH)
        if LEAVES >= 2:
            total = level0 + total
        if LEAVES >= 4:
            total = level1 + total
        if LEAVES >= 8:
            total = level2 + total
    if COALESCE:
        gl.thread_barrier()  # the tile is laid out anew in the ring's memory, from which another warp may still multiply
    store_tile(out, stride_m, stride_n, total, row, col, M, columns, COALESCE, WARPS)
