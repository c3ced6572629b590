"""The ring of shared-memory stages of the kernel whose sums are pieces; `gemm_ring` for those."""

from __future__ import annotations

from .gemm_ring import release
from .toolchain import gl, gluon_jit, mbarrier
from .wgmma import multiply, shared_base, wait


@gluon_jit
def start(
    sums: gl.tensor, ready: gl.tensor, step: gl.tensor, FRESH: gl.constexpr, STEPS: gl.constexpr,
    TYPE: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr,
    COUNT: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Start STEPS k16 steps, all four or a leaf's last few, of one stage; FRESH sums count as zero."""
    stage = step % STAGES
    mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
    place = shared_base() + stage * ((CONSUMERS * 64 + PIECE * COUNT) * 128)  # the ring is the largest allocation
    return multiply(sums, place + ME * (64 * 128), place + CONSUMERS * (64 * 128), FRESH, TYPE, A_KM, B_KN, STEPS)


@gluon_jit
def proceed(
    sums: gl.tensor, bars: gl.tensor, step: gl.tensor, steps: gl.tensor,
    TYPE: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr,
    COUNT: gl.constexpr, A_KM: gl.constexpr, B_KN: gl.constexpr, ME: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """`steps` more stages in ascending K; one group stays in flight from each to the next, and after the last."""
    for _ in range(steps):
        sums = start(sums, bars[0], step, False, 4, TYPE, CONSUMERS, STAGES, PIECE, COUNT, A_KM, B_KN, ME)
        sums = wait(sums, 1)
        release(bars[1], step - 1, STAGES)
        step += 1
    return sums, step
