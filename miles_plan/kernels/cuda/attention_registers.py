"""Parts of the Hopper prefill kernel's softmax as instructions on the registers of a tile in `wgmma`'s layout.

There a thread holds two rows, of which four registers in turn belong to the first, the first, the second and the second. Both functions
branch on what a warp's values are, which Gluon has no words for.
"""

from __future__ import annotations

from typing import Any

from .toolchain import gl, tl
from .wgmma import THREADS, in_place, inline


@inline
def rescaled(acc: Any, alpha: Any, _semantic: Any = None) -> Any:
    """acc * alpha[:, None], where a warp whose factors are all one leaves its rows as they are."""
    alpha = gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout), _semantic=_semantic)
    factors, _ = gl.broadcast(gl.expand_dims(alpha, 1, _semantic=_semantic), acc, _semantic=_semantic)
    each = acc.type.numel // THREADS
    first, second = each, each + 2
    lines = [
        "{ .reg .pred one;",
        f"setp.eq.f32 one, ${first}, 0f3F800000; setp.eq.and.f32 one, ${second}, 0f3F800000, one;",
        "vote.sync.all.pred one, one, -1; @one bra DONE;",
        *(f"mul.f32 ${i}, ${i}, ${second if i & 2 else first};" for i in range(each)),
        "DONE: }",
    ]
    # The factors' operands follow those that tie the results to acc: $each is the first of them.
    return in_place(" ".join(lines), [acc], [factors], ["f"] * each, _semantic)[0]


@inline
def lane_maxima(s: Any, _semantic: Any = None) -> Any:
    """A tensor of s's shape whose first register of each of a thread's rows holds the largest score of the row in that thread.

    Floats that are not negative are ordered as integers are, of which the multiprocessor compares three in one instruction. Only
    a warp in which some row of a thread is all negative needs a second pass: those are ordered the other way round.
    """
    each = s.type.numel // THREADS
    rows = [[f"${each + i}" for i in range(each) if i >> 1 & 1 == row] for row in (0, 1)]
    lines = ["{ .reg .pred below; .reg .b32 high0, high1, low0, low1, least;"]
    for row, registers in enumerate(rows):
        lines.append(f"mov.b32 high{row}, {registers[0]};")
        lines += [f"max.s32 high{row}, high{row}, {register};" for register in registers[1:]]
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
