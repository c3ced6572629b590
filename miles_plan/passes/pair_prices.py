"""What a trainer and rollout engines cost together, for all rows of a split against all of its engines at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from miles_plan.catalog.gpus import Cluster
from miles_plan.cost.columns import Floats
from miles_plan.cost.weight_sync import offload_time
from miles_plan.ir.layout import RolloutLayout, TrainLayout
from miles_plan.ir.tasks import Transport
from miles_plan.passes.base import PassContext
from miles_plan.passes.pair_memory import pair_memory, residues_bytes
from miles_plan.passes.placements import Split
from miles_plan.passes.rollout_choices import RolloutChoice
from miles_plan.passes.staleness import staleness_of
from miles_plan.passes.sync_price import bucket_size_bytes, price_class, sync_price, transports_between
from miles_plan.passes.train_choices import TrainChoice, passes_per_step
from miles_plan.passes.train_prices import PriceRows, PriceTable, front_rows
from miles_plan.passes.workload import StepWorkload

TRANSPORTS: tuple[Transport, ...] = get_args(Transport)
EMBEDDED_MOVE_S = 0.005  # the driver's share of a move; the embedded engines copy to memory-mapped files


@dataclass(frozen=True, slots=True, kw_only=True)
class PairPrices:
    """Prices of rows x engines, arrays of shape [rows, engines]; step_s is infinite where the two do not fit together.

    transport: position in TRANSPORTS; sleeping: the engines take turns, putting their states away.
    """

    step_s: Floats
    sync_s: Floats
    transport: NDArray[np.intp]
    transition_s: Floats
    headroom_bytes: Floats
    sleeping: NDArray[np.bool_]


def train_part_s(ctx: PassContext, choice: TrainChoice) -> float:
    """Seconds a step spends on the trainer: log-prob passes and the update."""
    return choice.step_s + choice.log_prob_s * passes_per_step(ctx)


def residue_bytes(ctx: PassContext, split: Split, rows: PriceRows) -> float:
    """What any sleeping trainer of the split leaves on a GPU at most: engines are sized beside it, whichever trains."""
    if split.kind == "disaggregate" or not len(rows):
        return 0.0
    return float(residues_bytes(ctx, rows).max())


def open_transports(ctx: PassContext, split: Split) -> tuple[Transport, ...]:
    """Transports that reach and that the spec leaves open; none means that the split cannot serve new weights."""
    reach = transports_between(ctx, split.train.span, split.rollout.span)
    asked = ctx.job.weight_sync.transport
    return reach if asked == "auto" else tuple(each for each in reach if each == asked)


def worth_pairing(
    ctx: PassContext,
    split: Split,
    workload: StepWorkload,
    table: PriceTable,
    engines: Sequence[RolloutChoice],
    *,
    training_only: bool = False,
) -> NDArray[np.intp]:
    """Rows that may be in a pair on the front: those no other row of their class beats in time with its moves and in peak.

    A class is rows whose syncs cost the same and that fit beside the same engines in the same way. Nothing else of a row
    enters a pair's price, so a beaten one stays beaten.
    """
    rows = table.rows
    memory = pair_memory(ctx, split, workload, rows, [each.memory for each in engines], training_only=training_only)
    seconds = rows.step_s + passes_per_step(ctx) * rows.log_prob_s
    if split.kind == "colocate":
        seconds = seconds + np.where(memory.sleeping.any(axis=1), _moves(ctx, split).round_trip_s(rows.static_bytes), 0.0)
    classes: dict[tuple[tuple[int, ...], ...], int] = {}
    transports = open_transports(ctx, split)
    of_layout = [
        classes.setdefault(tuple(price_class(ctx, transport, layout) for transport in transports), len(classes))
        for layout in table.layouts
    ]
    within = np.array(of_layout, dtype=np.intp)[rows.layout]
    beside = np.concatenate([memory.fits, memory.sleeping], axis=1)
    if not (beside == beside[:1]).all():
        together = np.column_stack([within, np.packbits(beside, axis=1)])
        within = np.unique(together, axis=0, return_inverse=True)[1].ravel()
    some = np.flatnonzero(memory.fits.any(axis=1))
    return some[front_rows(seconds[some], rows.peak_bytes[some], within=within[some])]


def pair_prices(
    ctx: PassContext,
    split: Split,
    workload: StepWorkload,
    layouts: Sequence[TrainLayout],
    rows: PriceRows,
    engines: Sequence[RolloutChoice],
    transports: Sequence[Transport],
    *,
    training_only: bool = False,
) -> PairPrices:
    """Price every row with every engine, weights going by the cheapest of `transports` (none: as if they took no time)."""
    memory = pair_memory(ctx, split, workload, rows, [each.memory for each in engines], training_only=training_only)
    train_s = (rows.step_s + passes_per_step(ctx) * rows.log_prob_s)[:, None]
    rollout_s = np.array([each.rollout_s for each in engines])[None]
    sync_s, transport = _syncs(ctx, split, layouts, rows, engines, transports)
    transition_s = np.zeros(memory.fits.shape)
    if split.kind == "colocate":
        moves = _moves(ctx, split)
        there = np.array([moves.engine_s(each) for each in engines])[None]
        transition_s = np.where(memory.sleeping, moves.round_trip_s(rows.static_bytes)[:, None] + there, 0.0)
    if staleness_of(ctx)[1] > 0 and split.kind == "disaggregate":
        step_s = np.maximum(train_s, rollout_s + sync_s)
    else:
        step_s = train_s + rollout_s + sync_s + transition_s
    return PairPrices(
        step_s=np.where(memory.fits, step_s, np.inf),
        sync_s=sync_s,
        transport=transport,
        transition_s=transition_s,
        headroom_bytes=memory.headroom_bytes,
        sleeping=memory.sleeping,
    )


def _syncs(
    ctx: PassContext,
    split: Split,
    layouts: Sequence[TrainLayout],
    rows: PriceRows,
    engines: Sequence[RolloutChoice],
    transports: Sequence[Transport],
) -> tuple[Floats, NDArray[np.intp]]:
    """Seconds of the cheapest sync of each pair and its transport."""
    best = np.full((len(rows), len(engines)), np.inf if transports else 0.0)
    which = np.zeros(best.shape, dtype=np.intp)
    for transport in transports:
        prices = _prices_by(ctx, split, transport, layouts, rows, engines)
        which = np.where(prices < best, TRANSPORTS.index(transport), which)
        best = np.minimum(prices, best)
    return best, which


def _prices_by(
    ctx: PassContext,
    split: Split,
    transport: Transport,
    layouts: Sequence[TrainLayout],
    rows: PriceRows,
    engines: Sequence[RolloutChoice],
) -> Floats:
    """Seconds of each pair's sync by one transport, priced once a class of layouts."""
    used, position = np.unique(rows.layout, return_inverse=True)
    members: dict[tuple[int, ...], list[int]] = {}
    for at, layout in enumerate(used):
        members.setdefault(price_class(ctx, transport, layouts[layout]), []).append(at)
    prices = np.empty((len(used), len(engines)))
    for of_class in members.values():
        for column, engine in enumerate(engines):
            prices[of_class, column] = sync_s(ctx, split, layouts[used[of_class[0]]], engine.layout, transport)
    return np.asarray(prices[position])


