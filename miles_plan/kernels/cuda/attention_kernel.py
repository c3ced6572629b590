"""The Hopper attention kernel for prefill, chunked prefill and training; `attention_decode` computes the same for few queries.

Warp-specialised Gluon kernel. A producer warp streams blocks of 128 keys and values through a ring of stages with TMA (from a
packed tensor, or page by page through a page table; `attention_tiles` says in which order), and each item's queries; two consumer
warp groups each own 64 rows of queries. A row is a (token, head) pair: the heads that share a key head sit side by side.

A warp group starts the scores of a block and the weighted values of the block before together, computes weights as soon as the
scores are there, waits for the values when some exponentials are done, and rescales beside the others; meanwhile the tensor core has
the other group's products, whose turn it is next. The blocks of all work items of a program are one stream: an item's first scores
run beside the last values of the item before. This is FlashAttention-3's overlap (arXiv 2407.08608, section 3) carried over the
items' ends.

What bounds it is the chain of instructions of a warp group. So both groups are one partition and run one copy of the code, which
stays in the instruction cache; its inner loop is free of branches, with masks, ends of chunks and ends of items outside of it; and
where the assembler would put arithmetic off, or a wait first, a dependence that changes no bit says otherwise
(`attention_registers`). Within the partition no barrier of Triton's may stand where one group has its turn: the other could never
reach it.

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
from .attention_registers import once_known, packed, unpacked
from .attention_state import added, fold_kept, inverse_sums, masked, scrub, store_rows, store_sums, to_weights, token_of, uneven
from .attention_tiles import hear, produce_tiles
from .named_barrier import arrive, arrive_after, meet, open_turn
from .own_memory import own_place, put_at, store_warp_rows
from .shared_addresses import address_of, mark_places, start_at, wait_at
from .toolchain import (
    async_copy,
    fence_async_shared,
    gl,
    gluon_jit,
    grid_release,
    grid_wait,
    mbarrier,
    tl,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .warp_lanes import lane, warp, warp_group

BLOCK_KEYS = 128
TILE_ROWS = 64
EMPTY = -1.0e30  # the maximum over no keys; finite, so that EMPTY - EMPTY is 0 and not NaN


@gluon_jit
def _scores(
    queries: gl.tensor, rings: gl.tensor, stage: gl.tensor, ROWS: gl.constexpr, BN: gl.constexpr, D_TAIL: gl.constexpr
) -> gl.tensor:
    """Start s = q k for one block: a chain over the head dimension, its tail after its body."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BN, 16])
    q_buffer, tail_buffer = queries
    k_ring, t_ring, _ = rings
    s = gl.zeros((ROWS, BN), gl.float32, layout)
    q_rows = q_buffer.reshape([ROWS, q_buffer.shape[len(q_buffer.shape) - 1]])
    s = warpgroup_mma(q_rows, k_ring.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)
    if D_TAIL:
        tail_rows = tail_buffer.reshape([ROWS, D_TAIL])
        s = warpgroup_mma(tail_rows, t_ring.index(stage).permute((1, 0)), s, is_async=True)
    return s


@gluon_jit
def _fetch_queries(
    q: gl.tensor, queries: gl.tensor, strides: gl.tensor, item: gl.tensor, GROUP: gl.constexpr, TOKENS: gl.constexpr,
    ROWS: gl.constexpr, D: gl.constexpr, D_TAIL: gl.constexpr,
) -> None:  # fmt: skip
    """Start to copy an item's queries, if there is an item, when every warp has read the ones before: where TMA cannot."""
    head, first_token, q_start, q_len, _, _, lo, hi = item
    q_buffer, tail_buffer = queries
    HALF: gl.constexpr = ROWS // 2
    gl.thread_barrier()
    if lo < hi:
        for group in gl.static_range(2):
            token = first_token + group * TOKENS
            fetch_queries(
                q[0],
                q_buffer.slice(group * HALF, HALF),
                strides,
                q_start,
                token,
                q_len,
                head * GROUP,
                0,
                GROUP,
                TOKENS,
                HALF,
                D,
                8,
            )
            if D_TAIL:
                fetch_queries(
                    q[0], tail_buffer.slice(group * HALF, HALF), strides, q_start, token, q_len, head * GROUP, D, GROUP, TOKENS,
                    HALF, D_TAIL, 8,
                )  # fmt: skip
        async_copy.commit_group()
    gl.thread_barrier()  # Triton else puts one where a warp group has its turn


