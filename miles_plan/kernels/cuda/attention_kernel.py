"""The Hopper attention kernel: paged decode, chunked prefill and training forward in one, so their bits agree by construction.

Warp-specialised Gluon kernel. A producer warp streams blocks of 128 keys and values through a ring of stages with TMA (from a
packed tensor, or page by page through a page table); two consumer warp groups each own 64 rows of queries. A row is a
(token, head) pair: the heads that share a key head sit side by side, so a decode step fills the tile with its whole group.

For every row the arithmetic is, whatever the batch, the tile, the page size, or where prefill was cut:

    keys in ascending blocks of 128 from absolute position 0, the state (m, l, acc) restarting every CHUNK keys;
    s = q k, one tensor-core chain over the head dimension;
    m' = max(m, ceil(max_j s_j * scale)), an integer, in units of log2, so that rescaling by 2^(m - m') is exact;
    p_j = exp2(fma(s_j, scale, -m')); masked keys give p = 0 and change nothing;
    l' = fma(l, 2^(m - m'), sum_j p_j); acc' = acc * 2^(m - m') + bf16(p) v, one tensor-core chain over the block;
    at a chunk's end the chunk's state is folded into the row's total in ascending order (`fold`).

A split decode computes one chunk a work item and leaves its state in memory. The same folds in the same order are then done by
whoever finishes a row's last chunk (SPLIT = 1, which saves a launch), or by a kernel of their own (SPLIT = 2, which does not
interrupt the stream of a long batch).
The online softmax is Milakov & Gimelshein 2018 (arXiv 1805.02867), the tiling FlashAttention-2/3 (arXiv 2307.08691, 2407.08608).
"""

from __future__ import annotations

