"""The Hopper attention kernel for prefill, chunked prefill and training; `attention_decode` computes the same for few queries.

Warp-specialised Gluon kernel. A producer warp streams blocks of 128 keys and values through a ring of stages with TMA (from a
packed tensor, or page by page through a page table); two consumer warp groups each own 64 rows of queries. A row is a
(token, head) pair: the heads that share a key head sit side by side.

For every row the arithmetic is, whatever the batch, the tile, the page size, or where prefill was cut:

    keys in ascending blocks of 128 from absolute position 0, the state (m, l, acc) restarting every CHUNK keys;
    s = q k, one tensor-core chain over the head dimension;
    m' = max(m, ceil(max_j s_j * scale)), an integer, in units of log2, so that rescaling by 2^(m - m') is exact;
    p_j = exp2(fma(s_j, scale, -m')); masked keys give p = 0 and change nothing;
    l' = fma(l, 2^(m - m'), sum_j p_j), where four lanes each add the keys 2c, 2c + 1 modulo 8 in ascending order, then lanes
    two apart, then neighbours; acc' = acc * 2^(m - m') + bf16(p) v, one tensor-core chain over the block;
    at a chunk's end the chunk's state is folded into the row's total in ascending order (`fold`).

The online softmax is Milakov & Gimelshein 2018 (arXiv 1805.02867), the tiling FlashAttention-2/3 (arXiv 2307.08691, 2407.08608).
"""

from __future__ import annotations

