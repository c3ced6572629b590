from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_plan.backends.training.micro_batches import micro_batches_of_rank, split_micro_batches

LENGTHS = st.lists(st.integers(1, 40), max_size=30)


def test_balanced_and_in_batch_order():
    parts = split_micro_batches(np.array([5, 1, 4, 2, 3, 3]), budget_tokens=9)
    assert [part.tolist() for part in parts] == [[0, 1, 5], [2, 3, 4]]


def test_a_long_sequence_gets_its_own():
    parts = split_micro_batches(np.array([3, 50, 3]), budget_tokens=8)
    assert [part.tolist() for part in parts] == [[0, 2], [1]]


def test_packing_that_balancing_would_break_is_kept():
    # Longest onto the least loaded ends at 11; first-fit-decreasing finds 7 3 | 6 4 | 5 3 2.
    lengths = np.array([7, 6, 5, 4, 3, 3, 2])
    parts = split_micro_batches(lengths, budget_tokens=10)
    assert len(parts) == 3
    assert all(lengths[part].sum() <= 10 for part in parts)


@given(LENGTHS, st.integers(1, 60))
def test_every_sample_once_and_under_the_budget(lengths, budget_tokens):
    lengths = np.array(lengths, dtype=np.int64)
    parts = split_micro_batches(lengths, budget_tokens=budget_tokens)
    members = np.concatenate([*parts, np.zeros(0, dtype=np.int64)])
    assert sorted(members.tolist()) == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or lengths[part].sum() <= budget_tokens
        assert (np.diff(part) > 0).all()


@given(LENGTHS, st.integers(1, 4), st.integers(1, 60))
def test_lockstep_ranks_run_equally_many_and_cover_the_batch(lengths, ranks, budget_tokens):
    lengths = np.array(lengths, dtype=np.int64)
    by_rank = [
        micro_batches_of_rank(lengths, rank=rank, ranks=ranks, budget_tokens=budget_tokens, lockstep=True)
        for rank in range(ranks)
    ]
    assert len({len(parts) for parts in by_rank}) == 1
    members = np.concatenate([part for parts in by_rank for part in parts] + [np.zeros(0, dtype=np.int64)])
    assert sorted(members.tolist()) == list(range(len(lengths)))


def test_bad_budget_and_count():
    with pytest.raises(ValueError, match="at least 1"):
        split_micro_batches(np.array([1]), budget_tokens=0)
    with pytest.raises(ValueError, match="2 can"):
        split_micro_batches(np.array([5, 5]), budget_tokens=5, count=1)
