"""The joint search: placement x trainer x engines x transport, exact within the enumerated space.

The two halves of a step are priced apart, as columns, and then all pairs of them with the sync between. What comes back is the
Pareto front over step time, GPU-hours and memory headroom. Three things keep it quick without changing it: a row is not timed
when a point already found beats even its most optimistic pair; of rows whose syncs cost the same only those that no other
beats in time and in memory are paired; and a sync is priced once a class of layouts that it cannot tell apart. So the front is
that of brute force (tests/passes/test_joint_search.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from miles_plan.catalog.gpus import Cluster
from miles_plan.cost.columns import Floats
from miles_plan.cost.profile import profile_for
from miles_plan.cost.rollout_memory import RolloutMemory
from miles_plan.cost.train_memory import DEVICE_ERROR
from miles_plan.ir.tasks import Transport
from miles_plan.passes.base import PassContext
from miles_plan.passes.layout_space import ANY_SIZES, Sizes
from miles_plan.passes.number_formats import COST_PRECISION
from miles_plan.passes.pair_prices import (
    TRANSPORTS,
    open_transports,
    pair_prices,
    residue_bytes,
    train_part_s,
    worth_pairing,
)
from miles_plan.passes.placements import Split, splits
from miles_plan.passes.rollout_choices import RolloutChoice, fastest_first, sized_engines
from miles_plan.passes.staleness import staleness_of
from miles_plan.passes.train_choices import (
    PASSES_OF_UPDATE,
    TrainChoice,
    TrainSearch,
    passes_per_step,
    size_trainers,
    smallest_of,
    train_search,
    usable_bytes,
)
from miles_plan.passes.train_prices import PassedLayouts, PriceRows, PriceTable, SizedLayouts, front_rows
from miles_plan.passes.workload import StepWorkload

HEADROOM_STEP = DEVICE_ERROR  # of a GPU's memory: what the memory model may be off by


@dataclass(frozen=True, slots=True, kw_only=True)
class JointChoice:
    """One whole answer with its price. sleeping: engines offload while the other runs (colocated only)."""

    split: Split
    train: TrainChoice
    rollout: RolloutChoice
    transport: Transport
    sleeping: bool
    train_s: float
    sync_s: float
    transition_s: float
    step_s: float
    headroom_bytes: float
    headroom_level: int

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of one step, by the GPUs in use."""
        return self.step_s * self.split.num_gpus / 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitBound:
    """What another split's fastest step takes, exactly or at least."""

    split: Split
    step_s: float
    exact: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class JointSearch:
    """front: every point that none beats, fastest first; the first is the choice. of_splits: the fastest point of each split
    among those that were priced to the end; others: every other split, fastest first.

    trainers, sized: what the chosen split's GPUs could do, timed and by bytes alone. left_out: why points were not
    considered, with how many; nearest: the trainer nearest to fitting.
    """

    front: tuple[JointChoice, ...]
    of_splits: tuple[JointChoice, ...]
    others: tuple[SplitBound, ...]
    trainers: TrainSearch | None
    sized: SizedLayouts | None
    left_out: Counter[str]
    nearest: TrainChoice | None
    rows_timed: int
    pairs_priced: int


def search_jointly(
    ctx: PassContext, workload: StepWorkload, *, train_sizes: Sizes = ANY_SIZES, rollout_sizes: Sizes = ANY_SIZES
) -> JointSearch:
    """Price the space and keep its front, the fastest of each split, and what was left out.

    train_sizes, rollout_sizes: sizes that layouts must have, for whoever asks about them.

    Where nothing fits because of a sync or a host, the front is of what fits the training GPUs: `plan_memory` then says of the
    best of it which phase overflows, where, and what the largest part is.
    """
    found = _Search(ctx, workload, train_sizes, rollout_sizes, training_only=False).run()
    return found if found.front else _Search(ctx, workload, train_sizes, rollout_sizes, training_only=True).run()


def without_rollout(trainers: TrainSearch) -> JointSearch:
    """What was found for a job that only trains and does not fit."""
    return JointSearch(
        front=(),
        of_splits=(),
        others=(),
        trainers=trainers,
        sized=None,
        left_out=trainers.left_out,
        nearest=trainers.smallest,
        rows_timed=len(trainers.table.rows),
        pairs_priced=0,
    )


