from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_plan.ir.critical_path import critical_path, end_s, start_s
from miles_plan.ir.plan import Plan
from miles_plan.report.schedule import iteration_runs, loop_schedule, loop_schedules, runs_in
from tests.report.sample_plans import load_plan


def test_the_critical_path_of_turns_goes_through_both_engines(moe_plan: Plan) -> None:
    schedule = loop_schedule(moe_plan.graph, moe_plan.graph.loop("rl"))
    assert schedule.critical == (
        "wake_weights", "quantize", "sync", "sleep_trainer", "wake_kv", "rollout", "record_routing", "replay_routing",
        "old_log_probs", "reference_log_probs", "wake_optimizer", "train", "draft",
    )  # fmt: skip


def test_with_gpus_of_its_own_the_rollout_is_the_critical_path(disaggregated_plan: Plan) -> None:
    schedule = loop_schedule(disaggregated_plan.graph, disaggregated_plan.graph.loop("rl"))
    assert schedule.critical == ("sync", "rollout")
    assert schedule.iteration_s == pytest.approx(85.0)


def test_the_critical_path_ends_with_the_iteration_and_each_task_waits_for_the_one_before(any_plan: Plan) -> None:
    for loop in any_plan.graph.loops:
        tasks = any_plan.graph.topological(loop.name)
        path = critical_path(any_plan.graph, tasks)
        assert end_s(path[-1]) == max(end_s(task) for task in tasks)
        for before, after in pairwise(path):
            assert end_s(before) <= start_s(after) + 1e-6


def test_rare_tasks_count_only_where_they_run(embedded_plan: Plan) -> None:
    schedule = loop_schedule(embedded_plan.graph, embedded_plan.graph.loop("rl"))
    rare_s = 0.5 + 0.08  # evaluate and checkpoint, in 3 of 60 iterations
    assert schedule.full_s == pytest.approx(schedule.iteration_s + rare_s)
    assert schedule.total_s == pytest.approx(60 * schedule.iteration_s + 3 * rare_s)


def test_every_counts_iterations_and_the_last_always_runs(embedded_plan: Plan) -> None:
    checkpoint = embedded_plan.graph.task("checkpoint")
    assert [iteration for iteration in range(50) if runs_in(checkpoint, iteration, 50)] == [19, 39, 49]


def test_the_plans_own_step_time_goes_first(embedded_plan: Plan) -> None:
    step = replace(embedded_plan.estimates[0], name="step time (rl)", low=1.0, mid=2.0, high=4.0)
    schedule = loop_schedules(replace(embedded_plan, estimates=(step,)))[1]
    assert (schedule.low_s, schedule.iteration_s, schedule.high_s, schedule.total_s) == (1.0, 2.0, 4.0, 120.0)


@given(st.sets(st.integers(min_value=0, max_value=20)))
def test_leaving_tasks_out_never_reorders_or_stretches_the_rest(skipped: set[int]) -> None:
    graph = load_plan("moe_1024").graph
    tasks = sorted(graph.topological("rl"), key=start_s)
    active = [task for at, task in enumerate(tasks) if at not in skipped]
    moved = iteration_runs(tasks, active)
    for run in moved:
        assert run.start_s <= start_s(run.task) + 1e-9
        assert run.end_s - run.start_s <= end_s(run.task) - start_s(run.task) + 1e-9
        assert run.end_s >= run.start_s >= -1e-9
    starts = [run.start_s for run in moved]
    assert starts == sorted(starts)


def test_iterations_that_overlap_are_said_to(embedded_plan: Plan) -> None:
    step = replace(embedded_plan.estimates[0], name="step time (rl)", low=0.5, mid=0.9, high=1.2)
    warm_start, rl = loop_schedules(replace(embedded_plan, estimates=(step,)))
    assert (warm_start.overlaps, rl.overlaps) == (False, True)
    assert rl.usual_s == pytest.approx(1.643)