from .attention_load import item_of, load_queries, produce, span
from .attention_state import fold, masked, scrub, store_rows, to_weights
from .toolchain import (
    fence_async_shared,
    gl,
    gluon_jit,
    grid_release,
    grid_wait,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

BLOCK_KEYS = 128
TILE_ROWS = 64
EMPTY = -1.0e30  # the maximum over no keys; finite, so that EMPTY - EMPTY is 0 and not NaN


@gluon_jit
def _scores(
    queries: gl.tensor, rings: gl.tensor, stage: gl.tensor, ME: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr,
    D_TAIL: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Start s = q k for one block: a chain over the head dimension, its tail after its body."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    q_buffer, tail_buffer = queries
    k_ring, t_ring, _ = rings
    s = gl.zeros((ROWS, BN), gl.float32, layout)
    s = warpgroup_mma(q_buffer.index(ME), k_ring.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)
    if D_TAIL:
        s = warpgroup_mma(tail_buffer.index(ME), t_ring.index(stage).permute((1, 0)), s, is_async=True)
    return s


@gluon_jit
def _weigh(
    s: gl.tensor, state: gl.tensor, totals: gl.tensor, block: gl.tensor, lo: gl.tensor, scale: gl.tensor, CHUNK: gl.constexpr,
    BN: gl.constexpr, dtype: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """A block's masked scores to weights, and the state made ready for their values; a full chunk is folded first."""
    m, l, acc = state
    total_m, total_l, total = totals
    o_layout: gl.constexpr = acc.type.layout
    restart = (block % (CHUNK // BN) == 0) & (block > lo)
    if restart:
        total_m, total_l, total = fold(total_m, total_l, total, m, l, acc)
    m_old = gl.where(restart, gl.full_like(m, -1.0e30), m)
    m_new, p, p_sum = to_weights(s, m_old, scale)
    alpha = gl.where(restart, 0.0, gl.exp2(m_old - m_new))  # a new chunk begins with nothing
    weights = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, o_layout, 2))
    return (
        weights,
        (m_new, gl.fma(l, alpha, p_sum), acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]),
        (total_m, total_l, total),
    )


@gluon_jit
def _attend(
    queries: gl.tensor, rings: gl.tensor, bars: gl.tensor, step: gl.tensor, lo: gl.tensor, hi: gl.tensor, position: gl.tensor,
    kv_len: gl.tensor, scale: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, CHUNK: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, D_TAIL: gl.constexpr, DV: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Walk the key blocks [lo, hi) up to the last block's scores.

    The values of one block and the scores of the next are multiplied in one go; while the other warp group multiplies, this one
    computes weights.
    """
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    s_rows: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16]))
    k_ready, v_ready, k_empty, v_empty = bars
    _, _, v_ring = rings
    empty = gl.full((ROWS,), -1.0e30, gl.float32, s_rows)
    nothing = gl.zeros((ROWS,), gl.float32, s_rows)
    state = (empty, nothing, gl.zeros((ROWS, DV), gl.float32, o_layout))
    totals = (empty, nothing, gl.zeros((ROWS, DV), gl.float32, o_layout))
    stage = step % STAGES
    phase = (step // STAGES) & 1
    mbarrier.wait(k_ready.index(stage), phase)
    s = warpgroup_mma_wait(num_outstanding=0, deps=(_scores(queries, rings, stage, ME, ROWS, BN, D_TAIL),))
    gl.thread_barrier()
    mbarrier.arrive(k_empty.index(stage), count=1)
    for block in range(lo, hi - 1):
        s = masked(s, block, position, kv_len, window, CAUSAL, GROUP, TOKENS, ROWS, BN)
        weights, state, totals = _weigh(s, state, totals, block, lo, scale, CHUNK, BN, v_ring.dtype)
        ahead = (step + 1) % STAGES
        mbarrier.wait(v_ready.index(stage), phase)
        mbarrier.wait(k_ready.index(ahead), ((step + 1) // STAGES) & 1)
        pending = warpgroup_mma(weights, v_ring.index(stage), state[2], is_async=True)
        s_next = _scores(queries, rings, ahead, ME, ROWS, BN, D_TAIL)
        acc, s = warpgroup_mma_wait(num_outstanding=0, deps=(pending, s_next))
        state = (state[0], state[1], acc)
        gl.thread_barrier()
        mbarrier.arrive(v_empty.index(stage), count=1)
        mbarrier.arrive(k_empty.index(ahead), count=1)
        step += 1
        stage = ahead
        phase = (step // STAGES) & 1
    return s, state, totals, step


@gluon_jit
def _finish(
    rings: gl.tensor, bars: gl.tensor, s: gl.tensor, state: gl.tensor, totals: gl.tensor, step: gl.tensor, lo: gl.tensor,
    hi: gl.tensor, position: gl.tensor, kv_len: gl.tensor, scale: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, CHUNK: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, DV: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The last block's weights and values, and the last chunk folded."""
    _, v_ready, _, v_empty = bars
    _, _, v_ring = rings
    stage = step % STAGES
    s = masked(s, hi - 1, position, kv_len, window, CAUSAL, GROUP, TOKENS, ROWS, BN)
    weights, state, totals = _weigh(s, state, totals, hi - 1, lo, scale, CHUNK, BN, v_ring.dtype)
    m, l, acc = state
    mbarrier.wait(v_ready.index(stage), (step // STAGES) & 1)
    if kv_len < hi * BN:
        scrub(v_ring.index(stage), kv_len - (hi - 1) * BN, BN, DV, 4)
        gl.thread_barrier()
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(warpgroup_mma(weights, v_ring.index(stage), acc, is_async=True),))
    gl.thread_barrier()
    mbarrier.arrive(v_empty.index(stage), count=1)
    total_m, total_l, total = totals
    return fold(total_m, total_l, total, m, l, acc)


@gluon_jit
def _consume(
    q: gl.tensor, outs: gl.tensor, queries: gl.tensor, rings: gl.tensor, bars: gl.tensor, lengths: gl.tensor, sizes: gl.tensor,
    strides: gl.tensor, scale: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, CHUNK: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, D: gl.constexpr, D_TAIL: gl.constexpr, DV: gl.constexpr, LSE: gl.constexpr, ME: gl.constexpr,
) -> None:  # fmt: skip
    """Consumer warp group ME: its 64 rows of every work item of this program."""
    ROWS: gl.constexpr = 64
    SEQS, HEADS, TILES, CHUNKS = sizes
    q_buffer, tail_buffer = queries
    step = 0
    for turn in range(gl.cdiv(SEQS * HEADS * TILES * CHUNKS, gl.num_programs(0))):
        _, head, first_token, _, q_start, q_len, _, kv_len, position, lo, hi = span(
            lengths, sizes, item_of(turn), window, CAUSAL, False, 2 * TOKENS, CHUNK, BN
        )
        if lo < hi:
            mine = first_token + ME * TOKENS
            position += ME * TOKENS
            gl.thread_barrier()
            load_queries(q, q_buffer.index(ME), strides, q_start, mine, q_len, head * GROUP, 0, GROUP, TOKENS, ROWS, D, 4)
            if D_TAIL:
                load_queries(
                    q, tail_buffer.index(ME), strides, q_start, mine, q_len, head * GROUP, D, GROUP, TOKENS, ROWS, D_TAIL, 4
                )
            fence_async_shared()
            gl.thread_barrier()
            s, state, totals, step = _attend(
                queries, rings, bars, step, lo, hi, position, kv_len, scale, window, CAUSAL, GROUP, TOKENS, CHUNK, ROWS, BN, STAGES,
                D_TAIL, DV, ME,
            )  # fmt: skip
            m, l, acc = _finish(
                rings, bars, s, state, totals, step, lo, hi, position, kv_len, scale, window, CAUSAL, GROUP, TOKENS, CHUNK, ROWS,
                BN, STAGES, DV,
            )  # fmt: skip
            step += 1
            store_rows(outs, strides, acc, m, l, q_start, mine, q_len, head * GROUP, GROUP, TOKENS, ROWS, DV, LSE)


@gluon_jit
def _consume_first(
    q: gl.tensor, outs: gl.tensor, queries: gl.tensor, rings: gl.tensor, bars: gl.tensor, lengths: gl.tensor, sizes: gl.tensor,
    strides: gl.tensor, scale: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, CHUNK: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, D: gl.constexpr, D_TAIL: gl.constexpr, DV: gl.constexpr, LSE: gl.constexpr,
) -> None:  # fmt: skip
    """The first warp group's entry."""
    _consume(
        q, outs, queries, rings, bars, lengths, sizes, strides, scale, window, CAUSAL, GROUP, TOKENS, CHUNK, BN, STAGES, D, D_TAIL,
        DV, LSE, 0,
    )  # fmt: skip


@gluon_jit
def _consume_second(
    q: gl.tensor, outs: gl.tensor, queries: gl.tensor, rings: gl.tensor, bars: gl.tensor, lengths: gl.tensor, sizes: gl.tensor,
    strides: gl.tensor, scale: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, CHUNK: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, D: gl.constexpr, D_TAIL: gl.constexpr, DV: gl.constexpr, LSE: gl.constexpr,
) -> None:  # fmt: skip
    """The second warp group's entry."""
    _consume(
        q, outs, queries, rings, bars, lengths, sizes, strides, scale, window, CAUSAL, GROUP, TOKENS, CHUNK, BN, STAGES, D, D_TAIL,
        DV, LSE, 1,
    )  # fmt: skip


@gluon_jit(do_not_specialize=["SEQS", "TILES", "window", "table_stride"])
def attention_kernel(
    q: gl.tensor, k_desc: gl.tensor, t_desc: gl.tensor, v_desc: gl.tensor, out: gl.tensor, lse: gl.tensor, q_starts: gl.tensor,
    kv_starts: gl.tensor, kv_lens: gl.tensor, table: gl.tensor, table_stride: gl.tensor, SEQS: gl.tensor, HEADS: gl.tensor,
    TILES: gl.tensor, q_stride_token: gl.tensor, q_stride_head: gl.tensor, o_stride_token: gl.tensor, o_stride_head: gl.tensor,
    lse_stride: gl.tensor, scale: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, GROUP: gl.constexpr, HEAD_TILES: gl.constexpr, TOKENS: gl.constexpr, CHUNK: gl.constexpr,
    BN: gl.constexpr, PAGE: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, D_TAIL: gl.constexpr,
    DV: gl.constexpr, LSE: gl.constexpr,
) -> None:  # fmt: skip
    """Softmax attention of packed queries over packed or paged keys and values; see the module's text for the arithmetic."""
    dtype: gl.constexpr = k_desc.dtype
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, D], gl.NVMMASharedLayout(128, 16))
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, DV], gl.NVMMASharedLayout(128, 16))
    q_buffer = gl.allocate_shared_memory(dtype, [2, 64, D], gl.NVMMASharedLayout(128, 16))
    t_ring = k_ring
    tail_buffer = q_buffer
    if D_TAIL:
        t_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, D_TAIL], gl.NVMMASharedLayout(128, 16))
        tail_buffer = gl.allocate_shared_memory(dtype, [2, 64, D_TAIL], gl.NVMMASharedLayout(128, 16))
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    gl.thread_barrier()
    grid_release()
    grid_wait()
    outs = (out, lse)
    queries = (q_buffer, tail_buffer)
    rings = (k_ring, t_ring, v_ring)
    bars = (k_ready, v_ready, k_empty, v_empty)
    lengths = (q_starts, kv_starts, kv_lens)
    sizes = (SEQS, HEADS, TILES, 1)
    strides = (q_stride_token, q_stride_head, o_stride_token, o_stride_head, lse_stride)
    descs = (k_desc, t_desc, v_desc)
    gl.warp_specialize(
        [
            (_consume_first, (q, outs, queries, rings, bars, lengths, sizes, strides, scale, window, CAUSAL, GROUP, TOKENS, CHUNK, BN,
                              STAGES, D, D_TAIL, DV, LSE)),
            (_consume_second, (q, outs, queries, rings, bars, lengths, sizes, strides, scale, window, CAUSAL, GROUP, TOKENS, CHUNK, BN,
                               STAGES, D, D_TAIL, DV, LSE)),
            (produce, (descs, rings, bars, lengths, sizes, table, table_stride, window, CAUSAL, False, 2 * TOKENS, CHUNK, BN,
                       PAGE, BOX, STAGES, D, D_TAIL, DV, HEAD_TILES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
