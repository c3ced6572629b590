"""The Hopper prefill kernel's row maxima as instructions on the registers of a tile in `wgmma`'s layout.

There a thread holds two rows, of which four registers in turn belong to the first, the first, the second and the second. The
second pass depends on what a warp's values are, which Gluon has no words for.
"""

from __future__ import annotations

from typing import Any

from .toolchain import tl
from .wgmma import THREADS, inline


def _chain(largest: str, registers: list[str]) -> list[str]:
    """Instructions that leave the largest of some registers, taken as integers, in one."""
    return [f"mov.b32 {largest}, {registers[0]};"] + [
        f"max.s32 {largest}, {largest}, {register};" for register in registers[1:]
    ]


@inline
def lane_maxima(s: Any, _semantic: Any = None) -> Any:
    """A tensor of s's shape whose first register of each of a thread's rows holds the largest score of the row in that thread.

    Floats that are not negative are ordered as integers are, of which the multiprocessor compares three in one instruction. A row is
    taken in two halves, because four such chains hide each other's latency. Only a warp in which some row of a thread is all negative
    needs a second pass: those are ordered the other way round.
    """
    each = s.type.numel // THREADS
    rows = [[f"${each + i}" for i in range(each) if i >> 1 & 1 == row] for row in (0, 1)]
    lines = ["{ .reg .pred below; .reg .b32 high0, high1, half0, half1, low0, low1, least;"]
    middle = len(rows[0]) // 2 + 1  # odd numbers: after the first register two more to an instruction
    chains = [
        chain
        for row in (0, 1)
        for chain in (_chain(f"high{row}", rows[row][:middle]), _chain(f"half{row}", rows[row][middle:]))
    ]
    lines += [chain[at] for at in range(middle) for chain in chains if at < len(chain)]
    lines += [f"max.s32 high{row}, high{row}, half{row};" for row in (0, 1)]
    lines += [
        "min.s32 least, high0, high1; setp.lt.s32 below, least, 0;",
        "vote.sync.any.pred below, below, -1; @!below bra DONE;",
    ]
    for row, registers in enumerate(rows):
        lines.append(f"mov.b32 low{row}, {registers[0]};")
        lines += [f"min.u32 low{row}, low{row}, {register};" for register in registers[1:]]
        lines.append(f"setp.lt.s32 below, high{row}, 0; selp.b32 high{row}, low{row}, high{row}, below;")
    lines += ["DONE: mov.b32 $0, high0; mov.b32 $2, high1; }"]
    constraints = ",".join(["=f"] * each + ["f"] * each)  # of the results only two are written, so the others take no register
    return tl.inline_asm_elementwise(
        " ".join(lines), constraints, [s], dtype=tl.float32, is_pure=True, pack=each, _semantic=_semantic
    )
