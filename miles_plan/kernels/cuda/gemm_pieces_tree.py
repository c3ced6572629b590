"""The tree family's sum where a leaf's sum is pieces side by side; `gemm_tree` for those.

Four sums of a tile fill the registers but for a few pieces: the pair and the third leaf, which wait, the fourth whose last step is in
flight, and the fifth whose first step follows it. So the matrix unit never waits where the left half ends. What does not fit waits in
shared memory, each thread's in a place of its own: first the last PAIRS pieces of the left pair, then the last STASHED of the left
half.

A leaf may end inside a stage (TAIL k16 steps), as eighths of a vocabulary do; what the stage holds beyond belongs to the next leaf
and is not multiplied.
"""

from __future__ import annotations

from .gemm_pieces_ring import proceed, start
from .gemm_ring import release
from .own_memory import put_at, taken_from
from .toolchain import gl, gluon_jit
from .wgmma import rounded, wait


@gluon_jit
def own_places(address: gl.tensor, PIECE: gl.constexpr, STASHED: gl.constexpr, layout: gl.constexpr) -> gl.tensor:
    """A tensor like a piece; of a thread's elements the first says where its part of a stash of STASHED pieces begins."""
    rows = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, layout)), 1)
    cols = gl.expand_dims(gl.arange(0, PIECE, gl.SliceLayout(0, layout)), 0)
    rows, cols = gl.broadcast(rows, cols)
    return address + (rows // 16) * (32 * 2 * PIECE * STASHED) + (rows % 8) * 64 + (cols // 2 % 4) * 16


@gluon_jit
def _some(pieces: gl.tensor, FIRST: gl.constexpr, LAST: gl.constexpr) -> gl.tensor:
    """Pieces FIRST to LAST - 1."""
    found: gl.tensor = ()
    for i in gl.static_range(FIRST, LAST):
        found = found + (pieces[i],)
    return found


@gluon_jit
def _put(pieces: gl.tensor, place: gl.tensor, PIECE: gl.constexpr) -> None:
    """Store pieces in a stash from its first on."""
    for i in gl.static_range(len(pieces)):
        put_at(pieces[i], place + i * (64 * PIECE), 4)


@gluon_jit
def _taken(like: gl.tensor, place: gl.tensor, PIECE: gl.constexpr) -> gl.tensor:
    """As many pieces as `like` has, from a stash."""
    found: gl.tensor = ()
    for i in gl.static_range(len(like)):
        found = found + (taken_from(like[i], place + i * (64 * PIECE), 4),)
    return found


@gluon_jit
def _both(x: gl.tensor, y: gl.tensor, COUNT: gl.constexpr) -> gl.tensor:
    """Wait until only the last started group is in flight; neither sum is touched before."""
    both = wait(x + y, 1)
    return _some(both, 0, COUNT), _some(both, COUNT, len(both))


@gluon_jit
def _added(x: gl.tensor, y: gl.tensor) -> gl.tensor:
    """The sums of the pieces."""
    total: gl.tensor = ()
    for i in gl.static_range(len(x)):
        total = total + (x[i] + y[i],)
    return total


@gluon_jit
def in_half(sums: gl.tensor, TYPE: gl.constexpr) -> gl.tensor:
    """The pieces in the type they are written in."""
    values: gl.tensor = ()
    for i in gl.static_range(len(sums)):
        values = values + (rounded(sums[i], TYPE),)
    return values


@gluon_jit
def _to_the_end(
    sums: gl.tensor, bars: gl.tensor, step: gl.tensor, steps: gl.tensor, TAIL: gl.constexpr,
    TYPE: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr,
    COUNT: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """`steps` more whole stages of a leaf, and the one in which it ends."""
    sums, step = proceed(sums, bars, step, steps, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
    if TAIL:
        sums = start(sums, bars[0], step, False, TAIL, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
        sums = wait(sums, 1)
        release(bars[1], step - 1, STAGES)
        step += 1
    return sums, step


@gluon_jit
def _next_leaf(
    last: gl.tensor, zero: gl.tensor, bars: gl.tensor, step: gl.tensor, steps: gl.tensor, TAIL: gl.constexpr,
    TYPE: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr,
    COUNT: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The leaf whose last step is in flight, finished after `steps` more, and the next with its first step in flight."""
    last, step = _to_the_end(last, bars, step, steps, TAIL, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
    following = start(zero, bars[0], step, True, 4, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
    last, following = _both(last, following, COUNT)
    release(bars[1], step - 1, STAGES)
    return last, following, step + 1


@gluon_jit
def _three_leaves(
    a: gl.tensor, zero: gl.tensor, bars: gl.tensor, place: gl.tensor, step: gl.tensor, begun: gl.tensor, steps: gl.tensor,
    PAIRS: gl.constexpr, TAIL: gl.constexpr,
    TYPE: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr,
    COUNT: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """a + b but for its last PAIRS pieces, which are in the stash, then c, and d with its first step in flight, for leaves of `steps`
    stages each; `a` has begun that many, the last in flight."""
    a, b, step = _next_leaf(a, zero, bars, step, steps - begun, TAIL, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
    b, c, step = _next_leaf(b, zero, bars, step, steps - 1, TAIL, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
    # Waits for nothing, but pins the sum here: put off to its use, it would keep two leaves in registers instead of one.
    c, pair = _both(c, _added(a, b), COUNT)
    _put(_some(pair, COUNT - PAIRS, COUNT), place, PIECE)
    c, d, step = _next_leaf(c, zero, bars, step, steps - 1, TAIL, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
    return _some(pair, 0, COUNT - PAIRS), c, d, step


@gluon_jit
def eight_leaves(
    a: gl.tensor, zero: gl.tensor, bars: gl.tensor, place: gl.tensor, step: gl.tensor, steps: gl.tensor,
    STASHED: gl.constexpr, PAIRS: gl.constexpr, TAIL: gl.constexpr,
    TYPE: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr,
    COUNT: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The binary tree over eight leaves of `steps` stages each, rounded; `a` has its first step in flight, afterwards none is."""
    pair, c, d, step = _three_leaves(
        a, zero, bars, place, step, 1, steps, PAIRS, TAIL, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME
    )
    d, e, step = _next_leaf(d, zero, bars, step, steps - 1, TAIL, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
    e = start(e, bars[0], step, False, 4, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
    left = _added(pair + _taken(_some(zero, 0, PAIRS), place, PIECE), _added(c, d))
    _put(_some(left, COUNT - STASHED, COUNT), place, PIECE)
    e, held = _both(e, _some(left, 0, COUNT - STASHED), COUNT)
    release(bars[1], step - 1, STAGES)
    step += 1
    pair, c, d, step = _three_leaves(
        e, zero, bars, place, step, 2, steps, 0, TAIL, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME
    )
    d, step = _to_the_end(d, bars, step, steps - 1, TAIL, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
    d = wait(d, 0)
    release(bars[1], step - 1, STAGES)
    left = held + _taken(_some(zero, COUNT - STASHED, COUNT), place, PIECE)
    return in_half(_added(left, _added(pair, _added(c, d))), TYPE), step
