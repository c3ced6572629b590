"""The Hopper matrix kernel for tiles whose width is no power of two: 80, 112, 160 columns, so that few tiles fill a device.

As `gemm_kernel` (one warp loads, one or two warp groups multiply, persistent, a tile stored while the next one begins, the same
order of the sum and so the same bits), for plain products in half precision. A sum is a tuple of COUNT pieces of [64, PIECE];
`wgmma` multiplies them as one. A chain's finished tile leaves piece by piece, each while a step of the next tile runs (DRIP), so that
its way out takes neither the matrix unit's time nor the memory of a whole tile.
"""

from __future__ import annotations

from .gemm_kernel import tile_position
from .gemm_ring import release
from .toolchain import fence_async_shared, gl, gluon_jit, grid_release, grid_wait, mbarrier, tma
from .wgmma import multiply, rounded, shared_base, wait


@gluon_jit
def _produce(
    a_desc: gl.tensor, b_desc: gl.tensor, ring: gl.tensor, bars: gl.tensor, M: gl.tensor, N: gl.tensor, K: gl.tensor,
    GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr,
) -> None:  # fmt: skip
    """The producer warp: a stage is the rows of A of each consumer, then the columns' rows of B, all of them 128 bytes long."""
    grid_wait()
    ready, empty = bars
    A_UNITS: gl.constexpr = CONSUMERS * 64 // PIECE
    STAGE_BYTES: gl.constexpr = a_desc.block_type.nbytes * CONSUMERS + b_desc.block_type.nbytes * COUNT
    num_m = gl.cdiv(M, 64 * CONSUMERS)
    num_n = gl.cdiv(N, PIECE * COUNT)
    step = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, num_m, num_n, GROUP)
        row = tile_m * (64 * CONSUMERS)
        col = tile_n * (PIECE * COUNT)
        for k in range(0, K, 64):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = ready.index(stage)
            mbarrier.expect(bar, STAGE_BYTES)
            unit = stage * (A_UNITS + COUNT)
            for c in gl.static_range(CONSUMERS):
                rows = ring.index(unit + c * (64 // PIECE))._reinterpret(a_desc.dtype, [64, 64], a_desc.layout)
                tma.async_copy_global_to_shared(a_desc, [row + c * 64, k], bar, rows)
            for i in gl.static_range(COUNT):
                tma.async_copy_global_to_shared(b_desc, [col + i * PIECE, k], bar, ring.index(unit + A_UNITS + i))
            step += 1


@gluon_jit
def _start(
    sums: gl.tensor, ready: gl.tensor, step: gl.tensor, FRESH: gl.constexpr, TYPE: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Start the products of one stage; FRESH sums count as zero."""
    stage = step % STAGES
    mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
    place = shared_base() + stage * ((CONSUMERS * 64 + PIECE * COUNT) * 128)  # the ring is the largest allocation
    return multiply(sums, place + ME * (64 * 128), place + CONSUMERS * (64 * 128), FRESH, TYPE)


@gluon_jit
def _proceed(
    sums: gl.tensor, bars: gl.tensor, step: gl.tensor, steps: gl.tensor, TYPE: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """`steps` more stages in ascending K; one group stays in flight from each to the next, and after the last."""
    for _ in range(steps):
        sums = _start(sums, bars[0], step, False, TYPE, CONSUMERS, STAGES, PIECE, COUNT, ME)
        sums = wait(sums, 1)
        release(bars[1], step - 1, STAGES)
        step += 1
    return sums, step


@gluon_jit
def _both(x: gl.tensor, y: gl.tensor, COUNT: gl.constexpr) -> gl.tensor:
    """Wait until only the last started group is in flight; neither sum is touched before."""
    both = wait(x + y, 1)
    left: gl.tensor = ()
    right: gl.tensor = ()
    for i in gl.static_range(COUNT):
        left = left + (both[i],)
        right = right + (both[COUNT + i],)
    return left, right


@gluon_jit
def _added(x: gl.tensor, y: gl.tensor, COUNT: gl.constexpr) -> gl.tensor:
    """The sums of the pieces."""
    total: gl.tensor = ()
    for i in gl.static_range(COUNT):
        total = total + (x[i] + y[i],)
    return total


@gluon_jit
def _next_leaf(
    last: gl.tensor, zero: gl.tensor, bars: gl.tensor, step: gl.tensor, steps: gl.tensor, TYPE: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The leaf whose last step is in flight, finished, and the next with its first step in flight."""
    last, step = _proceed(last, bars, step, steps - 1, TYPE, CONSUMERS, STAGES, PIECE, COUNT, ME)
    following = _start(zero, bars[0], step, True, TYPE, CONSUMERS, STAGES, PIECE, COUNT, ME)
    last, following = _both(last, following, COUNT)
    release(bars[1], step - 1, STAGES)
    return last, following, step + 1


@gluon_jit
def _four_leaves(
    a: gl.tensor, zero: gl.tensor, bars: gl.tensor, step: gl.tensor, steps: gl.tensor, TYPE: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """(a + b) + (c + d) for four leaves of `steps` stages each; `a` has its first step in flight, afterwards nothing is."""
    a, b, step = _next_leaf(a, zero, bars, step, steps, TYPE, CONSUMERS, STAGES, PIECE, COUNT, ME)
    b, c, step = _next_leaf(b, zero, bars, step, steps, TYPE, CONSUMERS, STAGES, PIECE, COUNT, ME)
    # Waits for nothing, but pins the sum here: put off to its use, it would keep two leaves in registers instead of one.
    c, pair = _both(c, _added(a, b, COUNT), COUNT)
    c, d, step = _next_leaf(c, zero, bars, step, steps, TYPE, CONSUMERS, STAGES, PIECE, COUNT, ME)
    d, step = _proceed(d, bars, step, steps - 1, TYPE, CONSUMERS, STAGES, PIECE, COUNT, ME)
    d = wait(d, 0)
    release(bars[1], step - 1, STAGES)
    return wait(_added(pair, _added(c, d, COUNT), COUNT), 0), step


@gluon_jit
def _fetched(stash: gl.tensor, like: gl.tensor, COUNT: gl.constexpr, ME: gl.constexpr) -> gl.tensor:
    """What this warp group has put into the stash."""
    pieces: gl.tensor = ()
    for i in gl.static_range(COUNT):
        pieces = pieces + (stash.index(ME * COUNT + i).load(like[0].type.layout),)
    return pieces


@gluon_jit
def _eight_leaves(
    a: gl.tensor, zero: gl.tensor, bars: gl.tensor, stash: gl.tensor, step: gl.tensor, steps: gl.tensor, TYPE: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The binary tree over eight leaves; its left half waits in shared memory."""
    left, step = _four_leaves(a, zero, bars, step, steps, TYPE, CONSUMERS, STAGES, PIECE, COUNT, ME)
    tma.store_wait(pendings=0)  # the last tile may still be on its way out of the same memory
    gl.thread_barrier()
    for i in gl.static_range(COUNT):
        stash.index(ME * COUNT + i).store(left[i])
    gl.thread_barrier()  # the registers first, then the next leaf
    e = _start(zero, bars[0], step, True, TYPE, CONSUMERS, STAGES, PIECE, COUNT, ME)
    e = wait(e, 1)
    right, step = _four_leaves(e, zero, bars, step + 1, steps, TYPE, CONSUMERS, STAGES, PIECE, COUNT, ME)
    gl.thread_barrier()  # keeps the loads after the sum, which needs the registers
    return _added(_fetched(stash, right, COUNT, ME), right, COUNT), step


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
def _write_piece(
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
def _consume(
    out_desc: gl.tensor, bars: gl.tensor, buffers: gl.tensor, stash: gl.tensor, M: gl.tensor, N: gl.tensor, K: gl.tensor,
    GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr,
    LEAVES: gl.constexpr, DRIP: gl.constexpr, ME: gl.constexpr,
) -> None:  # fmt: skip
    """Consumer warp group ME: its 64 rows of every tile this program walks. A chain's tile is written during the next."""
    grid_wait()
    TYPE: gl.constexpr = out_desc.dtype  # the operands' too
    FIRST: gl.constexpr = ME * COUNT * (2 if LEAVES else 1)  # a tree's buffers are the first half of its own stash
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    zero = (gl.zeros((64, PIECE), gl.float32, layout),) * COUNT
    num_m = gl.cdiv(M, 64 * CONSUMERS)
    num_n = gl.cdiv(N, PIECE * COUNT)
    steps = gl.cdiv(K, 64)
    step = 0
    # Before the first tile there is nothing to write: rows outside the matrix stand for it.
    done = (gl.zeros((64, PIECE), TYPE, layout),) * COUNT
    done_row = gl.cdiv(M, 64) * 64
    done_col = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, num_m, num_n, GROUP)
        row = tile_m * (64 * CONSUMERS) + ME * 64
        col = tile_n * (PIECE * COUNT)
        sums = _start(zero, bars[0], step, True, TYPE, CONSUMERS, STAGES, PIECE, COUNT, ME)
        sums = wait(sums, 1)  # waits for nothing: one group may be in flight
        step += 1
        if LEAVES:
            sums, step = _eight_leaves(sums, zero, bars, stash, step, steps // 8, TYPE, CONSUMERS, STAGES, PIECE, COUNT, ME)
            _write(sums, out_desc, buffers, row, col, FIRST, PIECE, COUNT)
        else:
            if DRIP:
                for i in gl.static_range(COUNT):
                    sums = _start(sums, bars[0], step, False, TYPE, CONSUMERS, STAGES, PIECE, COUNT, ME)
                    _write_piece(done[i], out_desc, buffers, done_row, done_col + i * PIECE, ME * DRIP + i % DRIP, DRIP)
                    sums = wait(sums, 1)
                    release(bars[1], step - 1, STAGES)
                    step += 1
            elif tile >= gl.num_programs(0):
                _write(done, out_desc, buffers, done_row, done_col, FIRST, PIECE, COUNT)
            sums, step = _proceed(
                sums, bars, step, steps - 1 - (COUNT if DRIP else 0), TYPE, CONSUMERS, STAGES, PIECE, COUNT, ME
            )
            sums = wait(sums, 0)
            release(bars[1], step - 1, STAGES)
            done = _rounded(sums, TYPE, COUNT)
            done_row = row
            done_col = col
    if LEAVES == 0:
        if DRIP:
            for i in gl.static_range(COUNT):
                _write_piece(done[i], out_desc, buffers, done_row, done_col + i * PIECE, ME * DRIP + i % DRIP, DRIP)
        else:
            _write(done, out_desc, buffers, done_row, done_col, FIRST, PIECE, COUNT)
    tma.store_wait(pendings=0)


@gluon_jit
def _consume_first(
    out_desc: gl.tensor, bars: gl.tensor, buffers: gl.tensor, stash: gl.tensor, M: gl.tensor, N: gl.tensor, K: gl.tensor,
    GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr,
    LEAVES: gl.constexpr, DRIP: gl.constexpr,
) -> None:  # fmt: skip
    """The first warp group's entry."""
    _consume(out_desc, bars, buffers, stash, M, N, K, GROUP, CONSUMERS, STAGES, PIECE, COUNT, LEAVES, DRIP, 0)


@gluon_jit
def _consume_second(
    out_desc: gl.tensor, bars: gl.tensor, buffers: gl.tensor, stash: gl.tensor, M: gl.tensor, N: gl.tensor, K: gl.tensor,
    GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr,
    LEAVES: gl.constexpr, DRIP: gl.constexpr,
) -> None:  # fmt: skip
    """The second warp group's entry."""
    _consume(out_desc, bars, buffers, stash, M, N, K, GROUP, CONSUMERS, STAGES, PIECE, COUNT, LEAVES, DRIP, 1)


@gluon_jit(do_not_specialize=["M"])
def gemm_pieces_kernel(
    a_desc: gl.tensor, b_desc: gl.tensor, out_desc: gl.tensor,
    M: gl.tensor, N: gl.tensor, K: gl.tensor, GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    PIECE: gl.constexpr, COUNT: gl.constexpr, LEAVES: gl.constexpr, DRIP: gl.constexpr,
    RELEASE: gl.constexpr,
) -> None:  # fmt: skip
    """C[M, N] = A[M, K] B[N, K]^T in the operands' dtype; boxes [64, 64] of A, [PIECE, 64] of B, [64, PIECE] of C. LEAVES: 0 or 8.
    DRIP: buffers of a finished tile's pieces for each warp group, or 0 to write it whole; only for a chain of more steps than pieces."""
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
                (_consume_first, (out_desc, bars, buffers, stash, M, N, K, GROUP, CONSUMERS, STAGES, PIECE, COUNT, LEAVES, DRIP)),
                (_consume_second, (out_desc, bars, buffers, stash, M, N, K, GROUP, CONSUMERS, STAGES, PIECE, COUNT, LEAVES, DRIP)),
                (_produce, (a_desc, b_desc, ring, bars, M, N, K, GROUP, CONSUMERS, STAGES, PIECE, COUNT)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume_first, (out_desc, bars, buffers, stash, M, N, K, GROUP, CONSUMERS, STAGES, PIECE, COUNT, LEAVES, DRIP)),
                (_produce, (a_desc, b_desc, ring, bars, M, N, K, GROUP, CONSUMERS, STAGES, PIECE, COUNT)),
            ],
            [1],
            [24],
        )  # fmt: skip
