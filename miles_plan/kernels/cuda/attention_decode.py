"""The Hopper attention kernel for few queries, above all a decode step: keys fill the tensor core's rows, queries its columns.

The arithmetic, block for block, is the one that `attention_kernel` documents. What differs is the orientation, which no bit
shows: scores are k q^T and weighted values v^T p^T, so that 8 queries cost 8 columns and not a tile of 64 rows. A work item is a
(sequence, head) or, where those are too few to fill the GPU, one chunk of its keys. A producer warp streams the keys and values of
every item of a thread block through one ring, without a pause between items.

A split item leaves its chunk's state in memory. The folds in ascending order that an unsplit item does at the end of each chunk are
then done by whoever finishes a row's last chunk (SPLIT = 1, which saves a launch), or by a kernel of their own (SPLIT = 2: with
several items a thread block, the slowest would be the last of many rows and fold them one after another, and the fence before it
can say that it has finished takes microseconds under the load of a long stream).

Where even chunks are too few, an item is also one of PARTS equal parts of the values' columns. Each part computes its head's
weights anew, from keys that the part beside it has brought into L2, and columns of v^T p^T never meet: no bit changes.
"""

from __future__ import annotations

from typing import Any

from .attention_load import item_of, load_queries, produce, span
from .attention_state import merge_chunks, scrub
from .toolchain import fence_async_shared, gl, gluon_jit, grid_release, grid_wait, mbarrier, warpgroup_mma, warpgroup_mma_wait


def layout_of_sums(rows: int, warps: int) -> Any:
    """Where weights [128 keys, rows] lie while they are added over the keys: in the lanes and registers that hold a row of scores
    in `attention_kernel`, hence in its order. Rows go to warps, more than 32 to further registers."""
    keys, lanes = [[1, 0], [8, 0], [16, 0], [32, 0], [64, 0]], [[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]]
    places = [[0, row if row < rows else 0] for row in (8, 16)] + [[0, 0]] * (warps // 4 - 1)
    return gl.DistributedLinearLayout(keys + ([[0, 32]] if rows > 32 else []), lanes, places, [], [128, rows])


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
def _fold(totals: gl.tensor, state: gl.tensor) -> gl.tensor:
    """`attention_state.fold` of states that lie in columns."""
    total_m, total_l, total = totals
    m, l, acc = state
    m_new = gl.maximum(total_m, m)
    a = gl.exp2(total_m - m_new)
    b = gl.exp2(m - m_new)
    return m_new, gl.fma(l, b, total_l * a), gl.fma(acc, b[None, :], total * a[None, :])


@gluon_jit
def _no_keys(ROWS: gl.constexpr, DV: gl.constexpr, layout: gl.constexpr) -> gl.tensor:
    """The state over no keys."""
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    return (
        gl.full((ROWS,), -1.0e30, gl.float32, columns),
        gl.zeros((ROWS,), gl.float32, columns),
        gl.zeros((DV, ROWS), gl.float32, layout),
    )


@gluon_jit
def _store_columns(
    outs: gl.tensor, strides: gl.tensor, state: gl.tensor, q_start: gl.tensor, first_token: gl.tensor, q_len: gl.tensor,
    head0: gl.tensor, GROUP: gl.constexpr, ROWS: gl.constexpr, DV: gl.constexpr, LSE: gl.constexpr,
) -> None:  # fmt: skip
    """Normalise and write rows that lie in columns; a row that saw no key becomes zeros."""
    out, lse = outs
    m, l, acc = state
    layout: gl.constexpr = acc.type.layout
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(0, layout))
    d = gl.arange(0, DV, layout=gl.SliceLayout(1, layout))
    token = first_token + r // GROUP
    valid = token < q_len
    head = head0 + r % GROUP
    offset = (q_start + token).to(gl.int64) * strides[2] + head * strides[3]
    inverse = gl.where(l > 0, 1.0 / l, 0.0)
    values = (acc * inverse[None, :]).to(out.dtype.element_ty)
    gl.store(out + offset[None, :] + d[:, None], values, mask=valid[None, :])
    if LSE:
        at = (q_start + token).to(gl.int64) * strides[4] + head
        gl.store(lse + at, gl.where(l > 0, m + gl.log2(l), float("-inf")), mask=valid)


