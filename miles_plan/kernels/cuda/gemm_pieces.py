"""The Hopper matrix kernel for tiles whose width is no power of two: 80, 112, 160 columns, so that few tiles fill a device.

As `gemm_kernel` (one warp loads, one or two warp groups multiply, persistent, the same order of the sum and so the same bits), for
products in half precision that no plan of experts cuts. A sum is a tuple of COUNT pieces of [64, PIECE]; `wgmma` multiplies them as
one. A finished tile leaves from registers, while the next one's first products run if another follows, so that all of shared memory
but a tree's stash is the ring's.

With SWAP the weights are A and the tokens B: 200 tokens are then one tile of 208 columns, where rows come by 64.
"""

from __future__ import annotations

from .gemm_kernel import inside, tile_position
from .gemm_pieces_ring import proceed, start
from .gemm_pieces_tree import eight_leaves, in_half, own_places
from .gemm_ring import release
from .toolchain import fence_async_shared, gl, gluon_jit, grid_release, grid_wait, mbarrier, tma
from .wgmma import shared_base, wait
from .whole_columns import last_piece, write_columns
from .whole_rows import write_rows


@gluon_jit
def _first_of(
    tile_m: gl.tensor, tile_n: gl.tensor, M: gl.tensor, N: gl.tensor, CONSUMERS: gl.constexpr, WIDTH: gl.constexpr,
    ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The first of the 64 rows of a tile that are warp group ME's, and the tile's first column. Each 64 rows are `inside` by themselves."""
    return inside(tile_m * (64 * CONSUMERS) + ME * 64, M, 64), inside(tile_n * WIDTH, N, WIDTH)


@gluon_jit
def _write(
    values: gl.tensor, out: gl.tensor, stride: gl.tensor, row: gl.tensor, col: gl.tensor, M: gl.tensor, N: gl.tensor,
    SWAP: gl.constexpr,
) -> None:  # fmt: skip
    """Write a warp group's pieces, as rows of C or, with SWAP, of its transpose."""
    if SWAP:
        write_columns(values, out, stride, row, col, M, N)
    else:
        write_rows(values, out, stride, row, col, M, N)


@gluon_jit
def _produce(
    a_desc: gl.tensor, b_desc: gl.tensor, ring: gl.tensor, bars: gl.tensor, M: gl.tensor, N: gl.tensor, K: gl.tensor,
    GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr,
    LEAVES: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr, SWAP: gl.constexpr,
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
        row, col = _first_of(tile_m, tile_n, M, N, CONSUMERS, PIECE * COUNT, 0)
        second, _ = _first_of(tile_m, tile_n, M, N, CONSUMERS, PIECE * COUNT, 1)
        last = last_piece(col, N, PIECE, COUNT)
        for first in range(0, K, leaf):
            for k in range(first, first + leaf, 64):
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                bar = ready.index(stage)
                mbarrier.expect(bar, STAGE_BYTES)
                unit = stage * (A_UNITS + COUNT)
                for c in gl.static_range(CONSUMERS):
                    rows = ring.index(unit + c * (64 // PIECE))._reinterpret(a_desc.dtype, [64, 64], a_desc.layout)
                    line = second if c else row
                    a_at = [k, line] if A_KM else [line, k]
                    tma.async_copy_global_to_shared(a_desc, a_at, bar, rows)
                for i in gl.static_range(COUNT):
                    line = last if SWAP and i + 1 == COUNT else col + i * PIECE
                    b_at = [k, line] if B_KN else [line, k]
                    tma.async_copy_global_to_shared(b_desc, b_at, bar, ring.index(unit + A_UNITS + i))
                step += 1


@gluon_jit
def _consume(
    out: gl.tensor, bars: gl.tensor, M: gl.tensor, N: gl.tensor, K: gl.tensor, stride: gl.tensor,
    GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr,
    LEAVES: gl.constexpr, TAIL: gl.constexpr, STASHED: gl.constexpr, PAIRS: gl.constexpr, DRIP: gl.constexpr,
    TYPE: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr, SWAP: gl.constexpr, ME: gl.constexpr,
) -> None:  # fmt: skip
    """Consumer warp group ME: its 64 rows of every tile this program walks, each written while the next one's first step runs or, with
    DRIP, a piece at each of its next steps."""
    grid_wait()
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    zero = (gl.zeros((64, PIECE), gl.float32, layout),) * COUNT
    STASH: gl.constexpr = STAGES * (CONSUMERS * 64 + PIECE * COUNT) * 128 + ME * (STASHED * PIECE * 256)
    place = own_places(shared_base() + STASH, PIECE, STASHED, layout)
    num_m = gl.cdiv(M, 64 * CONSUMERS)
    num_n = gl.cdiv(N, PIECE * COUNT)
    done = (gl.zeros((64, PIECE), TYPE, layout),) * COUNT
    row = 0
    col = 0
    step = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        sums = start(zero, bars[0], step, True, 4, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
        sums = wait(sums, 1)  # waits for nothing: one group may be in flight
        step += 1
        for i in gl.static_range(DRIP):
            sums = start(sums, bars[0], step, False, 4, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
            if tile >= gl.num_programs(0):
                write_rows((done[i],), out, stride, row, col + i * PIECE, M, N)
            sums = wait(sums, 1)
            release(bars[1], step - 1, STAGES)
            step += 1
        if not DRIP:
            if tile >= gl.num_programs(0):
                _write(done, out, stride, row, col, M, N, SWAP)
        tile_m, tile_n = tile_position(tile, num_m, num_n, GROUP)
        row, col = _first_of(tile_m, tile_n, M, N, CONSUMERS, PIECE * COUNT, ME)
        if LEAVES:
            done, step = eight_leaves(
                sums, zero, bars, place, step, K // (LEAVES * 64), STASHED, PAIRS, TAIL, TYPE, CONSUMERS, STAGES, PIECE, COUNT,
                A_KM, B_KN, ME,
            )  # fmt: skip
        else:
            sums, step = proceed(
                sums, bars, step, gl.cdiv(K, 64) - 1 - DRIP, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME
            )
            sums = wait(sums, 0)
            release(bars[1], step - 1, STAGES)
            done = in_half(sums, TYPE)
    _write(done, out, stride, row, col, M, N, SWAP)


@gluon_jit
def _consume_first(
    out: gl.tensor, bars: gl.tensor, M: gl.tensor, N: gl.tensor, K: gl.tensor, stride: gl.tensor,
    GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr,
    LEAVES: gl.constexpr, TAIL: gl.constexpr, STASHED: gl.constexpr, PAIRS: gl.constexpr, DRIP: gl.constexpr,
    TYPE: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr, SWAP: gl.constexpr,
) -> None:  # fmt: skip
    """The first warp group's entry."""
    _consume(
        out, bars, M, N, K, stride, GROUP, CONSUMERS, STAGES, PIECE, COUNT, LEAVES, TAIL, STASHED, PAIRS, DRIP, TYPE, A_KM,
        B_KN, SWAP, 0,
    )  # fmt: skip


@gluon_jit
def _consume_second(
    out: gl.tensor, bars: gl.tensor, M: gl.tensor, N: gl.tensor, K: gl.tensor, stride: gl.tensor,
    GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr,
    LEAVES: gl.constexpr, TAIL: gl.constexpr, STASHED: gl.constexpr, PAIRS: gl.constexpr, DRIP: gl.constexpr,
    TYPE: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr, SWAP: gl.constexpr,
) -> None:  # fmt: skip
    """The second warp group's entry."""
    _consume(
        out, bars, M, N, K, stride, GROUP, CONSUMERS, STAGES, PIECE, COUNT, LEAVES, TAIL, STASHED, PAIRS, DRIP, TYPE, A_KM,
        B_KN, SWAP, 1,
    )  # fmt: skip


@gluon_jit(do_not_specialize=["M", "N"])
def gemm_pieces_kernel(
    a_desc: gl.tensor, b_desc: gl.tensor, out: gl.tensor, M: gl.tensor, N: gl.tensor, K: gl.tensor, stride: gl.tensor,
    GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr,
    LEAVES: gl.constexpr, TAIL: gl.constexpr, STASHED: gl.constexpr, PAIRS: gl.constexpr, DRIP: gl.constexpr,
    A_KM: gl.constexpr, B_KN: gl.constexpr, SWAP: gl.constexpr, RELEASE: gl.constexpr,
) -> None:  # fmt: skip
    """C[M, N] = A[M, K] B[N, K]^T in the operands' dtype, C's rows `stride` elements apart; boxes [64, 64] of A, [PIECE, 64] of B. With
    A_KM, A lies as [K, M]; with B_KN, B as [K, N], PIECE is 64 and the boxes are [64, 64]. LEAVES: 0 or 8. TAIL: k16 steps of a leaf
    beyond its last whole stage. STASHED, PAIRS: see `gemm_pieces_tree`. DRIP: as many as a chain has pieces, of which one then leaves at
    each of the next tile's steps (see `tuning.drips`), or 0, and all leave at once. SWAP: C is written transposed, its
    columns' elements side by side and `stride` apart from the next column's."""
    TYPE: gl.constexpr = b_desc.dtype
    UNITS: gl.constexpr = CONSUMERS * 64 // PIECE + COUNT  # of [PIECE, 64] in a stage; a float32 piece takes two
    ring = gl.allocate_shared_memory(TYPE, [STAGES * UNITS + 2 * CONSUMERS * STASHED, PIECE, 64], b_desc.layout)
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
                (_consume_first, (out, bars, M, N, K, stride, GROUP, CONSUMERS, STAGES, PIECE, COUNT, LEAVES, TAIL,
                                  STASHED, PAIRS, DRIP, TYPE, A_KM, B_KN, SWAP)),
                (_consume_second, (out, bars, M, N, K, stride, GROUP, CONSUMERS, STAGES, PIECE, COUNT, LEAVES, TAIL,
                                  STASHED, PAIRS, DRIP, TYPE, A_KM, B_KN, SWAP)),
                (_produce, (a_desc, b_desc, ring, bars, M, N, K, GROUP, CONSUMERS, STAGES, PIECE, COUNT, LEAVES, A_KM, B_KN,
                            SWAP)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume_first, (out, bars, M, N, K, stride, GROUP, CONSUMERS, STAGES, PIECE, COUNT, LEAVES, TAIL,
                                  STASHED, PAIRS, DRIP, TYPE, A_KM, B_KN, SWAP)),
                (_produce, (a_desc, b_desc, ring, bars, M, N, K, GROUP, CONSUMERS, STAGES, PIECE, COUNT, LEAVES, A_KM, B_KN,
                            SWAP)),
            ],
            [1],
            [24],
        )  # fmt: skip