@gluon_jit
def _await_queries(q_ready: gl.tensor, turn: gl.tensor, Q_BOXES: gl.constexpr) -> None:
    """Wait for the queries of the program's item number `turn`, and let the tensor core see them."""
    if Q_BOXES:
        wait_at(q_ready + warp_group() * 8, turn & 1)
    else:
        async_copy.wait_group(0)
        fence_async_shared()
        gl.thread_barrier()


@gluon_jit
def _start_values(weights: gl.tensor, rings: gl.tensor, stage: gl.tensor, acc: gl.tensor, more: gl.tensor) -> gl.tensor:
    """Start p v for one block, and with `more` add it to acc."""
    v_ring = rings[2]
    p = unpacked(weights, v_ring.dtype, gl.DotOperandLayout(0, acc.type.layout, 2))
    return warpgroup_mma(p, v_ring.index(stage), acc, use_acc=more, is_async=True)


@gluon_jit
def _no_keys(ROWS: gl.constexpr, BN: gl.constexpr, DV: gl.constexpr) -> gl.tensor:
    """The state of rows that have seen nothing."""
    rows: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BN, 16]))
    return (
        gl.full((ROWS,), -1.0e30, gl.float32, rows),
        gl.zeros((ROWS,), gl.float32, rows),
        gl.zeros((ROWS, DV), gl.float32, gl.NVMMADistributedLayout([3, 0], [8, 1], [16, DV, 16])),
    )


@gluon_jit
def _scrub_end(
    item: gl.tensor, block: gl.tensor, rings: gl.tensor, v_ready: gl.tensor, ring: gl.tensor, BN: gl.constexpr, DV: gl.constexpr
) -> None:
    """Zero what an item's last block of values holds past the sequence's end."""
    valid_keys = item[4] - block * BN
    if valid_keys < BN:
        wait_at(v_ready + ring[0] * 8, ring[1])
        scrub(rings[2].index(ring[0]), valid_keys, BN, DV, 8)
        gl.thread_barrier()


@gluon_jit
def _store_whole_rows(
    outs: gl.tensor, strides: gl.tensor, kept: gl.tensor, acc: gl.tensor, m: gl.tensor, l: gl.tensor, item: gl.tensor,
    GROUP: gl.constexpr, TOKENS: gl.constexpr, ROWS: gl.constexpr, LSE: gl.constexpr,
) -> None:  # fmt: skip
    """`store_rows` by way of the place in shared memory where each warp's totals were."""
    head, first_token, q_start, q_len, _, _, _, _ = item
    out, _ = outs
    _, _, stride_token, stride_head, _ = strides
    pairs = packed(acc * inverse_sums(l, acc)[:, None], out.dtype.element_ty)
    r = warp() * 16 + lane()
    token = token_of(r, GROUP, TOKENS)
    there = (r % 64 < TOKENS * GROUP) & (first_token + token < q_len)
    offset = gl.where(there, (token * stride_token + r % 64 % GROUP * stride_head) * 2, -1)
    memory = out + ((q_start + first_token).to(gl.int64) * stride_token + head * GROUP * stride_head)
    store_warp_rows(pairs, kept - lane() * 16, memory.to(gl.int64), offset, 8)
    if LSE:
        store_sums(outs, strides, acc, m, l, q_start, first_token, q_len, head * GROUP, GROUP, TOKENS, ROWS)


