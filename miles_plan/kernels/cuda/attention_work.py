"""A decode's work items: which keys each covers, who takes them, and how the keys and values reach shared memory.

An item is a sequence and a head, of which a split decode takes one chunk of keys; prefill's are in `attention_tiles`.

Where there are more items than thread blocks, a block takes the next one when it has asked for the last keys of its own: sequences
differ in length, and multiprocessors in what they read in a microsecond. Which block computes an item changes no bit of it.
"""

from __future__ import annotations

from .attention_load import fetch_block, pages_from
from .toolchain import gl, gluon_jit, grid_wait, mbarrier

MOST_STAGES = 12  # of a decode's ring


@gluon_jit
def span(
    lengths: gl.tensor, sizes: gl.tensor, item: gl.tensor, window: gl.tensor, HEADS: gl.constexpr, CAUSAL: gl.constexpr,
    SPLIT: gl.constexpr, TOKENS: gl.constexpr, CHUNK: gl.constexpr, BN: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """What work item `item` covers: its sequence, head, chunk, where its queries and keys are, and the key blocks [lo, hi).

    Neighbouring programs take the heads of one sequence's keys, which lie side by side in memory. Last chunks come last: sequences
    that do not have them leave no holes between others'.
    """
    q_starts, kv_starts, kv_lens = lengths
    SEQS, CHUNKS = sizes
    rest = gl.maximum(item, 0)
    head = rest % HEADS
    rest = rest // HEADS
    seq = rest % SEQS
    chunk = rest // SEQS
    q_start = gl.load(q_starts + seq)
    q_len = gl.load(q_starts + seq + 1) - q_start
    kv_len = gl.load(kv_lens + seq)
    kv_start = gl.load(kv_starts + seq)
    position = kv_len - q_len
    hi = kv_len
    if CAUSAL:
        hi = gl.minimum(kv_len, position + TOKENS)
    lo = gl.maximum(position - window + 1, 0)
    if SPLIT:
        lo = gl.maximum(lo, chunk * CHUNK)
        hi = gl.minimum(hi, (chunk + 1) * CHUNK)
    hi_block = gl.where((q_len > 0) & (chunk < CHUNKS), gl.cdiv(hi, BN), 0)
    return seq, head, chunk, q_start, q_len, kv_start, kv_len, position, lo // BN, hi_block


@gluon_jit
def _items_there(
    lengths: gl.tensor, sizes: gl.tensor, HEADS: gl.constexpr, SPLIT: gl.constexpr, CHUNK: gl.constexpr
) -> gl.tensor:
    """Items up to the longest sequence's last chunk, where what the caller knew of its length may be far more: a CUDA graph is captured
    for the longest that may ever come. At least one a program."""
    SEQS, CHUNKS = sizes
    if SPLIT:
        lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
        longest = 0
        for first in range(0, SEQS, 32):
            longest = gl.maximum(longest, gl.max(gl.load(lengths[2] + gl.minimum(first + lane, SEQS - 1)), 0))
        CHUNKS = gl.minimum(CHUNKS, gl.cdiv(longest, CHUNK))
    return gl.maximum(SEQS * HEADS * CHUNKS, gl.num_programs(0))


@gluon_jit
def _claim(counter: gl.tensor, items: gl.tensor) -> gl.tensor:
    """The next item that no program has taken, or -1.

    Every program asks in vain once, so all ask as often as there are items, and who asks last sets the counter to zero again.

    Every lane of the warp adds, all but one of them nothing. Around an atomic of one lane ptxas puts a branch, and of the loop that
    looks for an item with keys it let the lanes meet again only at the end, behind the sum over them.
    """
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    asked = gl.atomic_add(counter + lane * 0, (lane == 0).to(gl.int32), sem="relaxed")
    asked = gl.sum(gl.where(lane == 0, asked, 0), 0)
    if asked == items - 1:
        gl.store(counter, 0)
    item = asked + gl.num_programs(0)  # each began with the item of its own number
    return gl.where(item < items, item, -1)


@gluon_jit
def _tell(board: gl.tensor, turn: gl.tensor, item: gl.tensor) -> None:
    """Let the consumers know the program's item number `turn`, from 1: that of number 0 they know."""
    told, numbers = board
    slot = (turn - 1) % told.shape[0]
    numbers.index(slot).store(gl.full((1,), item, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(told.index(slot), count=1)


@gluon_jit
def hear(board: gl.tensor, turn: gl.tensor, WARPS: gl.constexpr) -> gl.tensor:
    """The program's item number `turn`, or -1 where none is left."""
    told, numbers = board
    slot = (turn - 1) % told.shape[0]
    mbarrier.wait(told.index(slot), ((turn - 1) // told.shape[0]) & 1)
    return gl.max(numbers.index(slot).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)


@gluon_jit
def produce(
    descs: gl.tensor, rings: gl.tensor, bars: gl.tensor, board: gl.tensor, counter: gl.tensor, lengths: gl.tensor, sizes: gl.tensor,
    table: gl.tensor, table_stride: gl.tensor, window: gl.tensor,
    HEADS: gl.constexpr, CAUSAL: gl.constexpr, SPLIT: gl.constexpr, CLAIM: gl.constexpr, TOKENS: gl.constexpr, CHUNK: gl.constexpr,
    HALF: gl.constexpr, PAGE: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, D_TAIL: gl.constexpr,
    DV: gl.constexpr, HEAD_TILES: gl.constexpr, PARTS: gl.constexpr, PASS: gl.constexpr,
) -> None:  # fmt: skip
    """The producer warp: of every item of this program, pass by pass, the keys and then the values, as far ahead as the ring allows.

    With PARTS > 1 a head's values are cut into parts of DV columns, each an item of its own.
    """
    k_desc, t_desc, v_desc = descs
    k_ring, t_ring, v_ring = rings
    grid_wait()
    item = gl.program_id(0)
    where = span(lengths, sizes, item, window, HEADS, CAUSAL, SPLIT, TOKENS, CHUNK, 2 * HALF)
    if CLAIM:
        items = _items_there(lengths, sizes, HEADS, SPLIT, CHUNK)
    turn = 0
    step = 0
    while item >= 0:
        seq, head, _, _, _, kv_start, kv_len, _, lo, hi = where
        kv_head = head // (HEAD_TILES * PARTS)
        k_col = kv_head * (D + D_TAIL)
        v_col = (kv_head * PARTS + head % PARTS) * DV
        pages = table + seq.to(gl.int64) * table_stride
        for first in range(lo // PASS * PASS, hi, PASS):
            begin = gl.maximum(lo, first) * 2
            end = gl.minimum(hi, first + PASS) * 2
            step = _stream(
                k_desc, t_desc, (k_ring, t_ring), bars, step, begin, end, kv_start, kv_len, pages, k_col, HALF, PAGE, BOX, STAGES, D,
                D_TAIL,
            )  # fmt: skip
            step = _stream(
                v_desc, t_desc, (v_ring, t_ring), bars, step, begin, end, kv_start, kv_len, pages, v_col, HALF, PAGE, BOX, STAGES, DV,
                0,
            )  # fmt: skip
        item = -1
        if CLAIM:
            item = _claim(counter, items)
            where = span(lengths, sizes, item, window, HEADS, CAUSAL, SPLIT, TOKENS, CHUNK, 2 * HALF)
            while (item >= 0) & (where[8] >= where[9]):
                item = _claim(counter, items)
                where = span(lengths, sizes, item, window, HEADS, CAUSAL, SPLIT, TOKENS, CHUNK, 2 * HALF)
            turn += 1
            _tell(board, turn, item)


@gluon_jit
def _stream(
    desc: gl.tensor, t_desc: gl.tensor, rings: gl.tensor, bars: gl.tensor, step: gl.tensor, lo: gl.tensor, hi: gl.tensor,
    kv_start: gl.tensor, kv_len: gl.tensor, pages: gl.tensor, col: gl.tensor, HALF: gl.constexpr, PAGE: gl.constexpr,
    BOX: gl.constexpr, STAGES: gl.constexpr, WIDTH: gl.constexpr, TAIL: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The keys (or values) of half blocks [lo, hi) into the ring from `step` on; returns the step after them."""
    ring, t_ring = rings
    EACH: gl.constexpr = ring.shape[0] // STAGES
    ready, empty = bars
    BYTES: gl.constexpr = HALF * (WIDTH + TAIL) * desc.dtype.primitive_bitwidth // 8
    AT_ONCE: gl.constexpr = 32 * BOX // HALF  # half blocks whose pages are read together
    place = kv_start
    for half in range(lo, hi):
        if PAGE:
            if (half - lo) % AT_ONCE == 0:
                place = pages_from(pages, half, kv_len, PAGE, HALF, BOX)
        first_box = (half - lo) % AT_ONCE * (HALF // BOX)
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(ready.index(stage), BYTES)
        fetch_block(desc, ring, ready.index(stage), stage * EACH, place, first_box, half, col, PAGE, HALF, BOX)
        if TAIL:
            fetch_block(t_desc, t_ring, ready.index(stage), stage, place, first_box, half, col + WIDTH, PAGE, HALF, BOX)
        step += 1
    return step
