"""Everything a run writes down as it goes: journal, events, timeline, metrics, and what the terminal shows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miles_plan.backends.executor.dataflow import Dataflow, Instance
from miles_plan.backends.executor.deadlines import Action, Failure
from miles_plan.backends.executor.driver import Running
from miles_plan.backends.executor.events import EventKind, EventLog
from miles_plan.backends.executor.journal import Journal
from miles_plan.backends.executor.metrics import MetricsFile
from miles_plan.backends.executor.operations.operation import Outcome
from miles_plan.backends.executor.progress import Progress
from miles_plan.backends.executor.run_directory import RunDirectory
from miles_plan.backends.executor.timeline import TaskRun, TimelineFile
from miles_plan.ir.tasks import Task


@dataclass
class RunLog:
    """Writes one fact to every file it belongs in. epoch: `time.time` when the run first started."""

    flow: Dataflow
    directory: RunDirectory
    journal: Journal
    events: EventLog
    timeline: TimelineFile
    metrics: MetricsFile
    progress: Progress
    epoch: float
    closed: dict[str, int] = field(default_factory=dict)
    digests_differ: int = 0

    @classmethod
    def open(cls, flow: Dataflow, directory: RunDirectory, progress: Progress, *, epoch: float, tensorboard: bool) -> RunLog:
        """Open every file for appending. OSError names the path."""
        offsets, total = {}, 0
        for loop in flow.graph.loops:
            offsets[loop.name] = total
            total += loop.iterations
        return cls(
            flow=flow,
            directory=directory,
            journal=Journal(directory.journal),
            events=EventLog(directory.events, epoch=epoch),
            timeline=TimelineFile(directory.timeline),
            metrics=MetricsFile(
                directory.metrics, loop_offset=offsets, tensorboard=directory.tensorboard if tensorboard else None
            ),
            progress=progress,
            epoch=epoch,
            closed=dict.fromkeys(flow.iterations, 0),
        )

    def event(self, kind: EventKind, owner: str, subject: str, **fields: Any) -> None:
        """Write an event; warnings reach the terminal too."""
        self.events.write(kind, owner, subject, **fields)
        if kind == "start_step":
            self.progress.start_step(subject, float(fields["seconds"]))
        if kind in ("warning", "checkpoint_refused", "digest_differs"):
            self.progress.note(f"{owner}: {subject}" + "".join(f"; {name}: {value}" for name, value in fields.items()))

    def restart_from(self, done: Mapping[str, int], unwritten: Sequence[Mapping[str, Any]]) -> None:
        """The run goes on from here: take back what the files say about later iterations, add what a checkpoint held."""
        undone = self.journal.undo_after(done)
        self.closed = {loop: self._over(loop, done) for loop in self.flow.iterations}
        self.metrics.restart_from(self.closed, unwritten)
        if undone:
            self.event("rolled_back", "run", f"{undone} task runs will be repeated")
        self.progress.restart_from(self.closed)

    def loop_started(self, loop: str) -> None:
        """A loop begins."""
        self.events.write("loop_started", "run", loop)
        self.progress.loop_started(loop)

    def task_started(self, instance: Instance, loop: str, attempt: int) -> int:
        """An instance starts; returns its journal row."""
        self.events.write("task_started", str(instance), instance.task, loop=loop, attempt=attempt)
        self.progress.task_started(instance)
        return self.journal.start(instance, loop, attempt)

    def waiting(self, running: Running) -> None:
        """An operation begins to wait."""
        assert running.wait is not None, "it waits"
        self.events.write("waiting", running.name, running.wait.subject, deadline_s=running.deadline_s)
        self.progress.waiting(running.name, running.wait.subject)

    def task_completed(self, running: Running, outcome: Outcome, task: Task, done: Mapping[str, int]) -> None:
        """An instance is done; iterations that are over by it get their line of metrics."""
        instance = running.instance
        assert instance is not None, "tasks have instances"
        seconds = time.time() - running.started_at
        self._check_digest(instance, outcome)
        self.journal.complete(running.row, digest=outcome.digest, weight_version=outcome.weight_version)
        self.events.write(
            "task_completed", str(instance), instance.task, seconds=round(seconds, 4), busy_s=round(running.busy_s, 4)
        )
        self._run(running, instance, task)
        self.metrics.add(task.loop, instance.iteration, instance.task, seconds, outcome.figures)
        self.progress.task_completed(instance)
        while self.closed[task.loop] < self._over(task.loop, done):
            line = self.metrics.close_iteration(task.loop, self.closed[task.loop])
            self.closed[task.loop] += 1
            self.progress.iteration_over(line)

    def task_failed(self, running: Running, task: Task, failure: Failure, action: Action) -> None:
        """An instance failed, and what is done about it."""
        instance = running.instance
        assert instance is not None, "tasks have instances"
        if failure.cause == "overdue":
            self.events.write(
                "overdue", str(instance), failure.subject, age_s=round(failure.age_s, 3), deadline_s=running.deadline_s
            )
        self.events.write(
            "task_failed", str(instance), failure.subject, message=failure.message, cause=failure.cause, action=action
        )
        self.journal.fail(running.row, failure.message)
        self._run(running, instance, task)
        self.progress.note(f"{instance} failed ({failure.cause}): {failure.subject}: {failure.message}; {action}")

    def task_dropped(self, running: Running) -> None:
        """An instance was given up because a process it needs is replaced; it runs again."""
        self.journal.fail(running.row, "a process it waited for was replaced")
        self.events.write("task_retried", running.name, running.wait.subject if running.wait else "")

    def stacks(self, name: str, text: str) -> None:
        """Keep what the processes of an overdue task were doing."""
        self.directory.logs.mkdir(exist_ok=True)
        path: Path = self.directory.logs / f"stacks-{name}.txt"
        path.write_text(text, encoding="utf-8")
        self.events.write("warning", name, f"stacks of its processes are in {path.relative_to(self.directory.root)}")

    def close(self) -> None:
        """Close every file."""
        for each in (self.metrics, self.timeline, self.events, self.journal, self.progress):
            each.close()

    def _run(self, running: Running, instance: Instance, task: Task) -> None:
        start_s = running.started_at - self.epoch
        self.timeline.write(
            TaskRun(
                task=instance.task,
                loop=task.loop,
                iteration=instance.iteration,
                group=task.group,
                start_s=start_s,
                end_s=max(start_s, time.time() - self.epoch),
                busy_s=running.busy_s,
                attempt=running.attempt,
                peak_bytes=running.peak_bytes,
            )
        )

    def _check_digest(self, instance: Instance, outcome: Outcome) -> None:
        """Work that is repeated must give what it gave before; if not, something in it depends on chance or timing."""
        earlier = self.journal.earlier_digest(instance)
        if earlier is not None and outcome.digest is not None and earlier != outcome.digest:
            self.digests_differ += 1
            self.event("digest_differs", str(instance), "its result is not the one it gave before the restart")

    def _over(self, loop: str, done: Mapping[str, int]) -> int:
        """Iterations of a loop that are over."""
        return min(done[task.name] for task in self.flow.loop_tasks[loop])
