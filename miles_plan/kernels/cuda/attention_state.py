"""A row's running state in the Hopper attention kernel: maximum, sum and weighted values, folded, kept and written.

`attention_kernel` gives the formulas; everything here obeys their order.
"""

from __future__ import annotations

from .attention_registers import after, once_known
from .own_memory import taken_from
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
def token_of(r: gl.tensor, GROUP: gl.constexpr, TOKENS: gl.constexpr) -> gl.tensor:
    """Which token of a tile a row belongs to: a warp group's 64 rows are TOKENS tokens."""
    return r // 64 * TOKENS + r % 64 // GROUP


@gluon_jit
def uneven(
    block: gl.tensor, position: gl.tensor, kv_len: gl.tensor, window: gl.tensor, CAUSAL: gl.constexpr, TOKENS: gl.constexpr,
    BN: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Whether some row of a tile of TOKENS tokens from `position` on does not see a block whole."""
    first = block * BN
    cut = first <= position + TOKENS - 1 - window
    if CAUSAL:
        return cut | (first + BN - 1 > position)
    return cut | (first + BN > kv_len)


@gluon_jit
def masked(
    s: gl.tensor, block: gl.tensor, position: gl.tensor, kv_len: gl.tensor, window: gl.tensor, CAUSAL: gl.constexpr,
    GROUP: gl.constexpr, TOKENS: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Scores with -inf where the row may not look.

    A row at a place within the sequence that sees only keys up to its own sees none past the end; other rows are not written.
    """
    layout: gl.constexpr = s.type.layout
    key = block * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
    place = position + token_of(gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)), GROUP, TOKENS)
    if CAUSAL:
        s = gl.where(key[None, :] <= place[:, None], s, float("-inf"))
    else:
        s = gl.where((key < kv_len)[None, :], s, float("-inf"))
    if block * BN <= position + TOKENS * (ROWS // 64) - 1 - window:
        s = gl.where(key[None, :] > (place - window)[:, None], s, float("-inf"))
    return s


@gluon_jit
def _row_halves(x: gl.tensor) -> gl.tensor:
    """Of the two rows that a thread has in `wgmma`'s layout the first and the second: [rows / 16, 8, ...] each."""
    if len(x.shape) == 1:
        return x.reshape([x.shape[0] // 16, 2, 8]).permute((0, 2, 1)).split()
    else:
        return x.reshape([x.shape[0] // 16, 2, 8, x.shape[1]]).permute((0, 2, 3, 1)).split()


@gluon_jit
def _rows_of(first: gl.tensor, second: gl.tensor) -> gl.tensor:
    """The tensor that has these halves."""
    x = gl.join(first, second)
    if len(x.shape) == 3:
        return x.permute((0, 2, 1)).reshape([x.shape[0] * 16])
    else:
        return x.permute((0, 3, 1, 2)).reshape([x.shape[0] * 16, x.shape[2]])


@gluon_jit
def _lane_maxima(s: gl.tensor) -> gl.tensor:
    """The largest score of each row in each of its four lanes, of one row of each thread."""
    return gl.max(gl.max(s.reshape([s.shape[0], 8, s.shape[2] // 8, 4, 2]), 2), 3)


@gluon_jit
def _half_weights(
    s: gl.tensor, in_lane: gl.tensor, m: gl.tensor, scale: gl.tensor, restart: gl.tensor, LATE: gl.constexpr
) -> gl.tensor:
    """`to_weights` for one row of each thread; with LATE the weights come after what sums are to be multiplied by."""
    ROWS: gl.constexpr = s.shape[0]
    BN: gl.constexpr = s.shape[2]
    m_new = gl.maximum(m, gl.convert_layout(gl.ceil(gl.max(in_lane, 2) * scale), m.type.layout))
    alpha = gl.where(restart, 1.0, gl.exp2(m - m_new))
    shift = m_new
    if LATE:
        shift = once_known(m_new, alpha)
    p = gl.exp2(gl.fma(s, scale, gl.convert_layout(-shift, gl.SliceLayout(2, s.type.layout))[:, :, None]))
    lanes = gl.sum(p.reshape([ROWS, 8, BN // 8, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([ROWS, 8, 4, BN // 4]), 3)
    return m_new, alpha, p, lanes


@gluon_jit
def to_weights(s: gl.tensor, m: gl.tensor, scale: gl.tensor, restart: gl.tensor) -> gl.tensor:
    """Scores to unnormalised weights under the new running maximum (an integer power of two): the maximum, what sums so far are to
    be multiplied by, weights, what a row's four lanes each add up, [ROWS, 4], and the weights of each thread's first row again.

    One of a thread's rows after the other: the second's maximum is found beside the first's exponentials.
    """
    s0, s1 = _row_halves(s)
    m0, m1 = _row_halves(m)
    m0, alpha0, p0, lanes0 = _half_weights(s0, _lane_maxima(s0), m0, scale, restart, False)
    m1, alpha1, p1, lanes1 = _half_weights(s1, _lane_maxima(after(s1, alpha0)), m1, scale, restart, True)
    p = gl.convert_layout(_rows_of(p0, p1), s.type.layout, assert_trivial=True)
    m_new = gl.convert_layout(_rows_of(m0, m1), m.type.layout, assert_trivial=True)
    alpha = gl.convert_layout(_rows_of(alpha0, alpha1), m.type.layout, assert_trivial=True)
    return m_new, alpha, p, _rows_of(lanes0, lanes1), p0


@gluon_jit
def added(l: gl.tensor, alpha: gl.tensor, lanes: gl.tensor) -> gl.tensor:
    """The rescaled sum of weights with a block's."""
    return gl.fma(l, alpha, gl.convert_layout(gl.sum(lanes, 1), l.type.layout))


@gluon_jit
def fold_kept(
    totals: gl.tensor, kept: gl.tensor, chunks: gl.tensor, state: gl.tensor, WARPS: gl.constexpr
) -> gl.tensor:  # fmt: skip
    """`fold` of one more chunk's state into a total that was put aside, after `chunks` chunks."""
    total_m, total_l = totals
    m, l, acc = state
    m_new = gl.maximum(total_m, m)
    a = gl.exp2(total_m - m_new)
    b = gl.exp2(m - m_new)
    if chunks > 0:
        total = taken_from(acc, kept, WARPS)
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
def inverse_sums(l: gl.tensor, acc: gl.tensor) -> gl.tensor:
    """What normalises a row of acc; 0 for a row that saw no key."""
    l = gl.convert_layout(l, gl.SliceLayout(1, acc.type.layout))
    return gl.where(l > 0, 1.0 / l, 0.0)


@gluon_jit
def store_sums(
    outs: gl.tensor, strides: gl.tensor, acc: gl.tensor, m: gl.tensor, l: gl.tensor, q_start: gl.tensor,
    first_token: gl.tensor, q_len: gl.tensor, head0: gl.tensor, GROUP: gl.constexpr, TOKENS: gl.constexpr, ROWS: gl.constexpr,
) -> None:  # fmt: skip
    """Write the log2 of each row's sum of weights; of a row that saw no key -inf."""
    rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    r = gl.arange(0, ROWS, layout=rows)
    token = first_token + token_of(r, GROUP, TOKENS)
    valid = (r % 64 < TOKENS * GROUP) & (token < q_len)
    at = (q_start + token).to(gl.int64) * strides[4] + head0 + r % 64 % GROUP
    m = gl.convert_layout(m, rows)
    l = gl.convert_layout(l, rows)
    gl.store(outs[1] + at, gl.where(l > 0, m + gl.log2(l), float("-inf")), mask=valid)


@gluon_jit
def store_rows(
    outs: gl.tensor, strides: gl.tensor, acc: gl.tensor, m: gl.tensor, l: gl.tensor, q_start: gl.tensor,
    first_token: gl.tensor, q_len: gl.tensor, head0: gl.tensor, GROUP: gl.constexpr, TOKENS: gl.constexpr,
    ROWS: gl.constexpr, DV: gl.constexpr, LSE: gl.constexpr,
) -> None:  # fmt: skip
    """Normalise and write a tile's rows; a row that saw no key becomes zeros."""
    out, _ = outs
    _, _, stride_token, stride_head, _ = strides
    layout: gl.constexpr = acc.type.layout
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    d = gl.arange(0, DV, layout=gl.SliceLayout(0, layout))
    token = first_token + token_of(r, GROUP, TOKENS)
    valid = (r % 64 < TOKENS * GROUP) & (token < q_len)
    head = head0 + r % 64 % GROUP
    offset = (q_start + token).to(gl.int64) * stride_token + head * stride_head
    values = (acc * inverse_sums(l, acc)[:, None]).to(out.dtype.element_ty)
    gl.store(out + offset[:, None] + d[None, :], values, mask=valid[:, None])
    if LSE:
        store_sums(outs, strides, acc, m, l, q_start, first_token, q_len, head0, GROUP, TOKENS, ROWS)


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