class _Search:
    """What has been found while splits are visited one after another."""

    def __init__(
        self, ctx: PassContext, workload: StepWorkload, train_sizes: Sizes, rollout_sizes: Sizes, *, training_only: bool
    ) -> None:
        self.ctx, self.workload, self.training_only = ctx, workload, training_only
        self.train_sizes, self.rollout_sizes = train_sizes, rollout_sizes
        self.front: list[JointChoice] = []
        self.of_splits: list[JointChoice] = []
        self.trainers: dict[Split, TrainSearch] = {}
        self.bounds: dict[Split, float] = {}  # what the points of a split that were left out take at least
        self.sized: dict[tuple[int, int], SizedLayouts] = {}
        self.left_out: Counter[str] = Counter()
        self.nearest: TrainChoice | None = None
        self.rows_timed = self.pairs_priced = 0

    def run(self) -> JointSearch:
        """Visit every split that the spec leaves open."""
        possible = list(splits(self.ctx))
        reached = [split for split in possible if open_transports(self.ctx, split)]
        self.left_out["no transport that the spec allows reaches the engines"] += len(possible) - len(reached)
        for split in reached or possible:  # where none is reached `sync_weights` says so, of the one that would be best
            self.visit(split)
        return self.result()

    def result(self) -> JointSearch:
        """What has been found so far."""
        self.of_splits.sort(key=_order)
        return JointSearch(
            front=tuple(self.front),
            of_splits=tuple(self.of_splits),
            others=tuple(sorted(self._others(), key=lambda each: each.step_s)),
            trainers=self.trainers.get(self.front[0].split) if self.front else None,
            sized=self._sized(self.front[0].split) if self.front else None,
            left_out=+self.left_out,
            nearest=self.nearest,
            rows_timed=self.rows_timed,
            pairs_priced=self.pairs_priced,
        )

    def _others(self) -> Iterator[SplitBound]:
        """The splits that were not chosen, by their fastest plan or by a bound where a point of the front ruled it out."""
        best = {choice.split: choice.step_s for choice in reversed(self.of_splits)}
        for split in dict.fromkeys((*best, *self.bounds)):
            found_s, bound_s = best.get(split, np.inf), self.bounds.get(split, np.inf)
            if self.front and split != self.front[0].split:
                yield SplitBound(split=split, step_s=min(found_s, bound_s), exact=found_s <= bound_s)

    def visit(self, split: Split) -> None:
        """Price what can still be on the front of one split: bounds first, then engines, then updates, then pairs."""
        ctx, workload = self.ctx, self.workload
        sized = self._sized(split)
        nearest = smallest_of(sized.layouts, sized.smallest)
        if nearest is not None and (self.nearest is None or nearest.peak_bytes < self.nearest.peak_bytes):
            self.nearest = nearest
        self.left_out["peak memory over capacity"] += sized.overflowing
        residue = max((residue_bytes(ctx, split, rows) for _, rows in sized.groups), default=0.0)
        cluster, num_gpus = split.rollout.cluster, split.rollout_gpus
        open_, left_out = sized_engines(ctx, cluster, num_gpus, workload, resident_bytes=residue, sizes=self.rollout_sizes)
        self.left_out += left_out
        if not open_ or not sized.groups:
            return
        floors = [each.floor_s() for each in open_]
        beside = min(least_beside_bytes(split, each.memory) for each in open_)
        passed = sized.passed(lambda rows: self._worth(split, rows, min(floors), beside))
        if not passed.groups:
            return
        train_s = np.concatenate([self._least_train_s(split, rows) for _, rows in passed.groups])
        peaks = np.concatenate([rows.peak_bytes for _, rows in passed.groups])
        corner = front_rows(train_s, peaks)
        engines = fastest_first(
            each.simulated()
            for each, floor_s in zip(open_, floors, strict=True)
            if self._may_win(split, each.memory, floor_s, train_s[corner], peaks[corner])
        )
        if engines:
            self._price(split, passed, engines)

    def _price(self, split: Split, passed: PassedLayouts, engines: tuple[RolloutChoice, ...]) -> None:
        """Put times to what is still worth it and take the best pairs into the front."""
        beside = min(least_beside_bytes(split, each.memory) for each in engines)
        trainers = train_search(passed.updated(lambda rows: self._worth(split, rows, engines[0].rollout_s, beside)))
        self.trainers[split] = trainers
        self.rows_timed += len(trainers.table.rows)
        found = self._best_pairs(split, trainers, engines) if len(trainers.table.rows) else []
        if found:
            self.of_splits.append(found[0])
            self.front = nondominated([*self.front, *found])

    def _sized(self, split: Split) -> SizedLayouts:
        key = (split.train.run.first, split.train_gpus)
        if key not in self.sized:
            self.sized[key] = size_trainers(self.ctx, split.train.cluster, split.train_gpus, self.workload, self.train_sizes)
        return self.sized[key]

    def _may_win(self, split: Split, memory: RolloutMemory, floor_s: float, train_s: Floats, peaks: Floats) -> bool:
        """Whether engines that take at least `floor_s` could be on the front beside any trainers of these times and peaks."""
        levels = headroom_levels(self.ctx, capacity_bytes(split) - peaks - least_beside_bytes(split, memory))
        return not bool(self._beaten(split, self._step_s(split, floor_s, train_s), levels).all())

    def _step_s(self, split: Split, rollout_s: float, train_s: Floats) -> Floats:
        """A step of these halves if nothing came between them."""
        overlapping = staleness_of(self.ctx)[1] > 0 and split.kind == "disaggregate"
        return np.maximum(train_s, rollout_s) if overlapping else train_s + rollout_s

    def _least_train_s(self, split: Split, rows: PriceRows) -> Floats:
        """What the rows' trainers take at least, by the pass that is timed or by their GPUs' rate."""
        floor_s = train_floor_s(self.ctx, split.train.cluster, split.train_gpus, self.workload)
        return np.maximum(floor_s, (PASSES_OF_UPDATE + passes_per_step(self.ctx)) * rows.log_prob_s)

    def _worth(self, split: Split, rows: PriceRows, rollout_s: float, beside_bytes: float) -> NDArray[np.bool_]:
        """Rows that no point found so far beats even at the fastest update there could be, beside the best engines."""
        worth = self._unbeaten(split, self._least_train_s(split, rows), rows, rollout_s, beside_bytes)
        self.left_out["beaten by bound"] += int((~worth).sum())
        return worth

    def _unbeaten(
        self, split: Split, train_s: Floats, rows: PriceRows, rollout_s: float, beside_bytes: float
    ) -> NDArray[np.bool_]:
        """Rows that no point found so far beats, if their trainers took `train_s` and no sync took any time."""
        levels = headroom_levels(self.ctx, capacity_bytes(split) - rows.peak_bytes - beside_bytes)
        return ~self._beaten(split, self._step_s(split, rollout_s, train_s), levels)

    def _beaten(self, split: Split, step_s: Floats, levels: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Which prices the front beats. The fastest of them bounds what else the split could do."""
        beaten = beaten_by(self.front, split.num_gpus, step_s, levels)
        if beaten.any():
            self.bounds[split] = min(self.bounds.get(split, np.inf), float(step_s[beaten].min()))
        return beaten

    def _best_pairs(self, split: Split, trainers: TrainSearch, engines: tuple[RolloutChoice, ...]) -> list[JointChoice]:
        """The split's own front in step time and headroom, fastest first. Its GPU-hours go with its step time."""
        table = trainers.table
        kept = worth_pairing(self.ctx, split, self.workload, table, engines, training_only=self.training_only)
        self.left_out["trainer and engines do not fit together"] += 0 if len(kept) else len(table.rows)
        rows = table.rows.take(kept)
        train_s = rows.step_s + passes_per_step(self.ctx) * rows.log_prob_s
        transports = open_transports(self.ctx, split)
        beside = min(least_beside_bytes(split, each.memory) for each in engines)
        kept = kept[self._unbeaten(split, train_s, rows, engines[0].rollout_s, beside)]
        if len(transports) > 1 and len(kept):
            kept = kept[self._still_open(split, table, kept, engines, transports[0])]
        return self._front_of(split, trainers, kept, engines, transports) if len(kept) else []

    def _still_open(
        self,
        split: Split,
        table: PriceTable,
        kept: NDArray[np.intp],
        engines: tuple[RolloutChoice, ...],
        transport: Transport,
    ) -> NDArray[np.bool_]:
        """Rows that could be on the split's front if their sync took no time, the others' going by `transport`."""
        rows = table.rows.take(kept)
        known = pair_prices(
            self.ctx, split, self.workload, table.layouts, rows, engines, (transport,), training_only=self.training_only
        )
        hoped = pair_prices(self.ctx, split, self.workload, table.layouts, rows, engines, (), training_only=self.training_only)
        levels = headroom_levels(self.ctx, hoped.headroom_bytes)
        best = np.full(levels.max() + 2, np.inf)  # the fastest known with at least so much headroom
        np.minimum.at(best, np.maximum(levels, 0).ravel(), known.step_s.ravel())
        best = np.minimum.accumulate(best[::-1])[::-1]
        return np.asarray((hoped.step_s <= best[np.maximum(levels, 0)]).any(axis=1))

    def _front_of(
        self,
        split: Split,
        trainers: TrainSearch,
        kept: NDArray[np.intp],
        engines: tuple[RolloutChoice, ...],
        transports: tuple[Transport, ...],
    ) -> list[JointChoice]:
        table = trainers.table
        rows = table.rows.take(kept)
        prices = pair_prices(
            self.ctx, split, self.workload, table.layouts, rows, engines, transports, training_only=self.training_only
        )
        self.pairs_priced += prices.step_s.size
        fits = np.isfinite(prices.step_s).ravel()
        flat = np.flatnonzero(fits)
        levels = headroom_levels(self.ctx, prices.headroom_bytes)
        best = flat[front_rows(prices.step_s.ravel()[flat], -levels.ravel()[flat], -prices.headroom_bytes.ravel()[flat])]
        found = []
        for row, column in zip(*np.unravel_index(best, prices.step_s.shape), strict=True):
            train = trainers.choice(int(kept[row]))
            found.append(
                JointChoice(
                    split=split,
                    train=train,
                    rollout=engines[column],
                    transport=TRANSPORTS[prices.transport[row, column]],
                    sleeping=bool(prices.sleeping[row, column]),
                    train_s=train_part_s(self.ctx, train),
                    sync_s=float(prices.sync_s[row, column]),
                    transition_s=float(prices.transition_s[row, column]),
                    step_s=float(prices.step_s[row, column]),
                    headroom_bytes=float(prices.headroom_bytes[row, column]),
                    headroom_level=int(levels[row, column]),
                )
            )
        return found


def headroom_levels(ctx: PassContext, headroom_bytes: Floats) -> NDArray[np.intp]:
    """Headroom in steps that the memory model can tell apart; a finer difference is no reason to be slower."""
    step_bytes = HEADROOM_STEP * min(group.gpu.usable_bytes for group in ctx.cluster.groups)
    return np.floor(np.maximum(headroom_bytes, -1.0) / step_bytes).astype(np.intp)


def capacity_bytes(split: Split) -> int:
    """Memory of a trainer's GPU that a plan may use."""
    return min(usable_bytes(group) for group in split.train.cluster.groups)


def least_beside_bytes(split: Split, engines: RolloutMemory) -> float:
    """What engines hold at least on a trainer's GPU while it trains."""
    return 0.0 if split.kind == "disaggregate" else min(engines.asleep_bytes, engines.awake_bytes.mid)


def _order(choice: JointChoice) -> tuple[float, float, float]:
    return choice.step_s, choice.gpu_hours, -choice.headroom_bytes


def nondominated(points: Iterable[JointChoice]) -> list[JointChoice]:
    """Points that no other is at least as good as in step time, GPU-hours and level of headroom, fastest first."""
    kept: list[JointChoice] = []
    for point in sorted(points, key=_order):  # so whatever is kept is at least as fast
        if not any(o.gpu_hours <= point.gpu_hours and o.headroom_level >= point.headroom_level for o in kept):
            kept.append(point)
    return kept


def beaten_by(points: Sequence[JointChoice], num_gpus: int, step_s: Floats, levels: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Which of n prices on `num_gpus` some point is at least as good as in step time, GPU-hours and level of headroom.

    On one number of GPUs a point beats whatever takes longer than it does and costs more: a threshold in step time.
    """
    if not points:
        return np.zeros(len(step_s), dtype=bool)
    thresholds = np.array([max(point.step_s, point.gpu_hours * 3600.0 / num_gpus) for point in points])
    order = np.argsort(thresholds, kind="stable")
    most = np.maximum.accumulate(np.array([point.headroom_level for point in points])[order])
    slower_than = np.searchsorted(thresholds[order], step_s, side="right")
    return np.asarray((slower_than > 0) & (levels <= most[np.maximum(slower_than, 1) - 1]))


def train_floor_s(ctx: PassContext, cluster: Cluster, num_gpus: int, workload: StepWorkload) -> float:
    """No trainer on `num_gpus` is faster: forward and backward products of the active weights at the profile's best rate.

    Six operations an active weight and token for the update, two for each log-prob pass (arXiv 2001.08361).
    """
    gpu = max((group.gpu for group in cluster.groups), key=lambda each: max(each.flops.values()))
    precision = COST_PRECISION[ctx.job.precision.train]
    rate = gpu.rate(precision) * max(profile_for(gpu).gemm_fraction.values())
    flops = (6.0 + 2.0 * passes_per_step(ctx)) * ctx.model.params_active_nonembedding * workload.total_tokens
    return float(flops / rate / num_gpus)
