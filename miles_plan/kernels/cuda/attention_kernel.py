"""The Hopper attention kernel for prefill, chunked prefill and training; `attention_decode` computes the same for few queries.

Warp-specialised Gluon kernel. A producer warp streams blocks of 128 keys and values through a ring of stages with TMA (from a
packed tensor, or page by page through a page table; `attention_tiles` says in which order); two consumer warp groups each own 64
rows of queries. A row is a (token, head) pair: the heads that share a key head sit side by side.

A warp group starts the scores of a block and the weighted values of the block before together, computes weights as soon as the
scores are there, and rescales when the values are; meanwhile the tensor core has the other group's products, whose turn it is next.
The blocks of all work items of a program are one stream: an item's first scores run beside the last values of the item before. This
is FlashAttention-3's overlap (arXiv 2407.08608, section 3) carried over the items' ends.

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

from .attention_load import fetch_queries
from .attention_state import added, fold_kept, keep, masked, scrub, store_rows, to_weights
from .attention_tiles import hear, produce_tiles
from .named_barrier import arrive, meet
from .toolchain import (
    async_copy,
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
from .wgmma import computed

BLOCK_KEYS = 128
TILE_ROWS = 64
EMPTY = -1.0e30  # the maximum over no keys; finite, so that EMPTY - EMPTY is 0 and not NaN


@gluon_jit
def _rows(buffer: gl.tensor, ME: gl.constexpr, ROWS: gl.constexpr) -> gl.tensor:
    """A warp group's queries, a row for each (token, head)."""
    mine = buffer.index(ME)
    return mine.reshape([ROWS, mine.shape[len(mine.shape) - 1]])


