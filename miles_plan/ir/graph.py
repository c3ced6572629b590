"""The task graph: frozen tasks and edges, and the facts known about them. A pass returns a new graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import networkx as nx

from miles_plan.ir.group import DeviceGroup
from miles_plan.ir.memory import MemoryTimeline
from miles_plan.ir.tasks import AnyTask, Edge, Task

Fact = Literal["logical", "placed", "aligned", "sized", "synced", "priced", "guarded", "scheduled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """Tasks that repeat together. Loops run one after the other, in the order the graph lists them."""

    name: str
    iterations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskGraph:
    """One iteration of each loop of a job, and what has been decided about it so far.

    tasks keep the order in which passes added them; iteration order is `topological`. memory is empty until `sized`.
    """

    name: str
    loops: tuple[Loop, ...]
    groups: tuple[DeviceGroup, ...] = ()
    tasks: tuple[AnyTask, ...] = ()
    edges: tuple[Edge, ...] = ()
    memory: tuple[MemoryTimeline, ...] = ()
    facts: frozenset[Fact] = frozenset()

    def __post_init__(self) -> None:
        """Put edges in one canonical order, that of the tasks they end in, so that equal graphs compare equal."""
        rank = {task.name: index for index, task in enumerate(self.tasks)}
        edges = sorted(self.edges, key=lambda edge: rank.get(edge.dst, len(rank)))
        object.__setattr__(self, "edges", tuple(edges))

    def task(self, name: str) -> AnyTask:
        """The task of that name. KeyError if there is none."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise KeyError(name)

    def group(self, name: str) -> DeviceGroup:
        """The group of that name. KeyError if there is none."""
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)

    def loop(self, name: str) -> Loop:
        """The loop of that name. KeyError if there is none."""
        for loop in self.loops:
            if loop.name == name:
                return loop
        raise KeyError(name)

    def of_kind(self, *kinds: type[Task]) -> list[AnyTask]:
        """Tasks of these kinds, in order."""
        return [task for task in self.tasks if isinstance(task, kinds)]

    def inputs_of(self, name: str) -> list[Edge]:
        """Edges into a task, in order."""
        return [edge for edge in self.edges if edge.dst == name]

    def outputs_of(self, name: str) -> list[Edge]:
        """Edges out of a task, in order."""
        return [edge for edge in self.edges if edge.src == name]

    def within_iteration(self) -> nx.DiGraph[str]:
        """The frozen networkx graph of edges that hold within one iteration of one loop."""
        digraph: nx.DiGraph[str] = nx.DiGraph()
        digraph.add_nodes_from(task.name for task in self.tasks)
        loop_of = {task.name: task.loop for task in self.tasks}
        digraph.add_edges_from(
            (edge.src, edge.dst) for edge in self.edges if edge.distance == 0 and loop_of.get(edge.src) == loop_of.get(edge.dst)
        )
        frozen: nx.DiGraph[str] = nx.freeze(digraph)
        return frozen

    def topological(self, loop: str | None = None) -> list[AnyTask]:
        """Tasks in an order that respects every edge of an iteration; ties keep the order of `tasks`."""
        rank = {task.name: index for index, task in enumerate(self.tasks)}
        order = nx.lexicographical_topological_sort(self.within_iteration(), key=rank.__getitem__)
        by_name = {task.name: task for task in self.tasks}
        return [by_name[name] for name in order if loop is None or by_name[name].loop == loop]

    def with_facts(self, facts: Iterable[Fact]) -> TaskGraph:
        """The same graph, knowing more."""
        return replace(self, facts=self.facts | frozenset(facts))

    def with_tasks(self, tasks: Sequence[AnyTask], edges: Sequence[Edge] = ()) -> TaskGraph:
        """Tasks and edges added at the end. ValueError for a name that is taken."""
        taken = {task.name for task in self.tasks}
        for task in tasks:
            if task.name in taken:
                raise ValueError(f"task '{task.name}' is already in the graph")
            taken.add(task.name)
        return replace(self, tasks=(*self.tasks, *tasks), edges=(*self.edges, *edges))

    def with_replaced(self, *tasks: AnyTask) -> TaskGraph:
        """Tasks of the same names put in the place of the old ones."""
        new = {task.name: task for task in tasks}
        if unknown := set(new) - {task.name for task in self.tasks}:
            raise KeyError(", ".join(sorted(unknown)))
        return replace(self, tasks=tuple(new.get(task.name, task) for task in self.tasks))

    def without_edges(self, edges: Iterable[Edge]) -> TaskGraph:
        """The graph with these edges taken out."""
        gone = set(edges)
        return replace(self, edges=tuple(edge for edge in self.edges if edge not in gone))

    def with_edges(self, edges: Iterable[Edge]) -> TaskGraph:
        """The graph with these edges added, repeats left out."""
        return replace(self, edges=tuple(dict.fromkeys((*self.edges, *edges))))
