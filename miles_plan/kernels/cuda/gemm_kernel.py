"""The one Hopper matrix kernel that chain, tree, data-gradient and weight-gradient products share.

Warp-specialised Gluon kernel: one producer warp streams tiles through a ring of shared-memory stages with TMA, one or two
consumer warp groups run `wgmma` on them, each on its own `rows` of the tile. Persistent: a program walks several tiles, and
where registers allow it stores a tile while the next one's first products are under way. Each role waits for the kernel before
by itself, so that the roles are handed out while that one ends.

Order of the sum, for every output element, whatever the tile: products enter one float32 accumulator sixteen at a time in
ascending K (a `wgmma` k16 step adds its sixteen products and the accumulator in one fused, truncated sum, so neither the tile
nor which operand is called A can show; see `tensor_core`). With `LEAVES` > 0 the accumulator restarts at each of LEAVES equal
slices of K and the slices are added as a balanced binary tree, which is what a tensor-parallel shard can reproduce.

A value outside a matrix is loaded as zero and adds nothing, so ragged M, N and K need no second path.
"""

from __future__ import annotations

from .gemm_ring import begin, caught_up, drain, proceed
from .gemm_store import write
from .gemm_tree import leaf_tree
from .toolchain import fence_async_shared, gl, gluon_jit, grid_release, grid_wait, mbarrier, tma


@gluon_jit
def tile_position(tile: gl.tensor, num_m: gl.tensor, num_n: gl.tensor, GROUP: gl.constexpr) -> gl.tensor:
    """Walk GROUP row tiles down before the next column tile, so that a wave of programs shares its operands in L2."""
    width = GROUP * num_n
    first = (tile // width) * GROUP
    size = min(num_m - first, GROUP)
    local = tile % width
    return first + local % size, local // size


@gluon_jit
def inside(place: gl.tensor, size: gl.tensor, TILE: gl.constexpr) -> gl.tensor:
    """Where a tile of TILE rows or columns begins so that it ends inside the matrix, if the matrix is that large.

    The copy engine takes longer to fill what lies outside with zeros than to load it: half a tile outside cost a product up to
    45 %. Of the rows that two tiles then share both write the same bits.
    """
    return max(min(place, size - TILE), 0)


@gluon_jit
def locate(plan: gl.tensor, tile_m: gl.tensor, M: gl.tensor, TILE: gl.constexpr, GROUPED: gl.constexpr) -> gl.tensor:
    """Row tile `tile_m`: its first row, the row it must stop before, and the expert whose weights it meets."""
    row = inside(tile_m * TILE, M, TILE)
    end = M
    expert = 0
    if GROUPED:
        entry = plan + 1 + 3 * tile_m
        row = gl.load(entry)
        end = gl.load(entry + 1)
        expert = gl.load(entry + 2)
    return row, end, expert


@gluon_jit
def row_tiles(plan: gl.tensor, M: gl.tensor, TILE: gl.constexpr, GROUPED: gl.constexpr) -> gl.tensor:
    """How many row tiles there are."""
    tiles = gl.cdiv(M, TILE)
    if GROUPED:
        tiles = gl.load(plan)
    return tiles


@gluon_jit
def _produce(
    descs: gl.tensor, rings: gl.tensor, bars: gl.tensor, plan: gl.tensor, M: gl.tensor, N: gl.tensor, n_end: gl.tensor,
    K: gl.tensor, GROUPED: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr, GROUP: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, EXTRA: gl.constexpr, DEPTH: gl.constexpr,
) -> None:  # fmt: skip
    """The producer warp: fill the next free stage of the ring with the A rows of each consumer and the shared B columns."""
    grid_wait()
    a_desc, b_desc, e_desc = descs
    a_ring, b_ring, e_ring = rings
    ready, empty = bars
    STAGE_BYTES: gl.constexpr = (
        a_desc.block_type.nbytes * CONSUMERS + b_desc.block_type.nbytes + (e_desc.block_type.nbytes if EXTRA else 0)
    )
    num_n = gl.cdiv(N, COLS + EXTRA)
    num_m = row_tiles(plan, M, ROWS * CONSUMERS, GROUPED)
    step = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, num_m, num_n, GROUP)
        row, _, expert = locate(plan, tile_m, M, ROWS * CONSUMERS, GROUPED)
        col = inside(tile_n * (COLS + EXTRA), n_end, COLS + EXTRA)
        b_row = expert * N + col
        b_k = expert * K
        for k in range(0, K, DEPTH):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = ready.index(stage)
            mbarrier.expect(bar, STAGE_BYTES)
            for c in gl.static_range(CONSUMERS):
                a_at = [k, row + c * ROWS] if A_KM else [row + c * ROWS, k]
                tma.async_copy_global_to_shared(a_desc, a_at, bar, a_ring.index(stage * CONSUMERS + c))
            b_at = [b_k + k, col] if B_KN else [b_row, k]
            tma.async_copy_global_to_shared(b_desc, b_at, bar, b_ring.index(stage))
            if EXTRA:
                e_at = [b_k + k, col + COLS] if B_KN else [b_row + COLS, k]
                tma.async_copy_global_to_shared(e_desc, e_at, bar, e_ring.index(stage))
            step += 1


