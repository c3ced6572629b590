from __future__ import annotations

from dataclasses import replace

import pytest

from miles_plan.ir.graph import Fact, TaskGraph
from miles_plan.ir.group import GpuSpan
from miles_plan.ir.memory import MemoryPhase, MemoryTerm, MemoryTimeline
from miles_plan.ir.tasks import Edge, TimeEstimate
from miles_plan.ir.verify import VerifyError, verify
from tests.ir.graphs import grpo_graph


def knowing(graph: TaskGraph, *facts: Fact) -> TaskGraph:
    return replace(graph, facts=frozenset(facts))


def timeline(place: str, size_bytes: int) -> MemoryTimeline:
    phase = MemoryPhase(
        name="train", task="train", terms=(MemoryTerm(name="weights", owner="train", size_bytes=size_bytes),), high_bytes=0
    )
    return MemoryTimeline(place=place, gpus=GpuSpan(first=0, count=2), capacity_bytes=100, margin_bytes=0, phases=(phase,))


def scheduled(graph: TaskGraph, **starts: float) -> TaskGraph:
    estimate = TimeEstimate(low_s=1, mid_s=1, high_s=1, basis="test")
    order = {task.name: float(index) for index, task in enumerate(graph.topological())}
    return knowing(
        replace(
            graph,
            tasks=tuple(
                replace(task, estimate=estimate, start_s=starts.get(task.name, order[task.name])) for task in graph.tasks
            ),
        ),
        "scheduled",
    )


def test_a_sound_graph_passes() -> None:
    verify(grpo_graph(), num_gpus=2, after="test")
    verify(scheduled(grpo_graph()), num_gpus=2, after="test")


BROKEN = {
    "two tasks of one name": (lambda g: replace(g, tasks=(*g.tasks, g.tasks[0])), "appears 2 times"),
    "a cycle": (lambda g: g.with_edges([Edge(src="train", dst="prompts", carries="order")]), "cycle within an iteration"),
    "an edge to nowhere": (lambda g: g.with_edges([Edge(src="x", dst="train", carries="order")]), "no task 'x'"),
    "an unknown loop": (lambda g: g.with_replaced(replace(g.tasks[0], loop="x")), "no loop 'x'"),
    "a missing input": (
        lambda g: g.without_edges([Edge(src="weight_sync", dst="rollout", carries="weights")]),
        "%rollout needs weights",
    ),
    "a payload nobody gives": (
        lambda g: g.with_edges([Edge(src="prompts", dst="train", carries="routing")]),
        "%prompts does not give routing",
    ),
    "a task without a group": (lambda g: g.with_replaced(replace(g.task("train"), group=None)), "%train has no group"),
    "a rollout on the trainer": (lambda g: g.with_replaced(replace(g.task("rollout"), group="train")), "runs on roles"),
    "a layout that does not fill its group": (
        lambda g: replace(g, groups=(*g.groups[:2], replace(g.groups[2], gpus=GpuSpan(first=0, count=1)))),
        "needs 2 GPUs, it has 1",
    ),
    "GPUs the cluster does not have": (
        lambda g: replace(g, groups=(g.groups[0], replace(g.groups[1], gpus=GpuSpan(first=1, count=2)), g.groups[2])),
        "not all in a cluster of 2",
    ),
    "replay without routing": (
        lambda g: knowing(g.with_replaced(replace(g.task("train"), replay_routing=True)), "aligned"),
        "replay_routing=True",
    ),
    "memory over capacity": (
        lambda g: knowing(replace(g, memory=(timeline("gpu", 101), timeline("host", 1))), "sized"),
        "phase 'train' holds 101 of 100",
    ),
    "GPUs without a timeline": (lambda g: knowing(g, "sized"), "no gpu memory timeline"),
    "a sync without a transport": (lambda g: knowing(g, "synced"), "%weight_sync has no transport"),
    "no deadline": (lambda g: knowing(g, "guarded"), "no deadline"),
    "no estimate": (lambda g: knowing(g, "priced"), "no estimate"),
    "a start before its input": (lambda g: scheduled(g, reward=0.0), "before %rollout ends"),
    "a GPU used twice at once": (lambda g: scheduled(g, weight_sync=6.5, train=6.0), "hold the same GPUs"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_each_broken_invariant_is_named(case: str) -> None:
    breaks, message = BROKEN[case]
    with pytest.raises(VerifyError, match=message) as caught:
        verify(breaks(grpo_graph()), num_gpus=2, after="some_pass")
    assert "after 'some_pass'" in str(caught.value)
