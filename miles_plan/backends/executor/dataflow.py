"""The scheduler, without Ray and without a clock: which instances of tasks may start, given what is done.

An instance is a task in one iteration of its loop. The rules, each of which makes results independent of timing:

- Loops run one after the other; an instance waits for the instances its edges name, `distance` iterations back.
- Program order (loop, iteration, topological rank) is kept among tasks that hold a common GPU. An engine has state, so the
  order in which tasks touch it is part of the result; and since every wait points backwards in program order, nothing can
  deadlock.
- A task's instances run in order of iteration, so "done" is one number a task.
- An iteration starts only when the one `window + 1` before it is over: prefetching is bounded even where no edge bounds it.
- A checkpoint is a cut: it waits for everything of its iteration that does not come after it.

Tasks with `every` > 1 have no instance in the iterations between; whoever waits for such an instance waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import networkx as nx

from miles_plan.ir.graph import TaskGraph
from miles_plan.ir.tasks import AnyTask, Buffer, Checkpoint, FilterGroups, Prompts, Rollout, Task, TrainStep, WeightSync

T = TypeVar("T", bound=Task)


@dataclass(frozen=True, slots=True)
class Instance:
    """A task in one iteration of its loop."""

    task: str
    iteration: int

    def __str__(self) -> str:
        """`rollout@3`."""
        return f"{self.task}@{self.iteration}"

    @classmethod
    def parse(cls, text: str) -> Instance:
        """The instance that prints as `text`."""
        task, _, iteration = text.rpartition("@")
        return cls(task, int(iteration))


@dataclass(frozen=True, slots=True)
class Wait:
    """`dst` in iteration i waits for `src` in iteration i - distance; across loops, for all of `src`."""

    src: str
    dst: str
    distance: int


Done = Mapping[str, int]  # per task: how many iterations of its loop are behind it


class Dataflow:
    """The rules applied to one graph. Immutable; the state is the mapping `done` that callers keep."""

    def __init__(self, graph: TaskGraph) -> None:
        """Precompute who waits for whom and who holds which GPUs. The graph must be placed."""
        self.graph = graph
        self.tasks: dict[str, AnyTask] = {name: graph.task(name) for name in program_order(graph)}
        self.rank = {name: index for index, name in enumerate(self.tasks)}
        self.iterations = {loop.name: loop.iterations for loop in graph.loops}
        self.loop_tasks = {loop.name: [task for task in self.tasks.values() if task.loop == loop.name] for loop in graph.loops}
        self.holds = {name: gpus_held(graph, task) for name, task in self.tasks.items()}

    @cached_property
    def waits(self) -> Mapping[str, tuple[Wait, ...]]:
        """For each task, what it waits for: the graph's edges and the orders they imply."""
        found: dict[str, list[Wait]] = {name: [] for name in self.tasks}
        for wait in (*_edge_waits(self.graph), *_buffer_waits(self.graph), *_refill_waits(self.graph), *_cut_waits(self.graph)):
            found[wait.dst].append(wait)
        return {name: tuple(dict.fromkeys(waits)) for name, waits in found.items()}

    @cached_property
    def sharing(self) -> Mapping[str, tuple[str, ...]]:
        """For each task, the other tasks of its loop that hold one of its GPUs."""
        return {
            name: tuple(
                other.name
                for other in self.loop_tasks[task.loop]
                if other.name != name and self.holds[other.name] & self.holds[name]
            )
            for name, task in self.tasks.items()
        }

    @cached_property
    def window(self) -> Mapping[str, int]:
        """For each loop, how many iterations may be under way beyond the oldest one: its longest edge, at least 1."""
        longest = dict.fromkeys(self.iterations, 1)
        for edge in self.graph.edges:
            loop = self.tasks[edge.dst].loop
            longest[loop] = max(longest[loop], edge.distance)
        return longest

    def runs(self, task: str, iteration: int) -> bool:
        """Whether the task has an instance in that iteration."""
        each = self.tasks[task]
        return (iteration + 1) % each.every == 0 or iteration + 1 == self.iterations[each.loop]

    def start(self) -> dict[str, int]:
        """`done` before anything has run."""
        return self.settled(dict.fromkeys(self.tasks, 0))

    def settled(self, done: Done) -> dict[str, int]:
        """`done` moved past iterations in which tasks have no instance."""
        moved = dict(done)
        for name, task in self.tasks.items():
            while moved[name] < self.iterations[task.loop] and not self.runs(name, moved[name]):
                moved[name] += 1
        return moved

    def after(self, done: Done, instance: Instance) -> dict[str, int]:
        """`done` once `instance` is complete. ValueError if it was not the task's next one."""
        if done[instance.task] != instance.iteration:
            raise ValueError(f"{instance} completed, but {instance.task}@{done[instance.task]} is next")
        return self.settled({**done, instance.task: instance.iteration + 1})

    def ready(self, done: Done, running: Iterable[Instance]) -> tuple[Instance, ...]:
        """The instances that may start now, in program order."""
        busy = {instance.task for instance in running}
        loop = self.current_loop(done)
        if loop is None:
            return ()
        found = [
            Instance(task.name, done[task.name])
            for task in self.loop_tasks[loop]
            if task.name not in busy and self.may_start(Instance(task.name, done[task.name]), done)
        ]
        return tuple(sorted(found, key=lambda each: (each.iteration, self.rank[each.task])))

    def may_start(self, instance: Instance, done: Done) -> bool:
        """Whether everything the instance waits for is behind it."""
        last = self.iterations[self.tasks[instance.task].loop] - 1
        return instance.iteration <= last and next(self.blockers(instance, done), None) is None

    def blockers(self, instance: Instance, done: Done) -> Iterator[Instance]:
        """The instances that must complete before this one may start; the ones to name when someone asks why it waits."""
        name, iteration = instance.task, instance.iteration
        loop = self.tasks[name].loop
        for wait in self.waits[name]:
            yield from self._behind(wait.src, iteration - wait.distance if self.tasks[wait.src].loop == loop else None, done)
        for other in self.sharing[name]:
            yield from self._behind(other, iteration if self.rank[other] < self.rank[name] else iteration - 1, done)
        if iteration > self.window[loop]:
            for each in self.loop_tasks[loop]:
                yield from self._behind(each.name, iteration - self.window[loop] - 1, done)

    def _behind(self, task: str, iteration: int | None, done: Done) -> Iterator[Instance]:
        """The instance `task` still has to complete to be past `iteration` (None: its whole loop), if there is one."""
        last = self.iterations[self.tasks[task].loop] - 1 if iteration is None else iteration
        if done[task] <= last:
            yield Instance(task, done[task])

    def current_loop(self, done: Done) -> str | None:
        """The first loop that is not over, None at the end of the run."""
        for loop, tasks in self.loop_tasks.items():
            if any(done[task.name] < self.iterations[loop] for task in tasks):
                return loop
        return None

    def finished(self, done: Done) -> bool:
        """Whether nothing is left to run."""
        return self.current_loop(done) is None

    def cut(self, loop: str, iteration: int, checkpoint: str | None = None) -> dict[str, int]:
        """`done` right after a checkpoint in that iteration: all up to it, less what comes after the checkpoint task itself."""
        later = set(nx.descendants(self.graph.within_iteration(), checkpoint)) if checkpoint else set()
        done = dict.fromkeys(self.tasks, 0)
        for name, tasks in self.loop_tasks.items():
            for task in tasks:
                done[task.name] = self.iterations[name] if name != loop else iteration + (task.name not in later)
            if name == loop:
                break
        return self.settled(done)


