"""What the planned schedule says: when tasks run, in which iterations, how long loops take, and the critical path."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise

from miles_plan.ir.critical_path import by_start, critical_path, end_s, start_s
from miles_plan.ir.graph import Loop, TaskGraph
from miles_plan.ir.plan import Plan
from miles_plan.ir.tasks import AnyTask


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One planned run of a task, in seconds since its iteration began."""

    task: AnyTask
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class LoopSchedule:
    """One loop as planned.

    runs: every task once, by start. iteration_s: from one iteration's start to the next, on average; usual_s: the usual
    iteration from end to end, without rare tasks; full_s: one with all tasks; total_s: all iterations. low_s and high_s:
    iteration_s with the estimates' low or high ends. critical: names on the usual iteration's critical path, in time order.
    """

    loop: Loop
    runs: tuple[PlannedRun, ...]
    iteration_s: float
    low_s: float
    high_s: float
    usual_s: float
    full_s: float
    total_s: float
    critical: tuple[str, ...]

    @property
    def overlaps(self) -> bool:
        """Whether iterations begin before the one before them has ended."""
        return self.iteration_s < 0.98 * self.usual_s


def runs_in(task: AnyTask, iteration: int, iterations: int) -> bool:
    """Whether a task runs in an iteration: every `every`-th time, and in the last."""
    return (iteration + 1) % task.every == 0 or iteration + 1 == iterations


def loop_schedule(graph: TaskGraph, loop: Loop) -> LoopSchedule:
    """The schedule of one loop of a scheduled graph."""
    tasks = by_start(graph.topological(loop.name))
    always = [task for task in tasks if task.every == 1] or tasks
    typical = critical_path(graph, always)
    estimates = [task.estimate for task in typical if task.estimate]
    usual_s = _span_s(iteration_runs(tasks, always))
    return LoopSchedule(
        loop=loop,
        runs=tuple(PlannedRun(task, start_s(task), end_s(task)) for task in tasks),
        iteration_s=usual_s,
        usual_s=usual_s,
        low_s=sum(estimate.low_s for estimate in estimates),
        high_s=sum(estimate.high_s for estimate in estimates),
        full_s=max((end_s(task) for task in tasks), default=0.0),
        total_s=_total_s(tasks, loop.iterations),
        critical=tuple(task.name for task in typical),
    )


def loop_schedules(plan: Plan) -> list[LoopSchedule]:
    """The schedules of all loops, in order, with the plan's own step time where it has one.

    The plan's figure is that of the steady state: where iterations overlap it is shorter than one iteration from end to end.
    """
    return [_in_steady_state(loop_schedule(plan.graph, loop), plan) for loop in plan.graph.loops]


def _in_steady_state(schedule: LoopSchedule, plan: Plan) -> LoopSchedule:
    step = plan.estimate(f"step time ({schedule.loop.name})")
    if step is None:
        return schedule
    total_s = step.mid * schedule.loop.iterations
    return replace(schedule, iteration_s=step.mid, low_s=step.low, high_s=step.high, total_s=total_s)


def iteration_runs(tasks: list[AnyTask], active: list[AnyTask]) -> list[PlannedRun]:
    """The runs of an iteration in which only `active` of `tasks` run: time that only skipped tasks would have taken is cut."""
    names = {task.name for task in active}
    cuts = _uncovered([task for task in tasks if task.name not in names], active)

    def moved(at_s: float) -> float:
        return at_s - sum(min(end, at_s) - begin for begin, end in cuts if begin < at_s)

    return [PlannedRun(task, moved(start_s(task)), moved(end_s(task))) for task in active]


def _span_s(runs: list[PlannedRun]) -> float:
    return max((run.end_s for run in runs), default=0.0)


def _total_s(tasks: list[AnyTask], iterations: int) -> float:
    """All iterations, each with the tasks that run in it; equal sets of tasks are timed once."""
    sets = Counter(
        frozenset(task.name for task in tasks if runs_in(task, iteration, iterations)) for iteration in range(iterations)
    )
    return sum(count * _span_s(iteration_runs(tasks, [t for t in tasks if t.name in names])) for names, count in sets.items())


def _uncovered(skipped: list[AnyTask], active: list[AnyTask]) -> list[tuple[float, float]]:
    """Stretches of time in which some skipped task was planned and no active one, in order."""
    times = sorted({at for task in (*skipped, *active) for at in (start_s(task), end_s(task))})
    return [
        (begin, end) for begin, end in pairwise(times) if _any_runs(skipped, begin, end) and not _any_runs(active, begin, end)
    ]


def _any_runs(tasks: list[AnyTask], begin: float, end: float) -> bool:
    return any(start_s(task) <= begin and end <= end_s(task) for task in tasks)
