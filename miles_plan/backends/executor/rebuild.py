"""Making rollout engines anew while the trainer lives: new processes, and the weights that the old ones served."""

from __future__ import annotations

from miles_plan.backends.executor.crew import Crew, component_of
from miles_plan.backends.executor.operations.operation import Context, Wait, Waiting, places
from miles_plan.backends.executor.operations.publish import publish
from miles_plan.backends.executor.operations.weight_sync import take_weights
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
    publication = context.state.published.get(version)
    if publication is None:
        if context.state.trainer_version != version:
            raise RollbackNeededError
        publication = yield from publish(context, version)
    members = crew.members[group]
    calls = members.call(take_weights, version, publication.buckets)
    acknowledged = yield Wait(f"{places(members)}: take weights version {version}", calls)
    if any(each != version for each in acknowledged):
        raise RollbackNeededError
    context.state.served[group] = version
