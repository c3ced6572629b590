"""Planned against measured: the memory of every phase on a GPU and the time of every task, as rows, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from miles_plan.report.atomic_file import write_whole
from miles_plan.report.run_files import RunRecord, read_run
from miles_plan.report.schedule import loop_schedules
from miles_plan.report.task_times import iteration_times, task_times
from miles_plan.report.units import bytes_text, seconds_text

MEASURED_NAME = "measured.json"
WHOLE_STEP = "a whole step"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseMemory:
    """A phase of the memory plan. measured_bytes: the most that one of its GPUs held while its task ran."""

    gpus: str
    phase: str
    task: str
    planned_bytes: int
    measured_bytes: int

    @property
    def error(self) -> float:
        """Measured over planned, less one: above 0 the plan was too low."""
        return self.measured_bytes / self.planned_bytes - 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskTime:
    """A task of a loop, or a whole step of it. first_s: its first run, in which kernels are compiled; median_s: of the others,
    where there are any, and of a step of those that saved nothing."""

    loop: str
    task: str
    planned_s: float
    low_s: float
    high_s: float
    median_s: float
    first_s: float
    runs: int

    @property
    def error(self) -> float:
        """Measured over planned, less one."""
        return self.median_s / self.planned_s - 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A run's figures beside its plan's."""

    memory: tuple[PhaseMemory, ...]
    times: tuple[TaskTime, ...]


def measured(record: RunRecord) -> Measured:
    """Rows of what was both planned and measured."""
    return Measured(memory=tuple(_memory(record)), times=tuple(_times(record)))


def _memory(record: RunRecord) -> Iterator[PhaseMemory]:
    peaks: dict[str, int] = {}
    for run in record.runs:
        peaks[run.task] = max(peaks.get(run.task, 0), run.peak_bytes)
    for timeline in record.plan.graph.memory:
        if timeline.place != "gpu":
            continue
        for phase in timeline.phases:
            if (peak := peaks.get(phase.task, 0)) and phase.total_bytes:
                yield PhaseMemory(
                    gpus=str(timeline.gpus),
                    phase=phase.name,
                    task=phase.task,
                    planned_bytes=phase.total_bytes,
                    measured_bytes=peak,
                )


def _times(record: RunRecord) -> Iterator[TaskTime]:
    for loop in record.plan.graph.loops:
        for each in task_times(record, loop.name):
            estimate = each.task.estimate
            if estimate is None or estimate.mid_s <= 0:
                continue
            first = min((run for run in record.runs if run.task == each.task.name), key=lambda run: run.iteration)
            others = [run.took_s for run in record.runs if run.task == each.task.name and run is not first]
            yield TaskTime(
                loop=loop.name,
                task=each.task.name,
                planned_s=estimate.mid_s,
                low_s=estimate.low_s,
                high_s=estimate.high_s,
                median_s=median(others or [first.took_s]),
                first_s=first.took_s,
                runs=len(each.took_s),
            )
        yield from _whole_step(record, loop.name)


def _whole_step(record: RunRecord, loop: str) -> Iterator[TaskTime]:
    times = iteration_times(record, loop)
    took = list(times.values())
    planned = next(each for each in loop_schedules(record.plan) if each.loop.name == loop)
    # Steps with a rare task are left out, as `usual_s` has none; where steps overlap, the steady state is shorter than one.
    rare = {each.task.name for each in planned.runs if each.task.every > 1}
    held_up = {run.iteration for run in record.runs if run.loop == loop and run.task in rare}
    usual = [seconds for iteration, seconds in list(times.items())[1:] if iteration not in held_up]
    planned_s = min(planned.usual_s, planned.iteration_s)
    if took and planned_s > 0:
        yield TaskTime(
            loop=loop,
            task=WHOLE_STEP,
            planned_s=planned_s,
            low_s=min(planned.low_s, planned_s),
            high_s=max(planned.high_s, planned_s),
            median_s=median(usual or took[1:] or took),
            first_s=took[0],
            runs=len(took),
        )


def table(found: Measured) -> list[str]:
    """Lines of text: phases first, then tasks by loop."""
    lines = []
    if found.memory:
        lines.append(f"{'memory of a GPU':<24} {'planned':>10} {'measured':>10} {'difference':>11}")
        lines += [
            f"  {row.phase:<22} {bytes_text(row.planned_bytes):>10} {bytes_text(row.measured_bytes):>10} {row.error:>+11.1%}"
            for row in found.memory
        ]
    if found.times:
        lines.append(f"{'time of a task':<24} {'planned':>10} {'median':>10} {'difference':>11} {'first':>10}  runs")
        lines += [
            f"  {row.task:<22} {seconds_text(row.planned_s):>10} {seconds_text(row.median_s):>10} {row.error:>+11.1%} "
            f"{seconds_text(row.first_s):>10}  {row.runs}"
            for row in found.times
        ]
    return lines


def to_json(found: Measured) -> dict[str, Any]:
    """The rows with their errors."""
    return {
        "memory": [{**asdict(row), "error": round(row.error, 4)} for row in found.memory],
        "times": [{**asdict(row), "error": round(row.error, 4)} for row in found.times],
    }


def write_measured(run_dir: Path) -> tuple[Path, Measured]:
    """Write measured.json of a run directory; returns its path and what is in it. OSError names the path."""
    found = measured(read_run(run_dir))
    path = run_dir / MEASURED_NAME
    write_whole(path, json.dumps(to_json(found), indent=1) + "\n")
    return path, found
