"""Planned against measured: what a run's timeline says beside its plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from miles_plan.ir.plan import Plan
from miles_plan.report.measured import WHOLE_STEP, measured, table, write_measured
from miles_plan.report.run_files import read_run
from miles_plan.report.schedule import loop_schedules
from miles_plan.report.task_times import iteration_times
from tests.report.sample_run import RunWriter

RARE = ("checkpoint", "warm_start_checkpoint", "evaluate")


@pytest.fixture
def run(tmp_path: Path, disaggregated_plan: Plan) -> Path:
    """A run whose GPUs held 1 % more than planned in every phase."""
    writer = RunWriter(disaggregated_plan)
    folder = writer.write(tmp_path / "run", rl_iterations=3)
    lines = [line for line in disaggregated_plan.graph.memory if line.place == "gpu"]
    planned = {phase.task: phase.total_bytes for line in lines for phase in line.phases}
    for row in writer.timeline:
        row["peak_bytes"] = int(planned.get(row["task"], 0) * 1.01)
    (folder / "timeline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in writer.timeline), encoding="utf-8")
    return folder


def test_every_phase_whose_task_ran_is_compared(run: Path) -> None:
    found = measured(read_run(run))
    assert found.memory
    assert all(row.error == pytest.approx(0.01, abs=1e-6) for row in found.memory)


def test_the_first_run_of_a_task_is_not_in_its_median(run: Path) -> None:
    record = read_run(run)
    slow = [replace(each, end_s=each.end_s + 100.0) if each.iteration == 0 else each for each in record.runs]
    began = {each.task for each in slow if each.iteration == 0}
    rows = [row for row in measured(replace(record, runs=tuple(slow))).times if row.task in began and row.runs > 1]
    assert rows
    assert all(row.first_s > 100.0 for row in rows)
    assert all(row.median_s < 100.0 for row in rows)


def test_a_whole_step_is_held_against_the_plans_step_time(run: Path) -> None:
    record = read_run(run)
    rows = {row.loop: row for row in measured(record).times if row.task == WHOLE_STEP}
    assert set(rows) == {loop.name for loop in record.plan.graph.loops}
    for name, row in rows.items():
        saved = {each.iteration for each in record.runs if each.loop == name and each.task in RARE}
        took = {at: seconds for at, seconds in iteration_times(record, name).items() if at > 0}
        usual = [seconds for at, seconds in took.items() if at not in saved] or list(took.values())
        assert row.median_s == pytest.approx(median(usual))
        planned = next(each for each in loop_schedules(record.plan) if each.loop.name == name)
        assert row.planned_s == min(planned.usual_s, planned.iteration_s)
        assert row.low_s <= row.planned_s <= row.high_s


def test_a_step_that_saves_is_not_a_usual_step(run: Path) -> None:
    record = read_run(run)
    last = max(each.iteration for each in record.runs if each.loop == "rl")
    runs = [each for each in record.runs if each.task not in RARE or each.iteration == last]
    slow = [replace(each, end_s=each.end_s + 1000.0) if each.task == "checkpoint" else each for each in runs]
    rows = {row.loop: row for row in measured(replace(record, runs=tuple(slow))).times if row.task == WHOLE_STEP}
    assert rows["rl"].median_s < 500.0


def test_what_was_not_measured_is_not_compared(run: Path) -> None:
    record = read_run(run)
    without = replace(record, runs=tuple(replace(each, peak_bytes=0) for each in record.runs))
    assert measured(without).memory == ()
    assert not any("memory" in line for line in table(measured(without)))


def test_the_file_holds_what_the_table_shows(run: Path) -> None:
    path, found = write_measured(run)
    data = json.loads(path.read_text(encoding="utf-8"))
    assert [row["phase"] for row in data["memory"]] == [row.phase for row in found.memory]
    assert len(table(found)) == len(found.memory) + len(found.times) + 2
