"""A row's running state in the Hopper attention kernel: maximum, sum and weighted values, folded, kept and written.

`attention_kernel` gives the formulas; everything here obeys their order.
"""

from __future__ import annotations

from .attention_registers import lane_maxima
from .toolchain import fence_async_shared, gl, gluon_jit


@gluon_jit
def scrub(buffer: gl.tensor, valid_keys: gl.tensor, BN: gl.constexpr, DV: gl.constexpr, WARPS: gl.constexpr) -> None:
    """Zero the value rows past the sequence's end: p is 0 there, but 0 times what memory held may be NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [WARPS, 1], [1, 0])
    for part in gl.static_range(BN // 32):
        rows = buffer.slice(part * 32, 32)
        key = part * 32 + gl.arange(0, 32, layout=gl.SliceLayout(1, layout))
        values = rows.load(layout)
        rows.store(gl.where((key < valid_keys)[:, None], values, gl.zeros_like(values)))
    fence_async_shared()


@gluon_jit
def masked(
    s: gl.tensor, block: gl.tensor, position: gl.tensor, kv_len: gl.tensor, window: gl.tensor, CAUSAL: gl.constexpr,
    GROUP: gl.constexpr, TOKENS: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Scores with -inf where the row may not look; a block that every row sees whole is left untouched.

    A row at a place within the sequence that sees only keys up to its own sees none past the end; other rows are not written.
    """
    first = block * BN
    cut = first <= position + TOKENS - 1 - window
    if CAUSAL:
        ragged = first + BN - 1 > position
    else:
        ragged = first + BN > kv_len
    if ragged | cut:
        layout: gl.constexpr = s.type.layout
        key = first + gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
        place = position + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)) // GROUP
        if CAUSAL:
            s = gl.where(key[None, :] <= place[:, None], s, float("-inf"))
        else:
            s = gl.where((key < kv_len)[None, :], s, float("-inf"))
        if cut:
            s = gl.where(key[None, :] > (place - window)[:, None], s, float("-inf"))
    return s


