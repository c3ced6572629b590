"""A tile in `wgmma`'s layout whose rows are the matrix's columns, stored from registers, sixteen bytes of a row of the matrix at a time.

Eight by eight elements change places within their warp, which leaves them as `whole_rows` finds its own: four lanes hold two elements
each of eight that lie side by side, and exchange them until each has all eight of another group.
"""

from __future__ import annotations

from typing import Any

from .gemm_kernel import inside
from .toolchain import gl, gluon_jit, tl
from .wgmma import THREADS, inline
from .whole_rows import exchanged

PLACES = 9  # of what `columns_assembly` reads beside the pieces


@gluon_jit
def last_piece(col: gl.tensor, N: gl.tensor, PIECE: gl.constexpr, COUNT: gl.constexpr) -> gl.tensor:
    """Where the last of COUNT pieces from column `col` on begins: earlier than where the one before ends, if only so it is `inside`."""
    return min(col + (COUNT - 1) * PIECE, inside(N, N, PIECE))


@gluon_jit
def write_columns(
    pieces: gl.tensor, out: gl.tensor, stride: gl.tensor, row: gl.tensor, col: gl.tensor, M: gl.tensor, N: gl.tensor
) -> None:
    """Write a matrix [M, N] in half precision of which the pieces, side by side, hold 64 rows from `row` on and the columns from `col`
    on, the last piece's from `last_piece` on. In memory a column's elements lie side by side, `stride` elements after those of the
    column before. M, row, stride and the matrix's place are multiples of eight elements."""
    layout: gl.constexpr = pieces[0].type.layout
    rows = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, layout)), 1)
    cols = gl.expand_dims(gl.arange(0, pieces[0].shape[1], gl.SliceLayout(0, layout)), 0)
    rows, cols = gl.broadcast(rows, cols)
    last = last_piece(col, N, pieces[0].shape[1], len(pieces))
    _write(pieces, out.to(gl.int64, bitcast=True), stride, row, col, last, M, N, rows, cols)


@inline
def _write(
    pieces: Any,
    out: Any,
    stride: Any,
    row: Any,
    col: Any,
    last: Any,
    M: Any,
    N: Any,
    rows: Any,
    cols: Any,
    _semantic: Any = None,
) -> None:
    """last: the last piece's first column. rows, cols: of each element its row and column in its piece; see `whole_rows`."""
    values = list(pieces)
    shape, layout = [int(size) for size in values[0].type.shape], values[0].type.layout
    each = values[0].type.numel // THREADS
    scalars = [_semantic.to_tensor(x) for x in (out, stride, row, col, last, M, N)]
    places = [gl.full(shape, x, x.dtype, layout, _semantic=_semantic) for x in scalars] + [rows, cols]
    constraints = ["=&r"] * (each // 2) + ["r"] * (each // 2 * len(values)) + ["l"] * each + ["r"] * (each * (PLACES - 1))
    tl.inline_asm_elementwise(
        columns_assembly(shape[1], len(values)), ",".join(constraints), values + places, dtype=values[0].dtype, is_pure=False,
        pack=each, _semantic=_semantic,
    )  # fmt: skip


def columns_assembly(width: int, pieces: int) -> str:
    """What writes the columns of pieces `width` wide. Of its operands the first width / 4 are results, which nobody reads; the pieces'
    registers follow, two columns in each, of rows r and r + 8 of eight columns, then of the next eight; then the PLACES, each
    width / 2 times: the matrix's address, stride, row, col, last, M, N, and the first of a thread's rows and of its columns."""
    each, results = width // 2, width // 4
    registers = [f"${results + i}" for i in range(results * pieces)]
    out, stride, row, col, last, m, n, in_row, in_col = (f"${results * (1 + pieces) + each * i}" for i in range(PLACES))
    lines = [
        "{ .reg .b32 lane, c, x, y, t, w, bytes, t0, t1, t2, t3, a0, a1, a2, a3, b0, b1, b2, b3; .reg .b64 line, to;",
        ".reg .pred odd, upper, there, ok;",
        f"shr.u32 lane, {in_col}, 1; and.b32 x, lane, 1; setp.ne.u32 odd, x, 0; and.b32 y, lane, 2; setp.ne.u32 upper, y, 0;",
        f"and.b32 t, {in_row}, 7; and.b32 w, {in_row}, 48; add.u32 w, w, {row}; @odd add.u32 w, w, 8;",
        f"setp.lt.s32 there, w, {m}; mul.wide.u32 line, w, 2; add.s64 line, line, {out}; shl.b32 bytes, {stride}, 1;",
    ]
    firsts = [f"add.u32 c, {col}, {8 * first};" for first in range(pieces * width // 8)]  # column of each eight
    firsts[-width // 8 :] = [f"add.u32 c, {last}, {8 * first};" for first in range(width // 8)]
    for pair in range(0, len(firsts), 2):
        whole = pair + 1 < len(firsts)
        four = registers[2 * pair : 2 * pair + 4] if whole else registers[2 * pair :] * 2
        lines += [f"movmatrix.sync.aligned.m8n8.trans.b16 t{i}, {register};" for i, register in enumerate(four)]
        lines += exchanged(["t0", "t1", "t2", "t3"])  # lanes: eight rows, the next eight, and both of the next eight columns
        lines += [
            firsts[pair],
            f"@upper {firsts[pair + 1]}" if whole else "",
            f"add.u32 c, c, t; setp.lt.and.s32 ok, c, {n}, there;",
        ]
        lines += ["mul.wide.s32 to, c, bytes; add.s64 to, to, line;", "" if whole else "@upper setp.ne.u32 ok, 0, 0;"]
        lines.append("@ok st.global.v4.b32 [to], {a0, a1, a2, a3};")
    return " ".join([*lines, *(f"mov.b32 ${i}, 0;" for i in range(results)), "}"])
