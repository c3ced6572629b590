"""The steady-state step against a simulation of many iterations."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plan.ir.critical_path import critical_path
from miles_plan.ir.graph import TaskGraph
from miles_plan.ir.group import GpuSpan
from miles_plan.ir.tasks import TimeEstimate
from miles_plan.passes.schedule_steps import step_time_s
from tests.ir.graphs import grpo_graph


def timed(durations: dict[str, float], *, staleness: int, apart: bool) -> TaskGraph:
    """The GRPO graph with given durations, weights from further back, and the groups together or apart."""
    graph = grpo_graph()
    if apart:
        host, train, rollout = graph.groups
        graph = replace(graph, groups=(host, train, replace(rollout, gpus=GpuSpan(first=2, count=2))))
    edges = tuple(
        replace(edge, distance=1 + staleness) if (edge.src, edge.dst) == ("train", "weight_sync") else edge
        for edge in graph.edges
    )
    tasks = tuple(
        replace(task, estimate=TimeEstimate(low_s=d, mid_s=d, high_s=d, basis="test"))
        for task in graph.tasks
        for d in [durations.get(task.name, 0.0)]
    )
    return replace(graph, tasks=tasks, edges=edges)


def simulated_step_s(graph: TaskGraph, iterations: int = 60) -> float:
    """Earliest-iteration-first list scheduling of many iterations; the last half gives the period."""
    ends: dict[tuple[str, int], float] = {}
    order = graph.topological("rl")
    pending = [(iteration, task) for iteration in range(iterations) for task in order]
    free: dict[str, float] = {}
    while pending:
        best = None
        for iteration, task in pending:
            waits = [(edge.src, iteration - edge.distance) for edge in graph.inputs_of(task.name)]
            if any(i >= 0 and (name, i) not in ends for name, i in waits):
                continue
            ready = max((ends[name, i] for name, i in waits if i >= 0), default=0.0)
            group = graph.group(task.group)
            blockers = [g.name for g in graph.groups if g.gpus and group.gpus and g.shares_gpus_with(group)]
            start = max([ready, *(free.get(name, 0.0) for name in blockers)])
            if best is None or (start, iteration) < (best[0], best[1]):
                best = (start, iteration, task, blockers)
        assert best is not None
        start, iteration, task, blockers = best
        ends[task.name, iteration] = start + task.estimate.mid_s
        for name in blockers:
            free[name] = ends[task.name, iteration]
        pending.remove((iteration, task))
    half = iterations // 2
    return (ends["train", iterations - 1] - ends["train", half - 1]) / (iterations - half)


@given(st.floats(0.1, 9), st.floats(0.1, 9), st.floats(0.0, 3), st.floats(0.0, 3), st.integers(0, 2), st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_step_time_is_what_a_simulation_settles_on(
    rollout_s: float, train_s: float, sync_s: float, log_probs_s: float, staleness: int, apart: bool
) -> None:
    durations = {"rollout": rollout_s, "train": train_s, "weight_sync": sync_s, "old_log_probs": log_probs_s}
    graph = timed(durations, staleness=staleness if apart else 0, apart=apart)
    assert step_time_s(graph, "rl") == pytest.approx(simulated_step_s(graph, 24), rel=0.02, abs=1e-6)


def test_overlap_hides_the_shorter_half() -> None:
    durations = {"rollout": 5.0, "train": 3.0}
    assert step_time_s(timed(durations, staleness=0, apart=True), "rl") == pytest.approx(8.0)
    assert step_time_s(timed(durations, staleness=1, apart=True), "rl") == pytest.approx(5.0)


def test_the_critical_path_runs_from_the_first_wait_to_the_end() -> None:
    graph = timed({"rollout": 5.0, "train": 3.0, "old_log_probs": 1.0, "reward": 0.5}, staleness=0, apart=False)
    starts = {"rollout": 0.0, "reward": 5.0, "old_log_probs": 5.0, "advantage": 5.5, "train": 6.0}
    graph = replace(graph, tasks=tuple(replace(task, start_s=starts.get(task.name, 0.0)) for task in graph.tasks))
    assert [task.name for task in critical_path(graph, graph.topological("rl"))][-3:] == ["rollout", "old_log_probs", "train"]
