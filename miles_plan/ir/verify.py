"""The verifier: what each fact demands of a graph. It runs after every pass; what it finds is our bug, not the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import networkx as nx

from miles_plan.ir.critical_path import end_s, start_s
from miles_plan.ir.graph import Fact, TaskGraph
from miles_plan.ir.group import gpus_in_use
from miles_plan.ir.tasks import Logprobs, ReplayRouting, Rollout, TrainStep, WeightSync
from miles_plan.ir.text import to_text


class VerifyError(AssertionError):
    """A graph breaks an invariant it claims: names the pass, the invariants, and shows the graph around the fault."""

    def __init__(self, after: str, problems: list[str], graph: TaskGraph) -> None:
        self.after, self.problems = after, problems
        listed = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"after '{after}' the graph is not valid:\n{listed}\n{to_text(graph)}")


def verify(graph: TaskGraph, *, num_gpus: int, after: str) -> None:
    """Check everything the graph's facts promise on a cluster of `num_gpus`. VerifyError names what does not hold."""
    problems = list(structure_problems(graph))
    if not problems:
        for fact, demand in DEMANDS.items():
            if fact in graph.facts:
                problems += demand(graph, num_gpus)
    if problems:
        raise VerifyError(after, problems, graph)


def structure_problems(graph: TaskGraph) -> Iterator[str]:
    """What must hold of every graph: names are unique, edges end in tasks, loops exist, no cycle within an iteration."""
    names = [task.name for task in graph.tasks]
    yield from (f"task '{name}' appears {names.count(name)} times" for name in sorted(set(names)) if names.count(name) > 1)
    loops = {loop.name for loop in graph.loops}
    groups = {group.name for group in graph.groups}
    for task in graph.tasks:
        if task.loop not in loops:
            yield f"%{task.name}: no loop '{task.loop}'"
        if task.group is not None and task.group not in groups:
            yield f"%{task.name}: no group @{task.group}"
        yield from (f"%{task.name}: {problem}" for problem in task.problems())
    for edge in graph.edges:
        missing = [name for name in (edge.src, edge.dst) if name not in names]
        yield from (f"edge %{edge.src} -> %{edge.dst}: no task '{name}'" for name in missing)
        if edge.distance < 0:
            yield f"edge %{edge.src} -> %{edge.dst}: distance {edge.distance} is negative"
    if not nx.is_directed_acyclic_graph(graph.within_iteration()):
        cycle = nx.find_cycle(graph.within_iteration())
        yield "cycle within an iteration: " + " -> ".join(f"%{src}" for src, _ in cycle)


def _logical(graph: TaskGraph, num_gpus: int) -> Iterator[str]:
    """Edges carry what their ends give and take; every needed input is there; loops run at least once."""
    for loop in graph.loops:
        if loop.iterations < 1:
            yield f"loop '{loop.name}' has {loop.iterations} iterations"
    for edge in graph.edges:
        src, dst = graph.task(edge.src), graph.task(edge.dst)
        if edge.carries != "order" and edge.carries not in src.gives:
            yield f"%{edge.src} does not give {edge.carries} (to %{edge.dst})"
        if edge.carries not in dst.takes:
            yield f"%{edge.dst} does not take {edge.carries} (from %{edge.src})"
    for task in graph.tasks:
        present = {edge.carries for edge in graph.inputs_of(task.name)}
        yield from (f"%{task.name} needs {payload}" for payload in sorted(task.needs - present))


def _placed(graph: TaskGraph, num_gpus: int) -> Iterator[str]:
    """Every task has a group of a role it can run on; every group's layout divides and fits the cluster."""
    for group in graph.groups:
        yield from group.problems(num_gpus)
    for task in graph.tasks:
        if task.group is None:
            yield f"%{task.name} has no group"
        elif (role := graph.group(task.group).role) not in task.roles:
            yield f"%{task.name} runs on roles {sorted(task.roles)}, @{task.group} is '{role}'"
    if gpus_in_use(graph.groups) > num_gpus:
        yield f"groups hold {gpus_in_use(graph.groups)} GPUs, the cluster has {num_gpus}"


