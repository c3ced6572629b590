"""A micro-batch as Megatron's layers eat it: packed sequences padded to what the layout divides, and a context-parallel share.

With cp > 1 a rank holds the chunks i and 2 cp - 1 - i of every sequence, which balances causal attention
(Transformer Engine's packed "thd" format); sequences are padded to a multiple of 2 cp, and what tensor parallel ranks then
split further is filled up by one more sequence of padding. Padding is never predicted and never counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from miles_plan.backends.training.packed_samples import PackedSamples
from miles_plan.data.batch import Array


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class FedTokens:
    """One rank's tokens of a micro-batch, [m] of them.

    tokens: int64 [m]; source: int64 [m], each token's row in the unpadded micro-batch, -1 for padding; cumulative_lengths:
    int32 [sequences + 1], over all context-parallel ranks, padding included; longest: tokens of the longest sequence;
    predicting: int64 [p], rows of this rank whose hidden states predict a response token; predicted: int64 [p], which of the
    r response tokens of the micro-batch.
    """

    tokens: Tensor
    source: Tensor
    cumulative_lengths: Tensor
    longest: int
    predicting: Tensor
    predicted: Tensor


def feed(part: PackedSamples, *, multiple: int, cp: int = 1, cp_rank: int = 0, at_least: int = 0) -> FedTokens:
    """Lay out one micro-batch. multiple: what a rank's count of tokens must be divisible by (tp with sequence parallelism);
    at_least: tokens over all context-parallel ranks to fill up to, a count that `padded_tokens` gave."""
    lengths = np.asarray(part.sequences.lengths, dtype=np.int64)
    padded = _padded_lengths(lengths, cp)
    if rest := max(at_least, padded_tokens(part, multiple=multiple, cp=cp)) - int(padded.sum()):
        padded = np.append(padded, rest)
        lengths = np.append(lengths, 0)
    starts = np.cumsum(lengths) - lengths
    rows = [_rows_of_rank(start, real, whole, cp, cp_rank) for start, real, whole in zip(starts, lengths, padded, strict=True)]
    source = np.concatenate(rows)
    device = part.tokens.device
    own = torch.from_numpy(source).to(device)
    tokens = torch.where(own >= 0, part.tokens[own.clamp(min=0)], 0)
    predicting, predicted = _predicting(part, source)
    return FedTokens(
        tokens=tokens,
        source=own,
        cumulative_lengths=torch.from_numpy(np.concatenate([[0], np.cumsum(padded)]).astype(np.int32)).to(device),
        longest=int(padded.max()),
        predicting=torch.from_numpy(predicting).to(device),
        predicted=torch.from_numpy(predicted).to(device),
    )


def padded_tokens(part: PackedSamples, *, multiple: int, cp: int = 1) -> int:
    """Tokens of a micro-batch over all context-parallel ranks, padding included."""
    total = int(_padded_lengths(np.asarray(part.sequences.lengths, dtype=np.int64), cp).sum())
    step = int(np.lcm(2 * cp if cp > 1 else 1, cp * multiple))
    return -(-total // step) * step


def _padded_lengths(lengths: Array, cp: int) -> Array:
    step = 2 * cp if cp > 1 else 1
    padded: Array = -(-lengths // step) * step
    return padded


def _rows_of_rank(start: int, real: int, whole: int, cp: int, cp_rank: int) -> Array:
    """Rows of the micro-batch that a rank holds of one sequence of `real` tokens padded to `whole`; -1 for padding."""
    rows = np.where(np.arange(whole) < real, start + np.arange(whole), -1)
    if cp == 1:
        return rows
    chunk = whole // (2 * cp)
    last = 2 * cp - 1 - cp_rank
    return np.concatenate([rows[cp_rank * chunk : (cp_rank + 1) * chunk], rows[last * chunk : (last + 1) * chunk]])


def _predicting(part: PackedSamples, source: Array) -> tuple[Array, Array]:
    """Where on this rank the predicting rows lie, and which response tokens they predict."""
    place = np.full(int(max(source.max(initial=-1), -1)) + 1, -1, dtype=np.int64)
    place[source[source >= 0]] = np.flatnonzero(source >= 0)
    wanted = part.predicting.cpu().numpy()
    inside = wanted < len(place)
    found = np.where(inside, place[np.where(inside, wanted, 0)] if len(place) else -1, -1)
    predicted = np.flatnonzero(found >= 0)
    return found[predicted], predicted
