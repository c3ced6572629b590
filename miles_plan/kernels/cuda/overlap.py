"""Starting a kernel while the one before it on the stream still ends: programmatic dependent launch, on Hopper.

Such a kernel is brought onto multiprocessors as they fall free, sets itself up, and then waits, before it touches memory, until
everything before it has ended and can be seen. So nothing is reordered; what disappears is the idle time between two kernels,
a microsecond or two, which a decode step pays hundreds of times.

When a kernel releases its successor matters. Small kernels between matrix products do so after their own wait: before it, a chain
of them would let the next product onto the multiprocessors that the last one, still running, leaves free, and it would stay crowded
there. On an H200 a decoder layer of Qwen3-8B took 124.6 us so and takes 119.5 (one sequence of 4,096), 183 and 175 (sixteen).
`swiglu` leaves the release to its end: released early, the product after it cost a layer of 16,384 tokens 8 %, and few tokens
gained nothing. Matrix kernels release first thing, at their end, or do without all this, as the tuner finds.

Every thread block must wait, also one with no work: a kernel counts as ended when its blocks have, and the next one relies on
that to know that the kernels before have ended too.
"""

from __future__ import annotations

import torch

from .device import runs_gluon
from .toolchain import grid_release, grid_wait, jit, tl


@jit
def begin(OVERLAP: tl.constexpr) -> None:
    """What a kernel launched with `overlap` does first; here, release its successor at once."""
    if OVERLAP:
        grid_release()
        grid_wait()


@jit
def begin_in_turn(OVERLAP: tl.constexpr) -> None:
    """The same for a small kernel before a matrix product: its successor comes once what came before has ended."""
    if OVERLAP:
        grid_wait()
        grid_release()


@jit
def begin_alone(OVERLAP: tl.constexpr) -> None:
    """The same for a kernel whose end releases its successor."""
    if OVERLAP:
        grid_wait()


def overlaps(device: torch.device) -> bool:
    """Whether kernels on this device may be launched so."""
    return runs_gluon(device)


def overlap(device: torch.device) -> dict[str, bool]:
    """Launch arguments of a Triton kernel that calls one of these first."""
    return {"OVERLAP": True, "launch_pdl": True} if overlaps(device) else {"OVERLAP": False}
