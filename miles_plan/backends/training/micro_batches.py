"""Which samples share a forward pass: a rank's samples cut into micro-batches under a token budget.

A pure function of the lengths, so ranks that must run the same number of micro-batches (experts or pipeline stages in
lockstep) agree on it without talking.
"""

from __future__ import annotations

import heapq

import numpy as np

from miles_plan.backends.engine import share_of_rank
from miles_plan.data.batch import Array


def split_micro_batches(lengths: Array, *, budget_tokens: int, count: int | None = None) -> list[Array]:
    """Sample indices of each micro-batch, int64, in batch order, none over budget_tokens, balanced by tokens.

    A sequence longer than the budget gets a micro-batch of its own. As few as first-fit-decreasing needs, or exactly `count`,
    the last ones then perhaps empty. ValueError for a budget below 1 or a count that is too small.
    """
    if budget_tokens < 1:
        raise ValueError(f"budget_tokens must be at least 1, got {budget_tokens}")
    lengths = np.asarray(lengths, dtype=np.int64)
    packed = _first_fit_decreasing(lengths, budget_tokens)
    count = len(packed) if count is None else count
    if count < len(packed):
        raise ValueError(f"{count} micro-batches cannot hold the samples under {budget_tokens} tokens; {len(packed)} can")
    balanced = _longest_first(lengths, count)
    fits = all(len(members) == 1 or lengths[members].sum() <= budget_tokens for members in balanced if members)
    chosen = [np.sort(np.asarray(members, dtype=np.int64)) for members in (balanced if fits else packed) if members]
    chosen.sort(key=lambda members: int(members[0]))
    return chosen + [np.zeros(0, dtype=np.int64)] * (count - len(chosen))


def micro_batches_of_rank(lengths: Array, *, rank: int, ranks: int, budget_tokens: int, lockstep: bool) -> list[Array]:
    """The micro-batches of one data-parallel rank's share, as indices into the whole batch.

    In lockstep every rank gets as many as the rank that needs most.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    count = None
    if lockstep:
        shares = (share_of_rank(lengths, rank=each, ranks=ranks) for each in range(ranks))
        count = max(len(_first_fit_decreasing(lengths[share], budget_tokens)) for share in shares)
    own = share_of_rank(lengths, rank=rank, ranks=ranks)
    return [own[members] for members in split_micro_batches(lengths[own], budget_tokens=budget_tokens, count=count)]


def _first_fit_decreasing(lengths: Array, budget_tokens: int) -> list[list[int]]:
    """Few bins under the budget: the longest first, each into the first bin with room."""
    bins: list[list[int]] = []
    room = np.zeros(len(lengths), dtype=np.int64)
    for index in np.argsort(-lengths, kind="stable"):
        open_bins = room[: len(bins)] >= lengths[index]
        target = int(np.argmax(open_bins)) if open_bins.any() else len(bins)
        if target == len(bins):
            bins.append([])
            room[target] = max(budget_tokens, lengths[index])
        bins[target].append(int(index))
        room[target] -= lengths[index]
    return bins


def _longest_first(lengths: Array, count: int) -> list[list[int]]:
    """Even bins: the longest first, each into the least loaded bin (ties: the first)."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for index in np.argsort(-lengths, kind="stable"):
        load, number = heapq.heappop(loads)
        bins[number].append(int(index))
        heapq.heappush(loads, (load + int(lengths[index]), number))
    return bins