def program_order(graph: TaskGraph) -> list[str]:
    """Task names in an order that respects an iteration's edges and the cut of a checkpoint; ties keep the graph's order."""
    order = nx.DiGraph(graph.within_iteration())
    order.add_edges_from((wait.src, wait.dst) for wait in _cut_waits(graph))
    position = {task.name: index for index, task in enumerate(graph.tasks)}
    return list(nx.lexicographical_topological_sort(order, key=position.__getitem__))


def gpus_held(graph: TaskGraph, task: AnyTask) -> frozenset[int]:
    """GPUs that run the task: its group's, and those of an engine it calls besides.

    A weight sync one iteration behind its trainer exports from that trainer; a filter that draws more groups samples again.
    """
    groups = {task.group}
    if isinstance(task, WeightSync):
        near = [edge for edge in graph.inputs_of(task.name) if edge.carries == "weights" and edge.distance <= 1]
        groups |= {graph.task(edge.src).group for edge in near}
    if isinstance(task, FilterGroups):
        groups |= {each.group for each in graph.of_kind(Rollout) if each.loop == task.loop}
    spans = [graph.group(name).gpus for name in groups if name is not None]
    return frozenset(gpu for span in spans if span is not None for gpu in range(span.first, span.end))


def _edge_waits(graph: TaskGraph) -> Iterator[Wait]:
    for edge in graph.edges:
        yield Wait(edge.src, edge.dst, edge.distance)


def _buffer_waits(graph: TaskGraph) -> Iterator[Wait]:
    """A buffer holds so many samples: the one that would not fit waits until training has taken an earlier one."""
    for buffer in tasks_of(graph, Buffer):
        fits = buffer.capacity_samples // max(1, samples_per_iteration(graph, buffer.loop))
        for train in graph.of_kind(TrainStep):
            if train.loop == buffer.loop:
                yield Wait(train.name, buffer.name, max(1, fits))


def _refill_waits(graph: TaskGraph) -> Iterator[Wait]:
    """A filter that draws more prompts moves the data cursor: the next draw waits for it."""
    for each in graph.of_kind(FilterGroups):
        for prompts in graph.of_kind(Prompts):
            if prompts.loop == each.loop:
                yield Wait(each.name, prompts.name, 1)


def _cut_waits(graph: TaskGraph) -> Iterator[Wait]:
    """A checkpoint waits for all of its iteration but what comes after it."""
    within = graph.within_iteration()
    for checkpoint in graph.of_kind(Checkpoint):
        later = nx.descendants(within, checkpoint.name)
        for task in graph.tasks:
            if task.loop == checkpoint.loop and task.name not in later and not isinstance(task, Checkpoint):
                yield Wait(task.name, checkpoint.name, 0)


def samples_per_iteration(graph: TaskGraph, loop: str) -> int:
    """Samples that one iteration of the loop trains on: prompts kept times samples of each."""
    limits = [*((each.loop, each.keep_prompts) for each in tasks_of(graph, FilterGroups))]
    limits += [(each.loop, each.keep_prompts) for each in tasks_of(graph, Rollout)]
    kept = [count for where, count in limits if where == loop and count]
    prompts = [task for task in tasks_of(graph, Prompts) if task.loop == loop]
    if not prompts:
        return 0
    return (min(kept) if kept else prompts[0].prompts_per_step) * prompts[0].samples_per_prompt


def tasks_of(graph: TaskGraph, kind: type[T]) -> list[T]:
    """Tasks of one kind, in order, as that kind."""
    return [task for task in graph.tasks if isinstance(task, kind)]
