"""The ranks of one engine and the groups they form, in Megatron-core's rank order.

A rank's number is tp + TP x (dp + DP x pp). The experts of a stage lie on the same ranks as etp + ETP x (ep + EP x edp), with
etp = tp, so the ep group of a rank holds consecutive data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from miles_plan.backends.training.decoder_config import DecoderConfig
from miles_plan.ir.layout import RolloutLayout, TrainLayout
from miles_plan.kernels.collectives import RankGroup, open_group


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """One rank's groups. `group.rank` is the coordinate, `group.size` the parallel size; a size of 1 talks to nobody.

    expert_dp: the replicas of this rank's experts, over which their gradients are reduced; dp: those of its dense weights.
    """

    rank: int
    world: RankGroup
    tp: RankGroup
    dp: RankGroup
    pp: RankGroup
    ep: RankGroup
    expert_dp: RankGroup

    def close(self) -> None:
        """Close every connection."""
        for group in (self.tp, self.dp, self.pp, self.ep, self.expert_dp, self.world):
            group.close()


def check_train_layout(layout: TrainLayout, config: DecoderConfig) -> None:
    """ValueError listing all that the embedded trainer cannot do with this layout and model, and what it can."""
    problems = list(layout.problems()) or list(_train_problems(layout, config))
    if problems:
        raise ValueError("the embedded trainer cannot take this layout: " + "; ".join(problems))


def check_rollout_layout(layout: RolloutLayout, config: DecoderConfig) -> None:
    """ValueError listing all that the embedded rollout engine cannot do with this layout and model, and what it can."""
    problems = list(layout.problems())
    if not problems:
        problems = [
            f"{name}={getattr(layout, name)} (allowed: 1)" for name in ("pp", "ep", "dp_attention") if getattr(layout, name) > 1
        ]
        problems += _tp_problems(layout.tp, config)
    if problems:
        raise ValueError("the embedded rollout engine cannot take this layout: " + "; ".join(problems))


def open_mesh(
    layout: TrainLayout, rank: int, *, rendezvous: str | None = None, host: str = "127.0.0.1", timeout_s: float = 1800.0
) -> Mesh:
    """Connect rank `rank` of a world of layout.world_size over gloo; every rank calls it with the same layout and rendezvous.

    `rendezvous` is tcp://HOST:PORT, where rank 0 listens, or file:///PATH of a file that does not exist yet, on one
    machine; a world of one rank needs none. `host` is the address that other ranks reach this one at. ValueError for a bad
    rank or rendezvous.
    """
    if not 0 <= rank < layout.world_size:
        raise ValueError(f"rank must lie in [0, {layout.world_size}), got {rank}")
    store = _open_store(rendezvous, rank, layout.world_size, timeout_s) if layout.world_size > 1 else None
    groups = {}
    for name, ranks in groups_of_rank(layout, rank).items():
        key = f"{name}/{ranks[0]}"  # groups of one kind share no rank
        groups[name] = open_group(store, key, ranks, rank, host=host, timeout_s=timeout_s)
    return Mesh(rank=rank, **groups)


def groups_of_rank(layout: TrainLayout, rank: int) -> dict[str, tuple[int, ...]]:
    """The world ranks of each of this rank's groups, in group order; a pure function, for tests and for the planner's map."""
    tp, dp, pp, ep = layout.tp, layout.dp, layout.pp, layout.ep
    stage_ranks = tp * dp
    stage, inside = divmod(rank, stage_ranks)
    own_dp, own_tp = divmod(inside, tp)
    first = stage * stage_ranks
    expert_replica, own_ep = divmod(own_dp, ep)
    return {
        "world": tuple(range(layout.world_size)),
        "tp": tuple(first + own_dp * tp + t for t in range(tp)),
        "dp": tuple(first + d * tp + own_tp for d in range(dp)),
        "pp": tuple(s * stage_ranks + inside for s in range(pp)),
        "ep": tuple(first + (expert_replica * ep + e) * tp + own_tp for e in range(ep)),
        "expert_dp": tuple(first + (r * ep + own_ep) * tp + own_tp for r in range(dp // ep)),
    }


def stage_layers(layout: TrainLayout, num_layers: int) -> tuple[range, ...]:
    """The layers of each pipeline stage: as layout.stage_layers says, else even, the first stages taking what is left over."""
    if layout.stage_layers:
        counts = list(layout.stage_layers)
    else:
        counts = [num_layers // layout.pp + (stage < num_layers % layout.pp) for stage in range(layout.pp)]
    first, stages = 0, []
    for count in counts:
        stages.append(range(first, first + count))
        first += count
    return tuple(stages)


def _train_problems(layout: TrainLayout, config: DecoderConfig) -> Iterator[str]:
    for name in ("vpp", "cp"):
        if getattr(layout, name) > 1:
            yield f"{name}={getattr(layout, name)} (allowed: 1)"
    if layout.sequence_parallel:
        yield "sequence_parallel (allowed: false)"
    yield from _tp_problems(layout.tp, config)
    if layout.pp > config.num_layers:
        yield f"pp={layout.pp} with {config.num_layers} layers"
    if layout.stage_layers and sum(layout.stage_layers) != config.num_layers:
        yield f"stage_layers add up to {sum(layout.stage_layers)}, the model has {config.num_layers} layers"
    if layout.pp > 1 and config.tied_embeddings:
        yield f"pp={layout.pp} with tied embeddings (allowed: 1)"
    if not config.moe_layers:
        if layout.ep > 1:
            yield f"ep={layout.ep} for a model without experts (allowed: 1)"
        return
    if layout.etp != layout.tp:
        yield f"etp={layout.etp} with tp={layout.tp} (allowed: etp = tp)"
    if layout.dp % layout.ep:
        yield f"ep={layout.ep} does not divide dp={layout.dp}"
    if config.num_experts % layout.ep:
        yield f"ep={layout.ep} does not divide {config.num_experts} experts"


def _tp_problems(tp: int, config: DecoderConfig) -> list[str]:
    sizes = {
        "attention heads": config.num_heads,
        "key-value heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
    }
    if config.moe_layers:
        sizes["moe_intermediate_size"] = config.expert_intermediate_size
    return [f"tp={tp} does not divide {name} = {size}" for name, size in sizes.items() if size % tp]


def _open_store(rendezvous: str | None, rank: int, world_size: int, timeout_s: float) -> Store:
    parts = urlsplit(rendezvous or "")
    stores: Any = dist  # the stores are missing from torch's stubs
    if parts.scheme == "tcp" and parts.hostname and parts.port:
        store: Store = stores.TCPStore(parts.hostname, parts.port, world_size, rank == 0, timedelta(seconds=timeout_s))
        return store
    if parts.scheme == "file" and parts.path:
        store = stores.FileStore(str(Path(parts.path)), world_size)
        return store
    raise ValueError(f"rendezvous must be tcp://HOST:PORT or file:///PATH, got {rendezvous!r}")
