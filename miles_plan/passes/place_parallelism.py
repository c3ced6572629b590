"""Placement: which GPUs train and generate, in which layouts, with which recomputation and micro-batches.

The search itself is `joint_search`; this pass turns the spec's fixed choices into checks, runs it, and writes the answer into
the graph with its reasons and the runners-up. When nothing fits it says what is too large and what would help.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar

from miles_plan.ir.graph import Fact, TaskGraph
from miles_plan.ir.group import DeviceGroup, GpuSpan
from miles_plan.ir.plan import Alternative, Decision
from miles_plan.ir.tasks import AnyTask, Logprobs, Rollout, TrainStep, Values
from miles_plan.passes.base import Outcome, Pass, PassContext
from miles_plan.passes.binding_constraint import binding_constraint
from miles_plan.passes.joint_search import JointChoice, JointSearch, SplitBound, search_jointly, without_rollout
from miles_plan.passes.misfits import misfits
from miles_plan.passes.nothing_fits import nothing_fits
from miles_plan.passes.pareto_front import candidates
from miles_plan.passes.rollout_choices import RolloutChoice, asked_engines
from miles_plan.passes.train_choices import TrainChoice, TrainSearch, asked_layout, search_train
from miles_plan.passes.workload import StepWorkload, step_workload

GIB = 1 << 30
ALTERNATIVES_LOOKED_AT = 512  # of the trainers that were not chosen


@dataclass(frozen=True)
class PlaceParallelism(Pass):
    """Give every task a group and every group its GPUs and layout."""

    name: ClassVar[str] = "place_parallelism"
    needs: ClassVar[frozenset[Fact]] = frozenset({"logical"})
    gives: ClassVar[frozenset[Fact]] = frozenset({"placed"})

    def run(self, graph: TaskGraph, ctx: PassContext) -> Outcome:
        """Check what the spec fixes, search what it leaves open, write the answer into the graph."""
        workload = step_workload(ctx)
        generates = any("rollout" in task.roles and "train" not in task.roles for task in graph.tasks)
        if found := tuple(misfits(ctx, workload, generates=generates)):
            return Outcome(graph=graph, diagnostics=found)
        if not generates:
            return self._train_only(graph, ctx, workload)
        search = search_jointly(ctx, workload)
        if not search.front:
            return Outcome(graph=graph, diagnostics=(nothing_fits(ctx, search, generates=True),))
        chosen = search.front[0]
        assert search.sized is not None
        return Outcome(
            graph=_placed(graph, ctx, chosen.train, chosen),
            decisions=tuple(_decisions(ctx, search, workload)),
            candidates=tuple(candidates(search, binding_constraint(ctx, workload, chosen, search.sized))),
        )

    def _train_only(self, graph: TaskGraph, ctx: PassContext, workload: StepWorkload) -> Outcome:
        """A job without a rollout has one group of GPUs."""
        found = search_train(ctx, ctx.cluster, ctx.cluster.num_gpus, workload)
        choices = tuple(islice(found.choices, ALTERNATIVES_LOOKED_AT))
        if not choices:
            return Outcome(graph=graph, diagnostics=(nothing_fits(ctx, without_rollout(found), generates=False),))
        chosen = choices[0]
        decision = Decision(
            field="train.layout",
            value=str(chosen.layout),
            reason=f"fastest of {len(found.table.rows)} that fit",
            by=self.name,
            alternatives=tuple(_train_alternatives(chosen, choices)),
        )
        return Outcome(graph=_placed(graph, ctx, chosen, None), decisions=(decision,))


def _placed(graph: TaskGraph, ctx: PassContext, train: TrainChoice, joint: JointChoice | None) -> TaskGraph:
    """The graph with its groups, every task in one, and the chosen budgets in the tasks that use them."""
    groups = [
        DeviceGroup(name="host", role="host", engine="host"),
        DeviceGroup(
            name="train",
            role="train",
            engine=ctx.job.train.engine,
            gpus=joint.split.train.span if joint else GpuSpan(first=0, count=train.layout.world_size),
            train_layout=train.layout,
        ),
    ]
    rollout = joint.rollout if joint else None
    if joint is not None and rollout is not None:
        first = joint.split.rollout.span.first
        groups.append(
            DeviceGroup(
                name="rollout",
                role="rollout",
                engine=ctx.job.rollout.engine,
                gpus=GpuSpan(first=first, count=rollout.layout.world_size),
                rollout_layout=rollout.layout,
            )
        )
    return replace(graph, groups=tuple(groups), tasks=tuple(_settled(ctx, task, train, rollout) for task in graph.tasks))


def _settled(ctx: PassContext, task: AnyTask, train: TrainChoice, rollout: RolloutChoice | None) -> AnyTask:
    """The task in its group, with the budgets that go with it."""
    group = next(role for role in ("host", "train", "rollout") if role in task.roles)
    if isinstance(task, TrainStep):
        return replace(
            task,
            group=group,
            tokens_per_gpu=train.tokens_per_gpu,
            recompute=train.recompute,
            optimizer_offload=train.optimizer_offload,
            offload_fraction=ctx.job.train.optimizer.offload_fraction,
            gradients=ctx.job.train.gradients,
            release=ctx.job.train.release,
        )
    if isinstance(task, (Logprobs, Values)):
        return replace(task, group=group, tokens_per_gpu=train.tokens_per_gpu)
    if isinstance(task, Rollout) and rollout is not None:
        page, exact = ctx.job.rollout.page_tokens, ctx.job.precision.alignment == "exact"
        return replace(
            task,
            group=group,
            max_running=rollout.max_running,
            kv_pool_tokens=rollout.pool_tokens,
            page_tokens=page if page != "auto" else 64 if exact and ctx.job.rollout.engine == "sglang" else 16,
            static_fraction=0.0 if ctx.job.rollout.engine == "torch" else round(rollout.static_fraction, 3),
        )
    return replace(task, group=group)


def _decisions(ctx: PassContext, search: JointSearch, workload: StepWorkload) -> Iterator[Decision]:
    chosen = search.front[0]
    rollout = chosen.rollout
    yield Decision(
        field="placement",
        value=str(chosen.split),
        reason=_placement_reason(ctx, chosen, search.others),
        by=PlaceParallelism.name,
        alternatives=tuple(
            Alternative(
                value=str(other.split),
                cost=f"{'' if other.exact else 'at least '}{other.step_s:.3g} s/step",
                why_not=f"{other.step_s / max(chosen.step_s, 1e-9):.2f}x the step time" + ("" if other.exact else " or more"),
            )
            for other in search.others[:5]
        ),
    )
    fixed = asked_layout(ctx, chosen.split.train_gpus) is not None
    yield Decision(
        field="train.layout",
        value=f"{chosen.train.layout} on {chosen.split.train_gpus} GPUs",
        reason="the spec fixes it" if fixed else "in the fastest whole step of all that fit",
        by=PlaceParallelism.name,
        alternatives=tuple(_train_alternatives(chosen.train, _fastest(search.trainers))),
    )
    engines_fixed = asked_engines(ctx, chosen.split.rollout_gpus) is not None
    yield Decision(
        field="rollout.layout",
        value=str(rollout.layout),
        reason="the spec fixes it" if engines_fixed else f"{rollout.tokens_per_s:,.0f} tokens/s in all, tail included",
        by=PlaceParallelism.name,
    )
    yield Decision(
        field="train.tokens_per_gpu",
        value=str(chosen.train.tokens_per_gpu),
        reason=f"micro-batches that fit beside the states; the longest sequence has {workload.longest_tokens} tokens",
        by=PlaceParallelism.name,
    )
    yield Decision(
        field="train.recompute",
        value=chosen.train.recompute,
        reason="the spec fixes it" if ctx.job.train.recompute != "auto" else "the cheapest whose peak fits",
        by=PlaceParallelism.name,
    )
    yield Decision(
        field="train.optimizer.offload",
        value="host" if chosen.train.optimizer_offload else "off",
        reason="the spec fixes it" if ctx.job.train.optimizer.offload != "auto" else "faster among those that fit",
        by=PlaceParallelism.name,
    )


def _placement_reason(ctx: PassContext, chosen: JointChoice, others: tuple[SplitBound, ...]) -> str:
    if ctx.job.placement != "auto":
        return "the spec asks for it"
    if not others:
        return "the only placement that fits"
    return f"{chosen.step_s:.3g} s a step, the next best takes {'' if others[0].exact else 'at least '}{others[0].step_s:.3g} s"


def _fastest(trainers: TrainSearch | None) -> tuple[TrainChoice, ...]:
    return tuple(islice(trainers.choices, ALTERNATIVES_LOOKED_AT)) if trainers else ()


def _train_alternatives(chosen: TrainChoice, choices: tuple[TrainChoice, ...]) -> Iterator[Alternative]:
    """The next best layouts that differ from the chosen one in parallel sizes."""
    seen = {chosen.layout}
    base_s = chosen.step_s + chosen.log_prob_s
    for choice in choices:
        if choice.layout in seen:
            continue
        seen.add(choice.layout)
        slower = (choice.step_s + choice.log_prob_s) / max(base_s, 1e-12)
        yield Alternative(
            value=f"{choice.layout}, recompute {choice.recompute}",
            cost=f"{choice.step_s:.3g} s training",
            why_not=f"{slower:.2f}x as long to train" if slower >= 1.0 else "its whole step is slower",
        )
        if len(seen) > 4:
            return
