"""Where a rank stands in Megatron-core's default order, and which part of the model it holds: pure functions of the layout.

Dense layers: rank = tp + TP x (cp + CP x (dp + DP x pp)). Experts lie over the same ranks of a stage as
etp + ETP x (ep + EP x edp) (megatron.core.parallel_state, order "tp-cp-ep-dp-pp").
"""

from __future__ import annotations

from dataclasses import dataclass

from miles_plan.ir.layout import TrainLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlace:
    """A rank's coordinate on each axis."""

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    expert_dp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChunk:
    """Consecutive layers that one rank runs as one module; with vpp a rank has several. first, last: it embeds, it scores."""

    layers: range
    first: bool
    last: bool


def place_of_rank(layout: TrainLayout, rank: int) -> RankPlace:
    """Coordinates of a world rank. ValueError for a rank outside the world."""
    if not 0 <= rank < layout.world_size:
        raise ValueError(f"rank must lie in [0, {layout.world_size}), got {rank}")
    pp, inside = divmod(rank, layout.tp * layout.cp * layout.dp)
    outer, tp = divmod(inside, layout.tp)
    dp, cp = divmod(outer, layout.cp)
    expert_outer, etp = divmod(inside, layout.etp)
    expert_dp, ep = divmod(expert_outer, layout.ep)
    return RankPlace(tp=tp, cp=cp, dp=dp, pp=pp, etp=etp, ep=ep, expert_dp=expert_dp)


def chunk_layers(layout: TrainLayout, num_layers: int) -> tuple[range, ...]:
    """Layers of each of the pp x vpp chunks in model order: stage_layers, else even with the first chunks taking the rest."""
    chunks = layout.pp * layout.vpp
    counts = layout.stage_layers or tuple(num_layers // chunks + (each < num_layers % chunks) for each in range(chunks))
    first, found = 0, []
    for count in counts:
        found.append(range(first, first + count))
        first += count
    return tuple(found)


def chunks_of_stage(layout: TrainLayout, num_layers: int, pp: int) -> tuple[ModelChunk, ...]:
    """The chunks of one pipeline stage, by virtual stage: chunk v of stage p is number v x pp + p in model order."""
    spans = chunk_layers(layout, num_layers)
    numbers = range(pp, len(spans), layout.pp)
    return tuple(ModelChunk(layers=spans[n], first=n == 0, last=n == len(spans) - 1) for n in numbers)