from .attention_load import item_of, load_queries, produce, span
from .attention_state import fold, fold_kept, masked, merge_chunks, scrub, store_partial, store_rows, to_weights
from .toolchain import fence_async_shared, gl, gluon_jit, grid_release, grid_wait, mbarrier, warpgroup_mma, warpgroup_mma_wait

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
def _attend(
    queries: gl.tensor, rings: gl.tensor, bars: gl.tensor, turns: gl.tensor, totals: gl.tensor, step: gl.tensor,
    paced: gl.tensor, lo: gl.tensor, hi: gl.tensor, position: gl.tensor, kv_len: gl.tensor, scale: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, SPLIT: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, CHUNK: gl.constexpr,
    ROWS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, D_TAIL: gl.constexpr, DV: gl.constexpr,
    TAKE_TURNS: gl.constexpr, STASH: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Walk the key blocks [lo, hi): while a block's weights meet its values, the next block's scores are under way.

    Two warp groups that share an item start their products in turn, so that one computes weights while the other multiplies
    (the ping-pong of FlashAttention-3); `paced` counts the turns. With STASH the row's total waits in shared memory between
    chunks, which leaves its registers to the running chunk.
    """
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    k_ready, v_ready, k_empty, v_empty = bars
    _, _, v_ring = rings
    total_m = gl.full((ROWS,), -1.0e30, gl.float32, s_rows)
    total_l = gl.zeros((ROWS,), gl.float32, s_rows)
    total = gl.zeros((ROWS, DV), gl.float32, o_layout)
    folded = 0
    acc = gl.zeros((ROWS, DV), gl.float32, o_layout)
    # The first block stands outside the loop: it has scores to compute but no earlier weights to spend.
    stage = step % STAGES
    phase = (step // STAGES) & 1
    mbarrier.wait(k_ready.index(stage), phase)
    s = warpgroup_mma_wait(num_outstanding=0, deps=(_scores(queries, rings, stage, ME, ROWS, BN, D_TAIL),))
    gl.thread_barrier()
    mbarrier.arrive(k_empty.index(stage), count=1)
    s = masked(s, lo, position, kv_len, window, CAUSAL, GROUP, TOKENS, ROWS, BN)
    m, p, l = to_weights(s, total_m, scale)
    weights = gl.convert_layout(p.to(v_ring.dtype), p_layout)
    for block in range(lo + 1, hi):
        ahead = (step + 1) % STAGES
        mbarrier.wait(k_ready.index(ahead), ((step + 1) // STAGES) & 1)
        if not TAKE_TURNS:
            mbarrier.wait(turns.index(ME), (paced & 1) ^ (1 - ME))
        s_next = _scores(queries, rings, ahead, ME, ROWS, BN, D_TAIL)
        mbarrier.wait(v_ready.index(stage), phase)
        pending = warpgroup_mma(weights, v_ring.index(stage), acc, is_async=True)
        if not TAKE_TURNS:
            mbarrier.arrive(turns.index(1 - ME), count=1)
            paced += 1
        s = warpgroup_mma_wait(num_outstanding=1, deps=(s_next,))
        gl.thread_barrier()
        mbarrier.arrive(k_empty.index(ahead), count=1)
        s = masked(s, block, position, kv_len, window, CAUSAL, GROUP, TOKENS, ROWS, BN)
        m_old = m
        restart = block % (CHUNK // BN) == 0  # a split item never meets it: its chunk begins before the loop
        if not SPLIT:
            m_old = gl.where(restart, gl.full((ROWS,), -1.0e30, gl.float32, s_rows), m)
        m_new, p, p_sum = to_weights(s, m_old, scale)
        weights_next = gl.convert_layout(p.to(v_ring.dtype), p_layout)
        # This barrier has completed and cannot turn before `v_empty` below. Waiting for it again ends a basic block,
        # without which the assembler moves the wait for the values up, before the softmax that should hide it.
        mbarrier.wait(v_ready.index(stage), phase)
        acc, weights = warpgroup_mma_wait(num_outstanding=0, deps=(pending, weights_next))
        gl.thread_barrier()
        mbarrier.arrive(v_empty.index(stage), count=1)
        if not SPLIT:
            if restart:
                if STASH:
                    total_m, total_l, value = fold_kept(totals.index(ME), folded, total_m, total_l, m, l, acc)
                    totals.index(ME).store(value)
                    folded += 1
                else:
                    total_m, total_l, total = fold(total_m, total_l, total, m, l, acc)
        alpha = gl.exp2(m_old - m_new)
        if not SPLIT:
            alpha = gl.where(restart, 0.0, alpha)  # a new chunk begins with nothing
        acc = acc * gl.convert_layout(alpha, o_rows)[:, None]
        l = gl.fma(l, alpha, p_sum)
        m = m_new
        step += 1
        stage = ahead
        phase = (step // STAGES) & 1
    mbarrier.wait(v_ready.index(stage), phase)
    if TAKE_TURNS:
        # All loads of this item have been seen, so the other group cannot mistake an older phase of a stage for its own.
        mbarrier.arrive(turns.index(1 - ME), count=1)
    if kv_len < hi * BN:
        scrub(v_ring.index(stage), kv_len - (hi - 1) * BN, BN, DV)
        gl.thread_barrier()
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(warpgroup_mma(weights, v_ring.index(stage), acc, is_async=True),))
    gl.thread_barrier()
    mbarrier.arrive(v_empty.index(stage), count=1)
    if STASH:
        total_m, total_l, total = fold_kept(totals.index(ME), folded, total_m, total_l, m, l, acc)
    else:
        total_m, total_l, total = fold(total_m, total_l, total, m, l, acc)
    return total_m, total_l, total, step + 1, paced


@gluon_jit
def _consume(
    q: gl.tensor, outs: gl.tensor, partials: gl.tensor, queries: gl.tensor, rings: gl.tensor, bars: gl.tensor,
    turns: gl.tensor, totals: gl.tensor, counters: gl.tensor, lengths: gl.tensor, sizes: gl.tensor, strides: gl.tensor, scale: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, SPLIT: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, CHUNK: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, D_TAIL: gl.constexpr, DV: gl.constexpr,
    ROWS_KEPT: gl.constexpr, LSE: gl.constexpr, TILE_TOKENS: gl.constexpr, STASH: gl.constexpr, ME: gl.constexpr,
) -> None:  # fmt: skip
    """Consumer warp group ME: its 64 rows of every work item of this program, or every second item when an item has but 64.

    Taking turns lets one group fetch queries and leave results while the other multiplies.
    """
    ROWS: gl.constexpr = 64
    TAKE_TURNS: gl.constexpr = TILE_TOKENS == TOKENS
    q_starts, _, kv_lens = lengths
    SEQS, HEADS, TILES, CHUNKS = sizes
    q_stride_token, q_stride_head, _, _, _ = strides
    q_buffer, tail_buffer = queries
    items = SEQS * HEADS * TILES * CHUNKS
    step = 0
    served = 0
    paced = 0
    for turn in range(gl.cdiv(items, gl.num_programs(0))):
        item = item_of(turn)
        seq, head, first_token, chunk, q_start, q_len, kv_len, position, lo, hi = span(
            q_starts,
            kv_lens,
            item,
            items,
            SEQS,
            HEADS,
            TILES,
            CHUNKS,
            window,
            CAUSAL,
            SPLIT,
            TILE_TOKENS,
            CHUNK,
            BN,
        )
        mine = first_token
        place = position
        here = lo < hi
        if TAKE_TURNS:
            here = here & ((served & 1) == ME)
            if lo < hi:
                served += 1
                if not here:
                    step += hi - lo
        else:
            mine += ME * TOKENS
            place += ME * TOKENS
        if here:
            head0 = head * GROUP
            gl.thread_barrier()
            load_queries(
                q, q_buffer.index(ME), q_stride_token, q_stride_head, q_start, mine, q_len, head0, 0, GROUP, TOKENS, ROWS, D
            )
            if D_TAIL:
                load_queries(
                    q, tail_buffer.index(ME), q_stride_token, q_stride_head, q_start, mine, q_len, head0, D, GROUP, TOKENS,
                    ROWS, D_TAIL,
                )  # fmt: skip
            fence_async_shared()
            gl.thread_barrier()
            if TAKE_TURNS:
                # `served` counts this item already; the j-th item of a group is number 2j or 2j + 1.
                mbarrier.wait(turns.index(ME), (((served - 1) // 2) & 1) ^ (1 - ME))
            m, l, acc, step, paced = _attend(
                queries, rings, bars, turns, totals, step, paced, lo, hi, place, kv_len, scale, window, CAUSAL, SPLIT, GROUP, TOKENS, CHUNK,
                ROWS, BN, STAGES, D_TAIL, DV, TAKE_TURNS, STASH, ME,
            )  # fmt: skip
            if SPLIT:
                slot = ((TILES - 1 - first_token // TILE_TOKENS) * SEQS + seq) * HEADS + head
                store_partial(partials, acc, m, l, slot * CHUNKS + chunk, ROWS, ROWS_KEPT, DV)
                gl.thread_barrier()
                if SPLIT == 1:
                    first_chunk = gl.maximum(position - window + 1, 0) // CHUNK
                    last_chunk = gl.cdiv(gl.minimum(kv_len, position + TILE_TOKENS) if CAUSAL else kv_len, CHUNK)
                    done = gl.atomic_add(counters + slot, 1, sem="acq_rel", scope="gpu")
                    if done == last_chunk - first_chunk - 1:
                        gl.store(counters + slot, 0)
                        merge_chunks(
                            outs, partials, strides, slot, CHUNKS, first_chunk, last_chunk, q_start, mine, q_len, head,
                            GROUP, TOKENS, ROWS_KEPT, DV, LSE,
                        )  # fmt: skip
            else:
                store_rows(outs, strides, acc, m, l, q_start, mine, q_len, head0, GROUP, TOKENS, ROWS, DV, LSE)


@gluon_jit
def _consume_first(
    q: gl.tensor, outs: gl.tensor, partials: gl.tensor, queries: gl.tensor, rings: gl.tensor, bars: gl.tensor,
    turns: gl.tensor, totals: gl.tensor, counters: gl.tensor, lengths: gl.tensor, sizes: gl.tensor, strides: gl.tensor, scale: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, SPLIT: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, CHUNK: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, D_TAIL: gl.constexpr, DV: gl.constexpr,
    ROWS_KEPT: gl.constexpr, LSE: gl.constexpr, TILE_TOKENS: gl.constexpr, STASH: gl.constexpr,
) -> None:  # fmt: skip
    """The first warp group's entry."""
    _consume(
        q, outs, partials, queries, rings, bars, turns, totals, counters, lengths, sizes, strides, scale, window, CAUSAL, SPLIT, GROUP, TOKENS, CHUNK,
        BN, STAGES, D, D_TAIL, DV, ROWS_KEPT, LSE, TILE_TOKENS, STASH, 0,
    )  # fmt: skip


@gluon_jit
def _consume_second(
    q: gl.tensor, outs: gl.tensor, partials: gl.tensor, queries: gl.tensor, rings: gl.tensor, bars: gl.tensor,
    turns: gl.tensor, totals: gl.tensor, counters: gl.tensor, lengths: gl.tensor, sizes: gl.tensor, strides: gl.tensor, scale: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, SPLIT: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, CHUNK: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, D_TAIL: gl.constexpr, DV: gl.constexpr,
    ROWS_KEPT: gl.constexpr, LSE: gl.constexpr, TILE_TOKENS: gl.constexpr, STASH: gl.constexpr,
) -> None:  # fmt: skip
    """The second warp group's entry."""
    _consume(
        q, outs, partials, queries, rings, bars, turns, totals, counters, lengths, sizes, strides, scale, window, CAUSAL, SPLIT, GROUP, TOKENS, CHUNK,
        BN, STAGES, D, D_TAIL, DV, ROWS_KEPT, LSE, TILE_TOKENS, STASH, 1,
    )  # fmt: skip


@gluon_jit(do_not_specialize=["SEQS", "TILES", "CHUNKS", "window", "table_stride"])
def attention_kernel(
    q: gl.tensor, k_desc: gl.tensor, t_desc: gl.tensor, v_desc: gl.tensor, out: gl.tensor, lse: gl.tensor,
    part_m: gl.tensor, part_l: gl.tensor, part_acc: gl.tensor, counters: gl.tensor, q_starts: gl.tensor, kv_starts: gl.tensor,
    kv_lens: gl.tensor, table: gl.tensor, table_stride: gl.tensor, SEQS: gl.tensor, HEADS: gl.tensor, TILES: gl.tensor,
    CHUNKS: gl.tensor, q_stride_token: gl.tensor, q_stride_head: gl.tensor, o_stride_token: gl.tensor,
    o_stride_head: gl.tensor, lse_stride: gl.tensor, scale: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, SPLIT: gl.constexpr, GROUP: gl.constexpr, HEAD_TILES: gl.constexpr, TOKENS: gl.constexpr,
    CHUNK: gl.constexpr, BN: gl.constexpr, PAGE: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr,
    D: gl.constexpr, D_TAIL: gl.constexpr, DV: gl.constexpr, ROWS_KEPT: gl.constexpr, LSE: gl.constexpr,
    TILE_TOKENS: gl.constexpr, STASH: gl.constexpr,
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
    totals = q_buffer
    if STASH:
        totals = gl.allocate_shared_memory(gl.float32, [2, 64, DV], gl.NVMMASharedLayout(128, 32))
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=TILE_TOKENS // TOKENS)
        mbarrier.init(v_empty.index(i), count=TILE_TOKENS // TOKENS)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    fence_async_shared()
    gl.thread_barrier()
    grid_release()
    grid_wait()
    outs = (out, lse)
    partials = (part_m, part_l, part_acc)
    queries = (q_buffer, tail_buffer)
    rings = (k_ring, t_ring, v_ring)
    bars = (k_ready, v_ready, k_empty, v_empty)
    lengths = (q_starts, kv_starts, kv_lens)
    sizes = (SEQS, HEADS, TILES, CHUNKS)
    strides = (q_stride_token, q_stride_head, o_stride_token, o_stride_head, lse_stride)
    descs = (k_desc, t_desc, v_desc)
    gl.warp_specialize(
        [
            (_consume_first, (q, outs, partials, queries, rings, bars, turns, totals, counters, lengths, sizes, strides, scale, window, CAUSAL, SPLIT,
                              GROUP, TOKENS, CHUNK, BN, STAGES, D, D_TAIL, DV, ROWS_KEPT, LSE, TILE_TOKENS, STASH)),
            (_consume_second, (q, outs, partials, queries, rings, bars, turns, totals, counters, lengths, sizes, strides, scale, window, CAUSAL, SPLIT,
                               GROUP, TOKENS, CHUNK, BN, STAGES, D, D_TAIL, DV, ROWS_KEPT, LSE, TILE_TOKENS, STASH)),
            (produce, (descs, rings, bars, lengths, sizes, table, table_stride, window, CAUSAL, SPLIT, TILE_TOKENS, CHUNK,
                        BN, PAGE, BOX, STAGES, D, D_TAIL, DV, HEAD_TILES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
