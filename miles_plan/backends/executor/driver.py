"""The driver's event loop: advances every running operation as its calls come back, and knows whom each one waits for."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from miles_plan.backends.executor.dataflow import Instance
from miles_plan.backends.executor.deadlines import Cause, Failure
from miles_plan.backends.executor.failures import RunError
from miles_plan.backends.executor.operations.operation import Wait

LONGEST_TEXT = 500
PEERS_WAIT_S = 5.0  # how long the other ranks get to come back after one has failed, before they count as stuck


@dataclass
class Running:
    """An operation under way. deadline_at and since are of `time.monotonic`, started_at is of `time.time`.

    peak_bytes: the most that a GPU of its processes held, of all that is on it; 0 where none was watched.
    """

    name: str
    operation: Generator[Wait, list[Any], Any]
    deadline_s: float
    instance: Instance | None = None
    attempt: int = 0
    row: int = 0
    started_at: float = field(default_factory=time.time)
    deadline_at: float = 0.0
    wait: Wait | None = None
    since: float = 0.0
    pending: dict[Any, int] = field(default_factory=dict)
    reports: list[Any] = field(default_factory=list)
    slowest_s: float = 0.0
    busy_s: float = 0.0
    peak_bytes: int = 0

    @property
    def age_s(self) -> float:
        """Seconds since what it waits for was asked."""
        return time.monotonic() - self.since

    def failed(self, cause: Cause, message: str, place: int = 0) -> Failure:
        """How it failed, with what it was waiting for; place: whose report it was, where one failed."""
        slot, subject = (self.wait.calls.owner(place), self.wait.subject) if self.wait else ("", self.name)
        return Failure(cause=cause, slot=slot, subject=subject, message=message, age_s=self.age_s if self.wait else 0.0)


@dataclass(frozen=True, slots=True)
class Ended:
    """An operation that is over: its outcome, or how it failed."""

    running: Running
    outcome: Any = None
    failure: Failure | None = None
    error: BaseException | None = None


class Driver:
    """Holds what runs. `on_wait` hears of every new wait."""

    def __init__(self, on_wait: Callable[[Running], None]) -> None:
        """Nothing runs yet."""
        self.running: list[Running] = []
        self._on_wait = on_wait

    def add(self, running: Running) -> Ended | None:
        """Start an operation; returns its end if it waits for nothing."""
        running.deadline_at = time.monotonic() + running.deadline_s
        self.running.append(running)
        return self._advance(running, None)

    def poll(self, timeout_s: float) -> list[Ended]:
        """Take in calls that have come back, waiting at most so long for the first; returns operations that ended by it."""
        import ray

        waiting = {ref: running for running in self.running for ref in running.pending}
        if not waiting:
            return []
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=timeout_s, fetch_local=False)
        ended = [end for ref in ready if (end := self._take_in(waiting[ref], ref)) is not None]
        return ended + self._overdue()

    def drop(self, slot: str | None = None) -> list[Running]:
        """Forget what waits for a slot, or everything that runs; returns it."""
        dropped = [each for each in self.running if slot is None or (each.wait is not None and each.wait.calls.slot == slot)]
        for running in dropped:
            self._end(running)
        return dropped

    def _take_in(self, running: Running, ref: Any) -> Ended | None:
        import ray

        place = running.pending.pop(ref)
        try:
            timed = ray.get(ref)
        except Exception as error:
            return self._end(running, failure=self._failure_of_call(running, error, place), error=error)
        running.reports[place] = timed.report
        running.slowest_s = max(running.slowest_s, timed.seconds)
        running.peak_bytes = max(running.peak_bytes, timed.peak_bytes)
        if running.pending:
            return None
        running.busy_s += running.slowest_s
        return self._advance(running, running.reports)

    def _advance(self, running: Running, reports: list[Any] | None) -> Ended | None:
        """Let the operation go on until it waits again or ends."""
        while True:
            try:
                wait = next(running.operation) if reports is None else running.operation.send(reports)
            except StopIteration as stop:
                return self._end(running, outcome=stop.value)
            except Exception as error:
                cause: Cause = "refused" if isinstance(error, RunError) else "raised"
                return self._end(running, failure=running.failed(cause, _text(error)), error=error)
            running.wait, running.since, running.slowest_s = wait, time.monotonic(), 0.0
            running.pending = {ref: index for index, ref in enumerate(wait.calls.reports)}
            running.reports = [None] * len(running.pending)
            if running.pending:
                self._on_wait(running)
                return None
            reports = []

    def _failure_of_call(self, running: Running, error: BaseException, place: int) -> Failure:
        """One rank failed: whether its process lives, and whether the others have come back too."""
        from ray.exceptions import RayActorError

        cause: Cause = "died" if isinstance(error, RayActorError) else "raised"
        if cause == "raised" and not self._peers_came_back(running):
            cause = "died"
        return running.failed(cause, _text(error), place)

    def _peers_came_back(self, running: Running) -> bool:
        import ray

        if not running.pending:
            return True
        _, stuck = ray.wait(list(running.pending), num_returns=len(running.pending), timeout=PEERS_WAIT_S, fetch_local=False)
        return not stuck

    def _overdue(self) -> list[Ended]:
        now = time.monotonic()
        late = [running for running in self.running if now > running.deadline_at]
        return [self._end(running, failure=running.failed("overdue", _overdue_text(running))) for running in late]

    def _end(self, running: Running, **result: Any) -> Ended:
        self.running.remove(running)
        running.operation.close()
        return Ended(running, **result)


def _overdue_text(running: Running) -> str:
    return f"no answer after {running.age_s:.1f} s; the task may take {running.deadline_s:.1f} s"


def _text(error: BaseException) -> str:
    """What went wrong in a line: the cause inside a worker's exception, without its traceback."""
    cause = getattr(error, "cause", None) or error
    name = type(cause).__name__
    text = (str(cause).strip() or name).splitlines()[0][:LONGEST_TEXT]
    return text if isinstance(cause, RunError) or name in text else f"{name}: {text}"
