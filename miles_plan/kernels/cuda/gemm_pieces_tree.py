"""The tree family's sum where a leaf's sum is pieces side by side; `gemm_tree` for those.

A leaf may end inside a stage (TAIL k16 steps), as eighths of a vocabulary do; what the stage holds beyond belongs to the next leaf
and is not multiplied.
"""

from __future__ import annotations

from .gemm_pieces_ring import proceed, start
from .gemm_ring import release
from .toolchain import gl, gluon_jit, tma
from .wgmma import settled, wait


@gluon_jit
def _both(x: gl.tensor, y: gl.tensor, COUNT: gl.constexpr) -> gl.tensor:
    """Wait until only the last started group is in flight; neither sum is touched before."""
    both = wait(x + y, 1)
    left: gl.tensor = ()
    right: gl.tensor = ()
    for i in gl.static_range(COUNT):
        left = left + (both[i],)
        right = right + (both[COUNT + i],)
    return left, right


@gluon_jit
def _added(x: gl.tensor, y: gl.tensor, COUNT: gl.constexpr) -> gl.tensor:
    """The sums of the pieces."""
    total: gl.tensor = ()
    for i in gl.static_range(COUNT):
        total = total + (x[i] + y[i],)
    return total


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
def _four_leaves(
    a: gl.tensor, zero: gl.tensor, bars: gl.tensor, step: gl.tensor, begun: gl.tensor, steps: gl.tensor, TAIL: gl.constexpr,
    TYPE: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr,
    COUNT: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """(a + b) + (c + d) for four leaves of `steps` stages each; `a` has begun that many, the last in flight; afterwards none is."""
    a, b, step = _next_leaf(a, zero, bars, step, steps - begun, TAIL, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
    b, c, step = _next_leaf(b, zero, bars, step, steps - 1, TAIL, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
    # Waits for nothing, but pins the sum here: put off to its use, it would keep two leaves in registers instead of one.
    c, pair = _both(c, _added(a, b, COUNT), COUNT)
    c, d, step = _next_leaf(c, zero, bars, step, steps - 1, TAIL, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
    d, step = _to_the_end(d, bars, step, steps - 1, TAIL, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
    d = wait(d, 0)
    release(bars[1], step - 1, STAGES)
    return settled(_added(pair, _added(c, d, COUNT), COUNT)), step


@gluon_jit
def eight_leaves(
    a: gl.tensor, zero: gl.tensor, bars: gl.tensor, stash: gl.tensor, step: gl.tensor, begun: gl.tensor, steps: gl.tensor,
    TAIL: gl.constexpr, EACH: gl.constexpr,
    TYPE: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr,
    COUNT: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The binary tree over eight leaves but for its last sum: the left half goes into the stash, EACH pieces at each of the right half's
    first steps, and the right half is returned."""
    left, step = _four_leaves(a, zero, bars, step, begun, steps, TAIL, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
    e = start(zero, bars[0], step, True, 4, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
    e = wait(e, 1)
    step += 1
    for first in gl.static_range(0, COUNT, EACH):
        e = start(e, bars[0], step, False, 4, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
        if first == 0:
            tma.store_wait(pendings=0)  # the last tile may still be on its way out of the same memory
            gl.thread_barrier()
        for i in gl.static_range(first, min(first + EACH, COUNT)):
            stash.index(ME * COUNT + i).store(left[i])
        e = wait(e, 1)
        release(bars[1], step - 1, STAGES)
        step += 1
    return _four_leaves(
        e, zero, bars, step, 1 + (COUNT + EACH - 1) // EACH, steps, TAIL, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME
    )
