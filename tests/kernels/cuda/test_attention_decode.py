"""Where the decode kernel adds weights: the order of the sum that `attention_kernel` states, read off the layout."""

from __future__ import annotations

import itertools

import pytest

from miles_plan.kernels.cuda.attention_decode import layout_of_sums
from miles_plan.kernels.cuda.toolchain import HAVE_GLUON

pytestmark = pytest.mark.skipif(not HAVE_GLUON, reason="layouts are Gluon's")


def place(bases: list[list[int]], number: int) -> tuple[int, int]:
    """The (key, row) that a register, lane or warp of this number adds: the exclusive or of its bits' bases."""
    key = row = 0
    for bit, base in enumerate(bases):
        if number >> bit & 1:
            key, row = key ^ base[0], row ^ base[1]
    return key, row


@pytest.mark.parametrize(("rows", "warps"), list(itertools.product((8, 16, 32, 64), (4, 8))))
def test_four_lanes_add_a_rows_keys_in_ascending_order(rows: int, warps: int) -> None:
    layout = layout_of_sums(rows, warps)
    assert len(layout.warp_bases) == warps.bit_length() - 1
    added: dict[tuple[int, int], list[int]] = {}  # of a row, by the key's place among eight
    for warp, lane in itertools.product(range(warps), range(32)):
        of_lane: dict[int, list[int]] = {}
        for register in range(2 ** len(layout.reg_bases)):
            parts = (place(layout.reg_bases, register), place(layout.lane_bases, lane), place(layout.warp_bases, warp))
            key, row = (parts[0][i] ^ parts[1][i] ^ parts[2][i] for i in (0, 1))
            of_lane.setdefault(row, []).append(key)
        for row, keys in of_lane.items():
            assert keys == sorted(keys)
            assert added.setdefault((row, lane % 4), keys) == keys  # warps without rows of their own repeat others'
    for row, lane in itertools.product(range(rows), range(4)):
        assert added[row, lane] == [key for key in range(128) if key % 8 // 2 == lane]
