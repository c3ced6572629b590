"""Plans written by hand: plans/NAME.graph holds the graph, plans/NAME.yaml the rest, memory as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from miles_plan.ir.graph import TaskGraph
from miles_plan.ir.group import GpuSpan
from miles_plan.ir.memory import MemoryPhase, MemoryTerm, MemoryTimeline
from miles_plan.ir.plan import Plan
from miles_plan.ir.text import parse

NAMES = ("embedded", "moe_1024", "disaggregated")
PLANS = Path(__file__).parent / "plans"
RECOVERY = {
    "retry": "its inputs, in the object store",
    "rebuild": "a fresh engine with the last synced weights",
    "rollback": "the last checkpoint",
}


@lru_cache
def load_plan(name: str) -> Plan:
    """The plan of `plans/NAME.graph` (its graph) and `plans/NAME.yaml` (the rest), with starts and failure rows filled in."""
    rest = yaml.safe_load((PLANS / f"{name}.yaml").read_text(encoding="utf-8"))
    unit = {"MiB": 2**20, "GiB": 2**30}[rest.pop("memory_unit")]
    memory = tuple(memory_timeline(row, unit) for row in rest.pop("memory"))
    graph = replace(started(parse((PLANS / f"{name}.graph").read_text(encoding="utf-8"))), memory=memory)
    failures = [
        {"task": t.name, "restart": t.restart, "deadline_s": t.deadline_s, "recovers_from": RECOVERY[t.restart or ""]}
        for t in graph.tasks
    ]
    return TypeAdapter(Plan).validate_python({**rest, "graph": graph, "failures": failures})


def started(graph: TaskGraph) -> TaskGraph:
    """The graph with every task started as soon as its inputs and its GPUs allow."""
    ends: dict[str, float] = {}
    timed = []
    for loop in graph.loops:
        done: list[str] = []
        for task in graph.topological(loop.name):
            group = graph.group(task.group or "")
            waits = [ends[edge.src] for edge in graph.inputs_of(task.name) if edge.distance == 0 and edge.src in done]
            waits += [ends[name] for name in done if group.shares_gpus_with(graph.group(graph.task(name).group or ""))]
            start_s = max(waits, default=0.0)
            assert task.estimate is not None
            ends[task.name] = start_s + task.estimate.mid_s
            done.append(task.name)
            timed.append(replace(task, start_s=start_s))
    return graph.with_replaced(*timed)


def memory_timeline(row: Mapping[str, Any], unit: int) -> MemoryTimeline:
    """A timeline from its YAML form: sizes in `unit`, terms as `owner.name: size`."""
    first, count = (int(part) for part in row["gpus"].split("+"))
    return MemoryTimeline(
        place=row["place"],
        gpus=GpuSpan(first=first, count=count),
        capacity_bytes=int(row["capacity"] * unit),
        margin_bytes=int(row["margin"] * unit),
        phases=tuple(memory_phase(phase, unit) for phase in row["phases"]),
    )


def memory_phase(row: Mapping[str, Any], unit: int) -> MemoryPhase:
    terms = tuple(
        MemoryTerm(owner=name.split(".")[0], name=name.split(".")[1], size_bytes=int(size * unit))
        for name, size in row["terms"].items()
    )
    high_bytes = int(1.08 * sum(term.size_bytes for term in terms))
    return MemoryPhase(name=row["name"], task=row["task"], terms=terms, high_bytes=high_bytes)
