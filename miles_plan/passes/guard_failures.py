"""Deadlines and restart classes: what happens to each task when it fails, or does not come back in time.

A deadline is a multiple of the estimate's upper end, never under a floor that covers process starts and compilation. Restart
classes, mildest first: retry (the task changed nothing outside itself), rebuild (its engine is made anew and weights are synced
again), rollback (back to the last checkpoint: optimizer state may be half changed), fatal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from miles_plan.ir.graph import Fact, TaskGraph
from miles_plan.ir.plan import FailureRow
from miles_plan.ir.tasks import (
    AnyTask,
    Checkpoint,
    DraftStep,
    Evaluate,
    Offload,
    Onload,
    Rollout,
    Task,
    TrainStep,
    WeightSync,
)
from miles_plan.passes.base import Outcome, Pass, PassContext

Restart = Literal["retry", "rebuild", "rollback", "fatal"]

# First calls compile kernels and warm allocators: an SGLang engine takes 30 s to start and its first generate up to 40 s more
# (seen on one H200 with SGLang 0.5.16), so nothing on a GPU is declared dead before that.
FLOOR_S = {"host": 30.0, "cpu": 60.0, "gpu": 300.0}

RESTARTS: tuple[tuple[tuple[type[Task], ...], Restart, str], ...] = (
    ((TrainStep, DraftStep), "rollback", "a dead or stuck rank: weights and optimizer come back from the last checkpoint"),
    (
        (Rollout, Evaluate, WeightSync),
        "rebuild",
        "a dead engine: it is made anew, takes the current weights, and the task runs again",
    ),
    ((Offload, Onload), "rollback", "memory in an unknown state: engines are made anew from the last checkpoint"),
    ((Checkpoint,), "retry", "a failed write: the older checkpoint still stands and the save is tried again"),
)


@dataclass(frozen=True)
class GuardFailures(Pass):
    """Give every task its deadline and restart class, and print the failure table."""

    name: ClassVar[str] = "guard_failures"
    needs: ClassVar[frozenset[Fact]] = frozenset({"priced"})
    gives: ClassVar[frozenset[Fact]] = frozenset({"guarded"})

    def run(self, graph: TaskGraph, ctx: PassContext) -> Outcome:
        """Deadlines follow `failures.deadline_factor`."""
        factor = ctx.job.failures.deadline_factor
        guarded: list[AnyTask] = []
        rows = []
        for task in graph.tasks:
            restart, why = _restart(task)
            deadline_s = round(
                max(FLOOR_S[_place(graph, ctx, task)], factor * (task.estimate.high_s if task.estimate else 0.0)), 3
            )
            guarded.append(replace(task, deadline_s=deadline_s, restart=restart))
            rows.append(FailureRow(task=task.name, restart=restart, deadline_s=deadline_s, recovers_from=why))
        return Outcome(graph=graph.with_replaced(*guarded), failures=tuple(rows))


def _restart(task: Task) -> tuple[Restart, str]:
    for kinds, restart, why in RESTARTS:
        if isinstance(task, kinds):
            return restart, why
    if "train" in task.roles:
        return "rebuild", "a forward pass: the trainer is made anew from the last checkpoint and the pass runs again"
    return "retry", "a plain function of its inputs: it runs again"


def _place(graph: TaskGraph, ctx: PassContext, task: Task) -> str:
    group = graph.group(task.group) if task.group else None
    if group is None or group.gpus is None:
        return "host"
    return "cpu" if ctx.cluster.groups[0].gpu.vendor == "cpu" else "gpu"
