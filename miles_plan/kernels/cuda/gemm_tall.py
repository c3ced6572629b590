"""The Hopper matrix kernel for tiles of 256 rows and up to 192 columns: least traffic from L2 for what it multiplies.

As `gemm_pieces` (widths that are no power of two, the same order of the sum and so the same bits), for chains in half precision; but
each of the two warp groups multiplies two blocks of 64 rows with the same columns. Its sums take all registers, so that a tile leaves,
piece by piece, before the next one begins.
"""

from __future__ import annotations

from .gemm_kernel import tile_position
from .gemm_pieces import write_piece
from .gemm_ring import release
from .toolchain import fence_async_shared, gl, gluon_jit, grid_release, grid_wait, mbarrier, tma
from .wgmma import multiply, rounded, shared_base, wait


@gluon_jit
def _produce(
    a_desc: gl.tensor, b_desc: gl.tensor, ring: gl.tensor, bars: gl.tensor, M: gl.tensor, N: gl.tensor, K: gl.tensor,
    GROUP: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr,
    A_KM: gl.constexpr, B_KN: gl.constexpr,
) -> None:  # fmt: skip
    """The producer warp: a stage is 256 rows of A, then the columns' rows of B, all of them 128 bytes long."""
    grid_wait()
    ready, empty = bars
    A_UNITS: gl.constexpr = 256 // PIECE
    STAGE_BYTES: gl.constexpr = a_desc.block_type.nbytes * 4 + b_desc.block_type.nbytes * COUNT
    num_m = gl.cdiv(M, 256)
    num_n = gl.cdiv(N, PIECE * COUNT)
    step = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, num_m, num_n, GROUP)
        row = tile_m * 256
        col = tile_n * (PIECE * COUNT)
        for k in range(0, K, 64):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = ready.index(stage)
            mbarrier.expect(bar, STAGE_BYTES)
            unit = stage * (A_UNITS + COUNT)
            for c in gl.static_range(4):
                rows = ring.index(unit + c * (64 // PIECE))._reinterpret(a_desc.dtype, [64, 64], a_desc.layout)
                a_at = [k, row + c * 64] if A_KM else [row + c * 64, k]
                tma.async_copy_global_to_shared(a_desc, a_at, bar, rows)
            for i in gl.static_range(COUNT):
                b_at = [k, col + i * PIECE] if B_KN else [col + i * PIECE, k]
                tma.async_copy_global_to_shared(b_desc, b_at, bar, ring.index(unit + A_UNITS + i))
            step += 1


@gluon_jit
def _start(
    upper: gl.tensor, lower: gl.tensor, ready: gl.tensor, step: gl.tensor, FRESH: gl.constexpr, TYPE: gl.constexpr,
    STAGES: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Start the products of one stage, a group for each block of 64 rows; FRESH sums count as zero."""
    stage = step % STAGES
    mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
    place = shared_base() + stage * ((256 + PIECE * COUNT) * 128)
    upper = multiply(upper, place + ME * (128 * 128), place + 256 * 128, FRESH, TYPE, A_KM, B_KN)
    lower = multiply(lower, place + ME * (128 * 128) + 64 * 128, place + 256 * 128, FRESH, TYPE, A_KM, B_KN)
    return upper, lower


@gluon_jit
def _waited(upper: gl.tensor, lower: gl.tensor, COUNT: gl.constexpr, OUTSTANDING: gl.constexpr) -> gl.tensor:
    """Both sums, once at most OUTSTANDING groups are in flight."""
    both = wait(upper + lower, OUTSTANDING)
    first: gl.tensor = ()
    second: gl.tensor = ()
    for i in gl.static_range(COUNT):
        first = first + (both[i],)
        second = second + (both[COUNT + i],)
    return first, second


@gluon_jit
def _consume(
    out_desc: gl.tensor, bars: gl.tensor, buffers: gl.tensor, M: gl.tensor, N: gl.tensor, K: gl.tensor,
    GROUP: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr, BUFFERS: gl.constexpr,
    A_KM: gl.constexpr, B_KN: gl.constexpr, ME: gl.constexpr,
) -> None:  # fmt: skip
    """Consumer warp group ME: its 128 rows of every tile this program walks."""
    grid_wait()
    TYPE: gl.constexpr = out_desc.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    zero = (gl.zeros((64, PIECE), gl.float32, layout),) * COUNT
    num_m = gl.cdiv(M, 256)
    num_n = gl.cdiv(N, PIECE * COUNT)
    steps = gl.cdiv(K, 64)
    step = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, num_m, num_n, GROUP)
        row = tile_m * 256 + ME * 128
        col = tile_n * (PIECE * COUNT)
        upper, lower = _start(zero, zero, bars[0], step, True, TYPE, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
        upper, lower = _waited(upper, lower, COUNT, 2)
        step += 1
        for _ in range(steps - 1):
            upper, lower = _start(upper, lower, bars[0], step, False, TYPE, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
            upper, lower = _waited(upper, lower, COUNT, 2)
            release(bars[1], step - 1, STAGES)
            step += 1
        upper, lower = _waited(upper, lower, COUNT, 0)
        release(bars[1], step - 1, STAGES)
        for i in gl.static_range(COUNT):
            write_piece(rounded(upper[i], TYPE), out_desc, buffers, row, col + i * PIECE, ME * BUFFERS + i % BUFFERS, BUFFERS)
        for i in gl.static_range(COUNT):
            write_piece(
                rounded(lower[i], TYPE),
                out_desc,
                buffers,
                row + 64,
                col + i * PIECE,
                ME * BUFFERS + (COUNT + i) % BUFFERS,
                BUFFERS,
            )
    tma.store_wait(pendings=0)


@gluon_jit
def _consume_first(
    out_desc: gl.tensor, bars: gl.tensor, buffers: gl.tensor, M: gl.tensor, N: gl.tensor, K: gl.tensor,
    GROUP: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr, BUFFERS: gl.constexpr,
    A_KM: gl.constexpr, B_KN: gl.constexpr,
) -> None:  # fmt: skip
    """The first warp group's entry."""
    _consume(out_desc, bars, buffers, M, N, K, GROUP, STAGES, PIECE, COUNT, BUFFERS, A_KM, B_KN, 0)


@gluon_jit
def _consume_second(
    out_desc: gl.tensor, bars: gl.tensor, buffers: gl.tensor, M: gl.tensor, N: gl.tensor, K: gl.tensor,
    GROUP: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr, BUFFERS: gl.constexpr,
    A_KM: gl.constexpr, B_KN: gl.constexpr,
) -> None:  # fmt: skip
    """The second warp group's entry."""
    _consume(out_desc, bars, buffers, M, N, K, GROUP, STAGES, PIECE, COUNT, BUFFERS, A_KM, B_KN, 1)


@gluon_jit(do_not_specialize=["M"])
def gemm_tall_kernel(
    a_desc: gl.tensor, b_desc: gl.tensor, out_desc: gl.tensor,
    M: gl.tensor, N: gl.tensor, K: gl.tensor, GROUP: gl.constexpr, STAGES: gl.constexpr,
    PIECE: gl.constexpr, COUNT: gl.constexpr, BUFFERS: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr, RELEASE: gl.constexpr,
) -> None:  # fmt: skip
    """C[M, N] = A[M, K] B[N, K]^T in the operands' dtype; boxes [64, 64] of A, [PIECE, 64] of B, [64, PIECE] of C. BUFFERS: pieces of a
    finished tile that each warp group has on their way out at once."""
    ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES * (256 // PIECE + COUNT), PIECE, 64], b_desc.layout)
    buffers = gl.allocate_shared_memory(out_desc.dtype, [2 * BUFFERS, 64, PIECE], out_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.thread_barrier()
    if RELEASE:
        grid_release()
    bars = (ready, empty)
    gl.warp_specialize(
        [
            (_consume_first, (out_desc, bars, buffers, M, N, K, GROUP, STAGES, PIECE, COUNT, BUFFERS, A_KM, B_KN)),
            (_consume_second, (out_desc, bars, buffers, M, N, K, GROUP, STAGES, PIECE, COUNT, BUFFERS, A_KM, B_KN)),
            (_produce, (a_desc, b_desc, ring, bars, M, N, K, GROUP, STAGES, PIECE, COUNT, A_KM, B_KN)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
