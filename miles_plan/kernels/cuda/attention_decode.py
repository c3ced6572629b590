"""The Hopper attention kernel for few queries, above all a decode step: keys fill the tensor core's rows, queries its columns.

The arithmetic, block for block, is the one that `attention_kernel` documents. What differs is the orientation, which no bit
shows: scores are k q^T and weighted values v^T p^T, so that 8 queries cost 8 columns and not a tile of 64 rows. A work item is a
(sequence, head) or, where those are too few to fill the GPU, one chunk of its keys. A producer warp streams the keys and values of
every item of a thread block through one ring, without a pause between items, as `attention_work` says; the other warps take a few
blocks at a time, as `attention_pass` says.

A split item leaves its chunk's state in memory. The folds in ascending order that an unsplit item does at the end of each chunk are
then done by whoever finishes a row's last chunk, which saves a launch; or, where a thread block has several items (CLAIM), by a
kernel of their own: the slowest block would be the last of many rows and fold them one after another, and the fence before it can say
that it has finished takes microseconds under the load of a long stream. Folding inside made four sequences of 32k 14 % slower (H200).

Where even chunks are too few, an item is also one of PARTS equal parts of the values' columns. Each part computes its head's
weights anew, from keys that the part beside it has brought into L2, and columns of v^T p^T never meet: no bit changes.
"""

from __future__ import annotations

