"""The times of a 1.7B run against its plan (benchmarks.engines, case `long`), alone on an H200, other work on its host.

Prices of admissions, of requests in a step and of scoring were fitted to such a run; this one holds them in place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from miles_plan.ir.plan import Plan
from miles_plan.passes.compile import compile_job
from miles_plan.spec import load_job

ROOT = Path(__file__).parents[2]
WITHIN = {"rollout": 0.05, "old_log_probs": 0.13, "train": 0.2, "offload_states": 0.15, "onload_train": 0.27}
"""Of the tasks that take half a second and more."""


@pytest.fixture(scope="module")
def run() -> Any:
    return json.loads((ROOT / "benchmarks/results/engines_long_off.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def plan(run: Any) -> Plan:
    return compile_job(load_job(ROOT / "specs/gpu_grpo_1_7b_long_responses.yaml", run["settings"])).plan


def measured_s(run: Any, task: str) -> float:
    return float(next(row["median_s"] for row in run["planned_against_measured"]["times"] if row["task"] == task))


@pytest.mark.parametrize("name", WITHIN)
def test_a_task_takes_what_is_planned(run: Any, plan: Plan, name: str) -> None:
    task = next(each for each in plan.graph.tasks if each.name == name and each.loop == "rl")
    assert task.estimate.mid_s == pytest.approx(measured_s(run, name), rel=WITHIN[name])


def test_a_whole_step_takes_what_is_planned_within_eight_percent(run: Any, plan: Plan) -> None:
    """Of engines and trainer that take turns: the sum of their tasks, without the checkpoint, which few steps write."""
    names = [
        row["task"] for row in run["planned_against_measured"]["times"] if row["task"] not in ("a whole step", "checkpoint")
    ]
    planned_s = sum(each.estimate.mid_s for each in plan.graph.tasks if each.loop == "rl" and each.name in names)
    assert planned_s == pytest.approx(measured_s(run, "a whole step"), rel=0.08)
