"""When tasks of a scheduled graph start and end, and which of them set the end of an iteration."""

from __future__ import annotations

from collections.abc import Iterable

from miles_plan.ir.graph import TaskGraph
from miles_plan.ir.tasks import AnyTask, Task

TOLERANCE_S = 1e-6  # start times are rounded to it


def start_s(task: Task) -> float:
    """Start within the iteration; 0 for a task without one."""
    return task.start_s or 0.0


def end_s(task: Task) -> float:
    """Expected end within the iteration."""
    return start_s(task) + (task.estimate.mid_s if task.estimate else 0.0)


def by_start(tasks: Iterable[AnyTask]) -> list[AnyTask]:
    """Tasks in time order; those that start together, the shorter first."""
    return sorted(tasks, key=lambda task: (start_s(task), end_s(task)))


def critical_path(graph: TaskGraph, tasks: Iterable[AnyTask]) -> list[AnyTask]:
    """The tasks that set the end of the iteration, in time order: from the last to end, back to what each one waited for.

    A task waits for its inputs of this iteration and for whoever held its GPUs before it.
    """
    ordered = by_start(tasks)
    if not ordered:
        return []
    inputs = {(edge.src, edge.dst) for edge in graph.edges if edge.distance == 0}
    index = max(range(len(ordered)), key=lambda at: (end_s(ordered[at]), at))
    path = [ordered[index]]
    while True:
        current = ordered[index]
        waited = [
            at
            for at in range(index)
            if end_s(ordered[at]) <= start_s(current) + TOLERANCE_S
            and ((ordered[at].name, current.name) in inputs or _share_gpus(graph, ordered[at], current))
        ]
        if not waited:
            return path[::-1]
        index = max(waited, key=lambda at: (end_s(ordered[at]), (ordered[at].name, current.name) in inputs, at))
        path.append(ordered[index])


def _share_gpus(graph: TaskGraph, one: AnyTask, other: AnyTask) -> bool:
    if one.group is None or other.group is None:
        return False
    return graph.group(one.group).shares_gpus_with(graph.group(other.group))
