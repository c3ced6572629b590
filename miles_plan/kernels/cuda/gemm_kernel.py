"""The one Hopper matrix kernel that chain, tree, data-gradient and weight-gradient products share.

Warp-specialised Gluon kernel: one producer warp streams tiles through a ring of shared-memory stages with TMA, one or two
consumer warp groups run `wgmma` on them, each on its own `rows` of the tile. Persistent: a program walks several tiles.

Order of the sum, for every output element, whatever the tile: products enter one float32 accumulator sixteen at a time in
ascending K (a `wgmma` k16 step adds its sixteen products and the accumulator in one fused, truncated sum, so neither the tile
nor which operand is called A can show; see `tensor_core`). With `LEAVES` > 0 the accumulator restarts at each of LEAVES equal
slices of K and the slices are added as a balanced binary tree, which is what a tensor-parallel shard can reproduce.

STREAM evens out the last waves: their tiles are cut along K so that every program gets the same number of steps, and a program
that begins a tile hands its accumulator, as it is, to the next program, which goes on from it. The chain stays one chain. (An
ordered form of Stream-K, Osama et al. 2023, arXiv 2301.03598, whose partial sums would be added up instead.)

A value outside a matrix is loaded as zero and adds nothing, so ragged M, N and K need no second path.
"""

