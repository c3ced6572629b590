"""Tokens of several sequences on their way into the paged cache, and the index tensors that take them there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from miles_plan.backends.torch_engine.decoder import PagedBatch
from miles_plan.backends.torch_engine.kv_cache import FILLER_PAGE
from miles_plan.backends.torch_engine.scheduler import FedSequence
from miles_plan.data.batch import Array
from miles_plan.kernels.attention import pack_sequences


@dataclass(frozen=True, slots=True)
class Feed:
    """Tokens of one sequence from position `start` on: those it knows, or some that a draft proposes."""

    sequence: FedSequence
    start: int
    tokens: Sequence[int]


def next_tokens(sequence: FedSequence, count: int) -> Feed:
    """The next tokens that the cache lacks."""
    return Feed(sequence, sequence.num_cached, sequence.tokens[sequence.num_cached : sequence.num_cached + count])


def first_rows(feeds: Sequence[Feed]) -> Array:
    """The packed row at which each feed begins, int64 [B]."""
    counts = np.array([len(feed.tokens) for feed in feeds], dtype=np.int64)
    return np.cumsum(counts) - counts


def paged_batch(feeds: Sequence[Feed], *, page_tokens: int, device: str) -> PagedBatch:
    """All feeds as one batch; each sequence's pages must reach as far as its tokens."""
    counts = np.array([len(feed.tokens) for feed in feeds])
    starts = np.array([feed.start for feed in feeds])
    rows = np.repeat(np.arange(len(feeds)), counts)
    positions = starts[rows] + np.arange(len(rows)) - np.repeat(first_rows(feeds), counts)
    table = _page_table([feed.sequence.pages for feed in feeds], -(-int((starts + counts).max()) // page_tokens))

    def on_device(values: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device)

    return PagedBatch(
        tokens=torch.tensor(list(chain.from_iterable(feed.tokens for feed in feeds)), device=device),
        positions=on_device(positions),
        page=on_device(table[rows, positions // page_tokens]),
        offset=on_device(positions % page_tokens),
        page_table=on_device(table),
        context_tokens=on_device(starts),
        sequences=None if (counts == 1).all() else pack_sequences(counts.tolist(), device=device),
    )


def _page_table(pages: Sequence[Sequence[int]], width: int) -> Array:
    """[B, width] page numbers, padded with the filler page."""
    table = np.full((len(pages), width), FILLER_PAGE, dtype=np.int64)
    lengths = np.array([min(len(row), width) for row in pages])
    table[np.arange(width) < lengths[:, None]] = list(chain.from_iterable(row[:width] for row in pages))
    return table