@gluon_jit
def _restart(
    outs: gl.tensor, strides: gl.tensor, kept: gl.tensor, totals: gl.tensor, state: gl.tensor, item: gl.tensor,
    last: gl.tensor, GROUP: gl.constexpr, TOKENS: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr, DV: gl.constexpr,
    LSE: gl.constexpr, SHARED: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """A chunk's state folded into its rows' total, which after the item's last chunk is written, and else put aside."""
    total_m, total_l, chunks = totals
    total_m, total_l, total = fold_kept((total_m, total_l), kept, chunks, state, 8)
    chunks += 1
    if last:
        head, first_token, q_start, q_len, _, _, _, _ = item
        if SHARED:
            _store_whole_rows(outs, strides, kept, total, total_m, total_l, item, GROUP, TOKENS, ROWS, LSE)
        else:
            store_rows(
                outs, strides, total, total_m, total_l, q_start, first_token, q_len, head * GROUP, GROUP, TOKENS, ROWS, DV, LSE
            )
        total_m, total_l, _ = _no_keys(ROWS, BN, DV)
        chunks = 0
    else:
        put_at(total, kept, 8)
    return total_m, total_l, chunks


@gluon_jit
def _edge(
    s: gl.tensor, item: gl.tensor, coming: gl.tensor, block: gl.tensor, sources: gl.tensor, queries: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
    D_TAIL: gl.constexpr, Q_BOXES: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The scores of a block that some row may not see whole, masked; with an item's last the queries are given back."""
    _, _, _, _, kv_len, position, _, hi = item
    if block + 1 == hi:
        if Q_BOXES:
            arrive("queries", warp_group())
        else:
            q, strides = sources
            _fetch_queries(q, queries, strides, coming, GROUP, TOKENS, ROWS, D, D_TAIL)
    return masked(s, block, position, kv_len, window, CAUSAL, GROUP, TOKENS, ROWS, BN)


@gluon_jit
def _even(
    item: gl.tensor, block: gl.tensor, window: gl.tensor, CAUSAL: gl.constexpr, TOKENS: gl.constexpr, BN: gl.constexpr
) -> gl.tensor:
    """Whether a block needs no `_edge`: it is not an item's last, and every row of the item sees it whole."""
    _, _, _, _, kv_len, position, _, hi = item
    return not ((block + 1 == hi) | uneven(block, position, kv_len, window, CAUSAL, 2 * TOKENS, BN))


@gluon_jit
def _step(
    state: gl.tensor, ring: gl.tensor, item: gl.tensor, coming: gl.tensor, block: gl.tensor, restart: gl.tensor, me: gl.tensor,
    sources: gl.tensor, queries: gl.tensor, rings: gl.tensor, k_ready: gl.tensor, v_ready: gl.tensor, scale: gl.tensor,
    window: gl.tensor,
    CAUSAL: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    D: gl.constexpr, D_TAIL: gl.constexpr, Q_BOXES: gl.constexpr, EDGE: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The scores of `block` and the weighted values of the block before, which with `restart` ends a chunk; the state afterwards, the
    ring's, and the maximum before.

    state: maximum, sum, weighted values, whether there are any to add to, and, of the block whose values are not yet in them, the
    factor of what there was before, the sum of weights in each lane, and weights. ring: the stage and the phase of that block's
    values, and of the keys of `block`.
    """
    m, l, acc, more, alpha, lanes, weights = state
    stage, phase, ahead, ahead_phase = ring
    wait_at(k_ready + ahead * 8, ahead_phase)
    wait_at(v_ready + stage * 8, phase)
    meet("turn", me)
    s_pending = _scores(queries, rings, ahead, ROWS, BN, D_TAIL)
    acc_pending = _start_values(weights, rings, stage, acc, more)
    arrive("turn", 1 - me)
    s = warpgroup_mma_wait(num_outstanding=1, deps=(s_pending,))
    if EDGE:
        s = _edge(
            s, item, coming, block, sources, queries, window, CAUSAL, GROUP, TOKENS, ROWS, BN, D, D_TAIL, Q_BOXES
        )  # fmt: skip
    m_new, factor, p, sums, first_p = to_weights(s, gl.where(restart, -1.0e30, m), scale, restart)
    l = added(l, once_known(alpha, factor), lanes)  # beside the exponentials
    arrive_after("keys", ahead, first_p, 4, 8)  # and the wait after it, when so many exponentials are done
    acc, weights = warpgroup_mma_wait(num_outstanding=0, deps=(acc_pending, weights))
    arrive("values", stage)
    acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout))[:, None]
    something = block == block  # true: there are values to add to now
    state = (m_new, l, acc, something, factor, sums, packed(p, rings[2].dtype))
    wraps = ahead + 1 == STAGES
    ring = (ahead, ahead_phase, gl.where(wraps, 0, ahead + 1), gl.where(wraps, ahead_phase ^ 1, ahead_phase))
    return state, ring, m


@gluon_jit
def _attend(
    item: gl.tensor, q: gl.tensor, outs: gl.tensor, queries: gl.tensor, rings: gl.tensor, addresses: gl.tensor, kept: gl.tensor,
    strides: gl.tensor, scale: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, CHUNK: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, D: gl.constexpr, D_TAIL: gl.constexpr, DV: gl.constexpr, LSE: gl.constexpr, SHARED: gl.constexpr,
    Q_BOXES: gl.constexpr, TURNS: gl.constexpr,
) -> None:  # fmt: skip
    """All key blocks of `item`, the program's first, and of the items after it."""
    k_ready, v_ready, q_ready, told, fields = addresses
    sources = (q, strides)
    me = warp_group()
    turn = 0
    block = item[6]
    if not Q_BOXES:
        _fetch_queries(q, queries, strides, item, GROUP, TOKENS, ROWS, D, D_TAIL)
    coming = hear(told, fields, turn + 1, TURNS)
    _await_queries(q_ready, turn, Q_BOXES)
    wait_at(k_ready, 0)
    s = warpgroup_mma_wait(num_outstanding=0, deps=(_scores(queries, rings, 0, ROWS, BN, D_TAIL),))
    arrive("keys", 0)
    s = _edge(s, item, coming, block, sources, queries, window, CAUSAL, GROUP, TOKENS, ROWS, BN, D, D_TAIL, Q_BOXES)
    empty, nothing, acc = _no_keys(ROWS, BN, DV)
    m, alpha, p, lanes, first_p = to_weights(s, empty, scale, block != block)
    state = (m, nothing, acc, block != block, nothing, lanes, packed(p, rings[2].dtype))
    ring = (turn, turn, turn + 1, turn)  # stage 0 and stage 1, both for the first time
    totals = (empty, nothing, turn)  # of no chunk so far
    while tl.condition((block + 1 < item[7]) | (coming[6] < coming[7]), disable_licm=True):  # else registers would not do
        ended = item
        last = block + 1 == item[7]
        if last:
            _scrub_end(item, block, rings, v_ready, ring, BN, DV)
            turn += 1
            _await_queries(q_ready, turn, Q_BOXES)
            item = coming
            block = item[6] - 1
            coming = hear(told, fields, turn + 1, TURNS)
        block += 1
        restart = last | (block % (CHUNK // BN) == 0)
        m_ended = gl.full((ROWS,), 0.0, gl.float32, empty.type.layout)
        if _even(item, block, window, CAUSAL, TOKENS, BN):
            block -= 1
            even = block == block  # true, as a loop can carry it
            while even:
                block += 1
                restart = last | (block % (CHUNK // BN) == 0)
                state, ring, m_ended = _step(
                    state, ring, item, coming, block, restart, me, sources, queries, rings, k_ready, v_ready, scale, window, CAUSAL,
                    GROUP, TOKENS, ROWS, BN, STAGES, D, D_TAIL, Q_BOXES, False,
                )  # fmt: skip
                even = (not restart) & _even(item, block + 1, window, CAUSAL, TOKENS, BN)
        else:
            state, ring, m_ended = _step(
                state, ring, item, coming, block, restart, me, sources, queries, rings, k_ready, v_ready, scale, window, CAUSAL,
                GROUP, TOKENS, ROWS, BN, STAGES, D, D_TAIL, Q_BOXES, True,
            )  # fmt: skip
        if restart:
            m, l, acc, more, alpha, lanes, weights = state
            totals = _restart(
                outs, strides, kept, totals, (m_ended, l, acc), ended, last, GROUP, TOKENS, ROWS, BN, DV, LSE, SHARED
            )
            state = (m, l, acc, block != block, gl.zeros_like(alpha), lanes, weights)  # a new chunk begins with nothing
    _scrub_end(item, block, rings, v_ready, ring, BN, DV)
    wait_at(v_ready + ring[0] * 8, ring[1])
    m, l, acc, more, alpha, lanes, weights = state
    acc_pending = _start_values(weights, rings, ring[0], acc, more)
    l = added(l, alpha, lanes)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc_pending,))
    _restart(outs, strides, kept, totals, (m, l, acc), item, True, GROUP, TOKENS, ROWS, BN, DV, LSE, SHARED)


@gluon_jit
def _consume(
    q: gl.tensor, outs: gl.tensor, queries: gl.tensor, rings: gl.tensor, addresses: gl.tensor, kept: gl.tensor,
    strides: gl.tensor, scale: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, CHUNK: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, D: gl.constexpr, D_TAIL: gl.constexpr, DV: gl.constexpr, LSE: gl.constexpr, SHARED: gl.constexpr,
    Q_BOXES: gl.constexpr, TURNS: gl.constexpr,
) -> None:  # fmt: skip
    """The two consumer warp groups, each with 64 rows of every work item of this program. kept: an address in shared memory, or a
    pointer."""
    ROWS: gl.constexpr = 128
    open_turn(warp_group())
    if not SHARED:
        kept = (kept + gl.program_id(0) * (ROWS * DV)).to(gl.int64)
    kept = own_place(kept, ROWS * DV * 4 // 256)
    first = 0
    item = hear(addresses[3], addresses[4], first, TURNS)
    if item[6] < item[7]:
        _attend(
            item, q, outs, queries, rings, addresses, kept, strides, scale, window, CAUSAL, GROUP, TOKENS, CHUNK, ROWS, BN, STAGES,
            D, D_TAIL, DV, LSE, SHARED, Q_BOXES, TURNS,
        )  # fmt: skip


@gluon_jit(do_not_specialize=["SEQS", "ITEMS", "l2_keys", "window", "table_stride"])
def attention_kernel(
    q: gl.tensor, q_tail: gl.tensor, q_rows: gl.tensor, k_desc: gl.tensor, t_desc: gl.tensor, v_desc: gl.tensor, out: gl.tensor, lse: gl.tensor,
    kept: gl.tensor, counter: gl.tensor, q_starts: gl.tensor, kv_starts: gl.tensor, kv_lens: gl.tensor, table: gl.tensor,
    table_stride: gl.tensor, SEQS: gl.tensor, HEADS: gl.tensor, ITEMS: gl.tensor, l2_keys: gl.tensor, q_stride_token: gl.tensor,
    q_stride_head: gl.tensor, o_stride_token: gl.tensor, o_stride_head: gl.tensor, lse_stride: gl.tensor, scale: gl.tensor,
    window: gl.tensor,
    CAUSAL: gl.constexpr, GROUP: gl.constexpr, HEAD_TILES: gl.constexpr, TOKENS: gl.constexpr, CHUNK: gl.constexpr,
    BN: gl.constexpr, PAGE: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, D_TAIL: gl.constexpr,
    DV: gl.constexpr, LSE: gl.constexpr, SHARED: gl.constexpr, Q_BOXES: gl.constexpr,
) -> None:  # fmt: skip
    """Softmax attention of packed queries over packed or paged keys and values; see the module's text for the arithmetic.

    q, q_tail: with Q_BOXES TMA descriptors of [tokens, heads, head size], else Q itself, twice. q_rows: Q itself.
    kept: float32 [programs, 128, DV], where totals wait for the end of a chunk; unused with SHARED, where they wait in shared memory.
    counter: an int32 zero, zero again afterwards. ITEMS, l2_keys: see `attention_tiles`.
    """
    TURNS: gl.constexpr = 8  # told and not yet heard: at most those with a block in the ring, one after and one before them
    dtype: gl.constexpr = k_desc.dtype
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, D], gl.NVMMASharedLayout(128, 16))
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, DV], gl.NVMMASharedLayout(128, 16))
    if Q_BOXES:
        q_buffer = gl.allocate_shared_memory(dtype, [2 * TOKENS, GROUP, D], gl.NVMMASharedLayout(128, 16, 3))
    else:
        q_buffer = gl.allocate_shared_memory(dtype, [128, D], gl.NVMMASharedLayout(128, 16))
    t_ring = k_ring
    tail_buffer = q_buffer
    if D_TAIL:
        t_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, D_TAIL], gl.NVMMASharedLayout(128, 16))
        if Q_BOXES:
            tail_buffer = gl.allocate_shared_memory(dtype, [2 * TOKENS, GROUP, D_TAIL], gl.NVMMASharedLayout(128, 16, 3))
        else:
            tail_buffer = gl.allocate_shared_memory(dtype, [128, D_TAIL], gl.NVMMASharedLayout(128, 16))
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    told = gl.allocate_shared_memory(gl.int64, [TURNS, 1], mbarrier.MBarrierLayout())
    fields = gl.allocate_shared_memory(gl.int32, [TURNS * 8, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    mark_places(256)
    gl.thread_barrier()
    if SHARED:
        totals = gl.allocate_shared_memory(gl.int64, [64 * DV, 1], mbarrier.MBarrierLayout())
        kept = address_of(totals.index(0))
    k_at, v_at, q_at = address_of(k_ready.index(0)), address_of(v_ready.index(0)), address_of(q_ready.index(0))
    told_at = address_of(told.index(0))
    addresses = (k_at, v_at, q_at, told_at, address_of(fields.index(0)))
    gl.thread_barrier()
    start_at(k_at, STAGES)
    start_at(v_at, STAGES)
    start_at(q_at, 2)
    start_at(told_at, TURNS)
    fence_async_shared()
    gl.thread_barrier()
    grid_release()
    grid_wait()
    q = (q, q_tail)
    outs = (out, lse)
    queries = (q_buffer, tail_buffer)
    rings = (k_ring, t_ring, v_ring)
    bars = (k_ready, v_ready)
    board = (told, fields)
    lengths = (q_starts, kv_starts, kv_lens)
    sizes = (SEQS, HEADS, ITEMS, l2_keys)
    strides = (q_stride_token, q_stride_head, o_stride_token, o_stride_head, lse_stride)
    descs = (k_desc, t_desc, v_desc)
    gl.warp_specialize(
        [
            (_consume, (q, outs, queries, rings, addresses, kept, strides, scale, window, CAUSAL, GROUP, TOKENS, CHUNK, BN,
                        STAGES, D, D_TAIL, DV, LSE, SHARED, Q_BOXES, TURNS)),
            (produce_tiles, (descs, rings, bars, board, counter, lengths, sizes, table, table_stride, window, q,
                             q_rows, strides, queries + (q_ready,), CAUSAL, 2 * TOKENS, BN, PAGE, BOX, STAGES, D, D_TAIL, DV, HEAD_TILES, GROUP,
                             Q_BOXES)),
        ],
        [1],
        [24],
    )  # fmt: skip
    if SHARED:
        totals._keep_alive()  # Triton sees no use of it by its address