from __future__ import annotations

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
def _tile_position(tile: gl.tensor, num_m: gl.tensor, num_n: gl.tensor, GROUP: gl.constexpr) -> gl.tensor:
    """Walk GROUP row tiles down before the next column tile, so that a wave of programs shares its operands in L2."""
    width = GROUP * num_n
    first = (tile // width) * GROUP
    size = min(num_m - first, GROUP)
    local = tile % width
    return first + local % size, local // size


@gluon_jit
def _locate(plan: gl.tensor, tile_m: gl.tensor, M: gl.tensor, TILE: gl.constexpr, GROUPED: gl.constexpr) -> gl.tensor:
    """Row tile `tile_m`: its first row, the row it must stop before, and the expert whose weights it meets."""
    row = tile_m * TILE
    end = M
    expert = 0
    if GROUPED:
        entry = plan + 1 + 3 * tile_m
        row = gl.load(entry)
        end = gl.load(entry + 1)
        expert = gl.load(entry + 2)
    return row, end, expert


@gluon_jit
def _row_tiles(plan: gl.tensor, M: gl.tensor, TILE: gl.constexpr, GROUPED: gl.constexpr) -> gl.tensor:
    """How many row tiles there are."""
    tiles = gl.cdiv(M, TILE)
    if GROUPED:
        tiles = gl.load(plan)
    return tiles


@gluon_jit
def _turns(tiles: gl.tensor, STREAM: gl.constexpr) -> gl.tensor:
    """How many segments this program looks at, see `_segment`; with STREAM one more follows, which begins inside a tile."""
    turns = gl.cdiv(tiles - gl.program_id(0), gl.num_programs(0))
    if STREAM:
        turns = tiles // gl.num_programs(0) + 1
    return turns


@gluon_jit
def _segment(turn: gl.tensor, tiles: gl.tensor, steps: gl.tensor, STREAM: gl.constexpr) -> gl.tensor:
    """What this program does in its `turn`: steps [first, last) of a tile; nothing if first >= last.

    Whole tiles, and with STREAM at the end an equal share [begin, end) of the steps of the last one to two waves: first the
    beginning of the share's last tile, which the next program waits for, then a whole tile, then the end of its first tile,
    whose beginning the previous program did first.
    """
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    tile = program + turn * programs
    first = 0
    last = steps
    if STREAM:
        waves = tiles // programs - 1
        if turn >= waves:
            rest = tiles - waves * programs
            begin = program * rest * steps // programs
            end = (program + 1) * rest * steps // programs
            if turn == waves:
                tile = end // steps
                last = end - tile * steps
            elif turn == waves + 1:
                tile = gl.cdiv(begin, steps)
                last = gl.where((tile + 1) * steps <= end, steps, 0)
            else:
                tile = begin // steps
                first = begin - tile * steps
                last = gl.where(first > 0, steps, 0)
            tile += waves * programs
    return tile, first, last


@gluon_jit
def _produce(
    descs: gl.tensor, rings: gl.tensor, bars: gl.tensor, plan: gl.tensor, M: gl.tensor, N: gl.tensor, K: gl.tensor,
    GROUPED: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr, GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    ROWS: gl.constexpr, COLS: gl.constexpr, EXTRA: gl.constexpr, DEPTH: gl.constexpr, STREAM: gl.constexpr,
) -> None:  # fmt: skip
    """The producer warp: fill the next free stage of the ring with the A rows of each consumer and the shared B columns."""
    a_desc, b_desc, e_desc = descs
    a_ring, b_ring, e_ring = rings
    ready, empty = bars
    STAGE_BYTES: gl.constexpr = (
        a_desc.block_type.nbytes * CONSUMERS + b_desc.block_type.nbytes + (e_desc.block_type.nbytes if EXTRA else 0)
    )
    num_n = gl.cdiv(N, COLS + EXTRA)
    num_m = _row_tiles(plan, M, ROWS * CONSUMERS, GROUPED)
    step = 0
    for turn in range(_turns(num_m * num_n, STREAM) + (1 if STREAM else 0)):
        tile, first, last = _segment(turn, num_m * num_n, gl.cdiv(K, DEPTH), STREAM)
        tile_m, tile_n = _tile_position(tile, num_m, num_n, GROUP)
        row, _, expert = _locate(plan, tile_m, M, ROWS * CONSUMERS, GROUPED)
        col = tile_n * (COLS + EXTRA)
        b_row = expert * N + col
        b_k = expert * K
        for at in range(first, last):
            k = at * DEPTH
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
def _mma_steps(
    acc: gl.tensor, acc_e: gl.tensor, rings: gl.tensor, bars: gl.tensor, step: gl.tensor, steps: gl.tensor,
    A_KM: gl.constexpr, B_KN: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, EXTRA: gl.constexpr,
    ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """`steps` ring stages in ascending K into the accumulators, keeping one `wgmma` group in flight."""
    a_ring, b_ring, e_ring = rings
    ready, empty = bars
    for k in range(steps):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        a = a_ring.index(stage * CONSUMERS + ME)
        a = a.permute((1, 0)) if A_KM else a
        b = b_ring.index(stage)
        b = b if B_KN else b.permute((1, 0))
        acc = warpgroup_mma(a, b, acc, is_async=True)
        if EXTRA:
            e = e_ring.index(stage)
            e = e if B_KN else e.permute((1, 0))
            acc_e = warpgroup_mma(a, e, acc_e, is_async=True)
            acc, acc_e = warpgroup_mma_wait(num_outstanding=2, deps=(acc, acc_e))
        else:
            acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        gl.thread_barrier()  # every warp of the group is done with the previous stage
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
        step += 1
    if EXTRA:
        acc, acc_e = warpgroup_mma_wait(num_outstanding=0, deps=(acc, acc_e))
    else:
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    gl.thread_barrier()
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
    return acc, acc_e, step


@gluon_jit
def _leaf_pair(
    rings: gl.tensor, bars: gl.tensor, step: gl.tensor, steps: gl.tensor,
    A_KM: gl.constexpr, B_KN: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
    COLS: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Two neighbouring leaves and their sum; the second chain starts before the first has drained."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    left = gl.zeros((ROWS, COLS), gl.float32, layout)
    right = gl.zeros((ROWS, COLS), gl.float32, layout)
    left, step = _mma_leaf(left, rings, bars, step, steps, 0, A_KM, B_KN, CONSUMERS, STAGES, ME)
    right, step = _mma_leaf(right, rings, bars, step, steps, 1, A_KM, B_KN, CONSUMERS, STAGES, ME)
    left, right = warpgroup_mma_wait(num_outstanding=0, deps=(left, right))
    gl.thread_barrier()
    mbarrier.arrive(bars[1].index((step + STAGES - 1) % STAGES), count=1)
    return left + right, step


@gluon_jit
def _leaf_quad(
    rings: gl.tensor, bars: gl.tensor, step: gl.tensor, steps: gl.tensor,
    A_KM: gl.constexpr, B_KN: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
    COLS: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Two neighbouring pairs and their sum."""
    left, step = _leaf_pair(rings, bars, step, steps, A_KM, B_KN, CONSUMERS, STAGES, ROWS, COLS, ME)
    right, step = _leaf_pair(rings, bars, step, steps, A_KM, B_KN, CONSUMERS, STAGES, ROWS, COLS, ME)
    return left + right, step


@gluon_jit
def _mma_leaf(
    acc: gl.tensor, rings: gl.tensor, bars: gl.tensor, step: gl.tensor, steps: gl.tensor, follows: gl.constexpr,
    A_KM: gl.constexpr, B_KN: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """One leaf's steps, leaving the last in flight; `follows` a leaf whose last stage is still to be given back."""
    a_ring, b_ring, _ = rings
    ready, empty = bars
    for k in range(steps):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        a = a_ring.index(stage * CONSUMERS + ME)
        a = a.permute((1, 0)) if A_KM else a
        b = b_ring.index(stage)
        b = b if B_KN else b.permute((1, 0))
        acc = warpgroup_mma(a, b, acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        gl.thread_barrier()
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=(k > 0) | (follows == 1))
        step += 1
    return acc, step


@gluon_jit
def _leaf_tree(
    rings: gl.tensor, bars: gl.tensor, stash: gl.tensor, step: gl.tensor, steps: gl.tensor,
    A_KM: gl.constexpr, B_KN: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    ROWS: gl.constexpr, COLS: gl.constexpr, LEAVES: gl.constexpr, STASH: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """LEAVES chains of `steps` stages, added as a balanced binary tree.

    Leaves come in pairs; level1 holds a lone pair, level2 the sum of two pairs, the latter in shared memory when STASH: with it
    the registers of a 64 x 128 tile would overflow, and spilling would go through L2 beside the loads.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    if LEAVES == 1:
        total = gl.zeros((ROWS, COLS), gl.float32, layout)
        total, step = _mma_leaf(total, rings, bars, step, steps, 0, A_KM, B_KN, CONSUMERS, STAGES, ME)
        total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
        gl.thread_barrier()
        mbarrier.arrive(bars[1].index((step + STAGES - 1) % STAGES), count=1)
    elif LEAVES == 2:
        total, step = _leaf_pair(rings, bars, step, steps, A_KM, B_KN, CONSUMERS, STAGES, ROWS, COLS, ME)
    else:
        total, step = _leaf_quad(rings, bars, step, steps, A_KM, B_KN, CONSUMERS, STAGES, ROWS, COLS, ME)
    if LEAVES == 8:
        if STASH:
            stash.index(ME).store(total)
        right, step = _leaf_quad(rings, bars, step, steps, A_KM, B_KN, CONSUMERS, STAGES, ROWS, COLS, ME)
        total = (stash.index(ME).load(layout) if STASH else total) + right
    return total, step


@gluon_jit
def _store_tile(
    out: gl.tensor, stride_m: gl.tensor, stride_n: gl.tensor, tile: gl.tensor, row: gl.tensor, col: gl.tensor,
    end: gl.tensor, n_end: gl.tensor, COALESCE: gl.constexpr, WARPS: gl.constexpr,
) -> None:  # fmt: skip
    """Write a tile from registers; the strides say whether it lands as C or as C transposed. COALESCE first turns the
    matrix unit's layout into whole rows, which pays for wide tiles."""
    ROWS: gl.constexpr = tile.shape[0]
    COLS: gl.constexpr = tile.shape[1]
    values = tile.to(out.dtype.element_ty)
    if COALESCE:
        values = gl.convert_layout(values, gl.BlockedLayout([1, 8], [256 // COLS, COLS // 8], [WARPS, 1], [1, 0]))
    layout: gl.constexpr = values.type.layout
    m = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    n = col + gl.arange(0, COLS, layout=gl.SliceLayout(0, layout))
    offset = m[:, None].to(gl.int64) * stride_m + n[None, :].to(gl.int64) * stride_n
    gl.store(out + offset, values, mask=(m[:, None] < end) & (n[None, :] < n_end))


@gluon_jit
def _stage_tile(out_desc: gl.tensor, buffer: gl.tensor, tile: gl.tensor, row: gl.tensor, col: gl.tensor) -> None:
    """Write a tile through shared memory with TMA; the next tile's products may start while it drains."""
    buffer.store(tile.to(out_desc.dtype))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(out_desc, [row, col], buffer)


@gluon_jit
def _slot(handoff: gl.tensor, program: gl.tensor, CONSUMERS: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr,
          EXTRA: gl.constexpr, ME: gl.constexpr) -> gl.tensor:  # fmt: skip
    """Where the accumulators that `program` hands over lie."""
    return handoff + (program * CONSUMERS + ME).to(gl.int64) * (ROWS * (COLS + EXTRA))


@gluon_jit
def _places(ROWS: gl.constexpr, COLS: gl.constexpr, layout: gl.constexpr) -> gl.tensor:
    """Offsets of a tile's elements, row by row."""
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    return r[:, None] * COLS + gl.arange(0, COLS, layout=gl.SliceLayout(0, layout))[None, :]


@gluon_jit
def _hand_over(
    handoff: gl.tensor, flags: gl.tensor, acc: gl.tensor, acc_e: gl.tensor, CONSUMERS: gl.constexpr, ROWS: gl.constexpr,
    COLS: gl.constexpr, EXTRA: gl.constexpr, ME: gl.constexpr,
) -> None:  # fmt: skip
    """Leave this program's accumulators for the next one."""
    layout: gl.constexpr = acc.type.layout
    layout_e: gl.constexpr = acc_e.type.layout
    slot = _slot(handoff, gl.program_id(0), CONSUMERS, ROWS, COLS, EXTRA, ME)
    gl.store(slot + _places(ROWS, COLS, layout), acc)
    if EXTRA:
        gl.store(slot + ROWS * COLS + _places(ROWS, EXTRA, layout_e), acc_e)
    gl.thread_barrier()
    gl.atomic_xchg(flags + gl.program_id(0) * CONSUMERS + ME, 1, sem="release", scope="gpu")


@gluon_jit
def _receive(
    handoff: gl.tensor, flags: gl.tensor, layout: gl.constexpr, layout_e: gl.constexpr, CONSUMERS: gl.constexpr,
    ROWS: gl.constexpr, COLS: gl.constexpr, EXTRA: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Wait for the previous program's accumulators and take them; its flag is left at zero."""
    COLS_E: gl.constexpr = max(EXTRA, 8)
    program = gl.program_id(0) - 1
    flag = flags + program * CONSUMERS + ME
    ready = gl.atomic_add(flag, 0, sem="acquire", scope="gpu")
    while ready == 0:
        ready = gl.atomic_add(flag, 0, sem="acquire", scope="gpu")
    gl.thread_barrier()
    slot = _slot(handoff, program, CONSUMERS, ROWS, COLS, EXTRA, ME)
    acc = gl.load(slot + _places(ROWS, COLS, layout), cache_modifier=".cg")
    acc_e = gl.zeros((ROWS, COLS_E), gl.float32, layout_e)
    if EXTRA:
        acc_e = gl.load(slot + ROWS * COLS + _places(ROWS, COLS_E, layout_e), cache_modifier=".cg")
    gl.store(flag, 0)
    return acc, acc_e


@gluon_jit
def _write(
    outs: gl.tensor, c_buffers: gl.tensor, e_buffers: gl.tensor, acc: gl.tensor, acc_e: gl.tensor, row: gl.tensor,
    col: gl.tensor, end: gl.tensor, N: gl.tensor, n_end: gl.tensor, stride_m: gl.tensor, stride_n: gl.tensor,
    COLS: gl.constexpr, EXTRA: gl.constexpr, STORE: gl.constexpr, ME: gl.constexpr,
) -> None:  # fmt: skip
    """Round a finished tile and write it."""
    out, out_e = outs
    if STORE == 1:
        tma.store_wait(pendings=0)
        gl.thread_barrier()
        _stage_tile(out, c_buffers.index(ME), acc, row, col)
        if EXTRA:
            _stage_tile(out_e, e_buffers.index(ME), acc_e, row, col + COLS)
    else:
        limit = n_end
        if STORE == 2:
            limit = N  # known to be a multiple of 8, which lets whole rows be written 16 bytes at a time
        _store_tile(out, stride_m, stride_n, acc, row, col, end, limit, STORE == 2, 4)
        if EXTRA:
            _store_tile(out, stride_m, stride_n, acc_e, row, col + COLS, end, limit, STORE == 2, 4)


@gluon_jit
def _consume(
    outs: gl.tensor, rings: gl.tensor, bars: gl.tensor, buffers: gl.tensor, plan: gl.tensor, handoff: gl.tensor,
    flags: gl.tensor, M: gl.tensor, N: gl.tensor, n_end: gl.tensor, K: gl.tensor, stride_m: gl.tensor, stride_n: gl.tensor,
    GROUPED: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr, GROUP: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, EXTRA: gl.constexpr, DEPTH: gl.constexpr,
    LEAVES: gl.constexpr, STASH: gl.constexpr, STORE: gl.constexpr, STREAM: gl.constexpr, ME: gl.constexpr,
) -> None:  # fmt: skip
    """Consumer warp group ME: its ROWS rows of every tile this program walks."""
    c_buffers, e_buffers, stash = buffers
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    COLS_E: gl.constexpr = max(EXTRA, 8)
    layout_e: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS_E, 16])
    num_m = _row_tiles(plan, M, ROWS * CONSUMERS, GROUPED)
    num_n = gl.cdiv(N, COLS + EXTRA)
    steps = gl.cdiv(K, DEPTH)
    step = 0
    for turn in range(_turns(num_m * num_n, STREAM)):
        tile, first, last = _segment(turn, num_m * num_n, steps, STREAM)
        tile_m, tile_n = _tile_position(tile, num_m, num_n, GROUP)
        row, end, _ = _locate(plan, tile_m, M, ROWS * CONSUMERS, GROUPED)
        row += ME * ROWS
        col = tile_n * (COLS + EXTRA)
        acc_e = gl.zeros((ROWS, COLS_E), gl.float32, layout_e)
        if LEAVES:
            acc, step = _leaf_tree(
                rings, bars, stash, step, K // (LEAVES * DEPTH), A_KM, B_KN, CONSUMERS, STAGES, ROWS, COLS, LEAVES,
                STASH, ME,
            )  # fmt: skip
            _write(outs, c_buffers, e_buffers, acc, acc_e, row, col, end, N, n_end, stride_m, stride_n, COLS, EXTRA, STORE, ME)
        elif first < last:
            acc = gl.zeros((ROWS, COLS), gl.float32, layout)
            acc, acc_e, step = _mma_steps(acc, acc_e, rings, bars, step, last, A_KM, B_KN, CONSUMERS, STAGES, EXTRA, ME)
            if STREAM and last < steps:
                _hand_over(handoff, flags, acc, acc_e, CONSUMERS, ROWS, COLS, EXTRA, ME)
            else:
                _write(
                    outs, c_buffers, e_buffers, acc, acc_e, row, col, end, N, n_end, stride_m, stride_n, COLS, EXTRA, STORE, ME
                )
    if STREAM:
        # The share's first tile goes on from what the previous program computed. Outside the loop, because the assembler
        # gives up overlapping products whose accumulator is zero on one way in and loaded on another.
        tile, first, last = _segment(_turns(num_m * num_n, STREAM), num_m * num_n, steps, STREAM)
        if first < last:
            tile_m, tile_n = _tile_position(tile, num_m, num_n, GROUP)
            acc, acc_e = _receive(handoff, flags, layout, layout_e, CONSUMERS, ROWS, COLS, EXTRA, ME)
            acc, acc_e, step = _mma_steps(acc, acc_e, rings, bars, step, last - first, A_KM, B_KN, CONSUMERS, STAGES, EXTRA, ME)
            _write(
                outs, c_buffers, e_buffers, acc, acc_e, (tile_m * CONSUMERS + ME) * ROWS, tile_n * (COLS + EXTRA), M, N, n_end,
                stride_m, stride_n, COLS, EXTRA, STORE, ME,
            )  # fmt: skip
    if STORE == 1:
        tma.store_wait(pendings=0)


@gluon_jit
def _consume_first(
    outs: gl.tensor, rings: gl.tensor, bars: gl.tensor, buffers: gl.tensor, plan: gl.tensor, handoff: gl.tensor,
    flags: gl.tensor, M: gl.tensor, N: gl.tensor, n_end: gl.tensor, K: gl.tensor, stride_m: gl.tensor, stride_n: gl.tensor,
    GROUPED: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr, GROUP: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, EXTRA: gl.constexpr, DEPTH: gl.constexpr,
    LEAVES: gl.constexpr, STASH: gl.constexpr, STORE: gl.constexpr, STREAM: gl.constexpr,
) -> None:  # fmt: skip
    """The first warp group's entry."""
    _consume(
        outs, rings, bars, buffers, plan, handoff, flags, M, N, n_end, K, stride_m, stride_n, GROUPED, A_KM, B_KN, GROUP,
        CONSUMERS, STAGES, ROWS, COLS, EXTRA, DEPTH, LEAVES, STASH, STORE, STREAM, 0,
    )  # fmt: skip


@gluon_jit
def _consume_second(
    outs: gl.tensor, rings: gl.tensor, bars: gl.tensor, buffers: gl.tensor, plan: gl.tensor, handoff: gl.tensor,
    flags: gl.tensor, M: gl.tensor, N: gl.tensor, n_end: gl.tensor, K: gl.tensor, stride_m: gl.tensor, stride_n: gl.tensor,
    GROUPED: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr, GROUP: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, EXTRA: gl.constexpr, DEPTH: gl.constexpr,
    LEAVES: gl.constexpr, STASH: gl.constexpr, STORE: gl.constexpr, STREAM: gl.constexpr,
) -> None:  # fmt: skip
    """The second warp group's entry."""
    _consume(
        outs, rings, bars, buffers, plan, handoff, flags, M, N, n_end, K, stride_m, stride_n, GROUPED, A_KM, B_KN, GROUP,
        CONSUMERS, STAGES, ROWS, COLS, EXTRA, DEPTH, LEAVES, STASH, STORE, STREAM, 1,
    )  # fmt: skip


@gluon_jit(do_not_specialize=["M", "n_end"])
def gemm_kernel(
    a_desc: gl.tensor, b_desc: gl.tensor, e_desc: gl.tensor, out: gl.tensor, out_e: gl.tensor, plan: gl.tensor,
    handoff: gl.tensor, flags: gl.tensor, M: gl.tensor, N: gl.tensor, n_end: gl.tensor, K: gl.tensor, stride_m: gl.tensor,
    stride_n: gl.tensor, GROUPED: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr, GROUP: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, EXTRA: gl.constexpr,
    DEPTH: gl.constexpr, LEAVES: gl.constexpr, STASH: gl.constexpr, STORE: gl.constexpr, STREAM: gl.constexpr,
) -> None:  # fmt: skip
    """C[M, N] = A[M, K] B[N, K]^T; A may lie as [K, M] (A_KM) and B as [K, N] (B_KN). `n_end` is N again:
    N itself is rounded up to a whole tile where it counts tokens, because a compiler that knows N is 1 drops unused columns of the
    accumulator and then waits for every step."""
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES * CONSUMERS] + a_desc.block_shape, a_desc.layout)
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES] + b_desc.block_shape, b_desc.layout)
    e_ring = b_ring
    if EXTRA:
        e_ring = gl.allocate_shared_memory(e_desc.dtype, [STAGES] + e_desc.block_shape, e_desc.layout)
    c_buffers = b_ring
    e_buffers = b_ring
    if STORE == 1:
        c_buffers = gl.allocate_shared_memory(out.dtype, [CONSUMERS, ROWS, COLS], out.layout)
        if EXTRA:
            e_buffers = gl.allocate_shared_memory(out_e.dtype, [CONSUMERS, ROWS, EXTRA], out_e.layout)
    stash = b_ring
    if STASH:
        stash_layout: gl.constexpr = gl.NVMMASharedLayout(128, 32)
        stash = gl.allocate_shared_memory(gl.float32, [CONSUMERS, ROWS, COLS], stash_layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    gl.thread_barrier()
    grid_release()
    grid_wait()
    rings = (a_ring, b_ring, e_ring)
    bars = (ready, empty)
    outs = (out, out_e)
    buffers = (c_buffers, e_buffers, stash)
    descs = (a_desc, b_desc, e_desc)
    # A tuple bound to a name would lose its constexprs, so the argument lists are spelled out.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume_first, (outs, rings, bars, buffers, plan, handoff, flags, M, N, n_end, K, stride_m, stride_n, GROUPED, A_KM, B_KN, GROUP, CONSUMERS,
                                  STAGES, ROWS, COLS, EXTRA, DEPTH, LEAVES, STASH, STORE, STREAM)),
                (_consume_second, (outs, rings, bars, buffers, plan, handoff, flags, M, N, n_end, K, stride_m, stride_n, GROUPED, A_KM, B_KN, GROUP, CONSUMERS,
                                   STAGES, ROWS, COLS, EXTRA, DEPTH, LEAVES, STASH, STORE, STREAM)),
                (_produce, (descs, rings, bars, plan, M, N, K, GROUPED, A_KM, B_KN, GROUP, CONSUMERS, STAGES, ROWS, COLS, EXTRA, DEPTH, STREAM)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume_first, (outs, rings, bars, buffers, plan, handoff, flags, M, N, n_end, K, stride_m, stride_n, GROUPED, A_KM, B_KN, GROUP, CONSUMERS,
                                  STAGES, ROWS, COLS, EXTRA, DEPTH, LEAVES, STASH, STORE, STREAM)),
                (_produce, (descs, rings, bars, plan, M, N, K, GROUPED, A_KM, B_KN, GROUP, CONSUMERS, STAGES, ROWS, COLS, EXTRA, DEPTH, STREAM)),
            ],
            [1],
            [24],
        )  # fmt: skip
