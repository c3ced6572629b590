"""What the driver knows about the run beyond which instances are done: versions, published weights, the data cursor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from miles_plan.backends.executor.dataflow import Dataflow, Done, Instance
from miles_plan.ir.graph import TaskGraph
from miles_plan.ir.tasks import Checkpoint, TrainStep, WeightSync

Version = int  # how many training steps of the policy made these weights; 0 = those the run starts with


@dataclass(frozen=True, slots=True)
class Publication:
    """Weights that a trainer has put where rollout engines can take them."""

    group: str
    buckets: Sequence[Any]
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Link:
    """A process group in which a trainer sends weights. actors: who is in it; made anew, they must meet again."""

    actors: Any
    name: str


@dataclass
class RunState:
    """Mutable, and only the driver's loop changes it.

    trainer_version: of the policy as the trainer holds it; published: weights waiting to be taken, by version; weights_made:
    the version each training step and sync left behind, by instance; served: what the rollout engines acknowledged, by group,
    None while they have nothing to serve; cursors: rows drawn when a Prompts task's iteration was over, by instance; saved: the
    cut of the newest checkpoint; links: process groups with the trainer, by rollout group.
    """

    trainer_version: Version = 0
    published: dict[Version, Publication] = field(default_factory=dict)
    weights_made: dict[Instance, Version] = field(default_factory=dict)
    served: dict[str, Version | None] = field(default_factory=dict)
    cursors: dict[Instance, int] = field(default_factory=dict)
    saved: dict[str, int] | None = None
    restarts: int = 0
    links: dict[str, Link] = field(default_factory=dict)

    def cursor_before(self, prompts: str, iteration: int) -> int:
        """Rows that a Prompts task drew in all iterations before this one."""
        return self.cursors[Instance(prompts, iteration - 1)] if iteration else 0

    def version_before(self, flow: Dataflow, loop: str, iteration: int) -> Version:
        """The version that the policy's training step of this iteration starts from: one more for each step of the loop."""
        train = next(task for task in flow.graph.of_kind(TrainStep) if task.loop == loop)
        made = [each for each in self.weights_made if each.task == train.name and each.iteration < iteration]
        if not made:
            return self.trainer_version + iteration
        last = max(made, key=lambda each: each.iteration)
        return self.weights_made[last] + iteration - 1 - last.iteration

    def at_cut(self, flow: Dataflow, done: Done) -> tuple[dict[Instance, int], dict[Instance, Version]]:
        """The cursors and versions that whoever continues from `done` can ask for."""
        cursors = {made: rows for made, rows in self.cursors.items() if made.iteration == done[made.task] - 1}
        versions = {
            made: version
            for made, version in self.weights_made.items()
            if done[made.task] - flow.window[flow.tasks[made.task].loop] <= made.iteration < done[made.task]
        }
        return cursors, versions


def wanted_version(graph: TaskGraph, sync: str, iteration: int, made: Mapping[Instance, Version]) -> Version:
    """The version that a sync of that iteration delivers: what its trainer made `distance` iterations back.

    Before that, what the loop before left behind, and 0 where there is none. KeyError while a training step that makes it has
    yet to run.
    """
    loop = graph.task(sync).loop
    version = 0
    for edge in graph.inputs_of(sync):
        if edge.carries != "weights":
            continue
        source = _trainer_behind(graph, edge.src)
        if graph.task(source).loop != loop:
            version = max(version, made[Instance(source, graph.loop(graph.task(source).loop).iterations - 1)])
        elif iteration - edge.distance >= 0:
            version = max(version, made[Instance(source, iteration - edge.distance)])
    return version


def _trainer_behind(graph: TaskGraph, name: str) -> str:
    """The training step whose weights a task hands on."""
    while not isinstance(graph.task(name), TrainStep):
        name = next(edge.src for edge in graph.inputs_of(name) if edge.carries == "weights")
    return name


def publishes(graph: TaskGraph, train: str) -> bool:
    """Whether a training step's weights are asked for after the next one has run, so must be published before it."""
    return any(
        edge.carries == "weights" and edge.distance > 1 and _is_sync(graph, edge.dst) for edge in graph.outputs_of(train)
    )


def _is_sync(graph: TaskGraph, name: str) -> bool:
    return isinstance(graph.task(name), WeightSync)


def still_wanted(flow: Dataflow, done: Done, state: RunState) -> set[Version]:
    """Versions that a sync to come will take, or that a checkpoint to come must hold so that a resume can serve them.

    A checkpoint in iteration k is followed by syncs k + 1, k + 2, ..., of which those within the edge's distance take versions
    older than the one it saves; it runs when its trainer gets there, which may be after those syncs took theirs.
    """
    wanted: set[Version] = set()
    for sync in flow.graph.of_kind(WeightSync):
        distance = max((edge.distance for edge in flow.graph.inputs_of(sync.name) if edge.carries == "weights"), default=0)
        first = done[sync.name]
        for checkpoint in flow.graph.of_kind(Checkpoint):
            if checkpoint.loop == sync.loop:
                first = min(first, done[checkpoint.name] + 1)
        last = min(done[sync.name] + distance, flow.iterations[sync.loop])
        for iteration in range(max(0, first), last):
            try:
                wanted.add(wanted_version(flow.graph, sync.name, iteration, state.weights_made))
            except KeyError:
                break  # not made yet, and so neither are later ones
    return wanted
