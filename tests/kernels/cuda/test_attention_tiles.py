"""The order of prefill's work items: the arithmetic of the producer warp, as Python computes it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_plan.kernels.cuda.attention_tiles import head_and_tile, heads_at_once, slots_before
from miles_plan.kernels.cuda.toolchain import HAVE_GLUON

pytestmark = pytest.mark.skipif(not HAVE_GLUON, reason="without Gluon the functions cannot be called")

lengths = st.lists(st.integers(0, 700), min_size=1, max_size=9)


def items(lens: Sequence[int], heads: int, tokens: int, l2_keys: int) -> Iterator[tuple[int, int, int]]:
    """(sequence, head, tile) of the work items in the order in which programs take them, less places without tokens."""
    starts = [0, *itertools.accumulate(lens)]
    slots = [slots_before.fn(start, seq, tokens) for seq, start in enumerate(starts)]
    for item in range((starts[-1] // tokens + len(lens)) * heads):
        seq = max(seq for seq in range(len(lens)) if slots[seq] * heads <= item)
        width = heads_at_once.fn(lens[seq], heads, l2_keys)
        head, tile = head_and_tile.fn(item - slots[seq] * heads, slots[seq + 1] - slots[seq], heads, width)
        if tile * tokens < lens[seq]:
            yield seq, head, tile


@given(lens=lengths, heads=st.integers(1, 9), tokens=st.sampled_from((2, 24, 32, 128)), l2_keys=st.integers(1, 4000))
def test_every_tile_of_every_head_is_taken_once(lens: list[int], heads: int, tokens: int, l2_keys: int) -> None:
    taken = list(items(lens, heads, tokens, l2_keys))
    wanted = {(seq, head, tile) for seq, n in enumerate(lens) for head in range(heads) for tile in range(-(-n // tokens))}
    assert len(taken) == len(wanted)
    assert set(taken) == wanted


@given(lens=lengths, heads=st.integers(1, 9), l2_keys=st.integers(1, 4000))
def test_heads_come_in_sections_that_fit_and_long_tiles_first(lens: list[int], heads: int, l2_keys: int) -> None:
    for seq, group in itertools.groupby(items(lens, heads, 32, l2_keys), key=lambda item: item[0]):
        width = heads_at_once.fn(lens[seq], heads, l2_keys)
        assert width == 1 or width * lens[seq] <= l2_keys
        taken = [(head // width, -tile, head) for _, head, tile in group]
        assert taken == sorted(taken)


def test_heads_of_a_known_model() -> None:
    keys_that_fit = 16 * 2**20 // (2 * 128 * 2)
    assert [heads_at_once.fn(n, 8, keys_that_fit) for n in (0, 4096, 8192, 16384, 32768, 131072)] == [8, 8, 4, 2, 1, 1]
    assert heads_at_once.fn(10_000, 8, keys_that_fit) == 3  # three sections: 3, 3, 2
