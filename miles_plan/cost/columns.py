"""Many train layouts as columns, so that one pass of numpy prices them all; a single layout is a column of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from miles_plan.catalog.architecture import ModelArchitecture
from miles_plan.catalog.mixers import GroupedQuery, MultiLatent
from miles_plan.ir.layout import TrainLayout

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LayoutColumns:
    """Sizes of n layouts that share pp, vpp and the split of layers into chunks; every array has shape [n].

    mtp_layers: prediction layers the last chunk holds besides.
    """

    pp: int
    vpp: int
    stage_layers: tuple[int, ...]
    tp: Floats
    cp: Floats
    dp: Floats
    ep: Floats
    etp: Floats
    sequence_parallel: NDArray[np.bool_]
    mtp_layers: int = 0

    @property
    def expert_dp(self) -> Floats:
        """Replicas of each expert."""
        return self.tp * self.cp * self.dp / (self.ep * self.etp)

    @property
    def sequence_split(self) -> Floats:
        """Ranks that share one token's norms and residuals: tp with sequence parallelism, else 1."""
        return np.where(self.sequence_parallel, self.tp, 1.0)

    def __len__(self) -> int:
        return len(self.tp)


def group_layouts(layouts: Sequence[TrainLayout], mtp_layers: int = 0) -> list[tuple[NDArray[np.intp], LayoutColumns]]:
    """Split layouts by (pp, vpp, stage_layers); each part keeps the positions its rows came from."""
    parts: dict[tuple[int, int, tuple[int, ...]], list[int]] = {}
    for at, layout in enumerate(layouts):
        parts.setdefault((layout.pp, layout.vpp, layout.stage_layers), []).append(at)
    return [(np.array(rows), _columns([layouts[at] for at in rows], mtp_layers)) for rows in parts.values()]


def _columns(layouts: list[TrainLayout], mtp_layers: int) -> LayoutColumns:
    first = layouts[0]
    sizes = np.array([(each.tp, each.cp, each.dp, each.ep, each.etp) for each in layouts], dtype=np.float64).T
    return LayoutColumns(
        first.pp,
        first.vpp,
        first.stage_layers,
        sizes[0],
        sizes[1],
        sizes[2],
        sizes[3],
        sizes[4],
        np.array([each.sequence_parallel for each in layouts]),
        mtp_layers,
    )


@lru_cache(maxsize=65536)
def chunk_layers(
    num_layers: int, pp: int, vpp: int, stage_layers: tuple[int, ...] = (), mtp_layers: int = 0
) -> tuple[int, ...]:
    """Layers of each of pp x vpp chunks in model order, prediction layers apart.

    Even where it divides. Otherwise embedding and head count as a layer each, as Megatron's
    `account_for_embedding_in_pipeline_split` and its loss twin do: the first and the last chunk hold one layer less,
    and what is still missing comes off the later chunks. A prediction layer weighs two on the last chunk, itself and its
    pass through the head, as in Megatron-Bridge's layouts of DeepSeek-V3.

    Raises:
        ValueError: `stage_layers` does not add up, or there are too few layers to fill the chunks.
    """
    chunks = pp * vpp
    if stage_layers:
        if sum(stage_layers) != num_layers:
            raise ValueError(f"stage_layers add up to {sum(stage_layers)}, the model has {num_layers} layers")
        return stage_layers
    if num_layers % chunks == 0 and (not mtp_layers or chunks == 1):
        return (num_layers // chunks,) * chunks
    if num_layers + 2 < chunks:
        raise ValueError(f"{num_layers} layers cannot fill {chunks} pipeline chunks")
    ends = [0] * chunks
    ends[0], ends[-1] = 1, ends[-1] + 1 + 2 * mtp_layers
    most = -(-(num_layers + sum(ends)) // chunks)
    sizes = [max(0, most - end) for end in ends]
    while sum(sizes) > num_layers:
        fullest = max(range(chunks), key=lambda at: (sizes[at] + ends[at] if sizes[at] else -1, at))
        sizes[fullest] -= 1
    return tuple(sizes)


def stage_kinds(model: ModelArchitecture, columns: LayoutColumns) -> Floats:
    """Layers of each kind on each pipeline rank, shape [pp, kinds]; chunk c of rank r is virtual stage c * pp + r."""
    return _stage_kinds(model, columns.pp, columns.vpp, columns.stage_layers, columns.mtp_layers)


@lru_cache(maxsize=4096)
def _stage_kinds(model: ModelArchitecture, pp: int, vpp: int, stage_layers: tuple[int, ...], mtp_layers: int) -> Floats:
    kinds = np.array(model.layer_kinds())
    counts = np.zeros((pp, len(model.kinds)))
    begin = 0
    for chunk, layers in enumerate(chunk_layers(model.num_layers, pp, vpp, stage_layers, mtp_layers)):
        counts[chunk % pp] += np.bincount(kinds[begin : begin + layers], minlength=len(model.kinds))
        begin += layers
    counts[-1] += mtp_layers * mtp_kinds(model)
    counts.setflags(write=False)
    return counts


def mtp_kinds(model: ModelArchitecture) -> Floats:
    """Layers of each kind in one multi-token-prediction block, shape [kinds].

    One of the last kind, or where mixers and feed-forward parts are layers of their own (Nemotron-H), one of each.
    """
    out = np.zeros(len(model.kinds))
    last = model.kinds[model.runs[-1][0]]
    if last.mixer and last.ffn:
        out[model.runs[-1][0]] = 1.0
        return out
    attention = [at for at, kind in enumerate(model.kinds) if isinstance(kind.mixer, GroupedQuery | MultiLatent)]
    feed_forward = [at for at, kind in enumerate(model.kinds) if kind.ffn]
    for at in attention[:1] + feed_forward[:1]:
        out[at] = 1.0
    return out


@lru_cache(maxsize=65536)
def microbatches_in_flight(pp: int, vpp: int, num_microbatches: int) -> Floats:
    """Whole-rank microbatches whose activations a pipeline rank holds at its peak, shape [pp].

    1F1B holds min(m, p - r). Interleaved 1F1B holds min(m v, 2 (p - r - 1) + (v - 1) p + 1) chunk passes, each 1/v of a
    rank's layers (arXiv 2104.04473; the warm-up count of Megatron-core's interleaved schedule).
    """
    rank = np.arange(pp)
    if vpp == 1:
        return np.minimum(num_microbatches, pp - rank).astype(np.float64)
    warm = 2 * (pp - rank - 1) + (vpp - 1) * pp + 1
    return np.asarray(np.minimum(num_microbatches * vpp, warm) / vpp, dtype=np.float64)
