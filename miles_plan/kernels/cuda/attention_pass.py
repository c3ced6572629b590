"""A pass of the Hopper decode kernel over a few blocks of keys: all their scores, then all their weights, then all their values.

Only two chains run through a chunk: its running maximum, and the sums over its keys. Block by block, every step of both would wait
for the tensor core, for the lanes and warps among which a row's keys lie, and for shared memory. In a pass these waits are paid
once: scores leave through shared memory as they come, a row's 128 keys of a block then lie in four lanes of one warp, and what a
block must know of those before it are their maxima. The arithmetic of a block is the one that `attention_kernel` documents.

A pass is as many blocks as fill the lanes: eight of eight rows, one of 64.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from .attention_state import scrub
from .toolchain import fence_async_shared, gl, gluon_jit, mbarrier, warpgroup_mma, warpgroup_mma_wait

PASS_ROWS = 64  # of all blocks of a pass
HALF_KEYS = 64  # of a block, what a stage of the ring holds of keys or of values
PASS_BYTES = PASS_ROWS * (2 * HALF_KEYS * 4 + 3 * 4)  # scores, later weights, and three numbers a row and block


@lru_cache
def layout_of_scores(rows: int, warps: int) -> Any:
    """Where the scores of a pass [half blocks, rows, 64 keys] lie while weights are made of them and added: a row's keys in the lanes
    and registers that hold a row of scores in `attention_kernel`, hence in its order. Blocks, then rows beyond eight, go to warps, the
    rest of them to further registers."""
    blocks = PASS_ROWS // rows
    places = [[2 << bit, 0, 0] for bit in range(blocks.bit_length() - 1)] + [[0, row, 0] for row in (8, 16, 32) if row < rows]
    bits = warps.bit_length() - 1
    registers = [[0, 0, 1], [0, 0, 8], [0, 0, 16], [0, 0, 32], [1, 0, 0], *places[bits:]]
    lanes = [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, places[:bits], [], [2 * blocks, rows, HALF_KEYS])


@gluon_jit
def allocate_pass(dtype: gl.constexpr, ROWS: gl.constexpr, HALF: gl.constexpr, PASS: gl.constexpr) -> gl.tensor:
    """Shared memory of a pass: scores of each half block, where later its weights are; of each block and row the largest score, what the
    state is rescaled by, and the sum of weights."""
    weights = gl.allocate_shared_memory(dtype, [4 * PASS, ROWS, HALF], gl.NVMMASharedLayout(128, 16))
    scores = weights._reinterpret(gl.float32, [2 * PASS, ROWS, HALF], gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))
    maxima = gl.allocate_shared_memory(gl.float32, [PASS, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    scales = gl.allocate_shared_memory(gl.float32, [PASS, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    sums = gl.allocate_shared_memory(gl.float32, [PASS, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return scores, weights, maxima, scales, sums


@gluon_jit
def _masked(
    s: gl.tensor, block: gl.tensor, position: gl.tensor, kv_len: gl.tensor, window: gl.tensor, CAUSAL: gl.constexpr,
    GROUP: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Scores [keys, rows] with -inf where the row may not look; a block that every row sees whole is left untouched."""
    first = block * BN
    outside = (first + BN > kv_len) | (first <= position + ROWS - 1 - window)
    if CAUSAL:
        outside = outside | (first + BN - 1 > position)
    if outside:
        layout: gl.constexpr = s.type.layout
        key = first + gl.arange(0, BN, layout=gl.SliceLayout(1, layout))
        place = position + gl.arange(0, ROWS, layout=gl.SliceLayout(0, layout)) // GROUP
        seen = (key < kv_len)[:, None] & (key[:, None] > (place - window)[None, :])
        if CAUSAL:
            seen = seen & (key[:, None] <= place[None, :])
        s = gl.where(seen, s, float("-inf"))
    return s


