"""The tree family's sum: K in equal leaves, each a chain, added as a balanced binary tree.

A warp group adds finished leaves while the next leaf's products are under way, so the matrix unit hardly notices the tree.
"""

from __future__ import annotations

from .gemm_ring import release, start_step
from .toolchain import gl, gluon_jit, tma, warpgroup_mma_wait


@gluon_jit
def _first_step(
    rings: gl.tensor, bars: gl.tensor, step: gl.tensor, A_KM: gl.constexpr, B_KN: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """A new leaf with its first step in flight."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    acc = gl.zeros((ROWS, COLS), gl.float32, layout)
    return start_step(acc, rings, bars[0], step, True, A_KM, B_KN, CONSUMERS, STAGES, ME)


@gluon_jit
def _drain(acc: gl.tensor, bars: gl.tensor, step: gl.tensor, STAGES: gl.constexpr) -> gl.tensor:
    """Wait for the last step and give back its stage."""
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    release(bars[1], step - 1, STAGES)
    return acc


@gluon_jit
def _next_leaf(
    last: gl.tensor, rings: gl.tensor, bars: gl.tensor, step: gl.tensor, A_KM: gl.constexpr, B_KN: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Start the next leaf, then wait for the last and give back its last stage."""
    running = _first_step(rings, bars, step, A_KM, B_KN, CONSUMERS, STAGES, ROWS, COLS, ME)
    last, running = warpgroup_mma_wait(num_outstanding=1, deps=(last, running))
    release(bars[1], step - 1, STAGES)
    return last, running, step + 1


@gluon_jit
def _finish_leaf(
    acc: gl.tensor, rings: gl.tensor, bars: gl.tensor, step: gl.tensor, steps: gl.tensor, A_KM: gl.constexpr,
    B_KN: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The leaf's other steps."""
    for _ in range(steps - 1):
        acc = start_step(acc, rings, bars[0], step, False, A_KM, B_KN, CONSUMERS, STAGES, ME)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        release(bars[1], step - 1, STAGES)
        step += 1
    return acc, step


@gluon_jit
def _leaves(
    a: gl.tensor, rings: gl.tensor, bars: gl.tensor, step: gl.tensor, steps: gl.tensor, COUNT: gl.constexpr,
    A_KM: gl.constexpr, B_KN: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
    COLS: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The sum over 2 or 4 leaves; `a` is the first, with its first step in flight. Three leaves at most are in registers."""
    a, step = _finish_leaf(a, rings, bars, step, steps, A_KM, B_KN, CONSUMERS, STAGES, ME)
    a, b, step = _next_leaf(a, rings, bars, step, A_KM, B_KN, CONSUMERS, STAGES, ROWS, COLS, ME)
    b, step = _finish_leaf(b, rings, bars, step, steps, A_KM, B_KN, CONSUMERS, STAGES, ME)
    if COUNT == 2:
        b = _drain(b, bars, step, STAGES)
        total = a + b
    else:
        b, c, step = _next_leaf(b, rings, bars, step, A_KM, B_KN, CONSUMERS, STAGES, ROWS, COLS, ME)
        pair = a + b
        # Waits for nothing, but pins the sum here: put off to its use, it would keep two leaves in registers instead of one.
        c, pair = warpgroup_mma_wait(num_outstanding=1, deps=(c, pair))
        c, step = _finish_leaf(c, rings, bars, step, steps, A_KM, B_KN, CONSUMERS, STAGES, ME)
        c, d, step = _next_leaf(c, rings, bars, step, A_KM, B_KN, CONSUMERS, STAGES, ROWS, COLS, ME)
        d, step = _finish_leaf(d, rings, bars, step, steps, A_KM, B_KN, CONSUMERS, STAGES, ME)
        d = _drain(d, bars, step, STAGES)
        total = warpgroup_mma_wait(num_outstanding=0, deps=(pair + (c + d),))  # pins the sum before the next leaf starts
    return total, step


@gluon_jit
def leaf_tree(
    a: gl.tensor, rings: gl.tensor, bars: gl.tensor, stash: gl.tensor, step: gl.tensor, steps: gl.tensor,
    A_KM: gl.constexpr, B_KN: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
    COLS: gl.constexpr, LEAVES: gl.constexpr, STASH: gl.constexpr, STORE: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The sum over LEAVES (2, 4 or 8) leaves of `steps` stages each; `a` is the first leaf with its first step in flight.

    With STASH the first half of eight waits in shared memory: the registers of a 64 x 128 tile would overflow.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    COUNT: gl.constexpr = min(LEAVES, 4)
    total, step = _leaves(a, rings, bars, step, steps, COUNT, A_KM, B_KN, CONSUMERS, STAGES, ROWS, COLS, ME)
    if LEAVES == 8:
        if STASH:
            if STORE == 1:  # the last tile may still be on its way out of the same memory
                tma.store_wait(pendings=0)
                gl.thread_barrier()
            stash.index(ME).store(total)
            gl.thread_barrier()  # the registers first, then the next leaf
        a = _first_step(rings, bars, step, A_KM, B_KN, CONSUMERS, STAGES, ROWS, COLS, ME)
        a = warpgroup_mma_wait(num_outstanding=1, deps=(a,))  # waits for nothing; it makes a tensor of what is in flight
        step += 1
        right, step = _leaves(a, rings, bars, step, steps, COUNT, A_KM, B_KN, CONSUMERS, STAGES, ROWS, COLS, ME)
        if STASH:
            gl.thread_barrier()  # keeps the loads after the sum, which needs the registers
            total = stash.index(ME).load(layout)
        total = total + right
    return total, step
