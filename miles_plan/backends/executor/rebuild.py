"""Making rollout engines anew while the trainer lives: new processes, and the weights that the old ones served."""

from __future__ import annotations

from miles_plan.backends.engine import EngineError
from miles_plan.backends.executor.crew import Crew, component_of
from miles_plan.backends.executor.operations.deliver import deliver
from miles_plan.backends.executor.operations.operation import Context, Waiting
from miles_plan.ir.graph import TaskGraph
from miles_plan.ir.tasks import WeightSync


class RollbackNeededError(Exception):
    """The weights that the engines served are nowhere any more."""


def can_rebuild(graph: TaskGraph, group: str) -> bool:
    """Whether the group's processes hold no trainer: a trainer's state comes back from a checkpoint only."""
    return not any(graph.group(name).role == "train" for name in component_of(graph, group).groups)


def rebuild(context: Context, crew: Crew, group: str) -> Waiting[None]:
    """New engines for a rollout group, serving what they served. RollbackNeededError where that is gone."""
    version = context.state.served.get(group)
    context.state.served[group] = None
    yield from crew.replace_engines(component_of(context.flow.graph, group))
    if isinstance(context.task, WeightSync) or version is None:
        return  # the task brings its own
    if version not in context.state.published and context.state.trainer_version != version:
        raise RollbackNeededError
    try:
        yield from deliver(context, crew.members[group], version)
    except EngineError as error:
        raise RollbackNeededError from error
    context.state.served[group] = version
