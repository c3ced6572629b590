"""What a run is doing, whether that is normal, and what comes next: read from its folder, while it runs or after."""

from __future__ import annotations

import fcntl
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from miles_plan.backends.executor.checkpoints import all_checkpoints
from miles_plan.backends.executor.dataflow import Dataflow, Instance
from miles_plan.backends.executor.deadlines import deadline_s
from miles_plan.backends.executor.events import read_lines
from miles_plan.backends.executor.journal import Journal, JournalRow
from miles_plan.backends.executor.metrics import read_metrics
from miles_plan.backends.executor.run_directory import RunDirectory, RunDirectoryError
from miles_plan.ir.plan import Plan, read_plan

Phase = Literal["running", "finished", "interrupted", "failed", "killed"]
SLOW_FACTOR = 3.0  # a task is called slow beyond so many times its usual time


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopStatus:
    """How far a loop has come."""

    name: str
    done: int
    iterations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStatus:
    """A task under way. usual_s: the median of this run so far, or the plan's estimate; None where there is neither."""

    instance: str
    age_s: float
    usual_s: float | None
    deadline_s: float
    waits_for: str

    @property
    def verdict(self) -> str:
        """Whether that is normal."""
        if self.age_s > self.deadline_s:
            return "past its deadline"
        if self.usual_s is not None and self.age_s > SLOW_FACTOR * self.usual_s:
            return f"slow: {self.age_s / self.usual_s:.0f} times its usual time"
        return "normal"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """One look at a run. next: what starts when what runs now is done; remaining_s: at the pace of the last iterations."""

    name: str
    phase: Phase
    owner: Mapping[str, Any]
    loops: tuple[LoopStatus, ...]
    tasks: tuple[TaskStatus, ...]
    next: tuple[str, ...]
    remaining_s: float | None
    newest_checkpoint: str | None
    latest: Mapping[str, Any]
    restarts: int
    last_problem: str | None


def read_status(root: Path) -> RunStatus:
    """Look at a run. RunDirectoryError for a folder without one."""
    directory = RunDirectory(root)
    if not directory.plan.exists() or not directory.journal.exists():
        raise RunDirectoryError(f"{root} holds no run: there is no plan.json and journal.sqlite in it")
    plan = read_plan(directory.plan)
    flow = Dataflow(plan.graph)
    journal = Journal(directory.journal, read_only=True)
    events = list(read_lines(directory.events))
    try:
        rows, sessions = list(journal.rows()), journal.sessions()
    finally:
        journal.close()
    owner = _live_owner(directory)
    done = flow.settled(
        {
            name: max([0, *(row.iteration + 1 for row in rows if row.task == name and row.status == "completed")])
            for name in flow.tasks
        }
    )
    metrics = read_metrics(directory.metrics)
    running = [row for row in rows if row.status == "started"] if owner else []
    failures = [event for event in events if event.get("kind") in ("task_failed", "run_failed", "checkpoint_refused")]
    checkpoints = all_checkpoints(directory.checkpoints)
    return RunStatus(
        name=plan.name,
        phase=_phase(owner, sessions),
        owner=owner or {},
        loops=tuple(_loop(flow, done, loop.name) for loop in plan.graph.loops),
        tasks=tuple(_task(plan, flow, row, rows, events) for row in running),
        next=tuple(str(each) for each in _following(flow, done, running)),
        remaining_s=_remaining_s(flow, done, metrics) if owner else None,
        newest_checkpoint=checkpoints[0].name if checkpoints else None,
        latest=metrics[-1] if metrics else {},
        restarts=sum(event.get("kind") == "task_failed" for event in events) + max(0, len(sessions) - 1),
        last_problem=_problem(failures[-1]) if failures else None,
    )


def _live_owner(directory: RunDirectory) -> dict[str, Any] | None:
    """Who holds the run's lock, None where nobody does."""
    path = directory.root / "lock"
    try:
        with path.open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = json.loads(path.read_text(encoding="utf-8") or "{}")
                return {key: owner.get(key) for key in ("pid", "host", "since")}
    except (OSError, ValueError):
        return None
    return None


def _phase(owner: Mapping[str, Any] | None, sessions: Sequence[tuple[int, float, float | None, str | None]]) -> Phase:
    if owner:
        return "running"
    ending = sessions[-1][3] if sessions else None
    endings: dict[str | None, Phase] = {"finished": "finished", "interrupted": "interrupted", "failed": "failed"}
    return endings.get(ending, "killed")


def _loop(flow: Dataflow, done: Mapping[str, int], loop: str) -> LoopStatus:
    return LoopStatus(name=loop, done=min(done[task.name] for task in flow.loop_tasks[loop]), iterations=flow.iterations[loop])


def _task(
    plan: Plan, flow: Dataflow, row: JournalRow, rows: Sequence[JournalRow], events: Sequence[Mapping[str, Any]]
) -> TaskStatus:
    name = f"{row.task}@{row.iteration}"
    took = [
        each.ended_at - each.started_at
        for each in rows
        if each.task == row.task and each.ended_at and each.status == "completed"
    ]
    estimate = plan.graph.task(row.task).estimate
    waits = [event["subject"] for event in events if event.get("kind") == "waiting" and event.get("owner") == name]
    return TaskStatus(
        instance=name,
        age_s=time.time() - row.started_at,
        usual_s=statistics.median(took) if took else (estimate.mid_s if estimate else None),
        deadline_s=deadline_s(flow.tasks[row.task]),
        waits_for=str(waits[-1]) if waits else "",
    )


def _following(flow: Dataflow, done: Mapping[str, int], running: Sequence[JournalRow]) -> tuple[Instance, ...]:
    """What may start once everything that runs is done."""
    after = dict(done)
    for row in running:
        if after[row.task] == row.iteration:
            after = flow.after(after, Instance(row.task, row.iteration))
    return flow.ready(after, ())


def _remaining_s(flow: Dataflow, done: Mapping[str, int], metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """Iterations left, at the median time of the latest ones of their loop; None while a loop has no pace yet."""
    paces: dict[str, list[float]] = defaultdict(list)
    for line in metrics:
        paces[line["loop"]].append(line["step_s"])
    total = 0.0
    for loop in flow.iterations:
        left = flow.iterations[loop] - _loop(flow, done, loop).done
        if left and not paces[loop]:
            return None
        total += left * statistics.median(paces[loop][-20:]) if left else 0.0
    return total


def _problem(event: Mapping[str, Any]) -> str:
    return f"{event.get('owner')}: {event.get('subject')}" + (f": {event['message']}" if event.get("message") else "")
