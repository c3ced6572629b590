"""Starting a kernel while the one before it on the stream still ends: programmatic dependent launch, on Hopper.

Such a kernel is brought onto multiprocessors as they fall free, sets itself up, and then waits, before it touches memory, until
everything before it has ended and can be seen. So nothing is reordered; what disappears is the idle time between two kernels,
a microsecond or two, which a decode step pays hundreds of times.

When a kernel releases its successor matters. Small kernels between matrix products do so after their own wait: before it, a chain
of them would let the next product onto the multiprocessors that the last one, still running, leaves free, and it would stay crowded
there. On an H200 a decoder layer of Qwen3-8B took 124.6 us so and takes 119.5 (one sequence of 4,096), 183 and 175 (sixteen).
Norms and rotations do so once their loads are under way, which keeps the compiler from putting a load off until another's values
have been used. `swiglu` leaves the release to its end: released after its loads, the product after it cost a layer of 16,384 tokens
3 %, at once 8 %, and few tokens gained nothing. Matrix kernels release first thing, at their end, or do without all this, as the tuner
finds.

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
    """The same for a kernel whose loads, or whose end, release its successor."""
    if OVERLAP:
        grid_wait()


@jit
def release(OVERLAP: tl.constexpr) -> None:
    """After a small kernel's loads: its successor comes, and no load stands behind arithmetic that waits for another."""
    if OVERLAP:
        grid_release()


@jit
def ready(address: tl.tensor, OVERLAP: tl.constexpr) -> None:
    """`address` is computed before the wait that follows in the program's text.

    The assembler else puts such arithmetic after the wait, as it depends on nothing there, and the first load then starts that
    much later. It moves no wait above a barrier's instruction, here one that an address of 1 would let run.
    """
    if OVERLAP:
        tl.inline_asm_elementwise(
            "{ .reg .pred never; setp.eq.s64 never, $1, 1; @never bar.arrive 1, 32; mov.b32 $0, 0; }", "=r,l", [address],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@jit
def ahead(address: tl.tensor, BYTES: tl.constexpr, OVERLAP: tl.constexpr) -> None:
    """Before a wait: ask for BYTES (a multiple of 16) from `address` (at one) into L2.

    Right also where the kernel before still writes them, because it writes to the same L2; worth it only where it does not.
    """
    if OVERLAP:
        tl.inline_asm_elementwise(
            "{ .reg .pred one; .reg .b32 thread; mov.u32 thread, %tid.x; setp.eq.u32 one, thread, 0;"
            " @one cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r", [address, BYTES], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


def overlaps(device: torch.device) -> bool:
    """Whether kernels on this device may be launched so."""
    return runs_gluon(device)


def overlap(device: torch.device) -> dict[str, bool]:
    """Launch arguments of a Triton kernel that calls one of these first."""
    return {"OVERLAP": True, "launch_pdl": True} if overlaps(device) else {"OVERLAP": False}