def sync_s(ctx: PassContext, split: Split, train: TrainLayout, rollout: RolloutLayout, transport: Transport) -> float:
    """Seconds of one sync of a pair."""
    return sync_price(ctx, train, rollout, transport, bucket_size_bytes(ctx), split.linked).mid


@dataclass(frozen=True, slots=True)
class _Moves:
    """Seconds of moving states between a GPU and its host: fixed for each move, and for each byte out and in."""

    fixed_s: float
    out_s_per_byte: float
    in_s_per_byte: float
    copies_engines: bool

    def round_trip_s(self, size_bytes: Floats) -> Floats:
        """A trainer's states out before the sync, its weights after it, and all in after generation."""
        return 3.0 * self.fixed_s + size_bytes * (self.out_s_per_byte + self.in_s_per_byte)

    def engine_s(self, engine: RolloutChoice) -> float:
        """An engine's weights in for the sync, its cache for generation, both out: mapped and unmapped, copied if embedded."""
        copied = engine.memory.weight_bytes + engine.memory.pool_bytes if self.copies_engines else 0.0
        return 3.0 * self.fixed_s + copied * (self.out_s_per_byte + self.in_s_per_byte)


def _moves(ctx: PassContext, split: Split) -> _Moves:
    cluster = split.train.cluster
    if ctx.job.train.engine == "torch":
        per_byte = 1.0 / cluster.groups[0].gpu.pcie_bytes_per_s
        return _Moves(EMBEDDED_MOVE_S, per_byte, per_byte, copies_engines=True)
    return _Moves(offload_time(0.0, cluster).mid, _s_per_byte(cluster, "out"), _s_per_byte(cluster, "in"), copies_engines=False)


def _s_per_byte(cluster: Cluster, direction: Literal["out", "in"]) -> float:
    much = float(1 << 40)
    return (offload_time(much, cluster, direction).mid - offload_time(0.0, cluster, direction).mid) / much
