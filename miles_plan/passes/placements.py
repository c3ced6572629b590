"""Which GPUs train and which generate: every division of the cluster that the spec leaves open.

One engine stays within GPUs of one kind: a cluster of several kinds is runs of neighbouring node groups with the same GPU, and
the trainer and the rollout engines each take one run, or share one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from miles_plan.catalog.gpus import Cluster
from miles_plan.ir.group import GpuSpan
from miles_plan.passes.base import PassContext
from miles_plan.passes.staleness import staleness_of
from miles_plan.spec.execution import SplitPlacement

PlacementKind = Literal["colocate", "disaggregate"]
MAX_HALVINGS = 2  # a colocated job is also priced on a half and on a quarter of the GPUs
MAX_SPLITS = 16  # ways to divide one run of GPUs that are priced; nodes are kept whole where there are several


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Neighbouring nodes with GPUs of one kind; `first` is the number of their first GPU in the whole cluster."""

    first: int
    cluster: Cluster

    @property
    def gpu(self) -> str:
        """The kind of GPU."""
        return self.cluster.groups[0].gpu.name

    @property
    def unit(self) -> int:
        """GPUs that are not divided: a node, or one GPU where there is only one node."""
        return self.cluster.gpus_per_node if self.cluster.num_nodes > 1 else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """GPUs of one side: `count` from the start of a run, or from `offset` GPUs after it."""

    run: Run
    count: int
    offset: int = 0

    @property
    def span(self) -> GpuSpan:
        """The same by the numbers of the whole cluster."""
        return GpuSpan(first=self.run.first + self.offset, count=self.count)

    @property
    def cluster(self) -> Cluster:
        """Nodes that are like this side's."""
        return self.run.cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Which GPUs train and which generate: the same ones in turn, or apart."""

    kind: PlacementKind
    train: Side
    rollout: Side
    idle_gpus: int = 0

    @property
    def train_gpus(self) -> int:
        """GPUs that train."""
        return self.train.count

    @property
    def rollout_gpus(self) -> int:
        """GPUs that generate."""
        return self.rollout.count

    @property
    def num_gpus(self) -> int:
        """GPUs in use."""
        return self.train_gpus if self.kind == "colocate" else self.train_gpus + self.rollout_gpus

    @property
    def linked(self) -> Cluster:
        """The nodes that a weight sync runs over."""
        if self.train.run == self.rollout.run:
            return self.train.cluster
        return Cluster((*self.train.cluster.groups, *self.rollout.cluster.groups))

    def __str__(self) -> str:
        """As people say it."""
        apart = self.train.run != self.rollout.run
        if self.kind == "colocate":
            return f"colocate on {self.train_gpus}" + (f", {self.idle_gpus} idle" if self.idle_gpus else "")
        if apart:
            return f"{self.rollout_gpus} {self.rollout.run.gpu} rollout + {self.train_gpus} {self.train.run.gpu} train"
        return f"{self.rollout_gpus} rollout + {self.train_gpus} train" + (f", {self.idle_gpus} idle" if self.idle_gpus else "")


def runs(cluster: Cluster) -> list[Run]:
    """The cluster's runs of like nodes, in order."""
    found, first = [], 0
    for _, groups in groupby(cluster.groups, key=lambda group: (group.gpu, group.gpus_per_node, group.rdma)):
        part = Cluster(tuple(groups))
        found.append(Run(first=first, cluster=part))
        first += part.num_gpus
    return found


def cluster_of_span(cluster: Cluster, span: GpuSpan) -> Cluster:
    """The nodes that a span of GPUs touches, as a cluster of their groups."""
    touched = [run for run in runs(cluster) if span.overlaps(GpuSpan(first=run.first, count=run.cluster.num_gpus))]
    return Cluster(tuple(group for run in touched for group in run.cluster.groups)) if touched else cluster


def splits(ctx: PassContext) -> Iterator[Split]:
    """The placements that the spec leaves open: together first, then apart, each from most rollout GPUs to fewest."""
    every = runs(ctx.cluster)
    for run in every:
        yield from _together(ctx, run)
    for run in every:
        yield from _apart_in_one(ctx, run)
    for trainers in every:
        for engines in every:
            if trainers is not engines:
                yield from _apart_in_two(ctx, trainers, engines)


def _together(ctx: PassContext, run: Run) -> Iterator[Split]:
    """All of the run, a half and a quarter of it: fewer GPUs may be cheaper. The host's own cores cost nothing idle."""
    asked = ctx.job.placement
    if asked != "colocate" and (asked != "auto" or staleness_of(ctx)[1] > 0):
        return
    count = run.cluster.num_gpus
    rented = run.cluster.groups[0].gpu.vendor != "cpu"
    for _ in range(MAX_HALVINGS + 1):
        side = Side(run=run, count=count)
        yield Split(kind="colocate", train=side, rollout=side, idle_gpus=ctx.cluster.num_gpus - count)
        if not rented or count % 2 or (count // 2) % run.unit:
            return
        count //= 2


def _apart_in_one(ctx: PassContext, run: Run) -> Iterator[Split]:
    """Trainer first, engines after it, together all of the run."""
    num_gpus = run.cluster.num_gpus
    idle = ctx.cluster.num_gpus - num_gpus
    asked = ctx.job.placement
    if isinstance(asked, SplitPlacement):
        sizes = [asked.rollout_gpus] if 0 < asked.rollout_gpus < num_gpus else []
    elif asked in ("auto", "disaggregate"):
        whole = range(run.unit, num_gpus, run.unit)
        stride = max(1, -(-len(whole) // MAX_SPLITS))
        sizes = list(whole[stride - 1 :: stride])
    else:
        sizes = []
    for rollout_gpus in reversed(sizes):
        train = Side(run=run, count=num_gpus - rollout_gpus)
        engines = Side(run=run, count=rollout_gpus, offset=train.count)
        yield Split(kind="disaggregate", train=train, rollout=engines, idle_gpus=idle)


def _apart_in_two(ctx: PassContext, trainers: Run, engines: Run) -> Iterator[Split]:
    """The trainer on one kind of GPU and the engines on another, each on all of its run unless the spec says how many."""
    asked = ctx.job.placement
    if asked == "colocate":
        return
    count = engines.cluster.num_gpus
    if isinstance(asked, SplitPlacement):
        if asked.rollout_gpus > count:
            return
        count = asked.rollout_gpus
    train = Side(run=trainers, count=trainers.cluster.num_gpus)
    idle = ctx.cluster.num_gpus - train.count - count
    yield Split(kind="disaggregate", train=train, rollout=Side(run=engines, count=count), idle_gpus=idle)