@gluon_jit
def _started(
    queries: gl.tensor, rings: gl.tensor, stage: gl.tensor, ROWS: gl.constexpr, HALF: gl.constexpr, D_TAIL: gl.constexpr,
    layout: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Start s = k q^T for half a block: a chain over the head dimension, its tail after its body."""
    q_buffer, tail_buffer = queries
    k_ring, t_ring, _ = rings
    s = gl.zeros((HALF, ROWS), gl.float32, layout)
    s = warpgroup_mma(k_ring.index(stage), q_buffer.permute((1, 0)), s, use_acc=False, is_async=True)
    if D_TAIL:
        s = warpgroup_mma(t_ring.index(stage), tail_buffer.permute((1, 0)), s, is_async=True)
    return s


@gluon_jit
def _score(
    queries: gl.tensor, scores: gl.tensor, rings: gl.tensor, bars: gl.tensor, step: gl.tensor, lo: gl.tensor, hi: gl.tensor,
    position: gl.tensor, kv_len: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, GROUP: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr, D_TAIL: gl.constexpr, ROWS: gl.constexpr,
    WARPS: gl.constexpr, PASS: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Masked scores of the half blocks [lo, hi), each under way while those before are put down."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, ROWS, 16])
    ready, empty = bars
    stage = step % STAGES
    mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
    s = warpgroup_mma_wait(num_outstanding=0, deps=(_started(queries, rings, stage, ROWS, HALF, D_TAIL, layout),))
    gl.thread_barrier()
    mbarrier.arrive(empty.index(stage), count=1)
    for half in range(lo, hi - 1):
        step += 1
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        s_next = _started(queries, rings, stage, ROWS, HALF, D_TAIL, layout)
        s = _masked(s, half, position, kv_len, window, CAUSAL, GROUP, ROWS, HALF)
        scores.index(half % (2 * PASS)).permute((1, 0)).store(s)
        s = warpgroup_mma_wait(num_outstanding=0, deps=(s_next,))
        gl.thread_barrier()
        mbarrier.arrive(empty.index(stage), count=1)
    s = _masked(s, hi - 1, position, kv_len, window, CAUSAL, GROUP, ROWS, HALF)
    scores.index((hi - 1) % (2 * PASS)).permute((1, 0)).store(s)
    gl.thread_barrier()
    return step + 1


@gluon_jit
def _weigh(
    kept: gl.tensor, m: gl.tensor, first: gl.tensor, lo: gl.tensor, hi: gl.tensor, scale: gl.tensor, HALF: gl.constexpr,
    ROWS: gl.constexpr, LANES: gl.constexpr, columns: gl.constexpr, PASS: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Scores of the blocks [lo, hi) of a pass to weights, and the maxima, in both layouts, after them."""
    scores, weights, maxima, scales, sums = kept
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    x = scores._reinterpret(gl.float32, [2 * PASS, ROWS, HALF], gl.SwizzledSharedLayout(8, 1, 4, [2, 1, 0])).load(LANES)
    x = x.reshape([PASS, 2, ROWS, HALF]).permute((0, 2, 1, 3)).reshape([PASS, ROWS, 2 * HALF])
    blocks: gl.constexpr = gl.SliceLayout(2, x.type.layout)  # [PASS, ROWS]
    here = gl.arange(0, PASS, layout=gl.SliceLayout(1, blocks))
    there = (first + here >= lo) & (first + here < hi)
    x = gl.where(gl.expand_dims(gl.expand_dims(there, 1), 2), x, float("-inf"))
    maxima._reinterpret(gl.float32, [PASS, ROWS], PLAIN).store(gl.ceil(gl.max(x, 2) * scale))
    gl.thread_barrier()
    m_columns, m_rows = m
    m_rows = gl.convert_layout(m_rows, gl.SliceLayout(0, blocks))
    m_old = gl.zeros((PASS, ROWS), gl.float32, blocks) + m_rows[None, :]
    m_new = gl.zeros((PASS, ROWS), gl.float32, blocks) + m_rows[None, :]
    for block in gl.static_range(PASS):
        largest = maxima.index(block).load(gl.SliceLayout(0, blocks))
        m_old = gl.where((here > block)[:, None], gl.maximum(m_old, largest[None, :]), m_old)
        m_new = gl.where((here >= block)[:, None], gl.maximum(m_new, largest[None, :]), m_new)
        m_rows = gl.maximum(m_rows, largest)
        m_columns = gl.maximum(m_columns, maxima.index(block).load(columns))
    p = gl.exp2(gl.fma(x, scale, -gl.expand_dims(m_new, 2)))
    halves = p.reshape([PASS, ROWS, 2, HALF]).permute((0, 2, 1, 3)).reshape([2 * PASS, ROWS, HALF])
    weights._reinterpret(weights.dtype, [2 * PASS, ROWS, HALF], gl.NVMMASharedLayout(128, 16, rank=3)).store(
        halves.to(weights.dtype)
    )
    scales._reinterpret(gl.float32, [PASS, ROWS], PLAIN).store(gl.exp2(m_old - m_new))
    sums._reinterpret(gl.float32, [PASS, ROWS], PLAIN).store(gl.sum(p, 2))
    fence_async_shared()
    gl.thread_barrier()
    return m_columns, gl.convert_layout(m_rows, m[1].type.layout)


@gluon_jit
def _add(
    kept: gl.tensor, rings: gl.tensor, bars: gl.tensor, step: gl.tensor, l: gl.tensor, acc: gl.tensor, lo: gl.tensor, hi: gl.tensor,
    kv_len: gl.tensor, HALF: gl.constexpr, STAGES: gl.constexpr, DV: gl.constexpr, WARPS: gl.constexpr, columns: gl.constexpr,
    PASS: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The rescaled sums with the weights and weighted values of the blocks [lo, hi)."""
    _, weights, _, scales, sums = kept
    ready, empty = bars
    _, _, v_ring = rings
    EACH: gl.constexpr = v_ring.shape[0] // STAGES
    alpha = scales.index(lo % PASS).load(columns)
    for block in range(lo, hi):
        at = block % PASS
        acc = acc * alpha[None, :]
        for half in gl.static_range(2):
            stage = (step + half) % STAGES
            values = v_ring.index(stage * EACH)
            mbarrier.wait(ready.index(stage), ((step + half) // STAGES) & 1)
            valid_keys = kv_len - (2 * block + half) * HALF
            if valid_keys < HALF:
                scrub(values, valid_keys, HALF, DV, WARPS)
                gl.thread_barrier()
            p = weights.index(2 * at + half)
            acc = warpgroup_mma(values.permute((1, 0)), p.permute((1, 0)), acc, is_async=True)
        l = gl.fma(l, alpha, sums.index(at).load(columns))
        alpha = scales.index((block + 1) % PASS).load(columns)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        gl.thread_barrier()
        for half in gl.static_range(2):
            mbarrier.arrive(empty.index((step + half) % STAGES), count=1)
        step += 2
    return l, acc, step


@gluon_jit
def attend(
    queries: gl.tensor, kept: gl.tensor, rings: gl.tensor, bars: gl.tensor, step: gl.tensor, lo: gl.tensor, hi: gl.tensor,
    position: gl.tensor, kv_len: gl.tensor, scale: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, GROUP: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr, D_TAIL: gl.constexpr, DV: gl.constexpr,
    ROWS: gl.constexpr, LANES: gl.constexpr, WARPS: gl.constexpr, PASS: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The state (maximum, sum, weighted values in columns) over the key blocks [lo, hi) of one chunk; and the ring's step after it."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, ROWS, 16])
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    l = gl.zeros((ROWS,), gl.float32, columns)
    acc = gl.zeros((DV, ROWS), gl.float32, layout)
    in_rows: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, LANES))
    m = (gl.full((ROWS,), -1.0e30, gl.float32, columns), gl.full((ROWS,), -1.0e30, gl.float32, in_rows))
    for first in range(lo // PASS * PASS, hi, PASS):
        begin = gl.maximum(lo, first)
        end = gl.minimum(hi, first + PASS)
        step = _score(
            queries, kept[0], rings, bars, step, 2 * begin, 2 * end, position, kv_len, window, CAUSAL, GROUP, HALF, STAGES, D_TAIL,
            ROWS, WARPS, PASS,
        )  # fmt: skip
        m = _weigh(kept, m, first, begin, end, scale, HALF, ROWS, LANES, columns, PASS)
        l, acc, step = _add(kept, rings, bars, step, l, acc, begin, end, kv_len, HALF, STAGES, DV, WARPS, columns, PASS)
    return (m[0], l, acc), step
