"""One run of a graph in one process: starts what may start, writes down what ended, and repairs what failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from miles_plan.backends.executor.actors import Members
from miles_plan.backends.executor.crew import HOST, Crew
from miles_plan.backends.executor.dataflow import Dataflow, Instance
from miles_plan.backends.executor.deadlines import Action, Failure, action_for, deadline_s
from miles_plan.backends.executor.driver import Driver, Ended, Running
from miles_plan.backends.executor.failures import InterruptedRunError, RunError
from miles_plan.backends.executor.operations.operation import Context, Outcome, Services, Waiting
from miles_plan.backends.executor.operations.table import OPERATIONS
from miles_plan.backends.executor.rebuild import RollbackNeededError, can_rebuild, rebuild
from miles_plan.backends.executor.restore import restore
from miles_plan.backends.executor.run_log import RunLog
from miles_plan.backends.executor.run_state import RunState
from miles_plan.backends.executor.setup_steps import Exported, enter_loop, export, save_now
from miles_plan.backends.executor.stop import StopRequest
from miles_plan.backends.executor.values import Values

POLL_S = 0.2  # how long a Ctrl-C can go unnoticed
STACKS_WAIT_S = 1.0  # how long processes that are alive get to say what they are doing
SETUP_DEADLINE_S = 900.0  # building engines, loading a checkpoint, the final export


@dataclass
class Execution:
    """Everything of a run that changes while it goes on.

    done: iterations of each task that are behind it; loop: the loop that was entered last; attempts: how often instances have
    failed so far.
    """

    services: Services
    crew: Crew
    log: RunLog
    stop: StopRequest
    max_restarts: int
    done: Mapping[str, int] = field(default_factory=dict)
    state: RunState = field(default_factory=RunState)
    loop: str | None = None
    attempts: dict[Instance, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Nothing runs yet."""
        self.flow: Dataflow = self.services.flow
        self.values = Values(self.flow)
        self.driver = Driver(self.log.waiting)

    def run(self) -> Exported:
        """Run the graph to its end and export the policy.

        RunError when the run cannot go on, InterruptedRunError when it was asked to stop and has saved.
        """
        self.restore()
        while not self.flow.finished(self.done):
            if self.stop.requested:
                self._wind_down()
            self._enter_loop()
            self._start_ready(limit=None)
            self._take_in(self.driver.poll(POLL_S))
        exported: Exported = self._wait_for(
            "export", export(self._context(Instance("export", 0)), self.services.directory.final)
        )
        return exported

    def restore(self) -> None:
        """Build the engines and bring them, and this object, to the newest good checkpoint, or to the start."""
        restored = self._wait_for("restore", restore(self.services, self.crew, self.log))
        self.services, self.done, self.loop = restored.services, restored.done, restored.loop
        self.state = replace(restored.state, restarts=self.state.restarts)
        self.values = Values(self.flow)
        self.log.restart_from(self.done)

    def _enter_loop(self) -> None:
        """What must happen between two loops."""
        loop = self.flow.current_loop(self.done)
        if loop is not None and loop != self.loop:
            self._wait_for(f"enter loop {loop}", enter_loop(self._context(Instance(loop, 0)), loop))
            self.loop = loop
            self.log.loop_started(loop)

    def _start_ready(self, *, limit: int | None) -> None:
        """Start whatever may start, up to an iteration where there is a limit, until nothing more can."""
        while True:
            busy = [running.instance for running in self.driver.running if running.instance is not None]
            ready = [each for each in self.flow.ready(self.done, busy) if limit is None or each.iteration <= limit]
            ended = [end for each in ready if (end := self._start(each)) is not None]
            if not ended:
                return
            self._take_in(ended)

    def _start(self, instance: Instance) -> Ended | None:
        task, attempt = self.flow.tasks[instance.task], self.attempts.get(instance, 0)
        running = Running(
            name=str(instance),
            operation=OPERATIONS[task.kind](self._context(instance)),
            deadline_s=deadline_s(task),
            instance=instance,
            attempt=attempt,
            row=self.log.task_started(instance, task.loop, attempt),
        )
        return self.driver.add(running)

    def _context(self, instance: Instance) -> Context:
        inputs = self.values.inputs_of(instance) if instance.task in self.flow.tasks else ()
        return Context(services=self.services, state=self.state, instance=instance, inputs=inputs, done=self.done)

    def _take_in(self, ended: list[Ended]) -> None:
        """First what went well: a repair may take back what depends on it."""
        for each in sorted(ended, key=lambda each: each.failure is not None):
            instance = each.running.instance
            assert instance is not None, "only tasks run beside each other"
            if each.failure is None:
                self._complete(each.running, instance, each.outcome)
            elif self._repair(each.running, instance, each.failure, each.error) == "rollback":
                return

    def _complete(self, running: Running, instance: Instance, outcome: Outcome) -> None:
        self.done = self.flow.after(self.done, instance)
        self.attempts.pop(instance, None)
        self.values.put(instance, outcome.values)
        self.values.drop_taken(self.done)
        self.log.task_completed(running, outcome, self.flow.tasks[instance.task], self.done)

    def _repair(self, running: Running, instance: Instance, failure: Failure, error: BaseException | None) -> Action:
        """Do what the task's restart class says, or stop the run. Returns what was done.

        The processes concerned are those that were waited for, which need not be of the task's own group: a rollout also waits
        for the host, a weight sync for the trainer.
        """
        task, restarts = self.flow.tasks[instance.task], self.state.restarts
        on_gpu = failure.slot in self.services.members
        if failure.cause == "overdue" and failure.slot:
            self.log.stacks(str(instance), self._members(failure.slot).stacks(STACKS_WAIT_S))
        action = action_for(task, failure, on_gpu=on_gpu, restarts=restarts, max_restarts=self.max_restarts)
        if action == "rebuild" and not can_rebuild(self.flow.graph, failure.slot):
            action = "rollback"
        self.log.task_failed(running, task, failure, action)
        if action == "stop":
            raise stopping(instance, failure, error, restarts, self.max_restarts)
        self.state.restarts += 1
        self.attempts[instance] = running.attempt + 1
        if action == "rollback":
            self._roll_back()
        elif action == "rebuild":
            return self._rebuild(instance, failure.slot)
        elif failure.cause != "raised":
            self._replace_host()
        return action

    def _members(self, slot: str) -> Members:
        return self.services.members.get(slot, self.services.host)

    def _rebuild(self, instance: Instance, group: str) -> Action:
        """Make engines anew and give them the weights they served; where those are gone, roll back."""
        try:
            self._wait_for("rebuild", rebuild(self._context(instance), self.crew, group))
        except RollbackNeededError:
            self._roll_back()
            return "rollback"
        self.log.event("actors_rebuilt", str(instance), group, pids=dict(self.crew.pids))
        return "rebuild"

    def _replace_host(self) -> None:
        """A new process for the host's tasks; whatever waited for the old one runs again."""
        for running in self.driver.drop(HOST):
            self.log.task_dropped(running)
        self._wait_for("a new host process", self.crew.replace_host())
        self.log.event("actors_rebuilt", "run", HOST, pids=dict(self.crew.pids))

    def _roll_back(self) -> None:
        """Give up all engines and go back to the newest good checkpoint."""
        self.driver.drop()
        if self.stop.requested:
            raise InterruptedRunError  # the checkpoint to go back to is the one to resume from
        self.attempts.clear()
        self.crew.dismiss()
        self.restore()
        place = (
            f"{self.loop} {min(self.done[task.name] for task in self.flow.loop_tasks[self.loop]) - 1}"
            if self.loop
            else "the start"
        )
        self.log.event("rolled_back", "run", place, restarts=self.state.restarts)

    def _wind_down(self) -> None:
        """Asked to stop: finish the iterations that have trained, save them, and leave. Raises InterruptedRunError."""
        if self.loop is None:
            raise InterruptedRunError  # nothing has run
        last = self._last_trained(self.loop)
        self.log.event("interrupted", "run", f"finish {self.loop} up to iteration {last}, then save")
        while any(self.done[task.name] <= last for task in self.flow.loop_tasks[self.loop]):
            self._start_ready(limit=last)
            self._take_in(self.driver.poll(POLL_S))
        cut = self.flow.cut(self.loop, last)
        if self.state.trainer_version and self.state.saved != cut:
            self._wait_for("save", save_now(self._context(Instance("interrupt", last)), self.loop, last, cut))
        raise InterruptedRunError

    def _last_trained(self, loop: str) -> int:
        """The last iteration of the loop whose training step is done or under way; -1 when there is none."""
        running = {running.instance.task for running in self.driver.running if running.instance is not None}
        trains = [task.name for task in self.flow.loop_tasks[loop] if task.kind == "train_step"]
        return max((self.done[name] - 1 + (name in running) for name in trains), default=-1)

    def _wait_for(self, name: str, operation: Waiting[Any]) -> Any:
        """Run a step of our own to its end; tasks that run go on meanwhile. RunError when it fails.

        Asked to stop before it is over, it raises InterruptedRunError: only tasks change what a checkpoint must hold.
        """
        stops_before = self.stop.count
        driver = Driver(self.log.waiting)
        ended = driver.add(Running(name=name, operation=operation, deadline_s=SETUP_DEADLINE_S))
        while ended is None:
            ended = next(iter(driver.poll(POLL_S)), None)
            if self.stop.count > stops_before:
                raise InterruptedRunError
        if ended.failure is None:
            return ended.outcome
        if isinstance(ended.error, RunError | RollbackNeededError):
            raise ended.error
        failure = ended.failure
        raise RunError("MP520", f"{name}: waiting for {failure.subject}: {failure.message}") from ended.error


def stopping(instance: Instance, failure: Failure, error: BaseException | None, restarts: int, limit: int) -> RunError:
    """Why the run stops."""
    if isinstance(error, RunError):
        return error
    code = "MP501" if failure.cause == "overdue" else "MP500"
    notes = (f"{restarts} of {limit} restarts were used",) if restarts else ()
    return RunError(code, f"{instance} failed while waiting for {failure.subject}: {failure.message}", notes=notes)
