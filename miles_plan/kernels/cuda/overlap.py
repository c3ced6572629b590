"""Starting a kernel while the one before it on the stream still ends: programmatic dependent launch, on Hopper.

Such a kernel is brought onto multiprocessors as they fall free, sets itself up, and then waits, before it touches memory, until
everything before it has ended and can be seen. So nothing is reordered; what disappears is the idle time between two kernels,
a microsecond or two, which a decode step pays hundreds of times. A kernel releases its successor as soon as it runs itself:
the successor cannot take a multiprocessor before every thread block of this one has one.

Every thread block must wait, also one with no work: a kernel counts as ended when its blocks have, and the next one relies on
that to know that the kernels before have ended too.
"""

from __future__ import annotations

import torch

from .device import runs_gluon
from .toolchain import gl, gluon_jit, grid_release, grid_wait, jit, tl


@jit
def begin(OVERLAP: tl.constexpr) -> None:
    """What a kernel launched with `overlap` does first."""
    if OVERLAP:
        grid_release()
        grid_wait()


@gluon_jit
def prefetch_rows(
    matrix: gl.tensor, first: gl.tensor, rows: gl.tensor, stride: gl.tensor, K: gl.tensor, ROWS: gl.constexpr,
    DEPTH: gl.constexpr, WARPS: gl.constexpr,
) -> None:  # fmt: skip
    """Ask for the first DEPTH columns of rows [first, first + ROWS) of a 16-bit matrix [rows, K] to be brought into L2.

    Allowed before `grid_wait` whoever writes the matrix: L2 is where all writes meet, so nothing stale can be read from it.
    Rows begin 16 bytes apart or a multiple of it, which is also what one request covers.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    PARTS: gl.constexpr = max(32 * WARPS // ROWS, 1)
    WIDTH: gl.constexpr = DEPTH // PARTS // 8 * 8
    end = gl.maximum(K // 8 * 8, 8)
    i = gl.arange(0, PARTS * ROWS, layout=layout)
    row = gl.minimum(first + i % ROWS, rows - 1)
    column = (i // ROWS) * WIDTH
    at = matrix + row.to(gl.int64) * stride + gl.minimum(column, end - 8)
    size = gl.maximum(gl.minimum(WIDTH, end - column), 8) * 2
    gl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r", [at, size], dtype=gl.int32, is_pure=False, pack=1
    )


def overlaps(device: torch.device) -> bool:
    """Whether kernels on this device may be launched so."""
    return runs_gluon(device)


def overlap(device: torch.device) -> dict[str, bool]:
    """Launch arguments of a Triton kernel that calls `begin(OVERLAP)` first."""
    return {"OVERLAP": True, "launch_pdl": True} if overlaps(device) else {"OVERLAP": False}
