"""How decode is launched, and where it adds weights: the order that `attention_kernel` states, read off the layout."""

from __future__ import annotations

import itertools
from functools import reduce

import pytest

from miles_plan.kernels.cuda.attention import _programs, _ring_bytes, _ring_stages
from miles_plan.kernels.cuda.attention_pass import HALF_KEYS, PASS_BYTES, PASS_ROWS, layout_of_scores
from miles_plan.kernels.cuda.attention_work import MOST_STAGES
from miles_plan.kernels.cuda.toolchain import HAVE_GLUON
from miles_plan.kernels.cuda.tuning import SHARED_MEMORY_BYTES

ROWS = (8, 16, 32, 64)


def place(bases: list[list[int]], number: int) -> list[int]:
    """The (half block, row, key) that a register, lane or warp of this number holds: the exclusive or of its bits' bases."""
    taken = [base for bit, base in enumerate(bases) if number >> bit & 1]
    return reduce(lambda a, b: [x ^ y for x, y in zip(a, b, strict=True)], taken, [0, 0, 0])


@pytest.mark.skipif(not HAVE_GLUON, reason="layouts are Gluon's")
@pytest.mark.parametrize(("rows", "warps"), list(itertools.product(ROWS, (4, 8))))
def test_four_lanes_add_a_rows_keys_in_ascending_order(rows: int, warps: int) -> None:
    layout = layout_of_scores(rows, warps)
    assert len(layout.warp_bases) == warps.bit_length() - 1
    added: dict[tuple[int, int, int], list[int]] = {}  # of a block and row, by the key's place among eight
    for warp, lane in itertools.product(range(warps), range(32)):
        of_lane: dict[tuple[int, int, int], list[int]] = {}
        for register in range(2 ** len(layout.reg_bases)):
            parts = (place(layout.reg_bases, register), place(layout.lane_bases, lane), place(layout.warp_bases, warp))
            half, row, key = (parts[0][i] ^ parts[1][i] ^ parts[2][i] for i in range(3))
            of_lane.setdefault((half // 2, row, lane % 4), []).append(half % 2 * HALF_KEYS + key)
        for row_of_lane, keys in of_lane.items():
            assert keys == sorted(keys)
            assert row_of_lane not in added, "two lanes would add the same keys"
            added[row_of_lane] = keys
    assert added == {
        (block, row, lane): [key for key in range(128) if key % 8 // 2 == lane]
        for block, row, lane in itertools.product(range(PASS_ROWS // rows), range(rows), range(4))
    }


@pytest.mark.parametrize(("rows", "d"), list(itertools.product(ROWS, (64, 128, 192))))
def test_the_ring_fits_beside_queries_and_a_pass(rows: int, d: int) -> None:
    """With room for half a block that is multiplied and others that arrive."""
    stages = _ring_stages(rows, d, SHARED_MEMORY_BYTES)
    assert 6 <= stages <= MOST_STAGES
    assert rows * d * 2 + PASS_BYTES + stages * HALF_KEYS * d * 2 < SHARED_MEMORY_BYTES
    assert _ring_stages(rows, d, 0) == 4, "a block's keys and values"


@pytest.mark.parametrize(
    ("programs", "packed", "paged", "chunks", "paged_chunks"),
    [(132, 4, 6, 6, 8), (128, 4, 6, 6, 8), (96, 6, 8, 8, 11), (68, 8, 11, 11, 11)],
)
def test_fewer_thread_blocks_have_more_on_their_way(
    programs: int, packed: int, paged: int, chunks: int, paged_chunks: int
) -> None:
    cases = itertools.product((False, True), (False, True))
    stages = {case: _ring_stages(8, 128, _ring_bytes(*case, programs / 132)) for case in cases}
    assert stages == {(False, False): packed, (True, False): paged, (False, True): chunks, (True, True): paged_chunks}


@pytest.mark.parametrize("items", [1, 64, 128, 132, 133, 140, 256, 512, 1024, 16_384])
def test_thread_blocks_have_as_many_items(items: int) -> None:
    programs = _programs(items, 132)
    turns = -(-items // 132)
    assert programs <= 132
    assert -(-items // programs) == turns, "no more turns than with a block for every multiprocessor"
    assert programs * (turns - 1) < items, "and no fewer blocks"
    assert programs * turns - items < turns, "the last turn is as full as the number of items lets it be"
