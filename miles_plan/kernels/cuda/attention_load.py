"""The Hopper attention kernels' loads of keys, values and queries.

`attention_kernel` says what is computed with them; `attention_tiles` and `attention_work` which are loaded for what.
"""

from __future__ import annotations

from .named_barrier import meet
from .toolchain import async_copy, gl, gluon_jit, mbarrier, tma
from .warp_lanes import from_lane, lane


@gluon_jit
def pages_from(
    pages: gl.tensor, block: gl.tensor, kv_len: gl.tensor, PAGE: gl.constexpr, BN: gl.constexpr, BOX: gl.constexpr
) -> gl.tensor:
    """The pages of 32 boxes from a block on, one a lane; past the sequence's end page 0, whose keys will be masked."""
    key = block * BN + lane() * BOX
    return gl.load(pages + key // PAGE, mask=key < kv_len, other=0)


@gluon_jit
def fetch_block(
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
def _until_free(kind: gl.constexpr, step: gl.tensor, STAGES: gl.constexpr) -> None:
    """Wait until the consumers have given the stage of `step` back."""
    if step >= STAGES:
        meet(kind, step % STAGES)


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
    DV: gl.constexpr, q: gl.tensor, queries: gl.tensor, q_place: gl.tensor, TOKENS: gl.constexpr, GROUP: gl.constexpr,
    Q_BOXES: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """For prefill: one sequence's key blocks [lo, hi) and their values into the ring from `step` on; returns the step after them.

    With Q_BOXES its queries come after the first block's keys, whose stage is given back before the last item's queries are.

    The consumers give a stage back at its named barrier. The page table is read 32 boxes at a time, and those ahead of their turn:
    block by block, its latency would be paid for each until the ring is full.
    """
    k_desc, t_desc, v_desc = descs
    k_ring, t_ring, v_ring = rings
    k_ready, v_ready = bars
    K_BYTES: gl.constexpr = BN * (D + D_TAIL) * k_desc.dtype.primitive_bitwidth // 8
    V_BYTES: gl.constexpr = BN * DV * v_desc.dtype.primitive_bitwidth // 8
    BOXES: gl.constexpr = BN // BOX
    AT_ONCE: gl.constexpr = 32 // BOXES  # blocks whose pages are read together
    k_col = kv_head * (D + D_TAIL)
    place = kv_start
    if PAGE:
        place = pages_from(pages, lo, kv_len, PAGE, BN, BOX)
    ahead = place
    if PAGE:
        ahead = pages_from(pages, lo + AT_ONCE, kv_len, PAGE, BN, BOX)
    for block in range(lo, hi):
        stage = step % STAGES
        first_box = (block - lo) % AT_ONCE * BOXES
        if PAGE:
            if (first_box == 0) & (block > lo):
                place = ahead
                ahead = pages_from(pages, block + AT_ONCE, kv_len, PAGE, BN, BOX)
        _until_free("keys", step, STAGES)
        mbarrier.expect(k_ready.index(stage), K_BYTES)
        fetch_block(k_desc, k_ring, k_ready.index(stage), stage, place, first_box, block, k_col, PAGE, BN, BOX)
        if D_TAIL:
            fetch_block(t_desc, t_ring, k_ready.index(stage), stage, place, first_box, block, k_col + D, PAGE, BN, BOX)
        if Q_BOXES:
            if block == lo:
                _copy_queries(q, queries, q_place, TOKENS, GROUP, D, D_TAIL)
        _until_free("values", step, STAGES)
        mbarrier.expect(v_ready.index(stage), V_BYTES)
        fetch_block(v_desc, v_ring, v_ready.index(stage), stage, place, first_box, block, v_col, PAGE, BN, BOX)
        step += 1
    return step


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
