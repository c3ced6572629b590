"""The ring of shared-memory stages between the warp that loads and the warp groups that multiply.

A warp group may have the first steps of its next sum under way while it still stores, or adds up, what came before: `begin`
starts them, `proceed` does the rest, and `drain` waits for the last.
"""

from __future__ import annotations

from .toolchain import gl, gluon_jit, mbarrier, warpgroup_mma, warpgroup_mma_wait


@gluon_jit
def start_step(
    acc: gl.tensor, rings: gl.tensor, ready: gl.tensor, step: gl.tensor, fresh: gl.constexpr, A_KM: gl.constexpr,
    B_KN: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Start the products of one stage; a `fresh` accumulator counts as zero whatever it holds."""
    a_ring, b_ring, _ = rings
    stage = step % STAGES
    mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
    a = a_ring.index(stage * CONSUMERS + ME)
    a = a.permute((1, 0)) if A_KM else a
    b = b_ring.index(stage)
    b = b if B_KN else b.permute((1, 0))
    return warpgroup_mma(a, b, acc, use_acc=not fresh, is_async=True)


@gluon_jit
def _start_extra(
    acc_e: gl.tensor, rings: gl.tensor, step: gl.tensor, fresh: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """After `start_step`: the same for the second column block."""
    a_ring, _, e_ring = rings
    stage = step % STAGES
    a = a_ring.index(stage * CONSUMERS + ME)
    a = a.permute((1, 0)) if A_KM else a
    e = e_ring.index(stage)
    e = e if B_KN else e.permute((1, 0))
    return warpgroup_mma(a, e, acc_e, use_acc=not fresh, is_async=True)


@gluon_jit
def release(empty: gl.tensor, step: gl.tensor, STAGES: gl.constexpr) -> None:
    """Give back the stage of `step`, once every warp of the group is done with it."""
    gl.thread_barrier()
    mbarrier.arrive(empty.index((step + STAGES) % STAGES), count=1)


@gluon_jit
def begin(
    rings: gl.tensor, bars: gl.tensor, step: gl.tensor, A_KM: gl.constexpr, B_KN: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, EXTRA: gl.constexpr, AHEAD: gl.constexpr,
    ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """A new sum and its first AHEAD steps (1 or 2), in flight; no stage is given back yet."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    COLS_E: gl.constexpr = max(EXTRA, 8)
    layout_e: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS_E, 16])
    acc = gl.zeros((ROWS, COLS), gl.float32, layout)
    acc_e = gl.zeros((ROWS, COLS_E), gl.float32, layout_e)
    acc = start_step(acc, rings, bars[0], step, True, A_KM, B_KN, CONSUMERS, STAGES, ME)
    if EXTRA:
        acc_e = _start_extra(acc_e, rings, step, True, A_KM, B_KN, CONSUMERS, STAGES, ME)
    if AHEAD == 2:
        acc = start_step(acc, rings, bars[0], step + 1, False, A_KM, B_KN, CONSUMERS, STAGES, ME)
        if EXTRA:
            acc_e = _start_extra(acc_e, rings, step + 1, False, A_KM, B_KN, CONSUMERS, STAGES, ME)
    # No wait: these many may be in flight. It makes tensors of what Gluon else calls accumulators in flight.
    if EXTRA:
        acc, acc_e = warpgroup_mma_wait(num_outstanding=2 * AHEAD, deps=(acc, acc_e))
    else:
        acc = warpgroup_mma_wait(num_outstanding=AHEAD, deps=(acc,))
    return acc, acc_e, step + AHEAD


@gluon_jit
def caught_up(acc: gl.tensor, acc_e: gl.tensor, bars: gl.tensor, step: gl.tensor, STAGES: gl.constexpr,
              EXTRA: gl.constexpr) -> gl.tensor:  # fmt: skip
    """After `begin` with two steps ahead: wait until only the second is in flight."""
    if EXTRA:
        acc, acc_e = warpgroup_mma_wait(num_outstanding=2, deps=(acc, acc_e))
    else:
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
    release(bars[1], step - 2, STAGES)
    return acc, acc_e


@gluon_jit
def proceed(
    acc: gl.tensor, acc_e: gl.tensor, rings: gl.tensor, bars: gl.tensor, step: gl.tensor, steps: gl.tensor,
    A_KM: gl.constexpr, B_KN: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, EXTRA: gl.constexpr,
    ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """`steps` more stages in ascending K; one `wgmma` group stays in flight from each to the next, and after the last."""
    for _ in range(steps):
        acc = start_step(acc, rings, bars[0], step, False, A_KM, B_KN, CONSUMERS, STAGES, ME)
        if EXTRA:
            acc_e = _start_extra(acc_e, rings, step, False, A_KM, B_KN, CONSUMERS, STAGES, ME)
        if EXTRA:
            acc, acc_e = warpgroup_mma_wait(num_outstanding=2, deps=(acc, acc_e))
        else:
            acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        release(bars[1], step - 1, STAGES)
        step += 1
    return acc, acc_e, step


@gluon_jit
def drain(acc: gl.tensor, acc_e: gl.tensor, bars: gl.tensor, step: gl.tensor, STAGES: gl.constexpr,
          EXTRA: gl.constexpr) -> gl.tensor:  # fmt: skip
    """Wait for everything in flight and give back the last stage."""
    if EXTRA:
        acc, acc_e = warpgroup_mma_wait(num_outstanding=0, deps=(acc, acc_e))
    else:
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    release(bars[1], step - 1, STAGES)
    return acc, acc_e
