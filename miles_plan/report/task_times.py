"""Planned against measured: how long each task took, and how often that lay inside the planned interval."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from statistics import median

from miles_plan.ir.tasks import AnyTask
from miles_plan.report.run_files import RunRecord, TaskRun
from miles_plan.report.schedule import loop_schedule


@dataclass(frozen=True, slots=True)
class TaskTimes:
    """One task's plan and its measured runs, sorted by duration. again: runs that were repeated, whatever the reason."""

    task: AnyTask
    took_s: tuple[float, ...]
    again: int

    @property
    def median_s(self) -> float:
        """The middle of the measured runs."""
        return median(self.took_s)

    @property
    def ratio(self) -> float | None:
        """Measured median over planned middle; None where nothing was planned."""
        estimate = self.task.estimate
        return self.median_s / estimate.mid_s if estimate and estimate.mid_s > 0 else None

    @property
    def inside_count(self) -> int | None:
        """How many runs took a time inside the planned interval; None where none was planned."""
        estimate = self.task.estimate
        if estimate is None:
            return None
        return sum(estimate.low_s <= took <= estimate.high_s for took in self.took_s)


def task_times(record: RunRecord, loop: str) -> list[TaskTimes]:
    """The tasks of a loop that ran at least once, in planned order. Of a repeated run the last counts."""
    by_task: dict[str, dict[int, TaskRun]] = defaultdict(dict)
    repeats: dict[str, int] = defaultdict(int)
    for run in record.runs:
        if run.loop == loop:
            repeats[run.task] += run.iteration in by_task[run.task]
            by_task[run.task][run.iteration] = run
    schedule = loop_schedule(record.plan.graph, record.plan.graph.loop(loop))
    return [
        TaskTimes(
            task=planned.task,
            took_s=tuple(sorted(run.took_s for run in by_task[planned.task.name].values())),
            again=repeats[planned.task.name],
        )
        for planned in schedule.runs
        if planned.task.name in by_task
    ]


def coverage(times: list[TaskTimes]) -> tuple[int, int]:
    """Runs inside their planned intervals, and all runs that had one."""
    planned = [each for each in times if each.inside_count is not None]
    return sum(each.inside_count or 0 for each in planned), sum(len(each.took_s) for each in planned)


def iteration_spans(record: RunRecord, loop: str) -> dict[int, tuple[float, float]]:
    """Begin and end of each iteration of a loop, in seconds since the run began."""
    spans: dict[int, tuple[float, float]] = {}
    for run in record.runs:
        if run.loop == loop:
            begin, end = spans.get(run.iteration, (run.start_s, run.end_s))
            spans[run.iteration] = (min(begin, run.start_s), max(end, run.end_s))
    return spans


def iteration_begin(record: RunRecord, loop: str, iteration: int) -> float:
    """When an iteration began in earnest: with its first task on GPUs. Host tasks may run ahead of it, as a prefetch."""
    own = [run for run in record.runs if run.loop == loop and run.iteration == iteration]
    on_gpus = {group.name for group in record.plan.graph.groups if group.gpus is not None}
    return min(run.start_s for run in [run for run in own if run.group in on_gpus] or own)


def iteration_times(record: RunRecord, loop: str) -> dict[int, float]:
    """Seconds from the end of the iteration before to an iteration's own end; the first is timed from its begin.

    So the times of a loop add up to the loop's time, also where iterations overlap.
    """
    spans = iteration_spans(record, loop)
    times: dict[int, float] = {}
    ended_s: float | None = None
    for iteration in sorted(spans):
        end_s = spans[iteration][1]
        times[iteration] = max(0.0, end_s - (iteration_begin(record, loop, iteration) if ended_s is None else ended_s))
        ended_s = end_s
    return times


def typical_iteration(record: RunRecord, loop: str) -> int | None:
    """The iteration of median duration, the lower of two in the middle; None if none ran."""
    times = iteration_times(record, loop)
    ranked = sorted(times, key=lambda iteration: (times[iteration], iteration))
    return ranked[(len(ranked) - 1) // 2] if ranked else None
