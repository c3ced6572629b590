"""Start times, the critical path, and the time of one step.

Within an iteration tasks start as soon as their inputs are there and their GPUs are free, in topological order: the order the
executor follows. The steady-state step time is the largest of what a cycle of dependencies needs divided by the iterations it
spans (a synchronous loop is one such cycle of distance 1) and what any one GPU is busy: the recurrence and resource bounds of
modulo scheduling (Rau, MICRO 1994).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from miles_plan.cost.rl_step import ORCHESTRATION
from miles_plan.ir.critical_path import critical_path
from miles_plan.ir.graph import Fact, TaskGraph
from miles_plan.ir.group import DeviceGroup
from miles_plan.ir.plan import Decision, Estimate
from miles_plan.ir.tasks import AnyTask, Task
from miles_plan.passes.base import Outcome, Pass, PassContext

BISECTION_STEPS = 60


@dataclass(frozen=True)
class ScheduleSteps(Pass):
    """Place every task in time and name the critical path of each loop."""

    name: ClassVar[str] = "schedule_steps"
    needs: ClassVar[frozenset[Fact]] = frozenset({"priced", "guarded"})
    gives: ClassVar[frozenset[Fact]] = frozenset({"scheduled"})

    def run(self, graph: TaskGraph, ctx: PassContext) -> Outcome:
        """One decision (the critical path) and one estimate (the step) a loop."""
        for loop in graph.loops:
            graph = _start_times(graph, loop.name)
        decisions, estimates = [], []
        for loop in graph.loops:
            path = critical_path(graph, graph.topological(loop.name))
            decisions.append(
                Decision(
                    field=f"schedule.{loop.name}",
                    value=" -> ".join(task.name for task in path),
                    reason="the critical path of one iteration: shorten these to shorten the step",
                    by=self.name,
                )
            )
            estimates.append(_step_estimate(graph, loop.name))
        total = [(estimate, loop.iterations) for estimate, loop in zip(estimates, graph.loops, strict=True)]
        run = Estimate(
            name="run time",
            unit="s",
            low=sum(each.low * count for each, count in total),
            mid=sum(each.mid * count for each, count in total),
            high=sum(each.high * count for each, count in total),
            basis="sum of the loops' steps, process start left out",
        )
        return Outcome(graph=graph, decisions=tuple(decisions), estimates=(*estimates, run))


def _duration_s(task: Task, which: str = "mid_s") -> float:
    """Mean time a task adds to an iteration: one that runs every k iterations counts a k-th."""
    return float(getattr(task.estimate, which)) / task.every if task.estimate else 0.0


def _groups_in_conflict(graph: TaskGraph) -> dict[str, set[str]]:
    """For each group, the groups that share a GPU with it, itself among them. Host tasks do not wait for each other."""
    held = [group for group in graph.groups if group.gpus is not None]
    return {one.name: {other.name for other in held if one.shares_gpus_with(other)} for one in held}


def _start_times(graph: TaskGraph, loop: str) -> TaskGraph:
    """As early as inputs and GPUs allow."""
    conflicts = _groups_in_conflict(graph)
    free_s: dict[str, float] = {}
    end_s: dict[str, float] = {}
    placed: list[AnyTask] = []
    for task in graph.topological(loop):
        ready_s = max((end_s.get(edge.src, 0.0) for edge in graph.inputs_of(task.name) if edge.distance == 0), default=0.0)
        blocking = conflicts.get(task.group or "", set())
        start_s = max([ready_s, *(free_s.get(name, 0.0) for name in blocking)])
        # Full durations here, not means: the verifier holds a start against the whole run of what comes before.
        end_s[task.name] = round(start_s, 6) + (task.estimate.mid_s if task.estimate else 0.0)
        for name in blocking & {task.group}:
            free_s[name] = end_s[task.name]
        placed.append(replace(task, start_s=round(start_s, 6)))
    return graph.with_replaced(*placed)


def step_time_s(graph: TaskGraph, loop: str, which: str = "mid_s") -> float:
    """Seconds from one iteration's start to the next in steady state, with the estimates' low, mid or high ends."""
    tasks = graph.topological(loop)
    busy = [sum(_duration_s(task, which) for task in tasks if task.group in names) for names in _busy_sets(graph)]
    return max([_recurrence_s(graph, tasks, which), *busy])


def _busy_sets(graph: TaskGraph) -> list[set[str]]:
    """Sets of groups that all hold one GPU: nothing in a set overlaps."""
    held: list[DeviceGroup] = [group for group in graph.groups if group.gpus is not None]
    firsts = sorted({group.gpus.first for group in held if group.gpus})
    return [{group.name for group in held if group.gpus and group.gpus.first <= gpu < group.gpus.end} for gpu in firsts]


def _recurrence_s(graph: TaskGraph, tasks: list[AnyTask], which: str) -> float:
    """The largest cycle time over distance, by bisection on the period: a period is long enough when no cycle is positive."""
    names = {task.name: _duration_s(task, which) for task in tasks}
    edges = [(edge.src, edge.dst, edge.distance) for edge in graph.edges if edge.src in names and edge.dst in names]
    low, high = 0.0, sum(names.values())
    if high == 0.0 or not _has_positive_cycle(names, edges, 0.0):
        return 0.0
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        if _has_positive_cycle(names, edges, middle):
            low = middle
        else:
            high = middle
    return high


def _has_positive_cycle(durations: dict[str, float], edges: list[tuple[str, str, int]], period_s: float) -> bool:
    """Bellman-Ford on longest paths with weight duration(src) - period x distance."""
    longest = dict.fromkeys(durations, 0.0)
    for _ in range(len(durations)):
        changed = False
        for src, dst, distance in edges:
            reached = longest[src] + durations[src] - period_s * distance
            if reached > longest[dst] + 1e-12:
                longest[dst], changed = reached, True
        if not changed:
            return False
    return True


def _step_estimate(graph: TaskGraph, loop: str) -> Estimate:
    tasks = graph.topological(loop)
    # What no task prices: data movement between engines, waits of the controller. The embedded engines' driver is in each task.
    rest = 0.0 if all(group.engine in ("torch", "host") for group in graph.groups) else ORCHESTRATION
    mid_s = step_time_s(graph, loop)
    terms = [(task.name, _duration_s(task)) for task in tasks]
    return Estimate(
        name=f"step time ({loop})",
        unit="s",
        low=step_time_s(graph, loop, "low_s"),
        mid=mid_s * (1.0 + rest),
        high=step_time_s(graph, loop, "high_s") * (1.0 + rest),
        basis=", ".join(dict.fromkeys(task.estimate.basis for task in tasks if task.estimate)),
        terms=tuple([*terms, ("orchestration", mid_s * rest)] if rest else terms),
    )
