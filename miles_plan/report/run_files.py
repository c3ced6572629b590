"""What a run left behind: its plan, summary, metrics, timeline and events, read as far as they were written.

A run may be read while it goes on or after it was killed, so files may be missing and a last line may be torn; neither is an
error. Lines that cannot be used are counted and named, never passed over in silence.

    plan.json       what was to run (`ir.plan`); the only file that must be there
    summary.json    one object, written at the end
    metrics.jsonl   an object an iteration: `loop`, `iteration`, and any numbers
    timeline.jsonl  an object an attempt at a task: `task`, `loop`, `iteration`, `group`, `start_s`, `end_s`, `attempt`
    events.jsonl    an object an event: `time_s`, `kind`, `owner`, `subject`, and anything else
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles_plan.ir.plan import Plan, read_plan

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TaskRun:
    """One measured run of a task, in seconds since the run began. attempt counts from 0.

    peak_bytes: the most that a GPU of its group held meanwhile, whoever held it; 0 where nothing was measured.
    """

    task: str
    loop: str
    iteration: int
    group: str
    start_s: float
    end_s: float
    attempt: int
    peak_bytes: int = 0

    @property
    def took_s(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class RunFile:
    """A file of the run, by its path within the run directory; for a directory, the bytes of all in it."""

    name: str
    size_bytes: int
    is_directory: bool


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Everything read from one run directory. problems says, a sentence each, what could not be read."""

    path: Path
    plan: Plan
    summary: Row
    metrics: tuple[Row, ...]
    runs: tuple[TaskRun, ...]
    events: tuple[Row, ...]
    files: tuple[RunFile, ...]
    problems: tuple[str, ...]


def read_run(run_dir: Path) -> RunRecord:
    """Read a run directory. PlanFileError if its plan.json is missing or no plan; all else is optional."""
    plan = read_plan(run_dir / "plan.json")
    problems: list[str] = []
    metrics = _rows(run_dir / "metrics.jsonl", _is_metric, problems)
    runs = _rows(run_dir / "timeline.jsonl", _is_task_run, problems)
    events = _rows(run_dir / "events.jsonl", _is_event, problems)
    last = {(row["loop"], row["iteration"]): row for row in metrics}  # after a resume an iteration may have run again
    return RunRecord(
        path=run_dir,
        plan=plan,
        summary=_summary(run_dir / "summary.json", problems),
        metrics=tuple(sorted(last.values(), key=lambda row: (_loop_rank(plan, row["loop"]), row["iteration"]))),
        runs=tuple(sorted((_task_run(row) for row in runs), key=lambda run: (run.start_s, run.end_s))),
        events=tuple(sorted(events, key=lambda row: float(row["time_s"]))),
        files=_files(run_dir),
        problems=tuple(problems),
    )


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number; booleans are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rows(path: Path, usable: Callable[[Any], bool], problems: list[str]) -> list[dict[str, Any]]:
    """The usable objects of a JSONL file; what is not goes to `problems`, a torn last line excepted."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"{path.name}: {error.strerror}")
        return []
    rows, bad = [], []
    for number, line in enumerate(lines, start=1):
        row = _parsed(line)
        if usable(row):
            rows.append(row)
        elif line.strip() and number < len(lines):  # every whole line ends in a newline: what follows the last one is torn
            bad.append(number)
    if bad:
        problems.append(f"{path.name}: {len(bad)} of {len(lines) - 1} lines could not be used, the first is line {bad[0]}")
    return rows


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return None


def _is_metric(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("loop"), str) and isinstance(row.get("iteration"), int)


def _is_task_run(row: Any) -> bool:
    named = isinstance(row, dict) and isinstance(row.get("task"), str) and _is_metric(row)
    return named and is_number(row.get("start_s")) and is_number(row.get("end_s")) and row["end_s"] >= row["start_s"]


def _is_event(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("kind"), str) and is_number(row.get("time_s"))


def _task_run(row: Row) -> TaskRun:
    attempt, peak_bytes = row.get("attempt", 0), row.get("peak_bytes", 0)
    return TaskRun(
        task=row["task"],
        loop=row["loop"],
        iteration=row["iteration"],
        group=str(row.get("group") or ""),
        start_s=float(row["start_s"]),
        end_s=float(row["end_s"]),
        attempt=attempt if isinstance(attempt, int) else 0,
        peak_bytes=peak_bytes if isinstance(peak_bytes, int) else 0,
    )


def _summary(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        problems.append(f"{path.name}: {error}")
        return {}
    if isinstance(found, dict):
        return found
    problems.append(f"{path.name}: not a JSON object")
    return {}


def _loop_rank(plan: Plan, name: str) -> int:
    names = [loop.name for loop in plan.graph.loops]
    return names.index(name) if name in names else len(names)


def _files(run_dir: Path) -> tuple[RunFile, ...]:
    """What lies directly in the run directory, directories last; hidden files are left out."""
    found = []
    for path in sorted(run_dir.iterdir()):
        if path.name.startswith("."):
            continue
        try:
            inside = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
            found.append(RunFile(path.name, sum(each.stat().st_size for each in inside), path.is_dir()))
        except OSError:  # a file that a live run has just replaced
            continue
    return tuple(sorted(found, key=lambda each: each.is_directory))
