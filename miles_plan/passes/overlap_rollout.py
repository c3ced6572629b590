"""How rollout and training overlap: the distance of the weights edge is the whole mechanism.

The sync before rollout i takes the weights that training step i - d left behind. d = 1 is synchronous: generation waits for
the step before it. d = 2 is one step off: rollout i runs while step i - 1 trains. In general samples are d - 1 versions old
when they are trained on, so a staleness bound is a distance, and the executor's dataflow gives the overlap without further
rules. A buffer between the two holds what is ahead; its capacity follows from the bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from miles_plan.diagnostics import Diagnostic
from miles_plan.ir.graph import Fact, TaskGraph
from miles_plan.ir.plan import Decision
from miles_plan.ir.tasks import Buffer, Edge, Quantize, Rollout, WeightSync
from miles_plan.passes.base import Outcome, Pass, PassContext
from miles_plan.passes.staleness import staleness_of


@dataclass(frozen=True)
class OverlapRollout(Pass):
    """Set the weights edge's distance from the schedule's staleness, and put a buffer where samples wait."""

    name: ClassVar[str] = "overlap_rollout"
    needs: ClassVar[frozenset[Fact]] = frozenset({"placed"})

    def run(self, graph: TaskGraph, ctx: PassContext) -> Outcome:
        """Jobs without a rollout have nothing to overlap."""
        if not graph.of_kind(Rollout):
            return Outcome(graph=graph)
        mode, staleness = staleness_of(ctx)
        diagnostics = tuple(_misfits(ctx, staleness))
        decision = Decision(
            field="schedule.mode",
            value=mode if not staleness else f"{mode}, samples at most {staleness} version{'s' if staleness > 1 else ''} old",
            reason=_reason(mode),
            by=self.name,
        )
        if staleness:
            graph = _at_distance(graph, staleness + 1)
        if mode == "asynchronous":
            graph = _with_buffer(graph, ctx, staleness)
        return Outcome(graph=graph, diagnostics=diagnostics, decisions=(decision,))


def _reason(mode: str) -> str:
    return {
        "synchronous": "on-policy: every sample comes from the weights it trains",
        "one_step_off": "rollout i runs while step i - 1 trains; samples are one version old",
        "asynchronous": "generation never waits inside the staleness bound; the buffer holds what is ahead",
    }[mode]


def _at_distance(graph: TaskGraph, distance: int) -> TaskGraph:
    """The weights that a sync (or the quantisation before it) takes come from further back."""
    synced = {task.name for task in graph.of_kind(WeightSync, Quantize)}
    near = [edge for edge in graph.edges if edge.dst in synced and edge.distance == 1]
    return graph.without_edges(near).with_edges(replace(edge, distance=distance) for edge in near)


def _with_buffer(graph: TaskGraph, ctx: PassContext, staleness: int) -> TaskGraph:
    """Samples pass through a buffer on their way from rollout (or filter) to the passes that train on them."""
    source = "filter_groups" if any(task.name == "filter_groups" for task in graph.tasks) else "rollout"
    before = {"reward", "filter_groups", "record_routing", "buffer"}
    moved = [edge for edge in graph.outputs_of(source) if edge.carries == "samples" and edge.dst not in before]
    samples = ctx.job.rollout.prompts_per_step * ctx.job.rollout.samples_per_prompt
    buffer = Buffer(
        name="buffer",
        loop="rl",
        group=graph.task("advantage").group,
        capacity_samples=samples * (staleness + 1),
        max_staleness=staleness,
    )
    edges = [Edge(src=source, dst="buffer", carries="samples"), *(replace(edge, src="buffer") for edge in moved)]
    return graph.without_edges(moved).with_tasks([buffer], edges)


def _misfits(ctx: PassContext, staleness: int) -> Iterator[Diagnostic]:
    if ctx.job.schedule.mode == "one_step_off" and staleness != 1:
        yield ctx.error(
            "MP211",
            f"one step off means one version, max_staleness is {staleness}",
            "schedule.max_staleness",
            help="leave it out, or choose schedule.mode: asynchronous",
        )
