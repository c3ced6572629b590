"""A rank's micro-batches under a token budget, as many as Megatron's schedules and expert exchange need on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from miles_plan.backends.engine import RankLogProbs
from miles_plan.backends.megatron_engine.fed_tokens import FedTokens, feed, padded_tokens
from miles_plan.backends.megatron_engine.options import MegatronEngineOptions
from miles_plan.backends.megatron_engine.ranks import RankPlace
from miles_plan.backends.training.micro_batches import micro_batches_of_rank
from miles_plan.backends.training.packed_samples import PackedSamples, pack_samples, predicting_nothing
from miles_plan.data.batch import SampleBatch
from miles_plan.ir.layout import TrainLayout

FP8_TOKENS = 16  # FP8 GEMMs want token counts that are multiples of it


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """packed: the samples; fed: this rank's tokens of them. replay int64 [m, MoE layers, k] and counted bool [m]: the experts
    recorded for the tokens that this rank routes, and which of these tokens are no padding; replay is None without a record."""

    packed: PackedSamples
    fed: FedTokens
    replay: Tensor | None
    counted: Tensor


def micro_batches(
    batch: SampleBatch, options: MegatronEngineOptions, place: RankPlace, *, replay_routing: bool
) -> list[MicroBatch]:
    """Samples with a response, shared out by tokens. Ranks that exchange tokens or interleave get equally many, filled up with
    micro-batches that run a short sample and predict nothing; with interleaved stages all are equally long. None at all for a
    batch without a response."""
    layout = options.layout
    answered = np.flatnonzero(batch.response_length > 0)
    if not len(answered):
        return []
    shares = micro_batches_of_rank(
        batch.length[answered] - 1,
        rank=place.dp,
        ranks=layout.dp,
        budget_tokens=options.micro_batch_tokens,
        lockstep=layout.ep * layout.etp > 1 or layout.vpp > 1,
    )
    rounds = layout.pp if layout.vpp > 1 else 1
    count = max(1, -(-len(shares) // rounds) * rounds)
    shares += [np.zeros(0, dtype=np.int64)] * (count - len(shares))
    shortest = answered[[int(np.argmin(batch.length[answered]))]]
    packed = []
    for share in shares:
        samples = answered[share] if len(share) else shortest
        part = pack_samples(batch, samples, replay_routing=replay_routing, device=options.device)
        packed.append(part if len(share) else predicting_nothing(part))
    multiple = (layout.tp if layout.sequence_parallel else 1) * (FP8_TOKENS if options.fp8 else 1)
    longest = max(padded_tokens(part, multiple=multiple, cp=layout.cp) for part in packed) if layout.vpp > 1 else 0
    feds = [feed(part, multiple=multiple, cp=layout.cp, cp_rank=place.cp, at_least=longest) for part in packed]
    return [_micro_batch(part, fed, layout, place) for part, fed in zip(packed, feds, strict=True)]


def empty_batch_result() -> RankLogProbs:
    """What a rank says of a batch without a response."""
    nothing = np.zeros(0, dtype=np.float32)
    return RankLogProbs(sample_index=np.zeros(0, dtype=np.int64), log_probs=nothing, entropy=nothing)


def _micro_batch(part: PackedSamples, fed: FedTokens, layout: TrainLayout, place: RankPlace) -> MicroBatch:
    source = fed.source.chunk(layout.tp)[place.tp] if layout.sequence_parallel else fed.source
    real = source >= 0
    counted = real if len(part.samples) else torch.zeros_like(real)  # what fills up was routed before, in its own place
    return MicroBatch(part, fed, None if part.replay is None else part.replay[source.clamp(min=0)], counted)