@gluon_jit
def _row_maxima(s: gl.tensor, ROWS: gl.constexpr, BN: gl.constexpr) -> gl.tensor:
    """The largest score of each row, lane by lane and then over the lanes."""
    # Of a lane's keys 8 i + 2 lane + j, j = 0 is taken, then the even half of i until i = 0 is left.
    x, _ = lane_maxima(s).reshape([ROWS, BN // 8, 4, 2]).permute((0, 2, 1, 3)).split()
    x, _ = x.reshape([ROWS, 4, BN // 16, 2]).split()
    x, _ = x.reshape([ROWS, 4, BN // 32, 2]).split()
    x, _ = x.reshape([ROWS, 4, BN // 64, 2]).split()
    x, _ = x.reshape([ROWS, 4, BN // 128, 2]).split()
    return gl.convert_layout(gl.max(x.reshape([ROWS, 4]), 1), gl.SliceLayout(1, s.type.layout))


@gluon_jit
def to_weights(s: gl.tensor, m: gl.tensor, scale: gl.tensor, ROWS: gl.constexpr, BN: gl.constexpr) -> gl.tensor:
    """Scores to unnormalised weights under the new running maximum (an integer power of two), and what a row's four lanes each add
    up, [ROWS, 4]."""
    m_new = gl.maximum(m, gl.ceil(_row_maxima(s, ROWS, BN) * scale))
    p = gl.exp2(gl.fma(s, scale, -m_new[:, None]))
    by_lane = p.reshape([ROWS, BN // 8, 4, 2]).permute((0, 2, 1, 3)).reshape([ROWS, 4, BN // 4])
    return m_new, p, gl.sum(by_lane, 2)


@gluon_jit
def added(l: gl.tensor, alpha: gl.tensor, lanes: gl.tensor) -> gl.tensor:
    """The rescaled sum of weights with a block's."""
    return gl.fma(l, alpha, gl.convert_layout(gl.sum(lanes, 1), l.type.layout))


@gluon_jit
def _places(kept: gl.tensor, acc: gl.tensor) -> gl.tensor:
    """Where a row's total lies in memory."""
    layout: gl.constexpr = acc.type.layout
    r = gl.arange(0, acc.type.shape[0], layout=gl.SliceLayout(1, layout))
    d = gl.arange(0, acc.type.shape[1], layout=gl.SliceLayout(0, layout))
    return kept + r[:, None] * acc.type.shape[1] + d[None, :]


@gluon_jit
def keep(kept: gl.tensor, total: gl.tensor, SHARED: gl.constexpr) -> None:
    """Put a row's total aside until the next chunk ends: it would take the registers of half the products."""
    if SHARED:
        kept.store(total)
    else:
        gl.store(_places(kept, total), total)


@gluon_jit
def fold_kept(
    totals: gl.tensor, kept: gl.tensor, chunks: gl.tensor, state: gl.tensor, SHARED: gl.constexpr
) -> gl.tensor:  # fmt: skip
    """`fold` of one more chunk's state into a total that was put aside, after `chunks` chunks."""
    total_m, total_l = totals
    m, l, acc = state
    m_new = gl.maximum(total_m, m)
    a = gl.exp2(total_m - m_new)
    b = gl.exp2(m - m_new)
    if chunks > 0:
        if SHARED:
            total = kept.load(acc.type.layout)
        else:
            total = gl.load(_places(kept, acc))
        rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
        total = gl.fma(acc, gl.convert_layout(b, rows)[:, None], total * gl.convert_layout(a, rows)[:, None])
    else:
        total = acc + 0.0  # what folding into zeros gives
    return m_new, gl.fma(l, b, total_l * a), total


@gluon_jit
def fold(total_m: gl.tensor, total_l: gl.tensor, total: gl.tensor, m: gl.tensor, l: gl.tensor, acc: gl.tensor) -> gl.tensor:
    """Fold one chunk's state into the row's total."""
    m_new = gl.maximum(total_m, m)
    a = gl.exp2(total_m - m_new)
    b = gl.exp2(m - m_new)
    total_l = gl.fma(l, b, total_l * a)
    rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    a = gl.convert_layout(a, rows)[:, None]
    b = gl.convert_layout(b, rows)[:, None]
    return m_new, total_l, gl.fma(acc, b, total * a)


@gluon_jit
def store_rows(
    outs: gl.tensor, strides: gl.tensor, acc: gl.tensor, m: gl.tensor, l: gl.tensor, q_start: gl.tensor,
    first_token: gl.tensor, q_len: gl.tensor, head0: gl.tensor, GROUP: gl.constexpr, TOKENS: gl.constexpr,
    ROWS: gl.constexpr, DV: gl.constexpr, LSE: gl.constexpr,
) -> None:  # fmt: skip
    """Normalise and write this warp group's rows; a row that saw no key becomes zeros."""
    out, lse = outs
    _, _, stride_token, stride_head, stride_lse = strides
    layout: gl.constexpr = acc.type.layout
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    l_rows = gl.convert_layout(l, rows)
    inverse = gl.where(l_rows > 0, 1.0 / l_rows, 0.0)
    r = gl.arange(0, ROWS, layout=rows)
    d = gl.arange(0, DV, layout=gl.SliceLayout(0, layout))
    token = first_token + r // GROUP
    valid = (r < TOKENS * GROUP) & (token < q_len)
    head = head0 + r % GROUP
    offset = (q_start + token).to(gl.int64) * stride_token + head * stride_head
    values = (acc * inverse[:, None]).to(out.dtype.element_ty)
    gl.store(out + offset[:, None] + d[None, :], values, mask=valid[:, None])
    if LSE:
        at = (q_start + token).to(gl.int64) * stride_lse + head
        m_rows = gl.convert_layout(m, rows)
        gl.store(lse + at, gl.where(l_rows > 0, m_rows + gl.log2(l_rows), float("-inf")), mask=valid)


@gluon_jit
def merge_chunks(
    outs: gl.tensor, partials: gl.tensor, strides: gl.tensor, slot: gl.tensor, chunks: gl.tensor,
    first_chunk: gl.tensor, last_chunk: gl.tensor, q_start: gl.tensor, first_token: gl.tensor, q_len: gl.tensor,
    head: gl.tensor, GROUP: gl.constexpr, TOKENS: gl.constexpr, ROWS_KEPT: gl.constexpr, DV: gl.constexpr,
    LSE: gl.constexpr, WARPS: gl.constexpr, AT_ONCE: gl.constexpr,
) -> None:  # fmt: skip
    """Fold a tile's chunks [first_chunk, last_chunk) in ascending order and write its rows; AT_ONCE chunks' loads at a time."""
    part_m, part_l, part_acc = partials
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // DV, DV // 4], [WARPS, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    r = gl.arange(0, ROWS_KEPT, layout=rows)
    d = gl.arange(0, DV, layout=gl.SliceLayout(0, layout))
    total_m = gl.full((ROWS_KEPT,), -1.0e30, gl.float32, rows)
    total_l = gl.zeros((ROWS_KEPT,), gl.float32, rows)
    total = gl.zeros((ROWS_KEPT, DV), gl.float32, layout)
    for base in range(first_chunk, last_chunk, AT_ONCE):
        for ahead in gl.static_range(AT_ONCE):
            there = base + ahead < last_chunk
            at = (slot.to(gl.int64) * chunks + base + ahead) * ROWS_KEPT + r
            mask = there & (r < ROWS_KEPT)
            m = gl.load(part_m + at, mask=mask, other=-1.0e30, cache_modifier=".cg")
            l = gl.load(part_l + at, mask=mask, other=0.0, cache_modifier=".cg")
            acc = gl.load(part_acc + at[:, None] * DV + d[None, :], mask=mask[:, None], other=0.0, cache_modifier=".cg")
            total_m, total_l, total = fold(total_m, total_l, total, m, l, acc)
    store_rows(
        outs, strides, total, total_m, total_l, q_start, first_token, q_len, head * GROUP, GROUP, TOKENS, ROWS_KEPT, DV, LSE
    )
