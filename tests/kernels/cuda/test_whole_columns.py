"""A tile that is written transposed reaches memory whole and in its places; `test_whole_rows` for those."""

from __future__ import annotations

import pytest

from miles_plan.kernels.cuda.whole_columns import columns_assembly

from .test_whole_rows import LANES, carried_out


@pytest.mark.parametrize(
    ("piece", "count", "tokens", "weights", "row", "col"),
    [
        (16, 5, 200, 4096, 128, 80), (16, 5, 72, 4096, 128, 0), (32, 3, 190, 4096, 144, 94), (64, 2, 100, 4096, 64, 0),
        (8, 9, 70, 4096, 64, 0), (8, 10, 90, 4096, 64, 0), (16, 9, 200, 40, 32, 56), (16, 3, 10, 4096, 64, 0),
    ],
)  # fmt: skip
def test_a_warps_columns_reach_memory_whole(piece: int, count: int, tokens: int, weights: int, row: int, col: int) -> None:
    stride, base = weights + 8, 1 << 33
    last = min(col + (count - 1) * piece, max(tokens - piece, 0))  # its tokens may be some of the piece before
    token_of = [col + i for i in range((count - 1) * piece)] + [last + i for i in range(piece)]

    def element(in_row: int, in_col: int) -> int:
        return (row + in_row) * 131 + token_of[in_col] * 7 & 0xFFFF

    each = piece // 2
    results, pairs = each // 2, each // 2 * count
    first = [(row // 16 % 4 * 16 + lane // 4, lane % 4 * 2) for lane in LANES]
    row -= row // 16 % 4 * 16  # of the warp group, of which this is one warp
    operands = {}
    for i in range(pairs):  # `wgmma`'s layout
        at = [(r + 8 * (i % 2), c + i // 2 * 8) for r, c in first]
        operands[f"${results + i}"] = [element(r, c) | element(r, c + 1) << 16 for r, c in at]
    scalars = [[size] * 32 for size in (base, stride, row, col, last, weights, tokens)]
    own = [[r for r, _ in first], [c for _, c in first]]
    operands |= {f"${results + pairs + each * i}": values for i, values in enumerate(scalars + own)}
    written = carried_out(columns_assembly(piece, count), operands)
    rows = range(first[0][0], first[0][0] + 16, 2)
    assert written == {
        base + 2 * (token_of[c] * stride + row + r): element(r, c) | element(r + 1, c) << 16
        for r in rows
        for c in range(piece * count)
        if row + r < weights and token_of[c] < tokens
    }