@gluon_jit
def _consume(
    outs: gl.tensor, rings: gl.tensor, bars: gl.tensor, buffers: gl.tensor, plan: gl.tensor, M: gl.tensor, N: gl.tensor,
    n_end: gl.tensor, K: gl.tensor, stride_m: gl.tensor, stride_n: gl.tensor, GROUPED: gl.constexpr, A_KM: gl.constexpr,
    B_KN: gl.constexpr, GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
    COLS: gl.constexpr, EXTRA: gl.constexpr, DEPTH: gl.constexpr, LEAVES: gl.constexpr, STASH: gl.constexpr,
    STORE: gl.constexpr, AHEAD: gl.constexpr, DEFER: gl.constexpr, ME: gl.constexpr,
) -> None:  # fmt: skip
    """Consumer warp group ME: its ROWS rows of every tile this program walks; with DEFER each is written during the next."""
    grid_wait()
    c_buffers, e_buffers, stash = buffers
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    COLS_E: gl.constexpr = max(EXTRA, 8)
    layout_e: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS_E, 16])
    num_m = row_tiles(plan, M, ROWS * CONSUMERS, GROUPED)
    num_n = gl.cdiv(N, COLS + EXTRA)
    columns = N if STORE == 2 else n_end  # whole rows need what the compiler knows of N; see `gemm_kernel` on n_end
    steps = gl.cdiv(K, DEPTH)
    step = 0
    # Before the first tile there is nothing to write: a place outside the matrix stands for it.
    done = gl.zeros((ROWS, COLS), gl.float32, layout)
    done_e = gl.zeros((ROWS, COLS_E), gl.float32, layout_e)
    done_row = gl.cdiv(M, ROWS * CONSUMERS) * (ROWS * CONSUMERS)
    done_col = 0
    done_end = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, num_m, num_n, GROUP)
        row, end, _ = locate(plan, tile_m, M, ROWS * CONSUMERS, GROUPED)
        row += ME * ROWS
        col = inside(tile_n * (COLS + EXTRA), columns, COLS + EXTRA)
        acc, acc_e, step = begin(rings, bars, step, A_KM, B_KN, CONSUMERS, STAGES, ROWS, COLS, EXTRA, AHEAD, ME)
        if DEFER:
            write(
                outs, c_buffers, e_buffers, done, done_e, done_row, done_col, done_end, N, n_end, stride_m, stride_n, COLS,
                EXTRA, STASH, STORE, ME,
            )  # fmt: skip
        if LEAVES:
            acc, step = leaf_tree(
                acc, rings, bars, stash, step, K // (LEAVES * DEPTH), A_KM, B_KN, CONSUMERS, STAGES, ROWS, COLS, LEAVES,
                STASH, STORE, ME,
            )  # fmt: skip
        else:
            if AHEAD == 2:
                acc, acc_e = caught_up(acc, acc_e, bars, step, STAGES, EXTRA)
            acc, acc_e, step = proceed(acc, acc_e, rings, bars, step, steps - AHEAD, A_KM, B_KN, CONSUMERS, STAGES, EXTRA, ME)
            acc, acc_e = drain(acc, acc_e, bars, step, STAGES, EXTRA)
        if DEFER:
            done = acc
            done_e = acc_e
            done_row = row
            done_col = col
            done_end = end
        else:
            write(
                outs, c_buffers, e_buffers, acc, acc_e, row, col, end, N, n_end, stride_m, stride_n, COLS, EXTRA, STASH,
                STORE, ME,
            )  # fmt: skip
    if DEFER:
        write(
            outs, c_buffers, e_buffers, done, done_e, done_row, done_col, done_end, N, n_end, stride_m, stride_n, COLS, EXTRA,
            STASH, STORE, ME,
        )  # fmt: skip
    if STORE == 1:
        tma.store_wait(pendings=0)


