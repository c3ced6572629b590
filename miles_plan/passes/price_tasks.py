"""A price for every task: seconds as an interval with its basis. What deadlines, the schedule and the report build on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from miles_plan.catalog.gpus import Cluster
from miles_plan.cost.interval import Interval
from miles_plan.cost.train_time import log_prob_time, train_step_time, workload_of_lengths
from miles_plan.cost.weight_sync import checkpoint_time, offload_time
from miles_plan.ir.graph import Fact, TaskGraph
from miles_plan.ir.tasks import (
    AnyTask,
    Checkpoint,
    DraftStep,
    Evaluate,
    Logprobs,
    Offload,
    Onload,
    Prompts,
    Quantize,
    Reward,
    Rollout,
    Task,
    TimeEstimate,
    TrainStep,
    Values,
    WeightSync,
)
from miles_plan.passes.base import Outcome, Pass, PassContext
from miles_plan.passes.placements import cluster_of_span
from miles_plan.passes.rollout_choices import price_engines
from miles_plan.passes.sync_price import layouts_of, linked_cluster, sync_price
from miles_plan.passes.train_choices import chosen_train, time_options, train_workload
from miles_plan.passes.workload import StepWorkload, step_workload

# The driver's share of one task: submit, collect, journal, as the embedded quickstart shows it (planned against measured).
DRIVER_S = 0.005
# NumPy over flat columns on one core: group sums, ratios, packing.
HOST_TOKENS_PER_S = 2.0e7
# One math verification or exact match in a worker; user rewards are unknown and bounded by their timeout.
BUILTIN_REWARD_S, USER_REWARD_S = 2.0e-5, 1.0e-2
ASSUMED_LENGTH_SPREAD = 2.0  # how much wider a rollout's interval is when the mean length is an assumption


@dataclass(frozen=True)
class PriceTasks(Pass):
    """Give every task its time estimate."""

    name: ClassVar[str] = "price_tasks"
    needs: ClassVar[frozenset[Fact]] = frozenset({"placed", "aligned", "sized", "synced"})
    gives: ClassVar[frozenset[Fact]] = frozenset({"priced"})

    def run(self, graph: TaskGraph, ctx: PassContext) -> Outcome:
        """Every task is priced on its own; how they add up is the schedule's business."""
        prices = _Prices(graph=graph, ctx=ctx, workload=step_workload(ctx))
        return Outcome(graph=graph.with_replaced(*(replace(task, estimate=prices.of(task)) for task in graph.tasks)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prices:
    """Prices tasks of one graph."""

    graph: TaskGraph
    ctx: PassContext
    workload: StepWorkload

    def of(self, task: AnyTask) -> TimeEstimate:
        """The estimate of one task, the driver's share included."""
        for kinds, price in self._table():
            if isinstance(task, kinds):
                return price(task)
        return self._host(self.workload.total_tokens / HOST_TOKENS_PER_S)

    def _table(self) -> tuple[tuple[tuple[type[Task], ...], Callable[[Any], TimeEstimate]], ...]:
        return (
            ((Rollout,), self._rollout),
            ((Evaluate,), self._evaluate),
            ((TrainStep, DraftStep), self._train),
            ((Logprobs, Values), self._forward),
            ((WeightSync, Quantize), self._sync),
            ((Offload, Onload), self._move),
            ((Checkpoint,), self._save),
            ((Reward,), self._reward),
            ((Prompts,), lambda task: self._host(task.prompts_per_step * 1.0e-5)),
        )

    def _host(self, seconds: float) -> TimeEstimate:
        expected_s = round(seconds + DRIVER_S, 6)
        return TimeEstimate(low_s=DRIVER_S / 4, mid_s=expected_s, high_s=4 * expected_s, basis="calibrated")

    def _reward(self, task: Reward) -> TimeEstimate:
        each_s = USER_REWARD_S if ":" in task.reward else BUILTIN_REWARD_S
        return self._host(self.workload.drawn_samples * each_s / task.workers)

    def _rollout(self, task: Rollout) -> TimeEstimate:
        layout = self.graph.group(task.group or "").rollout_layout
        assert layout is not None
        choice = price_engines(self.ctx, self._nodes(task), layout, self.workload, resident_bytes=0.0)
        if isinstance(choice, str):
            raise ValueError(f"the chosen engines do not hold the job: {choice}")
        spread = ASSUMED_LENGTH_SPREAD if self.workload.assumed else 1.0
        return TimeEstimate(
            low_s=round(choice.low_s / spread, 6),
            mid_s=round(choice.rollout_s + DRIVER_S, 6),
            high_s=round(choice.high_s * spread + DRIVER_S, 6),
            basis="simulated" + (", mean length assumed" if self.workload.assumed else ""),
        )

    def _evaluate(self, task: Evaluate) -> TimeEstimate:
        rollout = next(each for each in self.graph.tasks if isinstance(each, Rollout))
        once = self._rollout(rollout)
        basis = "no data: the size of the evaluation set is unknown, a rollout's time stands in"
        return replace(once, low_s=0.0, high_s=4 * once.high_s, basis=basis)

    def _train(self, task: TrainStep | DraftStep) -> TimeEstimate:
        choice = chosen_train(self.graph)
        batch = train_workload(self.ctx, self.workload, choice.tokens_per_gpu)
        if task.loop == "warm_start":
            warm = next(each for each in self.graph.tasks if isinstance(each, Prompts) and each.loop == "warm_start")
            length = self.workload.prompt_tokens + self.workload.lengths.mean_tokens
            batch = workload_of_lengths([length] * warm.prompts_per_step, float(choice.tokens_per_gpu))
        seconds = train_step_time(self.ctx.model, choice.layout, batch, self._nodes(task), time_options(self.ctx, choice))
        share = 1.0 / self.ctx.model.num_layers if isinstance(task, DraftStep) else 1.0  # a draft is about one layer
        return _estimate(seconds, share)

    def _forward(self, task: Logprobs | Values) -> TimeEstimate:
        choice = chosen_train(self.graph)
        batch = train_workload(self.ctx, self.workload, choice.tokens_per_gpu)
        model = self.ctx.model
        if isinstance(task, Logprobs) and task.model == "teacher" and self.ctx.teacher is not None:
            model = self.ctx.teacher
        return _estimate(log_prob_time(model, choice.layout, batch, self._nodes(task), time_options(self.ctx, choice)))

    def _sync(self, task: WeightSync | Quantize) -> TimeEstimate:
        sync = next(each for each in self.graph.tasks if isinstance(each, WeightSync))
        train, rollout = self.graph.group("train"), self.graph.group(sync.group or "")
        assert sync.transport is not None
        cluster = linked_cluster(self.ctx, train, rollout)
        price = sync_price(self.ctx, *layouts_of(train, rollout), sync.transport, sync.bucket_bytes, cluster)
        if isinstance(task, Quantize):  # three passes over the bytes; the sync's own terms say how long
            share = sum(term.value for term in price.terms if term.name == "quantize") / max(price.mid, 1e-12)
            return _estimate(price, share)
        return _estimate(price)

    def _move(self, task: Offload | Onload) -> TimeEstimate:
        if self.graph.group(task.group or "").engine == "torch":  # copies to memory-mapped files, nothing to unmap
            return self._host(task.bytes_per_gpu / self._nodes(task).groups[0].gpu.pcie_bytes_per_s)
        direction: Literal["out", "in"] = "out" if isinstance(task, Offload) else "in"
        return _estimate(offload_time(self._copied_bytes(task), self._nodes(task), direction))

    def _copied_bytes(self, task: Offload | Onload) -> float:
        """Bytes that cross to or from the host: an engine's weights come anew with the sync, and nobody reads an old cache."""
        return 0.0 if self.graph.group(task.group or "").role == "rollout" else float(task.bytes_per_gpu)

    def _nodes(self, task: Task) -> Cluster:
        """The nodes that a task's group is on: their GPUs may differ from those of the rest of the cluster."""
        gpus = self.graph.group(task.group or "").gpus
        return cluster_of_span(self.ctx.cluster, gpus) if gpus else self.ctx.cluster

    def _save(self, task: Checkpoint) -> TimeEstimate:
        return _estimate(checkpoint_time(float(task.total_bytes), self._nodes(task)))


def _estimate(seconds: Interval, share: float = 1.0) -> TimeEstimate:
    return TimeEstimate(
        low_s=round(seconds.low * share, 6),
        mid_s=round(seconds.mid * share + DRIVER_S, 6),
        high_s=round(seconds.high * share + 4 * DRIVER_S, 6),
        basis=seconds.basis,
    )