@gluon_jit
def _store_state(
    partials: gl.tensor, state: gl.tensor, place: gl.tensor, ROWS: gl.constexpr, ROWS_KEPT: gl.constexpr, DV: gl.constexpr
) -> None:
    """Leave one chunk's state in memory for `merge_chunks`."""
    part_m, part_l, part_acc = partials
    m, l, acc = state
    layout: gl.constexpr = acc.type.layout
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(0, layout))
    d = gl.arange(0, DV, layout=gl.SliceLayout(1, layout))
    at = place.to(gl.int64) * ROWS_KEPT + r
    gl.store(part_m + at, m, mask=r < ROWS_KEPT)
    gl.store(part_l + at, l, mask=r < ROWS_KEPT)
    gl.store(part_acc + at[None, :] * DV + d[:, None], acc, mask=(r < ROWS_KEPT)[None, :])


@gluon_jit
def _scores(
    queries: gl.tensor, rings: gl.tensor, stage: gl.tensor, ROWS: gl.constexpr, BN: gl.constexpr, D_TAIL: gl.constexpr,
    layout: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Start s = k q^T for one block: a chain over the head dimension, its tail after its body."""
    q_buffer, tail_buffer = queries
    k_ring, t_ring, _ = rings
    s = gl.zeros((BN, ROWS), gl.float32, layout)
    s = warpgroup_mma(k_ring.index(stage), q_buffer.permute((1, 0)), s, use_acc=False, is_async=True)
    if D_TAIL:
        s = warpgroup_mma(t_ring.index(stage), tail_buffer.permute((1, 0)), s, is_async=True)
    return s


@gluon_jit
def _weigh(
    s: gl.tensor, m: gl.tensor, acc: gl.tensor, weights: gl.tensor, v_stage: gl.tensor, v_ready: gl.tensor, phase: gl.tensor,
    valid_keys: gl.tensor, scale: gl.tensor, BN: gl.constexpr, DV: gl.constexpr, WARPS: gl.constexpr, LAST: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """A block's masked scores to weights, and the start of their product with its values on the rescaled state."""
    m_new = gl.maximum(m, gl.ceil(gl.max(s, 0) * scale))
    p = gl.exp2(gl.fma(s, scale, -m_new[None, :]))
    weights.permute((1, 0)).store(p.to(weights.dtype))
    alpha = gl.exp2(m - m_new)
    acc = acc * alpha[None, :]
    mbarrier.wait(v_ready, phase)
    if LAST:
        if valid_keys < BN:
            scrub(v_stage, valid_keys, BN, DV, WARPS)
    fence_async_shared()
    gl.thread_barrier()
    return p, m_new, alpha, warpgroup_mma(v_stage.permute((1, 0)), weights.permute((1, 0)), acc, is_async=True)


@gluon_jit
def _added(l: gl.tensor, alpha: gl.tensor, p: gl.tensor, SUMS: gl.constexpr) -> gl.tensor:
    """The rescaled sum of weights and a block's; the tensor core multiplies its values meanwhile."""
    return gl.fma(l, alpha, gl.convert_layout(gl.sum(gl.convert_layout(p, SUMS), 0), l.type.layout))


@gluon_jit
def _attend_chunk(
    queries: gl.tensor, weights: gl.tensor, rings: gl.tensor, bars: gl.tensor, step: gl.tensor, lo: gl.tensor, hi: gl.tensor,
    position: gl.tensor, kv_len: gl.tensor, scale: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, GROUP: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, D_TAIL: gl.constexpr, DV: gl.constexpr,
    ROWS: gl.constexpr, SUMS: gl.constexpr, WARPS: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The state over the key blocks [lo, hi) of one chunk, a block at a time: the shortest way through a short item."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, ROWS, 16])
    k_ready, v_ready, k_empty, v_empty = bars
    _, _, v_ring = rings
    m, l, acc = _no_keys(ROWS, DV, layout)
    for block in range(lo, hi):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        mbarrier.wait(k_ready.index(stage), phase)
        s = warpgroup_mma_wait(num_outstanding=0, deps=(_scores(queries, rings, stage, ROWS, BN, D_TAIL, layout),))
        gl.thread_barrier()
        mbarrier.arrive(k_empty.index(stage), count=1)
        s = _masked(s, block, position, kv_len, window, CAUSAL, GROUP, ROWS, BN)
        p, m, alpha, pending = _weigh(
            s,
            m,
            acc,
            weights,
            v_ring.index(stage),
            v_ready.index(stage),
            phase,
            kv_len - block * BN,
            scale,
            BN,
            DV,
            WARPS,
            True,
        )
        l = _added(l, alpha, p, SUMS)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(pending,))
        gl.thread_barrier()
        mbarrier.arrive(v_empty.index(stage), count=1)
        step += 1
    return (m, l, acc), step


@gluon_jit
def _attend_ahead(
    queries: gl.tensor, weights: gl.tensor, rings: gl.tensor, bars: gl.tensor, step: gl.tensor, lo: gl.tensor, hi: gl.tensor,
    position: gl.tensor, kv_len: gl.tensor, scale: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, SPLIT: gl.constexpr, GROUP: gl.constexpr, CHUNK: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    D_TAIL: gl.constexpr, DV: gl.constexpr, ROWS: gl.constexpr, SUMS: gl.constexpr, WARPS: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The state over the key blocks [lo, hi), each block's scores under way during the block before: for a long stream.

    Of one chunk, or with SPLIT = 0 of all, folded as each ends.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, ROWS, 16])
    k_ready, v_ready, k_empty, v_empty = bars
    _, _, v_ring = rings
    m, l, acc = _no_keys(ROWS, DV, layout)
    totals = (m, l, acc)
    stage = step % STAGES
    phase = (step // STAGES) & 1
    mbarrier.wait(k_ready.index(stage), phase)
    s = warpgroup_mma_wait(num_outstanding=0, deps=(_scores(queries, rings, stage, ROWS, BN, D_TAIL, layout),))
    gl.thread_barrier()
    mbarrier.arrive(k_empty.index(stage), count=1)
    for block in range(lo, hi - 1):
        ahead = (step + 1) % STAGES
        mbarrier.wait(k_ready.index(ahead), ((step + 1) // STAGES) & 1)
        s_next = _scores(queries, rings, ahead, ROWS, BN, D_TAIL, layout)
        s = _masked(s, block, position, kv_len, window, CAUSAL, GROUP, ROWS, BN)
        if SPLIT == 0:
            if (block % (CHUNK // BN) == 0) & (block > lo):
                totals = _fold(totals, (m, l, acc))
                m, l, acc = _no_keys(ROWS, DV, layout)
        p, m, alpha, pending = _weigh(
            s, m, acc, weights, v_ring.index(stage), v_ready.index(stage), phase, BN, scale, BN, DV, WARPS, False
        )
        l = _added(l, alpha, p, SUMS)
        acc, s = warpgroup_mma_wait(num_outstanding=0, deps=(pending, s_next))
        gl.thread_barrier()
        mbarrier.arrive(v_empty.index(stage), count=1)
        mbarrier.arrive(k_empty.index(ahead), count=1)
        step += 1
        stage = ahead
        phase = (step // STAGES) & 1
    s = _masked(s, hi - 1, position, kv_len, window, CAUSAL, GROUP, ROWS, BN)
    if SPLIT == 0:
        if ((hi - 1) % (CHUNK // BN) == 0) & (hi - 1 > lo):
            totals = _fold(totals, (m, l, acc))
            m, l, acc = _no_keys(ROWS, DV, layout)
    p, m, alpha, pending = _weigh(
        s, m, acc, weights, v_ring.index(stage), v_ready.index(stage), phase, kv_len - (hi - 1) * BN, scale, BN, DV, WARPS, True
    )
    l = _added(l, alpha, p, SUMS)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(pending,))
    gl.thread_barrier()
    mbarrier.arrive(v_empty.index(stage), count=1)
    state = (m, l, acc)
    if SPLIT == 0:
        state = _fold(totals, state)
    return state, step + 1


@gluon_jit
def _consume(
    q: gl.tensor, outs: gl.tensor, partials: gl.tensor, counters: gl.tensor, queries: gl.tensor, weights: gl.tensor,
    rings: gl.tensor, bars: gl.tensor, lengths: gl.tensor, sizes: gl.tensor, strides: gl.tensor, scale: gl.tensor,
    window: gl.tensor,
    CAUSAL: gl.constexpr, SPLIT: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, CHUNK: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, D: gl.constexpr, D_TAIL: gl.constexpr, DV: gl.constexpr, ROWS: gl.constexpr, ROWS_KEPT: gl.constexpr,
    LSE: gl.constexpr, SUMS: gl.constexpr, WARPS: gl.constexpr, PARTS: gl.constexpr, AT_ONCE: gl.constexpr,
) -> None:  # fmt: skip
    """The consumer warps: every work item of this program."""
    SEQS, HEADS, TILES, CHUNKS = sizes
    q_buffer, tail_buffer = queries
    step = 0
    for turn in range(gl.cdiv(SEQS * HEADS * TILES * CHUNKS, gl.num_programs(0))):
        seq, head, first_token, chunk, q_start, q_len, _, kv_len, position, lo, hi = span(
            lengths, sizes, item_of(turn), window, CAUSAL, SPLIT, TOKENS, CHUNK, BN
        )
        if lo < hi:
            head0 = head // PARTS * GROUP
            mine = (outs[0] + head % PARTS * DV, outs[1])
            gl.thread_barrier()
            load_queries(q, q_buffer, strides, q_start, first_token, q_len, head0, 0, GROUP, TOKENS, ROWS, D, WARPS)
            if D_TAIL:
                load_queries(q, tail_buffer, strides, q_start, first_token, q_len, head0, D, GROUP, TOKENS, ROWS, D_TAIL, WARPS)
            fence_async_shared()
            gl.thread_barrier()
            if (WARPS == 4) & (PARTS == 1):
                state, step = _attend_chunk(
                    queries, weights, rings, bars, step, lo, hi, position, kv_len, scale, window, CAUSAL, GROUP, BN, STAGES,
                    D_TAIL, DV, ROWS, SUMS, WARPS,
                )  # fmt: skip
            else:
                state, step = _attend_ahead(
                    queries, weights, rings, bars, step, lo, hi, position, kv_len, scale, window, CAUSAL, SPLIT, GROUP, CHUNK, BN,
                    STAGES, D_TAIL, DV, ROWS, SUMS, WARPS,
                )  # fmt: skip
            if SPLIT == 0:
                _store_columns(mine, strides, state, q_start, first_token, q_len, head0, GROUP, ROWS, DV, LSE)
            else:
                slot = seq * HEADS + head
                _store_state(partials, state, slot * CHUNKS + chunk, ROWS, ROWS_KEPT, DV)
            if SPLIT == 1:
                gl.thread_barrier()
                first_chunk = gl.maximum(position - window + 1, 0) // CHUNK
                last_chunk = gl.cdiv(gl.minimum(kv_len, position + TOKENS) if CAUSAL else kv_len, CHUNK)
                done = gl.atomic_add(counters + slot, 1, sem="acq_rel", scope="gpu")
                if done == last_chunk - first_chunk - 1:
                    gl.store(counters + slot, 0)
                    merge_chunks(
                        mine, partials, strides, slot, CHUNKS, first_chunk, last_chunk, q_start, first_token, q_len, head // PARTS,
                        GROUP, TOKENS, ROWS_KEPT, DV, LSE, WARPS, AT_ONCE,
                    )  # fmt: skip


@gluon_jit(do_not_specialize=["SEQS", "CHUNKS", "window", "table_stride"])
def attention_decode_kernel(
    q: gl.tensor, k_desc: gl.tensor, t_desc: gl.tensor, v_desc: gl.tensor, out: gl.tensor, lse: gl.tensor,
    part_m: gl.tensor, part_l: gl.tensor, part_acc: gl.tensor, counters: gl.tensor, q_starts: gl.tensor, kv_starts: gl.tensor,
    kv_lens: gl.tensor, table: gl.tensor, table_stride: gl.tensor, SEQS: gl.tensor, HEADS: gl.tensor, CHUNKS: gl.tensor,
    q_stride_token: gl.tensor, q_stride_head: gl.tensor, o_stride_token: gl.tensor,
    o_stride_head: gl.tensor, lse_stride: gl.tensor, scale: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, SPLIT: gl.constexpr, GROUP: gl.constexpr, HEAD_TILES: gl.constexpr, TOKENS: gl.constexpr,
    CHUNK: gl.constexpr, BN: gl.constexpr, PAGE: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr,
    D: gl.constexpr, D_TAIL: gl.constexpr, DV: gl.constexpr, ROWS: gl.constexpr, ROWS_KEPT: gl.constexpr, LSE: gl.constexpr,
    SUMS: gl.constexpr, WARPS: gl.constexpr, PARTS: gl.constexpr, AT_ONCE: gl.constexpr,
) -> None:  # fmt: skip
    """Softmax attention of at most ROWS packed (token, head) rows a sequence and key head."""
    dtype: gl.constexpr = k_desc.dtype
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, D], gl.NVMMASharedLayout(128, 16))
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, DV], gl.NVMMASharedLayout(128, 16))
    q_buffer = gl.allocate_shared_memory(dtype, [ROWS, D], gl.NVMMASharedLayout(128, 16))
    weights = gl.allocate_shared_memory(dtype, [ROWS, BN], gl.NVMMASharedLayout(128, 16))
    t_ring = k_ring
    tail_buffer = q_buffer
    if D_TAIL:
        t_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, D_TAIL], gl.NVMMASharedLayout(128, 16))
        tail_buffer = gl.allocate_shared_memory(dtype, [ROWS, D_TAIL], gl.NVMMASharedLayout(128, 16))
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    grid_wait()
    if SPLIT:  # few pieces, beside which the next kernel sets itself up; at the end of a full grid it would crowd
        grid_release()
    outs = (out, lse)
    partials = (part_m, part_l, part_acc)
    queries = (q_buffer, tail_buffer)
    rings = (k_ring, t_ring, v_ring)
    bars = (k_ready, v_ready, k_empty, v_empty)
    lengths = (q_starts, kv_starts, kv_lens)
    sizes = (SEQS, HEADS, 1, CHUNKS)
    strides = (q_stride_token, q_stride_head, o_stride_token, o_stride_head, lse_stride)
    descs = (k_desc, t_desc, v_desc)
    gl.warp_specialize(
        [
            (_consume, (q, outs, partials, counters, queries, weights, rings, bars, lengths, sizes, strides, scale, window,
                        CAUSAL, SPLIT, GROUP, TOKENS, CHUNK, BN, STAGES, D, D_TAIL, DV, ROWS, ROWS_KEPT, LSE, SUMS, WARPS,
                        PARTS, AT_ONCE)),
            (produce, (descs, rings, bars, lengths, sizes, table, table_stride, window, CAUSAL, SPLIT, TOKENS, CHUNK,
                       BN, PAGE, BOX, STAGES, D, D_TAIL, DV, HEAD_TILES, PARTS)),
        ],
        [1],
        [24],
    )  # fmt: skip