@gluon_jit
def _consume_first(
    outs: gl.tensor, rings: gl.tensor, bars: gl.tensor, buffers: gl.tensor, plan: gl.tensor, M: gl.tensor, N: gl.tensor,
    n_end: gl.tensor, K: gl.tensor, stride_m: gl.tensor, stride_n: gl.tensor, GROUPED: gl.constexpr, A_KM: gl.constexpr,
    B_KN: gl.constexpr, GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
    COLS: gl.constexpr, EXTRA: gl.constexpr, DEPTH: gl.constexpr, LEAVES: gl.constexpr, STASH: gl.constexpr,
    STORE: gl.constexpr, AHEAD: gl.constexpr, DEFER: gl.constexpr,
) -> None:  # fmt: skip
    """The first warp group's entry."""
    _consume(
        outs, rings, bars, buffers, plan, M, N, n_end, K, stride_m, stride_n, GROUPED, A_KM, B_KN, GROUP, CONSUMERS, STAGES,
        ROWS, COLS, EXTRA, DEPTH, LEAVES, STASH, STORE, AHEAD, DEFER, 0,
    )  # fmt: skip


@gluon_jit
def _consume_second(
    outs: gl.tensor, rings: gl.tensor, bars: gl.tensor, buffers: gl.tensor, plan: gl.tensor, M: gl.tensor, N: gl.tensor,
    n_end: gl.tensor, K: gl.tensor, stride_m: gl.tensor, stride_n: gl.tensor, GROUPED: gl.constexpr, A_KM: gl.constexpr,
    B_KN: gl.constexpr, GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
    COLS: gl.constexpr, EXTRA: gl.constexpr, DEPTH: gl.constexpr, LEAVES: gl.constexpr, STASH: gl.constexpr,
    STORE: gl.constexpr, AHEAD: gl.constexpr, DEFER: gl.constexpr,
) -> None:  # fmt: skip
    """The second warp group's entry."""
    _consume(
        outs, rings, bars, buffers, plan, M, N, n_end, K, stride_m, stride_n, GROUPED, A_KM, B_KN, GROUP, CONSUMERS, STAGES,
        ROWS, COLS, EXTRA, DEPTH, LEAVES, STASH, STORE, AHEAD, DEFER, 1,
    )  # fmt: skip


