from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles_plan.ir.plan import Plan, write_plan
from miles_plan.report.run_files import RunRecord, read_run
from miles_plan.report.task_times import (
    coverage,
    iteration_begin,
    iteration_spans,
    iteration_times,
    task_times,
    typical_iteration,
)

GROUPS = {"prompts": "host", "rollout": "rollout", "train": "train"}


def _run(tmp_path: Path, plan: Plan, rows: list[tuple[str, int, float, float, int]]) -> RunRecord:
    """A run of (task, iteration, start_s, end_s, attempt) in loop rl."""
    write_plan(plan, tmp_path / "plan.json")
    lines = [
        json.dumps(
            {
                "task": task,
                "loop": "rl",
                "iteration": at,
                "group": GROUPS[task],
                "start_s": start,
                "end_s": end,
                "attempt": attempt,
            }
        )
        for task, at, start, end, attempt in rows
    ]
    (tmp_path / "timeline.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return read_run(tmp_path)


def test_of_a_repeated_run_the_last_counts(tmp_path: Path, embedded_plan: Plan) -> None:
    rows = [
        ("rollout", 0, 0.0, 9.0, 0),
        ("rollout", 0, 10.0, 10.8, 1),
        ("rollout", 1, 20.0, 21.0, 0),
        ("train", 0, 11.0, 11.1, 0),
    ]
    rollout, train = task_times(_run(tmp_path, embedded_plan, rows), "rl")
    assert rollout.task.name == "rollout"
    assert rollout.took_s == pytest.approx((0.8, 1.0))
    assert (rollout.again, rollout.inside_count) == (1, 2)
    assert rollout.median_s == pytest.approx(0.9)
    assert rollout.ratio == pytest.approx(0.9 / 0.95)
    assert (train.again, train.inside_count) == (0, 0)  # planned 0.32 to 0.7 s
    assert coverage([rollout, train]) == (2, 3)


def test_iterations(tmp_path: Path, embedded_plan: Plan) -> None:
    rows = [("rollout", 0, 0.0, 5.0, 0), ("rollout", 1, 5.0, 6.0, 0), ("train", 1, 6.0, 8.0, 0), ("rollout", 2, 8.0, 9.0, 0)]
    record = _run(tmp_path, embedded_plan, rows)
    assert iteration_spans(record, "rl") == {0: (0.0, 5.0), 1: (5.0, 8.0), 2: (8.0, 9.0)}
    assert typical_iteration(record, "rl") == 1
    assert typical_iteration(record, "warm_start") is None
    assert task_times(record, "warm_start") == []


def test_times_of_iterations_that_overlap_add_up_to_the_loops_time(tmp_path: Path, embedded_plan: Plan) -> None:
    rows = [("rollout", 0, 1.0, 3.0, 0), ("rollout", 1, 3.0, 5.0, 0), ("train", 0, 3.0, 4.0, 0), ("train", 1, 5.0, 7.0, 0)]
    record = _run(tmp_path, embedded_plan, rows)
    assert iteration_times(record, "rl") == {0: 3.0, 1: 3.0}


def test_a_prefetched_host_task_does_not_begin_an_iteration(tmp_path: Path, embedded_plan: Plan) -> None:
    record = _run(tmp_path, embedded_plan, [("prompts", 0, 0.0, 0.1, 0), ("rollout", 0, 5.0, 6.0, 0)])
    assert iteration_spans(record, "rl") == {0: (0.0, 6.0)}
    assert iteration_begin(record, "rl", 0) == 5.0
