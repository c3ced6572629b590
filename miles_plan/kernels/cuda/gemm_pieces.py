"""The Hopper matrix kernel for tiles whose width is no power of two: 80, 112, 160 columns, so that few tiles fill a device.

As `gemm_kernel` (one warp loads, one or two warp groups multiply, persistent, a tile stored while the next one begins, the same
order of the sum and so the same bits), for products in half precision that no plan of experts cuts. A sum is a tuple of COUNT pieces
of [64, PIECE]; `wgmma` multiplies them as one. A finished tile leaves piece by piece, each while a step of the next tile runs (DRIP),
so that its way out takes neither the matrix unit's time nor, of a chain, the memory of a whole tile.
"""

from __future__ import annotations

from .gemm_kernel import tile_position
from .gemm_pieces_ring import proceed, start
from .gemm_pieces_tree import eight_leaves
from .gemm_ring import release
from .toolchain import fence_async_shared, gl, gluon_jit, grid_release, grid_wait, mbarrier, tma
from .wgmma import rounded, wait


@gluon_jit
def _produce(
    a_desc: gl.tensor, b_desc: gl.tensor, ring: gl.tensor, bars: gl.tensor, M: gl.tensor, N: gl.tensor, K: gl.tensor,
    GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr,
    LEAVES: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr,
) -> None:  # fmt: skip
    """The producer warp: a stage is the rows of A of each consumer, then the columns' rows of B, all of them 128 bytes long."""
    grid_wait()
    ready, empty = bars
    A_UNITS: gl.constexpr = CONSUMERS * 64 // PIECE
    STAGE_BYTES: gl.constexpr = a_desc.block_type.nbytes * CONSUMERS + b_desc.block_type.nbytes * COUNT
    num_m = gl.cdiv(M, 64 * CONSUMERS)
    num_n = gl.cdiv(N, PIECE * COUNT)
    leaf = K // LEAVES if LEAVES else K
    step = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, num_m, num_n, GROUP)
        row = tile_m * (64 * CONSUMERS)
        col = tile_n * (PIECE * COUNT)
        for first in range(0, K, leaf):
            for k in range(first, first + leaf, 64):
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                bar = ready.index(stage)
                mbarrier.expect(bar, STAGE_BYTES)
                unit = stage * (A_UNITS + COUNT)
                for c in gl.static_range(CONSUMERS):
                    rows = ring.index(unit + c * (64 // PIECE))._reinterpret(a_desc.dtype, [64, 64], a_desc.layout)
                    a_at = [k, row + c * 64] if A_KM else [row + c * 64, k]
                    tma.async_copy_global_to_shared(a_desc, a_at, bar, rows)
                for i in gl.static_range(COUNT):
                    b_at = [k, col + i * PIECE] if B_KN else [col + i * PIECE, k]
                    tma.async_copy_global_to_shared(b_desc, b_at, bar, ring.index(unit + A_UNITS + i))
                step += 1


@gluon_jit
def _rounded(sums: gl.tensor, TYPE: gl.constexpr, COUNT: gl.constexpr) -> gl.tensor:
    """The pieces in the type they are written in."""
    values: gl.tensor = ()
    for i in gl.static_range(COUNT):
        values = values + (rounded(sums[i], TYPE),)
    return values


@gluon_jit
def _write(
    values: gl.tensor, out_desc: gl.tensor, buffers: gl.tensor, row: gl.tensor, col: gl.tensor, FIRST: gl.constexpr,
    PIECE: gl.constexpr, COUNT: gl.constexpr,
) -> None:  # fmt: skip
    """Round a tile and write it through shared memory with TMA, from buffer FIRST upwards."""
    tma.store_wait(pendings=0)
    gl.thread_barrier()
    for i in gl.static_range(COUNT):
        buffers.index(FIRST + i).store(values[i].to(out_desc.dtype))
    fence_async_shared()
    gl.thread_barrier()
    for i in gl.static_range(COUNT):
        tma.async_copy_shared_to_global(out_desc, [row, col + i * PIECE], buffers.index(FIRST + i))


@gluon_jit
def write_piece(
    value: gl.tensor, out_desc: gl.tensor, buffers: gl.tensor, row: gl.tensor, col: gl.tensor, PLACE: gl.constexpr,
    AT_ONCE: gl.constexpr,
) -> None:  # fmt: skip
    """Write one piece through buffer PLACE, one of AT_ONCE that take turns."""
    tma.store_wait(pendings=AT_ONCE - 1)
    gl.thread_barrier()
    buffers.index(PLACE).store(value)
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(out_desc, [row, col], buffers.index(PLACE))


@gluon_jit
def _write_tree(
    right: gl.tensor, out_desc: gl.tensor, buffers: gl.tensor, stash: gl.tensor, row: gl.tensor, col: gl.tensor,
    TYPE: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr, ME: gl.constexpr,
) -> None:  # fmt: skip
    """The last sum of pieces FIRST to LAST - 1 of a tree, written through the memory in which its left half waited."""
    values: gl.tensor = ()
    for i in gl.static_range(FIRST, LAST):
        left = stash.index(ME * COUNT + i).load(right[i].type.layout)
        values = values + (rounded(left + right[i], TYPE),)
    gl.thread_barrier()
    for i in gl.static_range(FIRST, LAST):
        buffers.index(2 * (ME * COUNT + i)).store(values[i - FIRST])
    fence_async_shared()
    gl.thread_barrier()
    for i in gl.static_range(FIRST, LAST):
        tma.async_copy_shared_to_global(out_desc, [row, col + i * PIECE], buffers.index(2 * (ME * COUNT + i)))


@gluon_jit
def _consume(
    out_desc: gl.tensor, bars: gl.tensor, buffers: gl.tensor, stash: gl.tensor, M: gl.tensor, N: gl.tensor, K: gl.tensor,
    GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr,
    LEAVES: gl.constexpr, TAIL: gl.constexpr, EACH: gl.constexpr, DRIP: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr, ME: gl.constexpr,
) -> None:  # fmt: skip
    """Consumer warp group ME: its 64 rows of every tile this program walks, each written during the next unless a tree's are written
    whole."""
    grid_wait()
    TYPE: gl.constexpr = out_desc.dtype  # the operands' too
    FIRST: gl.constexpr = ME * COUNT
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    zero = (gl.zeros((64, PIECE), gl.float32, layout),) * COUNT
    num_m = gl.cdiv(M, 64 * CONSUMERS)
    num_n = gl.cdiv(N, PIECE * COUNT)
    steps = K // (LEAVES * 64) if LEAVES else gl.cdiv(K, 64)
    step = 0
    # Before the first tile there is nothing to write: rows outside the matrix stand for it.
    done = (gl.zeros((64, PIECE), TYPE, layout),) * COUNT
    right = (gl.zeros((64, PIECE), gl.float32, layout),) * COUNT
    done_row = gl.cdiv(M, 64) * 64
    done_col = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, num_m, num_n, GROUP)
        row = tile_m * (64 * CONSUMERS) + ME * 64
        col = tile_n * (PIECE * COUNT)
        sums = start(zero, bars[0], step, True, 4, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
        sums = wait(sums, 1)  # waits for nothing: one group may be in flight
        step += 1
        if LEAVES:
            if DRIP:
                for first in gl.static_range(0, COUNT, EACH):
                    sums = start(sums, bars[0], step, False, 4, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
                    _write_tree(
                        right, out_desc, buffers, stash, done_row, done_col, TYPE, PIECE, COUNT, first,
                        min(first + EACH, COUNT), ME,
                    )  # fmt: skip
                    sums = wait(sums, 1)
                    release(bars[1], step - 1, STAGES)
                    step += 1
            right, step = eight_leaves(
                sums, zero, bars, stash, step, 1 + ((COUNT + EACH - 1) // EACH if DRIP else 0), steps, TAIL, EACH, TYPE,
                CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME,
            )  # fmt: skip
            if DRIP:
                done_row = row
                done_col = col
            else:
                _write_tree(right, out_desc, buffers, stash, row, col, TYPE, PIECE, COUNT, 0, COUNT, ME)
        else:
            if DRIP:
                for i in gl.static_range(COUNT):
                    sums = start(sums, bars[0], step, False, 4, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
                    write_piece(done[i], out_desc, buffers, done_row, done_col + i * PIECE, ME * DRIP + i % DRIP, DRIP)
                    sums = wait(sums, 1)
                    release(bars[1], step - 1, STAGES)
                    step += 1
            elif tile >= gl.num_programs(0):
                _write(done, out_desc, buffers, done_row, done_col, FIRST, PIECE, COUNT)
            sums, step = proceed(
                sums, bars, step, steps - 1 - (COUNT if DRIP else 0), TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME
            )
            sums = wait(sums, 0)
            release(bars[1], step - 1, STAGES)
            done = _rounded(sums, TYPE, COUNT)
            done_row = row
            done_col = col
    if LEAVES:
        if DRIP:
            _write_tree(right, out_desc, buffers, stash, done_row, done_col, TYPE, PIECE, COUNT, 0, COUNT, ME)
    elif DRIP:
        for i in gl.static_range(COUNT):
            write_piece(done[i], out_desc, buffers, done_row, done_col + i * PIECE, ME * DRIP + i % DRIP, DRIP)
    else:
        _write(done, out_desc, buffers, done_row, done_col, FIRST, PIECE, COUNT)
    tma.store_wait(pendings=0)


@gluon_jit
def _consume_first(
    out_desc: gl.tensor, bars: gl.tensor, buffers: gl.tensor, stash: gl.tensor, M: gl.tensor, N: gl.tensor, K: gl.tensor,
    GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr,
    LEAVES: gl.constexpr, TAIL: gl.constexpr, EACH: gl.constexpr, DRIP: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr,
) -> None:  # fmt: skip
    """The first warp group's entry."""
    _consume(
        out_desc, bars, buffers, stash, M, N, K, GROUP, CONSUMERS, STAGES, PIECE, COUNT, LEAVES, TAIL, EACH, DRIP, A_KM, B_KN, 0
    )


@gluon_jit
def _consume_second(
    out_desc: gl.tensor, bars: gl.tensor, buffers: gl.tensor, stash: gl.tensor, M: gl.tensor, N: gl.tensor, K: gl.tensor,
    GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr,
    LEAVES: gl.constexpr, TAIL: gl.constexpr, EACH: gl.constexpr, DRIP: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr,
) -> None:  # fmt: skip
    """The second warp group's entry."""
    _consume(
        out_desc, bars, buffers, stash, M, N, K, GROUP, CONSUMERS, STAGES, PIECE, COUNT, LEAVES, TAIL, EACH, DRIP, A_KM, B_KN, 1
    )


@gluon_jit(do_not_specialize=["M"])
def gemm_pieces_kernel(
    a_desc: gl.tensor, b_desc: gl.tensor, out_desc: gl.tensor,
    M: gl.tensor, N: gl.tensor, K: gl.tensor, GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    PIECE: gl.constexpr, COUNT: gl.constexpr, LEAVES: gl.constexpr, TAIL: gl.constexpr, EACH: gl.constexpr, DRIP: gl.constexpr, A_KM: gl.constexpr,
    B_KN: gl.constexpr, RELEASE: gl.constexpr,
) -> None:  # fmt: skip
    """C[M, N] = A[M, K] B[N, K]^T in the operands' dtype; boxes [64, 64] of A, [PIECE, 64] of B, [64, PIECE] of C. With A_KM, A lies as
    [K, M]; with B_KN, B as [K, N], PIECE is 64 and the boxes are [64, 64]. LEAVES: 0 or 8. TAIL: k16 steps of a leaf beyond its last
    whole stage. EACH: pieces of a tree that move while one step runs; COUNT of them need fewer steps than a leaf has. DRIP: buffers of
    a chain's pieces for each warp group, which needs more steps than pieces, or for a tree not 0; 0 writes a tile whole."""
    ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES * (CONSUMERS * 64 // PIECE + COUNT), PIECE, 64], b_desc.layout)
    if LEAVES:
        stash_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, PIECE], gl.float32)
        stash = gl.allocate_shared_memory(gl.float32, [CONSUMERS * COUNT, 64, PIECE], stash_layout)
        buffers = stash._reinterpret(out_desc.dtype, [2 * CONSUMERS * COUNT, 64, PIECE], out_desc.layout)
    else:
        buffers = gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS * (DRIP if DRIP else COUNT), 64, PIECE], out_desc.layout)
        stash = buffers
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    gl.thread_barrier()
    if RELEASE:
        grid_release()
    bars = (ready, empty)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume_first, (out_desc, bars, buffers, stash, M, N, K, GROUP, CONSUMERS, STAGES, PIECE, COUNT, LEAVES, TAIL,
                                  EACH, DRIP, A_KM, B_KN)),
                (_consume_second, (out_desc, bars, buffers, stash, M, N, K, GROUP, CONSUMERS, STAGES, PIECE, COUNT, LEAVES, TAIL,
                                  EACH, DRIP, A_KM, B_KN)),
                (_produce, (a_desc, b_desc, ring, bars, M, N, K, GROUP, CONSUMERS, STAGES, PIECE, COUNT, LEAVES, A_KM, B_KN)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume_first, (out_desc, bars, buffers, stash, M, N, K, GROUP, CONSUMERS, STAGES, PIECE, COUNT, LEAVES, TAIL,
                                  EACH, DRIP, A_KM, B_KN)),
                (_produce, (a_desc, b_desc, ring, bars, M, N, K, GROUP, CONSUMERS, STAGES, PIECE, COUNT, LEAVES, A_KM, B_KN)),
            ],
            [1],
            [24],
        )  # fmt: skip
