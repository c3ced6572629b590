"""Attention for the cases the Hopper kernel leaves, and the merge of split decodes.

Any page size, any head size (padded to powers of two: a product with zeros adds nothing), any GPU, and the CPU interpreter.
The arithmetic of the forward kernel is the one `attention_kernel` documents, block for block, and so are its bits on Hopper.
"""

from __future__ import annotations

from .overlap import begin
from .toolchain import jit, tl


@jit
def _fold(total_m: tl.tensor, total_l: tl.tensor, total: tl.tensor, m: tl.tensor, l: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """Fold one chunk's state into the row's total."""
    m_new = tl.maximum(total_m, m)
    a = tl.exp2(total_m - m_new)
    b = tl.exp2(m - m_new)
    return m_new, tl.fma(l, b, total_l * a), tl.fma(acc, b[:, None], total * a[:, None])


@jit
def _load_rows(x: tl.tensor, offset: tl.tensor, valid: tl.tensor, D: tl.constexpr, D_PAD: tl.constexpr) -> tl.tensor:
    """Rows at `offset`, D_PAD wide, zeros where the row or the column is not there."""
    d = tl.arange(0, D_PAD)
    mask = valid[:, None]
    if D != D_PAD:
        mask = mask & (d < D)[None, :]
    return tl.load(x + offset[:, None] + d[None, :], mask=mask, other=0.0)


@jit
def _key_rows(key: tl.tensor, seen: tl.tensor, table: tl.tensor, kv_start: tl.tensor, PAGE: tl.constexpr) -> tl.tensor:
    """Where the keys lie: consecutive rows of a packed tensor, or rows of the pages that the table names."""
    if PAGE == 0:
        rows = (kv_start + key).to(tl.int64)
    else:
        rows = tl.load(table + key // PAGE, mask=seen, other=0).to(tl.int64) * PAGE + key % PAGE
    return rows


@jit
def _attend_block(
    q: tl.tensor, q_tail: tl.tensor, k: tl.tensor, v: tl.tensor, table: tl.tensor, kv_start: tl.tensor, block: tl.tensor,
    place: tl.tensor, kv_len: tl.tensor, window: tl.tensor, scale: tl.tensor, m: tl.tensor, l: tl.tensor, acc: tl.tensor,
    k_stride: tl.tensor, v_stride: tl.tensor,
    CAUSAL: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    D_TAIL: tl.constexpr, T_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """One block of keys and values into the running state."""
    key = block * BN + tl.arange(0, BN)
    there = key < kv_len
    rows = _key_rows(key, there, table, kv_start, PAGE)
    s = tl.dot(q, tl.trans(_load_rows(k, rows * k_stride, there, D, D_PAD)))
    if D_TAIL:
        s = tl.dot(q_tail, tl.trans(_load_rows(k + D, rows * k_stride, there, D_TAIL, T_PAD)), s)
    seen = there[None, :] & (key[None, :] > (place - window)[:, None])
    if CAUSAL:
        seen = seen & (key[None, :] <= place[:, None])
    s = tl.where(seen, s, float("-inf"))
    m_new = tl.maximum(m, tl.ceil(tl.max(s, 1) * scale))
    p = tl.exp2(tl.fma(s, scale, -m_new[:, None]))
    alpha = tl.exp2(m - m_new)
    l = tl.fma(l, alpha, tl.sum(p, 1))
    v_rows = _load_rows(v, rows * v_stride, there, DV, DV_PAD)
    acc = tl.dot(p.to(v_rows.dtype), v_rows, acc * alpha[:, None])
    return m_new, l, acc


@jit(do_not_specialize=["TILES", "CHUNKS", "window", "table_stride"])
def attention_portable_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, out: tl.tensor, lse: tl.tensor, part_m: tl.tensor, part_l: tl.tensor,
    part_acc: tl.tensor, q_starts: tl.tensor, kv_starts: tl.tensor, kv_lens: tl.tensor, table: tl.tensor,
    table_stride: tl.tensor, HEADS: tl.tensor, TILES: tl.tensor, CHUNKS: tl.tensor, q_stride_token: tl.tensor,
    q_stride_head: tl.tensor, k_stride_row: tl.tensor, k_stride_head: tl.tensor, v_stride_row: tl.tensor,
    v_stride_head: tl.tensor, o_stride_token: tl.tensor, o_stride_head: tl.tensor, lse_stride: tl.tensor,
    scale: tl.tensor, window: tl.tensor,
    CAUSAL: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr, HEAD_TILES: tl.constexpr, TOKENS: tl.constexpr,
    CHUNK: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    D_TAIL: tl.constexpr, T_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, ROWS: tl.constexpr,
    ROWS_KEPT: tl.constexpr, LSE: tl.constexpr,
) -> None:  # fmt: skip
    """Program (sequence x head x token tile x chunk): ROWS rows of queries, a row being a (token, head) pair."""
    item = tl.program_id(0)
    chunk = item % CHUNKS
    head = (item // CHUNKS) % HEADS
    rest = item // (CHUNKS * HEADS)
    tile = rest % TILES
    seq = rest // TILES
    q_start = tl.load(q_starts + seq)
    q_len = tl.load(q_starts + seq + 1) - q_start
    kv_len = tl.load(kv_lens + seq)
    first_token = tile * TOKENS
    position = kv_len - q_len + first_token
    hi = kv_len
    if CAUSAL:
        hi = tl.minimum(kv_len, position + TOKENS)
    lo = tl.maximum(position - window + 1, 0)
    if SPLIT:
        lo = tl.maximum(lo, chunk * CHUNK)
        hi = tl.minimum(hi, (chunk + 1) * CHUNK)
    if (first_token < q_len) & (lo < hi):
        r = tl.arange(0, ROWS)
        token = first_token + r // GROUP
        head_of_row = head * GROUP + r % GROUP
        valid = (r < TOKENS * GROUP) & (token < q_len)
        q_at = (q_start + token).to(tl.int64) * q_stride_token + head_of_row * q_stride_head
        q_rows = _load_rows(q, q_at, valid, D, D_PAD)
        q_tail = q_rows
        if D_TAIL:
            q_tail = _load_rows(q + D, q_at, valid, D_TAIL, T_PAD)
        place = position + r // GROUP
        kv_head = head // HEAD_TILES
        k_head = k + kv_head * k_stride_head
        v_head = v + kv_head * v_stride_head
        pages = table + seq.to(tl.int64) * table_stride
        kv_start = tl.load(kv_starts + seq)
        total_m = tl.full((ROWS,), -1.0e30, tl.float32)
        total_l = tl.zeros((ROWS,), tl.float32)
        total = tl.zeros((ROWS, DV_PAD), tl.float32)
        for chunk_at in range(lo // CHUNK, tl.cdiv(hi, CHUNK)):
            m = tl.full((ROWS,), -1.0e30, tl.float32)
            l = tl.zeros((ROWS,), tl.float32)
            acc = tl.zeros((ROWS, DV_PAD), tl.float32)
            first_block = tl.maximum(lo // BN, chunk_at * (CHUNK // BN))
            last_block = tl.minimum(tl.cdiv(hi, BN), (chunk_at + 1) * (CHUNK // BN))
            for block in range(first_block, last_block):
                m, l, acc = _attend_block(
                    q_rows, q_tail, k_head, v_head, pages, kv_start, block, place, kv_len, window, scale, m, l, acc,
                    k_stride_row, v_stride_row, CAUSAL, PAGE, BN, D, D_PAD, D_TAIL, T_PAD, DV, DV_PAD,
                )  # fmt: skip
            total_m, total_l, total = _fold(total_m, total_l, total, m, l, acc)
        d = tl.arange(0, DV_PAD)
        if SPLIT:
            at = item.to(tl.int64) * ROWS_KEPT + r
            kept = r < ROWS_KEPT
            tl.store(part_m + at, total_m, mask=kept)
            tl.store(part_l + at, total_l, mask=kept)
            tl.store(part_acc + at[:, None] * DV + d[None, :], total, mask=kept[:, None] & (d < DV)[None, :])
        else:
            inverse = tl.where(total_l > 0, 1.0 / total_l, 0.0)
            o_at = (q_start + token).to(tl.int64) * o_stride_token + head_of_row * o_stride_head
            values = (total * inverse[:, None]).to(out.dtype.element_ty)
            tl.store(out + o_at[:, None] + d[None, :], values, mask=valid[:, None] & (d < DV)[None, :])
            if LSE:
                at = (q_start + token).to(tl.int64) * lse_stride + head_of_row
                tl.store(lse + at, tl.where(total_l > 0, total_m + tl.log2(total_l), float("-inf")), mask=valid)


@jit
def _states(
    part_m: tl.tensor, part_l: tl.tensor, part_acc: tl.tensor, slot: tl.tensor, row: tl.tensor, base: tl.tensor, CHUNKS: tl.tensor,
    ROWS_KEPT: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, UNROLL: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """A row's states of UNROLL chunks from `base` on. Past the last the last again, so that no load waits for a mask."""
    d = tl.arange(0, DV_PAD)
    one = tl.arange(0, 1)
    states: tl.tensor = ()
    for ahead in tl.static_range(UNROLL):
        at = (slot.to(tl.int64) * CHUNKS + tl.minimum(base + ahead, CHUNKS - 1)) * ROWS_KEPT + row + one
        acc = tl.load(part_acc + at[:, None] * DV + d[None, :], mask=(d < DV)[None, :], other=0.0)
        states = states + ((tl.load(part_m + at), tl.load(part_l + at), acc),)
    return states


@jit
def _folded(total: tl.tensor, states: tl.tensor, base: tl.tensor, first_chunk: tl.tensor, last_chunk: tl.tensor) -> tl.tensor:
    """The total with those of the states from chunk `base` on that are of chunks [first_chunk, last_chunk)."""
    m, l, acc = total
    for ahead in tl.static_range(len(states)):
        there = (base + ahead >= first_chunk) & (base + ahead < last_chunk)
        new_m, new_l, new_acc = states[ahead]
        m, l, acc = _fold(
            m, l, acc, tl.where(there, new_m, -1.0e30), tl.where(there, new_l, 0.0), tl.where(there, new_acc, 0.0)
        )
    return m, l, acc


@jit(do_not_specialize=["TILES", "CHUNKS", "window"])
def attention_merge_kernel(
    out: tl.tensor, lse: tl.tensor, part_m: tl.tensor, part_l: tl.tensor, part_acc: tl.tensor, q_starts: tl.tensor,
    kv_lens: tl.tensor, HEADS: tl.tensor, TILES: tl.tensor, CHUNKS: tl.tensor, o_stride_token: tl.tensor,
    o_stride_head: tl.tensor, lse_stride: tl.tensor, window: tl.tensor,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr,
    CHUNK: tl.constexpr, BN: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, ROWS_KEPT: tl.constexpr,
    LSE: tl.constexpr, UNROLL: tl.constexpr, ALL: tl.constexpr, OVERLAP: tl.constexpr,
) -> None:  # fmt: skip
    """Program (sequence x head x token tile, row): fold the row's chunks in ascending order, as the unsplit kernels do.

    UNROLL chunks are loaded before the first of them is folded. With ALL these are all there can be, and they are on their way
    before the sequence's length is known; what memory holds for a chunk that it does not have is not looked at.
    """
    begin(OVERLAP)
    slot = tl.program_id(0)
    row = tl.program_id(1)
    total = (tl.full((1,), -1.0e30, tl.float32), tl.zeros((1,), tl.float32), tl.zeros((1, DV_PAD), tl.float32))
    if ALL:
        states = _states(part_m, part_l, part_acc, slot, row, 0, CHUNKS, ROWS_KEPT, DV, DV_PAD, UNROLL)
    head = slot % HEADS
    rest = slot // HEADS
    tile = rest % TILES
    seq = rest // TILES
    q_start = tl.load(q_starts + seq)
    q_len = tl.load(q_starts + seq + 1) - q_start
    kv_len = tl.load(kv_lens + seq)
    first_token = tile * TOKENS
    token = first_token + row // GROUP
    position = kv_len - q_len + first_token
    hi = kv_len
    if CAUSAL:
        hi = tl.minimum(kv_len, position + TOKENS)
    first_chunk = tl.maximum(position - window + 1, 0) // CHUNK
    last_chunk = tl.cdiv(hi, CHUNK)
    if ALL:
        total = _folded(total, states, 0, first_chunk, last_chunk)
    else:
        for base in range(first_chunk, last_chunk, UNROLL):
            states = _states(part_m, part_l, part_acc, slot, row, base, CHUNKS, ROWS_KEPT, DV, DV_PAD, UNROLL)
            total = _folded(total, states, base, first_chunk, last_chunk)
    m, l, acc = total
    inverse = tl.where(l > 0, 1.0 / l, 0.0)
    head_of_row = head * GROUP + row % GROUP
    d = tl.arange(0, DV_PAD)
    o_at = (q_start + token).to(tl.int64) * o_stride_token + head_of_row * o_stride_head
    values = (acc * inverse[:, None]).to(out.dtype.element_ty)
    tl.store(out + o_at + d[None, :], values, mask=(token < q_len) & (d < DV)[None, :])
    if LSE:
        at = (q_start + token).to(tl.int64) * lse_stride + head_of_row + tl.arange(0, 1)
        tl.store(lse + at, tl.where(l > 0, m + tl.log2(l), float("-inf")), mask=token < q_len)
