"""The Hopper attention kernels' streams of keys and values, the loads of their queries, and decode's work items.

A decode's item is a sequence and a head, of which a split decode takes one chunk of keys; prefill's are in `attention_tiles`.
`attention_kernel` says what is computed with them.
"""

from __future__ import annotations

from .named_barrier import meet
from .toolchain import async_copy, gl, gluon_jit, mbarrier, tma
from .warp_lanes import from_lane, lane


@gluon_jit
def item_of(turn: gl.tensor) -> gl.tensor:
    """The work item of this program's `turn`: back and forth, because items are sorted from long to short."""
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    return turn * programs + gl.where((turn & 1) == 1, programs - 1 - place, place)


@gluon_jit
def span(
    lengths: gl.tensor, sizes: gl.tensor, item: gl.tensor, window: gl.tensor, CAUSAL: gl.constexpr, SPLIT: gl.constexpr,
    TOKENS: gl.constexpr, CHUNK: gl.constexpr, BN: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """What work item `item` covers: its sequence, head, first token, chunk, and the range of key blocks [lo, hi).

    Neighbouring programs take the heads of one sequence's keys, which lie side by side in memory.
    """
    q_starts, kv_starts, kv_lens = lengths
    SEQS, HEADS, TILES, CHUNKS = sizes
    items = SEQS * HEADS * TILES * CHUNKS
    rest = gl.minimum(item, items - 1)
    head = rest % HEADS
    rest = rest // HEADS
    chunk = rest % CHUNKS
    rest = rest // CHUNKS
    seq = rest % SEQS
    first_token = (TILES - 1 - rest // SEQS) * TOKENS  # long rows first
    q_start = gl.load(q_starts + seq)
    q_len = gl.load(q_starts + seq + 1) - q_start
    kv_len = gl.load(kv_lens + seq)
    kv_start = gl.load(kv_starts + seq)
    position = kv_len - q_len + first_token
    hi = kv_len
    if CAUSAL:
        hi = gl.minimum(kv_len, position + TOKENS)
    lo = gl.maximum(position - window + 1, 0)
    if SPLIT:
        lo = gl.maximum(lo, chunk * CHUNK)
        hi = gl.minimum(hi, (chunk + 1) * CHUNK)
    hi_block = gl.where((first_token < q_len) & (item < items), gl.cdiv(hi, BN), 0)
    return seq, head, first_token, chunk, q_start, q_len, kv_start, kv_len, position, lo // BN, hi_block


@gluon_jit
def _pages_from(
    pages: gl.tensor, block: gl.tensor, kv_len: gl.tensor, PAGE: gl.constexpr, BN: gl.constexpr, BOX: gl.constexpr
) -> gl.tensor:
    """The pages of 32 boxes from a block on, one a lane; past the sequence's end page 0, whose keys will be masked."""
    key = block * BN + lane() * BOX
    return gl.load(pages + key // PAGE, mask=key < kv_len, other=0)


@gluon_jit
def _fetch(
    desc: gl.tensor, ring: gl.tensor, bar: gl.tensor, stage: gl.tensor, place: gl.tensor, first_box: gl.tensor, block: gl.tensor,
    col: gl.tensor, PAGE: gl.constexpr, BN: gl.constexpr, BOX: gl.constexpr,
) -> None:  # fmt: skip
    """One block of keys (or values) into a stage: a box from row `place` of a packed tensor, or a box a page, whose numbers
    stand in `place` from lane `first_box` on."""
    if PAGE == 0:
        tma.async_copy_global_to_shared(desc, [place + block * BN, col], bar, ring.index(stage))
    else:
        for part in gl.static_range(BN // BOX):
            row = from_lane(place, first_box + part) * PAGE
            if BOX < PAGE:
                row += block * BN % PAGE
            tma.async_copy_global_to_shared(desc, [row, col], bar, ring.index(stage).slice(part * BOX, BOX))


@gluon_jit
def _until_free(
    kind: gl.constexpr, empty: gl.tensor, step: gl.tensor, STAGES: gl.constexpr, NAMED: gl.constexpr
) -> None:  # fmt: skip
    """Wait until the consumers have given the stage of `step` back."""
    stage = step % STAGES
    if NAMED:
        if step >= STAGES:
            meet(kind, stage)
    else:
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)


@gluon_jit
def _copy_queries(
    q: gl.tensor, queries: gl.tensor, place: gl.tensor, TOKENS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr,
    D_TAIL: gl.constexpr,
) -> None:  # fmt: skip
    """An item's queries, for each of the two warp groups when it has given back those before.

    place: first row of Q, first head, and the program's number of the item, from 1. TMA brings the next sequence's rows too where
    a tile ends behind its own: nothing is written for them.
    """
    q_desc, tail_desc = q
    q_buffer, tail_buffer, q_ready = queries
    row, head0, number = place
    BYTES: gl.constexpr = TOKENS * GROUP * (D + D_TAIL) * q_desc.dtype.primitive_bitwidth // 8
    for group in gl.static_range(2):
        if number > 1:
            meet("queries", group)
        ready = q_ready.index(group)
        mbarrier.expect(ready, BYTES)
        first = row + group * TOKENS
        tma.async_copy_global_to_shared(q_desc, [first, head0, 0], ready, q_buffer.slice(group * TOKENS, TOKENS))
        if D_TAIL:
            tail = tail_buffer.slice(group * TOKENS, TOKENS)
            tma.async_copy_global_to_shared(tail_desc, [first, head0, D], ready, tail)


@gluon_jit
def stream_blocks(
    descs: gl.tensor, rings: gl.tensor, bars: gl.tensor, step: gl.tensor, lo: gl.tensor, hi: gl.tensor, kv_start: gl.tensor,
    kv_len: gl.tensor, pages: gl.tensor, kv_head: gl.tensor, v_col: gl.tensor,
    BN: gl.constexpr, PAGE: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, D_TAIL: gl.constexpr,
    DV: gl.constexpr, NAMED: gl.constexpr, q: gl.tensor = None, queries: gl.tensor = None, q_place: gl.tensor = None,
    TOKENS: gl.constexpr = 0, GROUP: gl.constexpr = 0, Q_BOXES: gl.constexpr = False,
) -> gl.tensor:  # fmt: skip
    """One sequence's key blocks [lo, hi) and their values into the ring from `step` on; returns the step after them.

    With Q_BOXES its queries come after the first block's keys, whose stage is given back before the last item's queries are.

    The consumers give a stage back at its mbarrier of k_empty or v_empty or, with NAMED, at its named barrier. The page table is
    read 32 boxes at a time, and those ahead of their turn: block by block, its latency would be paid for each until the ring
    is full.
    """
    k_desc, t_desc, v_desc = descs
    k_ring, t_ring, v_ring = rings
    k_ready, v_ready, k_empty, v_empty = bars
    K_BYTES: gl.constexpr = BN * (D + D_TAIL) * k_desc.dtype.primitive_bitwidth // 8
    V_BYTES: gl.constexpr = BN * DV * v_desc.dtype.primitive_bitwidth // 8
    BOXES: gl.constexpr = BN // BOX
    AT_ONCE: gl.constexpr = 32 // BOXES  # blocks whose pages are read together
    k_col = kv_head * (D + D_TAIL)
    place = kv_start
    if PAGE:
        place = _pages_from(pages, lo, kv_len, PAGE, BN, BOX)
    ahead = place
    if PAGE:
        ahead = _pages_from(pages, lo + AT_ONCE, kv_len, PAGE, BN, BOX)
    for block in range(lo, hi):
        stage = step % STAGES
        first_box = (block - lo) % AT_ONCE * BOXES
        if PAGE:
            if (first_box == 0) & (block > lo):
                place = ahead
                ahead = _pages_from(pages, block + AT_ONCE, kv_len, PAGE, BN, BOX)
        _until_free("keys", k_empty, step, STAGES, NAMED)
        mbarrier.expect(k_ready.index(stage), K_BYTES)
        _fetch(k_desc, k_ring, k_ready.index(stage), stage, place, first_box, block, k_col, PAGE, BN, BOX)
        if D_TAIL:
            _fetch(t_desc, t_ring, k_ready.index(stage), stage, place, first_box, block, k_col + D, PAGE, BN, BOX)
        if Q_BOXES:
            if block == lo:
                _copy_queries(q, queries, q_place, TOKENS, GROUP, D, D_TAIL)
        _until_free("values", v_empty, step, STAGES, NAMED)
        mbarrier.expect(v_ready.index(stage), V_BYTES)
        _fetch(v_desc, v_ring, v_ready.index(stage), stage, place, first_box, block, v_col, PAGE, BN, BOX)
        step += 1
    return step


@gluon_jit
def produce(
    descs: gl.tensor, rings: gl.tensor, bars: gl.tensor, lengths: gl.tensor, sizes: gl.tensor, table: gl.tensor,
    table_stride: gl.tensor, window: gl.tensor,
    CAUSAL: gl.constexpr, SPLIT: gl.constexpr, TOKENS: gl.constexpr, CHUNK: gl.constexpr, BN: gl.constexpr,
    PAGE: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, D_TAIL: gl.constexpr,
    DV: gl.constexpr, HEAD_TILES: gl.constexpr, PARTS: gl.constexpr,
) -> None:  # fmt: skip
    """The producer warp of a decode: keys and values of every work item of this program, as far ahead as the ring allows.

    With PARTS > 1 a head's values are cut into parts of DV columns, each an item of its own.
    """
    SEQS, HEADS, TILES, CHUNKS = sizes
    step = 0
    for turn in range(gl.cdiv(SEQS * HEADS * TILES * CHUNKS, gl.num_programs(0))):
        seq, head, _, _, _, _, kv_start, kv_len, _, lo, hi = span(
            lengths, sizes, item_of(turn), window, CAUSAL, SPLIT, TOKENS, CHUNK, BN
        )
        kv_head = head // (HEAD_TILES * PARTS)
        v_col = (kv_head * PARTS + head % PARTS) * DV
        pages = table + seq.to(gl.int64) * table_stride
        step = stream_blocks(
            descs, rings, bars, step, lo, hi, kv_start, kv_len, pages, kv_head, v_col, BN, PAGE, BOX, STAGES, D, D_TAIL, DV,
            False,
        )  # fmt: skip


@gluon_jit
def _query_places(
    q: gl.tensor, strides: gl.tensor, q_start: gl.tensor, first_token: gl.tensor, q_len: gl.tensor, head0: gl.tensor,
    COL: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, WARPS: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Where columns [COL, COL + D) of an item's rows of Q lie, and which rows have a query."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    token = first_token + r // GROUP
    valid = (r < TOKENS * GROUP) & (token < q_len)
    offset = (q_start + token).to(gl.int64) * strides[0] + (head0 + r % GROUP) * strides[1]
    return q + offset[:, None] + (COL + d)[None, :], valid[:, None]


@gluon_jit
def load_queries(
    q: gl.tensor, buffer: gl.tensor, strides: gl.tensor, q_start: gl.tensor, first_token: gl.tensor, q_len: gl.tensor,
    head0: gl.tensor, COL: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr,
    WARPS: gl.constexpr,
) -> None:  # fmt: skip
    """Columns [COL, COL + D) of an item's rows of Q into shared memory; rows without a query become zeros."""
    places, valid = _query_places(q, strides, q_start, first_token, q_len, head0, COL, GROUP, TOKENS, ROWS, D, WARPS)
    buffer.store(gl.load(places, mask=valid, other=0.0))


@gluon_jit
def fetch_queries(
    q: gl.tensor, buffer: gl.tensor, strides: gl.tensor, q_start: gl.tensor, first_token: gl.tensor, q_len: gl.tensor,
    head0: gl.tensor, COL: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr,
    WARPS: gl.constexpr,
) -> None:  # fmt: skip
    """`load_queries` without waiting for them: part of the thread's next group of asynchronous copies."""
    places, valid = _query_places(q, strides, q_start, first_token, q_len, head0, COL, GROUP, TOKENS, ROWS, D, WARPS)
    async_copy.async_copy_global_to_shared(buffer, places, mask=valid)
