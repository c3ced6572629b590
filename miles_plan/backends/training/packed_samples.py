"""What the trainer's forward eats: some samples of a batch packed into one row of tokens, and where their answers lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from miles_plan.backends.training.decoder_config import DecoderConfig
from miles_plan.data.batch import Array, SampleBatch, ragged_rows
from miles_plan.kernels.attention import PackedSequences, pack_sequences


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
        return torch.from_numpy(values[self.answers].astype(np.float32)).to(self.tokens.device)


def pack_samples(batch: SampleBatch, samples: Array, *, replay_routing: bool, device: str = "cpu") -> PackedSamples:
    """Pack these samples in the order given; each must have a response."""
    start, fed = batch.start[samples], batch.length[samples] - 1
    prompts, responses = batch.prompt_length[samples], batch.response_length[samples]
    token_rows = ragged_rows(start, fed)
    packed_start = np.cumsum(fed, dtype=np.int64) - fed
    replay = None
    if replay_routing:
        assert batch.routing is not None, "replay without a routing record"
        replay = torch.from_numpy(batch.routing[token_rows].astype(np.int64)).to(device)

    def tokens_at(rows: Array) -> Tensor:
        return torch.from_numpy(batch.tokens[rows].astype(np.int64)).to(device)

    return PackedSamples(
        samples=samples,
        sequences=pack_sequences(fed.tolist(), device=device),
        tokens=tokens_at(token_rows),
        predicting=torch.from_numpy(ragged_rows(packed_start + prompts - 1, responses)).to(device),
        targets=tokens_at(ragged_rows(start + prompts, responses)),
        answers=ragged_rows(batch.response_start[samples], responses),
        replay=replay,
    )


def batch_problems(batch: SampleBatch, config: DecoderConfig, *, replay_routing: bool) -> Iterator[str]:
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


def _routing_problems(batch: SampleBatch, config: DecoderConfig) -> Iterator[str]:
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
