"""What an operation is: a generator that the driver advances, yielding what it waits for and returning what the task made.

So the driver is one thread that knows, for every task that runs, whom it waits for and since when.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from miles_plan.backends.executor.actors import Calls, Members
from miles_plan.backends.executor.dataflow import Dataflow, Done, Instance
from miles_plan.backends.executor.events import EventKind
from miles_plan.backends.executor.run_directory import RunDirectory
from miles_plan.backends.executor.run_state import RunState
from miles_plan.ir.plan import Plan
from miles_plan.ir.tasks import AnyTask, Payload


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait for the reports of these calls. subject: who is asked for what, as the event log and an overdue message name it."""

    subject: str
    calls: Calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a task made.

    values: by payload, what consumers get: a reference into the object store, or something small; figures: for the metrics;
    digest: of everything that later tasks see, to compare when the work is repeated; weight_version: which weights took part.
    """

    values: Mapping[Payload, Any] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    digest: str | None = None
    weight_version: int | None = None


T = TypeVar("T")
Waiting = Generator[Wait, list[Any], T]
Operation = Waiting[Outcome]


@dataclass(frozen=True, slots=True)
class Input:
    """One edge's value: the task it comes from, and all that its outcome holds."""

    src: AnyTask
    payload: Payload
    outcome: Mapping[Payload, Any]

    @property
    def value(self) -> Any:
        """What flows along the edge."""
        return self.outcome[self.payload]


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What is the same for every operation of a run. members: engines by group name;
    host: data, tokenizer and rewards; end_token: what ends a response; event: writes to the event log."""

    plan: Plan
    plan_sha256: str
    flow: Dataflow
    members: Mapping[str, Members]
    host: Members
    end_token: int
    directory: RunDirectory
    event: Callable[..., None]
    journal_row: Callable[[], int]
    unwritten_metrics: Callable[[str, int], list[dict[str, Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What one operation works with. done: as it was when the instance started."""

    services: Services
    state: RunState
    instance: Instance
    inputs: tuple[Input, ...]
    done: Done

    def all(self, payload: Payload) -> list[Input]:
        """Inputs of one payload, in the order of the graph's edges."""
        return [each for each in self.inputs if each.payload == payload]

    def value(self, payload: Payload) -> Any:
        """The value of the first input of that payload, None where there is none."""
        return next((each.value for each in self.inputs if each.payload == payload), None)

    @property
    def drawn(self) -> Any:
        """The prompts behind the samples that come in: whoever makes samples hands them on beside them."""
        return next(each.outcome["prompts"] for each in self.inputs if each.payload in ("prompts", "samples"))

    @property
    def flow(self) -> Dataflow:
        """The graph and its rules."""
        return self.services.flow

    @property
    def members(self) -> Mapping[str, Members]:
        """Engines by group name."""
        return self.services.members

    @property
    def host(self) -> Members:
        """The process of the host's tasks."""
        return self.services.host

    def event(self, kind: EventKind, subject: str, **fields: Any) -> None:
        """Write an event of which this instance is the owner."""
        self.services.event(kind, str(self.instance), subject, **fields)

    @property
    def group(self) -> Members:
        """The engine of the task's own group."""
        return self.members[self.task.group or ""]

    @property
    def task(self) -> AnyTask:
        """The task that runs."""
        return self.flow.tasks[self.instance.task]


def places(members: Members) -> str:
    """Who is asked: `@train ranks 0..3`."""
    count = len(members)
    return f"@{members.slot}" if count == 1 else f"@{members.slot} ranks 0..{count - 1}"