from .attention_load import load_queries
from .attention_pass import allocate_pass, attend
from .attention_state import merge_chunks
from .attention_work import hear, produce, span
from .toolchain import fence_async_shared, gl, gluon_jit, grid_release, grid_wait, mbarrier


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
def _item(
    queries: gl.tensor, kept: gl.tensor, rings: gl.tensor, bars: gl.tensor, step: gl.tensor, lo: gl.tensor, hi: gl.tensor,
    position: gl.tensor, kv_len: gl.tensor, scale: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, SPLIT: gl.constexpr, GROUP: gl.constexpr, CHUNK: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr,
    D_TAIL: gl.constexpr, DV: gl.constexpr, ROWS: gl.constexpr, LANES: gl.constexpr, WARPS: gl.constexpr,
    PASS: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The state over an item's key blocks [lo, hi): of one chunk with SPLIT, else of all, folded as each ends."""
    if SPLIT:
        state, step = attend(
            queries, kept, rings, bars, step, lo, hi, position, kv_len, scale, window, CAUSAL, GROUP, HALF, STAGES, D_TAIL, DV,
            ROWS, LANES, WARPS, PASS,
        )  # fmt: skip
    else:
        EACH: gl.constexpr = CHUNK // (2 * HALF)
        state = _no_keys(ROWS, DV, gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, ROWS, 16]))
        for first in range(lo // EACH * EACH, hi, EACH):
            chunk, step = attend(
                queries, kept, rings, bars, step, gl.maximum(lo, first), gl.minimum(hi, first + EACH), position, kv_len, scale, window,
                CAUSAL, GROUP, HALF, STAGES, D_TAIL, DV, ROWS, LANES, WARPS, PASS,
            )  # fmt: skip
            state = _fold(state, chunk)
    return state, step


@gluon_jit
def _consume(
    q: gl.tensor, outs: gl.tensor, partials: gl.tensor, counters: gl.tensor, queries: gl.tensor, kept: gl.tensor,
    rings: gl.tensor, bars: gl.tensor, board: gl.tensor, lengths: gl.tensor, sizes: gl.tensor, strides: gl.tensor,
    scale: gl.tensor, window: gl.tensor,
    HEADS: gl.constexpr, CAUSAL: gl.constexpr, SPLIT: gl.constexpr, CLAIM: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr,
    CHUNK: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, D_TAIL: gl.constexpr, DV: gl.constexpr,
    ROWS: gl.constexpr, ROWS_KEPT: gl.constexpr, LSE: gl.constexpr, LANES: gl.constexpr, WARPS: gl.constexpr, PARTS: gl.constexpr,
    PASS: gl.constexpr, AT_ONCE: gl.constexpr,
) -> None:  # fmt: skip
    """The consumer warps: every work item of this program."""
    CHUNKS = sizes[1]
    q_buffer, tail_buffer = queries
    grid_wait()
    if SPLIT:  # few pieces, beside which the next kernel sets itself up; at the end of a full grid it would crowd
        grid_release()
    item = gl.program_id(0)
    turn = 0
    step = 0
    while item >= 0:
        seq, head, chunk, q_start, q_len, _, kv_len, position, lo, hi = span(
            lengths, sizes, item, window, HEADS, CAUSAL, SPLIT, TOKENS, CHUNK, 2 * HALF
        )
        if lo < hi:
            head0 = head // PARTS * GROUP
            mine = (outs[0] + head % PARTS * DV, outs[1])
            gl.thread_barrier()
            load_queries(q, q_buffer, strides, q_start, 0, q_len, head0, 0, GROUP, TOKENS, ROWS, D, WARPS)
            if D_TAIL:
                load_queries(q, tail_buffer, strides, q_start, 0, q_len, head0, D, GROUP, TOKENS, ROWS, D_TAIL, WARPS)
            fence_async_shared()
            gl.thread_barrier()
            state, step = _item(
                queries, kept, rings, bars, step, lo, hi, position, kv_len, scale, window, CAUSAL, SPLIT, GROUP, CHUNK, HALF, STAGES,
                D_TAIL, DV, ROWS, LANES, WARPS, PASS,
            )  # fmt: skip
            if not SPLIT:
                _store_columns(mine, strides, state, q_start, 0, q_len, head0, GROUP, ROWS, DV, LSE)
            else:
                slot = seq * HEADS + head
                _store_state(partials, state, slot * CHUNKS + chunk, ROWS, ROWS_KEPT, DV)
            if SPLIT and not CLAIM:
                gl.thread_barrier()
                first_chunk = gl.maximum(position - window + 1, 0) // CHUNK
                last_chunk = gl.cdiv(gl.minimum(kv_len, position + TOKENS) if CAUSAL else kv_len, CHUNK)
                done = gl.atomic_add(counters + slot, 1, sem="acq_rel", scope="gpu")
                if done == last_chunk - first_chunk - 1:
                    gl.store(counters + slot, 0)
                    merge_chunks(
                        mine, partials, strides, slot, CHUNKS, first_chunk, last_chunk, q_start, 0, q_len, head // PARTS, GROUP,
                        TOKENS, ROWS_KEPT, DV, LSE, WARPS, AT_ONCE,
                    )  # fmt: skip
        item = -1
        if CLAIM:
            turn += 1
            item = hear(board, turn, WARPS)


@gluon_jit(do_not_specialize=["SEQS", "CHUNKS", "window", "table_stride"])
def attention_decode_kernel(
    q: gl.tensor, k_desc: gl.tensor, t_desc: gl.tensor, v_desc: gl.tensor, out: gl.tensor, lse: gl.tensor,
    part_m: gl.tensor, part_l: gl.tensor, part_acc: gl.tensor, counters: gl.tensor, q_starts: gl.tensor, kv_starts: gl.tensor,
    kv_lens: gl.tensor, table: gl.tensor, table_stride: gl.tensor, SEQS: gl.tensor, HEADS: gl.constexpr, CHUNKS: gl.tensor,
    q_stride_token: gl.tensor, q_stride_head: gl.tensor, o_stride_token: gl.tensor,
    o_stride_head: gl.tensor, lse_stride: gl.tensor, scale: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, SPLIT: gl.constexpr, CLAIM: gl.constexpr, GROUP: gl.constexpr, HEAD_TILES: gl.constexpr,
    TOKENS: gl.constexpr, CHUNK: gl.constexpr, HALF: gl.constexpr, PAGE: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr,
    D: gl.constexpr, D_TAIL: gl.constexpr, DV: gl.constexpr, ROWS: gl.constexpr, ROWS_KEPT: gl.constexpr, LSE: gl.constexpr,
    LANES: gl.constexpr, WARPS: gl.constexpr, PARTS: gl.constexpr, PASS: gl.constexpr, AT_ONCE: gl.constexpr,
) -> None:  # fmt: skip
    """Softmax attention of at most ROWS packed (token, head) rows a sequence and key head."""
    # Of items that the consumers have not begun the ring holds fewer: each takes four stages at least, of at most MOST_STAGES.
    TURNS: gl.constexpr = 4
    dtype: gl.constexpr = k_desc.dtype
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, HALF, D], gl.NVMMASharedLayout(128, 16))
    v_ring = k_ring._reinterpret(dtype, [STAGES * (D // DV), HALF, DV], gl.NVMMASharedLayout(128, 16))
    q_buffer = gl.allocate_shared_memory(dtype, [ROWS, D], gl.NVMMASharedLayout(128, 16))
    t_ring = k_ring
    tail_buffer = q_buffer
    if D_TAIL:
        t_ring = gl.allocate_shared_memory(dtype, [STAGES, HALF, D_TAIL], gl.NVMMASharedLayout(128, 16))
        tail_buffer = gl.allocate_shared_memory(dtype, [ROWS, D_TAIL], gl.NVMMASharedLayout(128, 16))
    kept = allocate_pass(dtype, ROWS, HALF, PASS)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    told = gl.allocate_shared_memory(gl.int64, [TURNS, 1], mbarrier.MBarrierLayout())
    numbers = gl.allocate_shared_memory(gl.int32, [TURNS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(TURNS):
        mbarrier.init(told.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    lengths = (q_starts, kv_starts, kv_lens)
    sizes = (SEQS, CHUNKS)
    outs = (out, lse)
    partials = (part_m, part_l, part_acc)
    queries = (q_buffer, tail_buffer)
    rings = (k_ring, t_ring, v_ring)
    bars = (ready, empty)
    board = (told, numbers)
    strides = (q_stride_token, q_stride_head, o_stride_token, o_stride_head, lse_stride)
    descs = (k_desc, t_desc, v_desc)
    gl.warp_specialize(
        [
            (_consume, (q, outs, partials, counters, queries, kept, rings, bars, board, lengths, sizes, strides, scale, window,
                        HEADS, CAUSAL, SPLIT, CLAIM, GROUP, TOKENS, CHUNK, HALF, STAGES, D, D_TAIL, DV, ROWS, ROWS_KEPT, LSE,
                        LANES, WARPS, PARTS, PASS, AT_ONCE)),
            (produce, (descs, rings, bars, board, counters, lengths, sizes, table, table_stride, window, HEADS, CAUSAL, SPLIT,
                       CLAIM, TOKENS, CHUNK, HALF, PAGE, BOX, STAGES, D, D_TAIL, DV, HEAD_TILES, PARTS, PASS)),
        ],
        [1],
        [40],
    )  # fmt: skip
