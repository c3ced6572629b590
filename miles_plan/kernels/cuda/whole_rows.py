"""A tile in `wgmma`'s layout stored from registers, sixteen bytes of a row at a time.

The four lanes that hold a row hold two columns of every eight. They exchange pairs until each has eight columns of its own, so no
shared memory, no barrier and no copy engine stand between a finished sum and memory.
"""

from __future__ import annotations

from typing import Any

from .toolchain import gl, gluon_jit, tl
from .wgmma import THREADS, inline


@gluon_jit
def write_rows(
    pieces: gl.tensor, out: gl.tensor, stride: gl.tensor, row: gl.tensor, col: gl.tensor, M: gl.tensor, N: gl.tensor
) -> None:
    """Write pieces in half precision, side by side from (row, col) on, into a matrix [M, N] of their type whose rows are `stride`
    elements apart. N, col, stride and the matrix's place are multiples of eight elements."""
    layout: gl.constexpr = pieces[0].type.layout
    rows = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, layout)), 1)
    cols = gl.expand_dims(gl.arange(0, pieces[0].shape[1], gl.SliceLayout(0, layout)), 0)
    rows, cols = gl.broadcast(row + rows, cols)
    _write(pieces, out.to(gl.int64, bitcast=True), stride, rows, cols, col, M, N)


@inline
def _write(pieces: Any, out: Any, stride: Any, rows: Any, cols: Any, col: Any, M: Any, N: Any, _semantic: Any = None) -> None:
    """rows, cols: of each element its row in the matrix and its column in its piece, of which a thread's first are used. (Of the
    thread's number assembly should not ask: where a kernel has several warp groups, the assembler then gives up its uniform registers.)"""
    values = list(pieces)
    shape, layout = [int(size) for size in values[0].type.shape], values[0].type.layout
    each = values[0].type.numel // THREADS
    scalars = [_semantic.to_tensor(x) for x in (out, stride, col, M, N)]
    places = [gl.full(shape, x, x.dtype, layout, _semantic=_semantic) for x in scalars] + [rows, cols]
    constraints = ["=&r"] * (each // 2) + ["r"] * (each // 2 * len(values)) + ["l"] * each + ["r"] * (each * (len(places) - 1))
    tl.inline_asm_elementwise(
        writing(each, len(values)), ",".join(constraints), values + places, dtype=values[0].dtype, is_pure=False, pack=each,
        _semantic=_semantic,
    )  # fmt: skip


def writing(each: int, pieces: int) -> str:
    """The instructions, of a thread's `each` elements of each piece: results that mean nothing in each / 2 registers, then the pieces,
    two columns in a register (rows r and r + 8 of eight columns, then of the next eight), then, `each` times each, the matrix's
    address, its stride, the first column, M, N, and this thread's row and column."""
    results, count = each // 2, each // 2 * pieces
    at_out, at_stride, at_col, at_m, at_n, at_row, at_lane = (f"${results + count + each * i}" for i in range(7))
    lines = [
        "{ .reg .b32 lane, c, x, y, a0, a1, a2, a3, b0, b1, b2, b3; .reg .b64 line, eight, to;",
        ".reg .pred odd, upper, low, high, ok; ",
        f"shr.u32 lane, {at_lane}, 1; and.b32 x, lane, 1; setp.ne.u32 odd, x, 0; and.b32 y, lane, 2; setp.ne.u32 upper, y, 0;",
        f"setp.lt.s32 low, {at_row}, {at_m}; add.u32 x, {at_row}, 8; setp.lt.s32 high, x, {at_m};",
        f"cvt.s64.s32 line, {at_row}; cvt.s64.s32 eight, {at_stride}; mul.lo.s64 line, line, eight; shl.b64 eight, eight, 4;",
        f"cvt.s64.s32 to, {at_col}; add.s64 line, line, to; shl.b64 line, line, 1; add.s64 line, line, {at_out};",
    ]
    registers = [f"${results + i}" for i in range(count)]
    groups = count // 2  # of eight columns
    for first in range(0, groups - groups % 4, 4):
        for half, there in enumerate(("low", "high")):
            lines += exchanged(registers[2 * first + half : 2 * first + 8 : 2])
            lines += [f"add.u32 c, lane, {first};", _address(at_col), "add.s64 to, to, eight;" if half else ""]
            lines.append(f"setp.lt.and.s32 ok, c, {at_n}, {there}; @ok st.global.v4.b32 [to], {{a0, a1, a2, a3}};")
    if groups % 4:  # two times eight columns: the lanes' four are both rows of one, then of the other
        lines += exchanged(registers[-4:])
        lines += [f"shr.u32 c, lane, 1; add.u32 c, c, {groups - 2};", _address(at_col), "@odd add.s64 to, to, eight;"]
        lines.append("selp.b32 x, 1, 0, high; @!odd selp.b32 x, 1, 0, low; setp.ne.u32 ok, x, 0;")
        lines.append(f"setp.lt.and.s32 ok, c, {at_n}, ok; @ok st.global.v4.b32 [to], {{a0, a1, a2, a3}};")
    return " ".join(lines + [f"mov.b32 ${i}, 0;" for i in range(results)] + ["}"])


def _address(at_col: str) -> str:
    """Of group c of eight columns, in `to`; c becomes its first column."""
    return f"shl.b32 c, c, 3; mul.wide.u32 to, c, 2; add.s64 to, to, line; add.u32 c, c, {at_col};"


def exchanged(of: list[str]) -> list[str]:
    """Of four registers of each of four lanes, lane q gets the q-th of all four lanes, as a0 to a3."""
    return [
        f"selp.b32 x, {of[0]}, {of[1]}, odd; selp.b32 y, {of[2]}, {of[3]}, odd;",
        "shfl.sync.bfly.b32 x, x, 1, 31, -1; shfl.sync.bfly.b32 y, y, 1, 31, -1;",
        f"selp.b32 b0, x, {of[0]}, odd; selp.b32 b1, {of[1]}, x, odd; selp.b32 b2, y, {of[2]}, odd; selp.b32 b3, {of[3]}, y, odd;",
        "selp.b32 x, b0, b2, upper; selp.b32 y, b1, b3, upper;",
        "shfl.sync.bfly.b32 x, x, 2, 31, -1; shfl.sync.bfly.b32 y, y, 2, 31, -1;",
        "selp.b32 a0, x, b0, upper; selp.b32 a1, y, b1, upper; selp.b32 a2, b2, x, upper; selp.b32 a3, b3, y, upper;",
    ]