@gluon_jit
def _scores(
    queries: gl.tensor, rings: gl.tensor, stage: gl.tensor, ME: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr,
    D_TAIL: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Start s = q k for one block: a chain over the head dimension, its tail after its body."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    q_buffer, tail_buffer, _ = queries
    k_ring, t_ring, _ = rings
    s = gl.zeros((ROWS, BN), gl.float32, layout)
    s = warpgroup_mma(_rows(q_buffer, ME, ROWS), k_ring.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)
    if D_TAIL:
        s = warpgroup_mma(_rows(tail_buffer, ME, ROWS), t_ring.index(stage).permute((1, 0)), s, is_async=True)
    return s


@gluon_jit
def _item(board: gl.tensor, turn: gl.tensor, TOKENS: gl.constexpr, ME: gl.constexpr) -> gl.tensor:
    """The program's work item number `turn` as warp group ME sees it; with lo >= hi where none is left."""
    head, first_token, q_start, q_len, kv_len, position, lo, hi = hear(board, turn)
    return head, first_token + ME * TOKENS, q_start, q_len, kv_len, position + ME * TOKENS, lo, hi


@gluon_jit
def _fetch_queries(
    q: gl.tensor, queries: gl.tensor, strides: gl.tensor, item: gl.tensor, GROUP: gl.constexpr, TOKENS: gl.constexpr,
    ROWS: gl.constexpr, D: gl.constexpr, D_TAIL: gl.constexpr, Q_BOXES: gl.constexpr, ME: gl.constexpr,
) -> None:  # fmt: skip
    """Start to copy an item's queries, if there is an item, when every warp of the group has read the ones before.

    TMA brings the next sequence's rows too where a tile ends behind its own: nothing is written for them.
    """
    head, first_token, q_start, q_len, _, _, lo, hi = item
    q_buffer, tail_buffer, q_ready = queries
    head0 = head * GROUP
    gl.thread_barrier()
    if lo < hi:
        if Q_BOXES:
            q_desc, tail_desc = q
            mbarrier.expect(q_ready.index(ME), ROWS * (D + D_TAIL) * q_buffer.dtype.primitive_bitwidth // 8)
            place = q_start + first_token
            tma.async_copy_global_to_shared(q_desc, [place, head0, 0], q_ready.index(ME), q_buffer.index(ME))
            if D_TAIL:
                tma.async_copy_global_to_shared(tail_desc, [place, head0, D], q_ready.index(ME), tail_buffer.index(ME))
        else:
            fetch_queries(q[0], q_buffer.index(ME), strides, q_start, first_token, q_len, head0, 0, GROUP, TOKENS, ROWS, D, 4)
            if D_TAIL:
                fetch_queries(
                    q[0], tail_buffer.index(ME), strides, q_start, first_token, q_len, head0, D, GROUP, TOKENS, ROWS, D_TAIL, 4
                )
            async_copy.commit_group()


@gluon_jit
def _await_queries(queries: gl.tensor, turn: gl.tensor, Q_BOXES: gl.constexpr, ME: gl.constexpr) -> None:
    """Wait for the queries of the program's item number `turn`, and let the tensor core see them."""
    _, _, q_ready = queries
    if Q_BOXES:
        mbarrier.wait(q_ready.index(ME), turn & 1)
    else:
        async_copy.wait_group(0)
        fence_async_shared()
        gl.thread_barrier()


@gluon_jit
def _start_values(
    weights: gl.tensor, acc: gl.tensor, rings: gl.tensor, bars: gl.tensor, step: gl.tensor, last: gl.tensor,
    valid_keys: gl.tensor, BN: gl.constexpr, STAGES: gl.constexpr, DV: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Start acc + p v for the block of `step`, of which an item's last may have keys past the sequence's end."""
    _, v_ready = bars
    _, _, v_ring = rings
    stage = step % STAGES
    mbarrier.wait(v_ready.index(stage), (step // STAGES) & 1)
    if last & (valid_keys < BN):
        scrub(v_ring.index(stage), valid_keys, BN, DV, 4)
        gl.thread_barrier()
    return warpgroup_mma(weights, v_ring.index(stage), acc, is_async=True)


@gluon_jit
def _operand(p: gl.tensor, like: gl.tensor, acc: gl.tensor) -> gl.tensor:
    """Weights as the tensor core takes them, in registers."""
    return gl.convert_layout(p.to(like.dtype), gl.DotOperandLayout(0, acc.type.layout, 2))


@gluon_jit
def _no_keys(ROWS: gl.constexpr, BN: gl.constexpr, DV: gl.constexpr) -> gl.tensor:
    """The state of rows that have seen nothing."""
    rows: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16]))
    return (
        gl.full((ROWS,), -1.0e30, gl.float32, rows),
        gl.zeros((ROWS,), gl.float32, rows),
        gl.zeros((ROWS, DV), gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])),
    )


@gluon_jit
def _begin(
    queries: gl.tensor, rings: gl.tensor, bars: gl.tensor, turn: gl.tensor, Q_BOXES: gl.constexpr, ME: gl.constexpr,
    ROWS: gl.constexpr, BN: gl.constexpr, D_TAIL: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The scores of the program's first block, with nothing to hide them behind."""
    k_ready, _ = bars
    _await_queries(queries, turn, Q_BOXES, ME)
    mbarrier.wait(k_ready.index(0), 0)
    s = warpgroup_mma_wait(num_outstanding=0, deps=(_scores(queries, rings, 0, ME, ROWS, BN, D_TAIL),))
    arrive("keys", 0)
    return s


@gluon_jit
def _restart(
    outs: gl.tensor, strides: gl.tensor, kept: gl.tensor, totals: gl.tensor, state: gl.tensor, item: gl.tensor,
    last: gl.tensor, GROUP: gl.constexpr, TOKENS: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr, DV: gl.constexpr,
    LSE: gl.constexpr, SHARED: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """A chunk's state folded into its rows' total, which after the item's last chunk is written, and else put aside."""
    total_m, total_l, chunks = totals
    total_m, total_l, total = fold_kept((total_m, total_l), kept, chunks, state, SHARED)
    chunks += 1
    if last:
        head, first_token, q_start, q_len, _, _, _, _ = item
        store_rows(
            outs, strides, total, total_m, total_l, q_start, first_token, q_len, head * GROUP, GROUP, TOKENS, ROWS, DV, LSE
        )
        total_m, total_l, _ = _no_keys(ROWS, BN, DV)
        chunks = 0
    else:
        keep(kept, total, SHARED)
    return total_m, total_l, chunks


@gluon_jit
def _attend(
    q: gl.tensor, outs: gl.tensor, queries: gl.tensor, rings: gl.tensor, bars: gl.tensor, board: gl.tensor, kept: gl.tensor,
    strides: gl.tensor, scale: gl.tensor, window: gl.tensor, item: gl.tensor,
    CAUSAL: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, CHUNK: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, D: gl.constexpr, D_TAIL: gl.constexpr, DV: gl.constexpr, LSE: gl.constexpr, SHARED: gl.constexpr,
    Q_BOXES: gl.constexpr, ME: gl.constexpr,
) -> None:  # fmt: skip
    """All key blocks of `item`, the program's first, and of the items after it."""
    k_ready, _ = bars
    _, _, v_ring = rings
    turn = 0
    _, _, _, _, kv_len, position, block, hi = item
    _fetch_queries(q, queries, strides, item, GROUP, TOKENS, ROWS, D, D_TAIL, Q_BOXES, ME)
    coming = _item(board, turn + 1, TOKENS, ME)
    s = _begin(queries, rings, bars, turn, Q_BOXES, ME, ROWS, BN, D_TAIL)
    if block + 1 == hi:
        _fetch_queries(q, queries, strides, coming, GROUP, TOKENS, ROWS, D, D_TAIL, Q_BOXES, ME)
    empty, nothing, acc = _no_keys(ROWS, BN, DV)
    s = masked(s, block, position, kv_len, window, CAUSAL, GROUP, TOKENS, ROWS, BN)
    m, p, lanes = to_weights(s, empty, scale, ROWS, BN)
    weights = _operand(p, v_ring, acc)
    l = nothing
    alpha = nothing
    totals = (empty, nothing, turn)  # of no chunk so far
    step = 0
    while (block + 1 < hi) | (coming[6] < coming[7]):
        last = block + 1 == hi
        ahead = (step + 1) % STAGES
        if last:
            turn += 1
            _await_queries(queries, turn, Q_BOXES, ME)
        mbarrier.wait(k_ready.index(ahead), ((step + 1) // STAGES) & 1)
        meet("turn", ME)
        s_pending = _scores(queries, rings, ahead, ME, ROWS, BN, D_TAIL)
        acc_pending = _start_values(weights, acc, rings, bars, step, last, kv_len - block * BN, BN, STAGES, DV)
        arrive("turn", 1 - ME)
        l = added(l, alpha, lanes)
        ended = item
        block += 1
        if last:
            item = coming
            _, _, _, _, kv_len, position, block, hi = item
            coming = _item(board, turn + 1, TOKENS, ME)
        s = warpgroup_mma_wait(num_outstanding=1, deps=(s_pending,))
        arrive("keys", ahead)
        if block + 1 == hi:
            _fetch_queries(q, queries, strides, coming, GROUP, TOKENS, ROWS, D, D_TAIL, Q_BOXES, ME)
        s = masked(s, block, position, kv_len, window, CAUSAL, GROUP, TOKENS, ROWS, BN)
        restart = last | (block % (CHUNK // BN) == 0)
        m_old = gl.where(restart, empty, m)
        m_new, p, lanes = to_weights(s, m_old, scale, ROWS, BN)
        lanes = computed(lanes)
        alpha = gl.where(restart, 0.0, gl.exp2(m_old - m_new))  # a new chunk begins with nothing
        acc, weights = warpgroup_mma_wait(num_outstanding=0, deps=(acc_pending, weights))
        arrive("values", step % STAGES)
        weights = _operand(p, v_ring, acc)
        if restart:
            totals = _restart(outs, strides, kept, totals, (m, l, acc), ended, last, GROUP, TOKENS, ROWS, BN, DV, LSE, SHARED)
            acc = gl.zeros_like(acc)
        else:
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
        m = m_new
        step += 1
    acc_pending = _start_values(weights, acc, rings, bars, step, True, kv_len - block * BN, BN, STAGES, DV)
    l = added(l, alpha, lanes)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc_pending,))
    _restart(outs, strides, kept, totals, (m, l, acc), item, True, GROUP, TOKENS, ROWS, BN, DV, LSE, SHARED)


@gluon_jit
def _consume(
    q: gl.tensor, outs: gl.tensor, queries: gl.tensor, rings: gl.tensor, bars: gl.tensor, board: gl.tensor, kept: gl.tensor,
    strides: gl.tensor, scale: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, CHUNK: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, D: gl.constexpr, D_TAIL: gl.constexpr, DV: gl.constexpr, LSE: gl.constexpr, SHARED: gl.constexpr,
    Q_BOXES: gl.constexpr, ME: gl.constexpr,
) -> None:  # fmt: skip
    """Consumer warp group ME: its 64 rows of every work item of this program."""
    ROWS: gl.constexpr = 64
    if ME == 1:
        arrive("turn", 0)  # the first group begins
    if SHARED:
        mine = kept.index(ME)
    else:
        mine = kept + (gl.program_id(0) * 2 + ME) * (ROWS * DV)
    first = 0
    item = _item(board, first, TOKENS, ME)
    if item[6] < item[7]:
        _attend(
            q, outs, queries, rings, bars, board, mine, strides, scale, window, item, CAUSAL, GROUP, TOKENS, CHUNK, ROWS, BN,
            STAGES, D, D_TAIL, DV, LSE, SHARED, Q_BOXES, ME,
        )  # fmt: skip


@gluon_jit
def _consume_first(
    q: gl.tensor, outs: gl.tensor, queries: gl.tensor, rings: gl.tensor, bars: gl.tensor, board: gl.tensor, kept: gl.tensor,
    strides: gl.tensor, scale: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, CHUNK: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, D: gl.constexpr, D_TAIL: gl.constexpr, DV: gl.constexpr, LSE: gl.constexpr, SHARED: gl.constexpr,
    Q_BOXES: gl.constexpr,
) -> None:  # fmt: skip
    """The first warp group's entry."""
    _consume(
        q, outs, queries, rings, bars, board, kept, strides, scale, window, CAUSAL, GROUP, TOKENS, CHUNK, BN, STAGES, D, D_TAIL,
        DV, LSE, SHARED, Q_BOXES, 0,
    )  # fmt: skip


@gluon_jit
def _consume_second(
    q: gl.tensor, outs: gl.tensor, queries: gl.tensor, rings: gl.tensor, bars: gl.tensor, board: gl.tensor, kept: gl.tensor,
    strides: gl.tensor, scale: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, CHUNK: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, D: gl.constexpr, D_TAIL: gl.constexpr, DV: gl.constexpr, LSE: gl.constexpr, SHARED: gl.constexpr,
    Q_BOXES: gl.constexpr,
) -> None:  # fmt: skip
    """The second warp group's entry."""
    _consume(
        q, outs, queries, rings, bars, board, kept, strides, scale, window, CAUSAL, GROUP, TOKENS, CHUNK, BN, STAGES, D, D_TAIL,
        DV, LSE, SHARED, Q_BOXES, 1,
    )  # fmt: skip


@gluon_jit(do_not_specialize=["SEQS", "ITEMS", "l2_keys", "window", "table_stride"])
def attention_kernel(
    q: gl.tensor, q_tail: gl.tensor, k_desc: gl.tensor, t_desc: gl.tensor, v_desc: gl.tensor, out: gl.tensor, lse: gl.tensor,
    kept: gl.tensor, counter: gl.tensor, q_starts: gl.tensor, kv_starts: gl.tensor, kv_lens: gl.tensor, table: gl.tensor,
    table_stride: gl.tensor, SEQS: gl.tensor, HEADS: gl.tensor, ITEMS: gl.tensor, l2_keys: gl.tensor, q_stride_token: gl.tensor,
    q_stride_head: gl.tensor, o_stride_token: gl.tensor, o_stride_head: gl.tensor, lse_stride: gl.tensor, scale: gl.tensor,
    window: gl.tensor,
    CAUSAL: gl.constexpr, GROUP: gl.constexpr, HEAD_TILES: gl.constexpr, TOKENS: gl.constexpr, CHUNK: gl.constexpr,
    BN: gl.constexpr, PAGE: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, D_TAIL: gl.constexpr,
    DV: gl.constexpr, LSE: gl.constexpr, SHARED: gl.constexpr, Q_BOXES: gl.constexpr,
) -> None:  # fmt: skip
    """Softmax attention of packed queries over packed or paged keys and values; see the module's text for the arithmetic.

    q, q_tail: with Q_BOXES TMA descriptors of [tokens, heads, head size], else Q itself, twice.
    kept: float32 [programs, 128, DV], where totals wait for the end of a chunk; unused with SHARED, where they wait in shared memory.
    counter: an int32 zero, zero again afterwards. ITEMS, l2_keys: see `attention_tiles`.
    """
    TURNS: gl.constexpr = 8  # told and not yet heard: at most those with a block in the ring, one after and one before them
    dtype: gl.constexpr = k_desc.dtype
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, D], gl.NVMMASharedLayout(128, 16))
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, DV], gl.NVMMASharedLayout(128, 16))
    if Q_BOXES:
        q_buffer = gl.allocate_shared_memory(dtype, [2, TOKENS, GROUP, D], gl.NVMMASharedLayout(128, 16, 3))
    else:
        q_buffer = gl.allocate_shared_memory(dtype, [2, 64, D], gl.NVMMASharedLayout(128, 16))
    t_ring = k_ring
    tail_buffer = q_buffer
    if D_TAIL:
        t_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, D_TAIL], gl.NVMMASharedLayout(128, 16))
        if Q_BOXES:
            tail_buffer = gl.allocate_shared_memory(dtype, [2, TOKENS, GROUP, D_TAIL], gl.NVMMASharedLayout(128, 16, 3))
        else:
            tail_buffer = gl.allocate_shared_memory(dtype, [2, 64, D_TAIL], gl.NVMMASharedLayout(128, 16))
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    told = gl.allocate_shared_memory(gl.int64, [TURNS, 1], mbarrier.MBarrierLayout())
    fields = gl.allocate_shared_memory(gl.int32, [TURNS * 8, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    if SHARED:
        kept = gl.allocate_shared_memory(gl.float32, [2, 64, DV], gl.NVMMASharedLayout.get_default_for([64, DV], gl.float32))
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(q_ready.index(i), count=1)
    for i in gl.static_range(TURNS):
        mbarrier.init(told.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    grid_release()
    grid_wait()
    q = (q, q_tail)
    outs = (out, lse)
    queries = (q_buffer, tail_buffer, q_ready)
    rings = (k_ring, t_ring, v_ring)
    bars = (k_ready, v_ready)
    board = (told, fields)
    lengths = (q_starts, kv_starts, kv_lens)
    sizes = (SEQS, HEADS, ITEMS, l2_keys)
    strides = (q_stride_token, q_stride_head, o_stride_token, o_stride_head, lse_stride)
    descs = (k_desc, t_desc, v_desc)
    gl.warp_specialize(
        [
            (_consume_first, (q, outs, queries, rings, bars, board, kept, strides, scale, window, CAUSAL, GROUP, TOKENS, CHUNK, BN,
                              STAGES, D, D_TAIL, DV, LSE, SHARED, Q_BOXES)),
            (_consume_second, (q, outs, queries, rings, bars, board, kept, strides, scale, window, CAUSAL, GROUP, TOKENS, CHUNK, BN,
                               STAGES, D, D_TAIL, DV, LSE, SHARED, Q_BOXES)),
            (produce_tiles, (descs, rings, bars + bars, board, counter, lengths, sizes, table, table_stride, window, CAUSAL,
                             2 * TOKENS, BN, PAGE, BOX, STAGES, D, D_TAIL, DV, HEAD_TILES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
