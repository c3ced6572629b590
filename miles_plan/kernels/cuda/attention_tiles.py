"""Prefill's work items in the order in which programs take them, and the warp that takes them and streams their keys and values.

An item is a tile of a sequence's tokens with one key head. A sequence's heads are worked on in sections, as many at a time as L2
holds the keys and values of: with all eight of Qwen3-8B at once, 32,768 tokens read 6.8 GB from memory and not 0.4. Within a
section the last tile of each head comes first, which has the most keys, so that what is left at the end is short. FlashAttention-3
orders its tiles so too (`hopper/tile_scheduler.hpp`).

Programs take the next item when they are done with one. Which program computes an item changes no bit of it.
"""

from __future__ import annotations

from .attention_load import stream_blocks
from .shared_addresses import eight_at, wait_at
from .toolchain import gl, gluon_jit, mbarrier
from .warp_lanes import fetch_ahead, lane


@gluon_jit
def slots_before(q_start: gl.tensor, seq: gl.tensor, TOKENS: gl.constexpr) -> gl.tensor:
    """Places for tiles before those of sequence `seq`, whose first token is `q_start`: enough for each sequence's tiles, with at
    most one to spare, and known without a sum over the sequences."""
    return q_start // TOKENS + seq


@gluon_jit
def heads_at_once(keys: gl.tensor, HEADS: gl.tensor, l2_keys: gl.tensor) -> gl.tensor:
    """Of a sequence's heads those in a section, with so many keys each and room for `l2_keys`; sections are as equal as may be."""
    most = min(max(l2_keys // max(keys, 1), 1), HEADS)
    sections = (HEADS + most - 1) // most
    return (HEADS + sections - 1) // sections


@gluon_jit
def head_and_tile(place: gl.tensor, tiles: gl.tensor, HEADS: gl.tensor, width: gl.tensor) -> gl.tensor:
    """Which head and which tile of a sequence is its item number `place`, in sections of `width` heads."""
    first_head = place // (tiles * width) * width
    place = place - first_head * tiles
    width = min(width, HEADS - first_head)
    return first_head + place % width, tiles - 1 - place // width


@gluon_jit
def _sequence_of(q_starts: gl.tensor, sizes: gl.tensor, item: gl.tensor, seq: gl.tensor, TOKENS: gl.constexpr) -> gl.tensor:
    """The sequence of an item, looked for from `seq` upwards, 32 sequences at a time."""
    SEQS, HEADS, _, _ = sizes
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    passed = 32
    while passed == 32:
        after = seq + 1 + lane
        slots = slots_before(gl.load(q_starts + gl.minimum(after, SEQS)), after, TOKENS)
        passed = gl.sum(((after < SEQS) & (slots * HEADS <= item)).to(gl.int32), 0)
        seq += passed
    return seq


@gluon_jit
def _span(
    lengths: gl.tensor, sizes: gl.tensor, item: gl.tensor, seq: gl.tensor, window: gl.tensor, CAUSAL: gl.constexpr,
    TOKENS: gl.constexpr, BN: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """What an item of sequence `seq` covers: sequence, head, first token, the sequence's places and lengths, and the range of key
    blocks [lo, hi), which is empty for an item without tokens or keys."""
    q_starts, kv_starts, kv_lens = lengths
    _, HEADS, ITEMS, l2_keys = sizes
    q_start = gl.load(q_starts + seq)
    q_end = gl.load(q_starts + seq + 1)
    kv_len = gl.load(kv_lens + seq)
    kv_start = gl.load(kv_starts + seq)
    slots = slots_before(q_start, seq, TOKENS)
    tiles = slots_before(q_end, seq + 1, TOKENS) - slots
    place = item - slots * HEADS
    there = (place >= 0) & (place < tiles * HEADS) & (item < ITEMS)
    width = heads_at_once(gl.minimum(kv_len, window), HEADS, l2_keys)
    head, tile = head_and_tile(gl.where(there, place, 0), tiles, HEADS, width)
    first_token = tile * TOKENS
    q_len = q_end - q_start
    position = kv_len - q_len + first_token
    hi = kv_len
    if CAUSAL:
        hi = gl.minimum(kv_len, position + TOKENS)
    lo = gl.maximum(position - window + 1, 0) // BN
    hi = gl.where(there & (first_token < q_len), gl.cdiv(hi, BN), lo)
    return seq, head, first_token, q_start, q_len, kv_start, kv_len, position, lo, hi


@gluon_jit
def _claim(
    counter: gl.tensor, lengths: gl.tensor, sizes: gl.tensor, seq: gl.tensor, window: gl.tensor, CAUSAL: gl.constexpr,
    TOKENS: gl.constexpr, BN: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The next item that no program has taken and that has keys, as `_span` says it; one without where none is left.

    Every program asks in vain once, so all ask as often as there are items, and who asks last sets the counter to zero again.
    """
    _, _, ITEMS, _ = sizes
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    none = 0
    where = (seq, none, none, none, none, none, none, none, none, none)
    searching = ITEMS > 0
    while searching:
        asked = gl.atomic_add(counter + lane * 0, gl.full_like(lane, 1), mask=lane == 0, sem="relaxed")
        asked = gl.sum(gl.where(lane == 0, asked, 0), 0)
        if asked == ITEMS - 1:
            gl.store(counter, 0)
        item = asked + gl.num_programs(0)  # each began with the item of its own number
        seq = _sequence_of(lengths[0], sizes, item, seq, TOKENS)
        where = _span(lengths, sizes, item, seq, window, CAUSAL, TOKENS, BN)
        searching = (item < ITEMS) & (where[8] >= where[9])
    return where


@gluon_jit
def _tell(board: gl.tensor, turn: gl.tensor, where: gl.tensor) -> None:
    """Let the consumers know what the program's item number `turn` covers."""
    told, fields = board
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    _, head, first_token, q_start, q_len, _, kv_len, position, lo, hi = where
    values = (head, first_token, q_start, q_len, kv_len, position, lo, hi)
    slot = turn % told.shape[0]
    for i in gl.static_range(8):
        fields.index(slot * 8 + i).store(gl.full((1,), values[i], gl.int32, layout))
    mbarrier.arrive(told.index(slot), count=1)


@gluon_jit
def hear(told: gl.tensor, fields: gl.tensor, turn: gl.tensor, TURNS: gl.constexpr) -> gl.tensor:
    """What the program's item number `turn` covers: head, first token, first row of Q, queries, keys, the first token's position,
    and the range of key blocks, empty where no item is left. told, fields: addresses of the board's parts."""
    slot = turn % TURNS
    wait_at(told + slot * 8, (turn // TURNS) & 1)
    return eight_at(fields + slot * 32)


@gluon_jit
def _ask_for_queries(
    q_rows: gl.tensor, q_strides: gl.tensor, where: gl.tensor, TOKENS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr
) -> None:
    """Ask for an item's queries in L2: when its turn comes both warp groups wait for their copy."""
    _, head, first_token, q_start, q_len, _, _, _, lo, hi = where
    for part in gl.static_range((TOKENS + 31) // 32):
        place = part * 32 + lane()
        token = first_token + place
        row = q_rows + (q_start + token).to(gl.int64) * q_strides[0] + head * GROUP * q_strides[1]
        fetch_ahead(
            row, GROUP * D * q_rows.dtype.element_ty.primitive_bitwidth // 8, (place < TOKENS) & (token < q_len) & (lo < hi)
        )


@gluon_jit
def produce_tiles(
    descs: gl.tensor, rings: gl.tensor, bars: gl.tensor, board: gl.tensor, counter: gl.tensor, lengths: gl.tensor,
    sizes: gl.tensor, table: gl.tensor, table_stride: gl.tensor, window: gl.tensor, q: gl.tensor, q_rows: gl.tensor,
    q_strides: gl.tensor, queries: gl.tensor,
    CAUSAL: gl.constexpr, TOKENS: gl.constexpr, BN: gl.constexpr, PAGE: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr,
    D: gl.constexpr, D_TAIL: gl.constexpr, DV: gl.constexpr, HEAD_TILES: gl.constexpr, GROUP: gl.constexpr,
    Q_BOXES: gl.constexpr,
) -> None:  # fmt: skip
    """The producer warp: takes items, tells the consumers, and streams keys and values as far ahead as the ring allows.

    The item after the present one is taken before the present one's blocks, so that nobody waits for it.
    """
    turn = 0
    step = 0
    item = gl.program_id(0)
    seq = _sequence_of(lengths[0], sizes, item, turn, TOKENS)
    where = _span(lengths, sizes, item, seq, window, CAUSAL, TOKENS, BN)
    if where[8] >= where[9]:
        where = _claim(counter, lengths, sizes, seq, window, CAUSAL, TOKENS, BN)
    _tell(board, turn, where)
    while where[8] < where[9]:
        after = _claim(counter, lengths, sizes, where[0], window, CAUSAL, TOKENS, BN)
        turn += 1
        _tell(board, turn, after)
        if Q_BOXES:
            _ask_for_queries(q_rows, q_strides, after, TOKENS, GROUP, D + D_TAIL)
        seq, head, first_token, q_start, _, kv_start, kv_len, _, lo, hi = where
        kv_head = head // HEAD_TILES
        pages = table + seq.to(gl.int64) * table_stride
        step = stream_blocks(
            descs, rings, bars, step, lo, hi, kv_start, kv_len, pages, kv_head, kv_head * DV, BN, PAGE, BOX, STAGES, D, D_TAIL, DV,
            q, queries, (q_start + first_token, head * GROUP, turn), TOKENS // 2, GROUP, Q_BOXES,
        )  # fmt: skip
        where = after
