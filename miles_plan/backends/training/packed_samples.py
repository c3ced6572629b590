"""What the trainer's forward eats: some samples of a batch packed into one row of tokens, and where their answers lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from miles_plan.data.batch import Array, SampleBatch, ragged_rows
from miles_plan.kernels.attention import PackedSequences, pack_sequences


class TokenModel(Protocol):
    """What of a model decides which batches it can take; a `DecoderConfig` is one."""

    @property
    def max_positions(self) -> int:
        """The longest sequence."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        ...

    @property
    def moe_layers(self) -> Sequence[int]:
        """Layers with experts: the columns of a routing record."""
        ...

    @property
    def num_experts(self) -> int:
        """Experts of a layer."""
        ...

    @property
    def experts_per_token(self) -> int:
        """Slots of a routing record."""
        ...


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PackedSamples:
    """The n samples of a micro-batch: M tokens fed, r response tokens predicted.

    samples: int64 [n], into the batch; tokens: int64 [M], all but each sequence's last; predicting: int64 [r], the packed rows
    whose hidden states predict a response token; targets: int64 [r], those tokens; answers: int64 [r], their places in the
    batch's flat per-response-token columns; replay: int64 [M, MoE layers of the model, top_k], or None.
    """

    samples: Array
    sequences: PackedSequences
    tokens: Tensor
    predicting: Tensor
    targets: Tensor
    answers: Array
    replay: Tensor | None

    def column(self, values: Array) -> Tensor:
        """This micro-batch's part of a per-response-token column, float32 [r]."""
        return on_device(values[self.answers].astype(np.float32), self.tokens.device)


def pack_samples(
    batch: SampleBatch, samples: Array, *, replay_routing: bool, device: str = "cpu", buckets: bool = True
) -> PackedSamples:
    """Pack these samples in the order given; each must have a response. buckets: with what only our own attention reads."""
    start, fed = batch.start[samples], batch.length[samples] - 1
    prompts, responses = batch.prompt_length[samples], batch.response_length[samples]
    token_rows = ragged_rows(start, fed)
    packed_start = np.cumsum(fed, dtype=np.int64) - fed
    replay = None
    if replay_routing:
        assert batch.routing is not None, "replay without a routing record"
        replay = on_device(batch.routing[token_rows].astype(np.int64), device)

    def tokens_at(rows: Array) -> Tensor:
        return on_device(batch.tokens[rows].astype(np.int64), device)

    return PackedSamples(
        samples=samples,
        sequences=pack_sequences(fed.tolist(), device=device) if buckets else _without_buckets(fed, device),
        tokens=tokens_at(token_rows),
        predicting=on_device(ragged_rows(packed_start + prompts - 1, responses), device),
        targets=tokens_at(ragged_rows(start + prompts, responses)),
        answers=ragged_rows(batch.response_start[samples], responses),
        replay=replay,
    )


def _without_buckets(lengths: Array, device: str) -> PackedSequences:
    positions = ragged_rows(np.zeros_like(lengths, dtype=np.int64), lengths)
    return PackedSequences(tuple(lengths.tolist()), on_device(positions, device), ())


def on_device(values: Array, device: torch.device | str) -> Tensor:
    """The values as a tensor. On a GPU they arrive in the order of its work, and the host does not wait for them."""
    tensor = torch.from_numpy(values)
    if torch.device(device).type != "cuda" or not values.size:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def predicting_nothing(part: PackedSamples) -> PackedSamples:
    """The same tokens, of which none predicts: what a rank runs when only the others have samples left."""
    return replace(
        part,
        samples=part.samples[:0],
        predicting=part.predicting[:0],
        targets=part.targets[:0],
        answers=part.answers[:0],
    )


def batch_problems(batch: SampleBatch, config: TokenModel, *, replay_routing: bool) -> Iterator[str]:
    """What keeps the model from taking this batch: lengths, token ids, routing record."""
    problems = batch.problems()
    yield from problems
    if problems or not batch.num_samples:
        return
    if int(batch.length.max()) - 1 > config.max_positions:
        yield f"a sequence of {int(batch.length.max())} tokens is beyond the model's {config.max_positions} positions"
    low, high = int(batch.tokens.min()), int(batch.tokens.max())
    if low < 0 or high >= config.vocab_size:
        yield f"token ids {low}..{high} are outside the vocabulary of {config.vocab_size}"
    if replay_routing:
        yield from _routing_problems(batch, config)


def _routing_problems(batch: SampleBatch, config: TokenModel) -> Iterator[str]:
    if not config.moe_layers:
        yield "routing replay for a model without experts"
    elif batch.routing is None:
        yield "routing replay without a routing record"
    elif batch.routing.shape[1:] != (len(config.moe_layers), config.experts_per_token):
        yield (
            f"the routing record has {list(batch.routing.shape[1:])} layers and slots, "
            f"the model {[len(config.moe_layers), config.experts_per_token]}"
        )
    elif int(batch.routing.max()) >= config.num_experts:
        yield f"the routing record names expert {int(batch.routing.max())}, the model has {config.num_experts}"