def _aligned(graph: TaskGraph, num_gpus: int) -> Iterator[str]:
    """Who replays routing gets it, and what is recorded is replayed somewhere."""
    for task in graph.of_kind(TrainStep, Logprobs):
        gets_routing = any(edge.carries == "routing" for edge in graph.inputs_of(task.name))
        if getattr(task, "replay_routing", False) != gets_routing:
            yield f"%{task.name}: replay_routing={not gets_routing} but routing {'arrives' if gets_routing else 'does not'}"
    for task in graph.of_kind(Rollout):
        records = isinstance(task, Rollout) and task.record_routing
        if records and not graph.of_kind(ReplayRouting):
            yield f"%{task.name} records routing that nothing replays"


def _sized(graph: TaskGraph, num_gpus: int) -> Iterator[str]:
    """Every GPU in use has a timeline, and no phase is over capacity."""
    for timeline in graph.memory:
        yield from timeline.problems()
    for group in graph.groups:
        if group.gpus is None:
            continue
        for place in ("gpu", "host"):
            if not any(t.place == place and t.gpus.overlaps(group.gpus) for t in graph.memory):
                yield f"@{group.name}: no {place} memory timeline"


def _synced(graph: TaskGraph, num_gpus: int) -> Iterator[str]:
    """Every rollout consumes weights that a sync delivered, and every sync has a transport."""
    for task in graph.tasks:
        if isinstance(task, WeightSync) and task.transport is None:
            yield f"%{task.name} has no transport"
        for edge in graph.inputs_of(task.name):
            served = "rollout" in task.roles and edge.carries == "weights" and not isinstance(task, WeightSync)
            if served and not isinstance(graph.task(edge.src), WeightSync):
                yield f"%{task.name} takes weights from %{edge.src}, which no sync delivered"


def _priced(graph: TaskGraph, num_gpus: int) -> Iterator[str]:
    """Every task has an estimate whose interval is in order."""
    for task in graph.tasks:
        if task.estimate is None:
            yield f"%{task.name} has no estimate"
        elif not 0.0 <= task.estimate.low_s <= task.estimate.mid_s <= task.estimate.high_s:
            yield f"%{task.name}: estimate {task.estimate} is not an interval"


def _guarded(graph: TaskGraph, num_gpus: int) -> Iterator[str]:
    """Every task has a deadline and a restart class."""
    for task in graph.tasks:
        if task.deadline_s is None or task.restart is None:
            yield f"%{task.name} has no deadline or no restart class"


def _scheduled(graph: TaskGraph, num_gpus: int) -> Iterator[str]:
    """Every task has a start, after what it waits for, and GPUs run one task at a time."""
    for task in graph.tasks:
        if task.start_s is None or task.estimate is None:
            yield f"%{task.name} has no start or no estimate"
            return
    loop_of = {task.name: task.loop for task in graph.tasks}
    for edge in graph.edges:
        src, dst = graph.task(edge.src), graph.task(edge.dst)
        if edge.distance == 0 and loop_of[edge.src] == loop_of[edge.dst] and start_s(dst) + 1e-9 < end_s(src):
            yield f"%{edge.dst} starts at {start_s(dst):.3f} s, before %{edge.src} ends at {end_s(src):.3f} s"
    yield from _double_booked(graph)


def _double_booked(graph: TaskGraph) -> Iterator[str]:
    timed = [(task, graph.group(task.group)) for task in graph.tasks if task.group and graph.group(task.group).gpus]
    for index, (one, one_group) in enumerate(timed):
        for other, other_group in timed[index + 1 :]:
            if one.loop != other.loop or not one_group.shares_gpus_with(other_group):
                continue
            if start_s(one) + 1e-9 < end_s(other) and start_s(other) + 1e-9 < end_s(one):
                yield f"%{one.name} and %{other.name} hold the same GPUs at the same time"


DEMANDS: dict[Fact, Callable[[TaskGraph, int], Iterator[str]]] = {
    "logical": _logical,
    "placed": _placed,
    "aligned": _aligned,
    "sized": _sized,
    "synced": _synced,
    "priced": _priced,
    "guarded": _guarded,
    "scheduled": _scheduled,
}
