"""What tasks made and others still have to take: references into the object store, dropped when the last taker is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles_plan.backends.executor.dataflow import Dataflow, Done, Instance
from miles_plan.backends.executor.operations.operation import Input


class Values:
    """Outcomes by instance."""

    def __init__(self, flow: Dataflow) -> None:
        """Nothing is made yet."""
        self.flow = flow
        self._held: dict[Instance, Mapping[Any, Any]] = {}

    def __len__(self) -> int:
        """How many outcomes are held."""
        return len(self._held)

    def put(self, instance: Instance, outcome: Mapping[Any, Any]) -> None:
        """Keep what an instance made, if anything."""
        if outcome:
            self._held[instance] = outcome

    def inputs_of(self, instance: Instance) -> tuple[Input, ...]:
        """What flows into an instance, edge by edge; edges that carry order, or whose source has not run yet, bring nothing."""
        found = []
        for edge in self.flow.graph.inputs_of(instance.task):
            source = self.source(edge.src, instance, edge.distance)
            outcome = self._held.get(source) if source is not None and edge.carries != "order" else None
            if outcome is not None and edge.carries in outcome:
                found.append(Input(self.flow.tasks[edge.src], edge.carries, outcome))
        return tuple(found)

    def source(self, src: str, instance: Instance, distance: int) -> Instance | None:
        """The instance whose value an edge brings: the last one that ran by then. None before the first."""
        loop = self.flow.tasks[src].loop
        same = loop == self.flow.tasks[instance.task].loop
        latest = instance.iteration - distance if same else self.flow.iterations[loop] - 1
        while latest >= 0 and not self.flow.runs(src, latest):
            latest -= 1
        return Instance(src, latest) if latest >= 0 else None

    def drop_taken(self, done: Done) -> None:
        """Let go of outcomes that nobody will ask for again."""
        for instance in [each for each in self._held if not self._still_asked(each, done)]:
            del self._held[instance]

    def _still_asked(self, instance: Instance, done: Done) -> bool:
        """Whether a task to come takes it: until the source runs again within its loop, its last run in later loops."""
        loop = self.flow.tasks[instance.task].loop
        following = instance.iteration + 1
        while following < self.flow.iterations[loop] and not self.flow.runs(instance.task, following):
            following += 1
        is_last = following == self.flow.iterations[loop]
        for edge in self.flow.graph.outputs_of(instance.task):
            taker = self.flow.tasks[edge.dst].loop
            end = self.flow.iterations[taker] - 1
            last = end if taker != loop else min(end, following + edge.distance - 1)
            if edge.carries != "order" and done[edge.dst] <= last and (taker == loop or is_last):
                return True
        return False