@gluon_jit(do_not_specialize=["M", "n_end"])
def gemm_kernel(
    a_desc: gl.tensor, b_desc: gl.tensor, e_desc: gl.tensor, out: gl.tensor, out_e: gl.tensor, plan: gl.tensor,
    M: gl.tensor, N: gl.tensor,
    n_end: gl.tensor, K: gl.tensor, stride_m: gl.tensor, stride_n: gl.tensor, GROUPED: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr, GROUP: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, EXTRA: gl.constexpr,
    DEPTH: gl.constexpr, LEAVES: gl.constexpr, STASH: gl.constexpr, STORE: gl.constexpr,
    AHEAD: gl.constexpr, DEFER: gl.constexpr, RELEASE: gl.constexpr,
) -> None:  # fmt: skip
    """C[M, N] = A[M, K] B[N, K]^T; A may lie as [K, M] (A_KM) and B as [K, N] (B_KN). `n_end` is N again:
    N itself is rounded up to a whole tile where it counts tokens, because a compiler that knows N is 1 drops unused columns of the
    accumulator and then waits for every step."""
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES * CONSUMERS] + a_desc.block_shape, a_desc.layout)
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES] + b_desc.block_shape, b_desc.layout)
    e_ring = b_ring
    if EXTRA:
        e_ring = gl.allocate_shared_memory(e_desc.dtype, [STAGES] + e_desc.block_shape, e_desc.layout)
    stash = b_ring
    if STASH:
        stash_layout: gl.constexpr = gl.NVMMASharedLayout(128, 32)
        stash = gl.allocate_shared_memory(gl.float32, [CONSUMERS, ROWS, COLS], stash_layout)
    c_buffers = b_ring
    e_buffers = b_ring
    if STORE == 1:
        if STASH:  # a finished tile leaves through the memory of its own stash
            c_buffers = stash._reinterpret(out.dtype, [2 * CONSUMERS, ROWS, COLS], out.layout)
        else:
            c_buffers = gl.allocate_shared_memory(out.dtype, [CONSUMERS, ROWS, COLS], out.layout)
        e_buffers = c_buffers
        if EXTRA and EXTRA != COLS:
            e_buffers = gl.allocate_shared_memory(out_e.dtype, [CONSUMERS, ROWS, EXTRA], out_e.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    gl.thread_barrier()
    if RELEASE:
        grid_release()
    rings = (a_ring, b_ring, e_ring)
    bars = (ready, empty)
    outs = (out, out_e)
    buffers = (c_buffers, e_buffers, stash)
    descs = (a_desc, b_desc, e_desc)
    # A tuple bound to a name would lose its constexprs, so the argument lists are spelled out.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume_first, (outs, rings, bars, buffers, plan, M, N, n_end, K, stride_m, stride_n, GROUPED, A_KM, B_KN, GROUP,
                                  CONSUMERS, STAGES, ROWS, COLS, EXTRA, DEPTH, LEAVES, STASH, STORE, AHEAD, DEFER)),
                (_consume_second, (outs, rings, bars, buffers, plan, M, N, n_end, K, stride_m, stride_n, GROUPED, A_KM, B_KN, GROUP,
                                  CONSUMERS, STAGES, ROWS, COLS, EXTRA, DEPTH, LEAVES, STASH, STORE, AHEAD, DEFER)),
                (_produce, (descs, rings, bars, plan, M, N, n_end, K, GROUPED, A_KM, B_KN, GROUP, CONSUMERS, STAGES, ROWS, COLS, EXTRA,
                            DEPTH)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume_first, (outs, rings, bars, buffers, plan, M, N, n_end, K, stride_m, stride_n, GROUPED, A_KM, B_KN, GROUP,
                                  CONSUMERS, STAGES, ROWS, COLS, EXTRA, DEPTH, LEAVES, STASH, STORE, AHEAD, DEFER)),
                (_produce, (descs, rings, bars, plan, M, N, n_end, K, GROUPED, A_KM, B_KN, GROUP, CONSUMERS, STAGES, ROWS, COLS, EXTRA,
                            DEPTH)),
            ],
            [1],
            [24],
        )  # fmt: skip
