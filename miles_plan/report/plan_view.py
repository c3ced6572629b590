"""What the page of a plan shows: charts, sentences and tables, ready for its template."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from miles_plan.ir.group import gpus_in_use
from miles_plan.ir.memory import MemoryTimeline
from miles_plan.ir.plan import Plan, plan_sha256
from miles_plan.ir.tasks import AnyTask, WeightSync
from miles_plan.ir.text import to_text
from miles_plan.report.charts.candidates import candidates_chart
from miles_plan.report.charts.memory import memory_chart, ordered_terms, shade_class
from miles_plan.report.charts.placement import placement_map
from miles_plan.report.charts.steps import step_chart
from miles_plan.report.cluster_map import gpu_blocks
from miles_plan.report.palette import ACTIVITIES, activity
from miles_plan.report.schedule import LoopSchedule, loop_schedules
from miles_plan.report.units import bytes_text, estimate_text, interval_text, plural, seconds_scale, seconds_text
from miles_plan.report.wording import (
    cluster_text,
    colocation_text,
    device_noun,
    group_nodes,
    memory_place,
    model_text,
    overlap_text,
    routing_sentences,
    tightest,
)

SECTIONS = (
    ("warnings", "Warnings"),
    ("placement", "Placement"),
    ("steps", "Step"),
    ("memory", "Memory"),
    ("decisions", "Decisions"),
    ("candidates", "Candidates"),
    ("precision", "Precision"),
    ("transfers", "Transfers"),
    ("failures", "Failures"),
    ("estimates", "Estimates"),
    ("origin", "Origin"),
)


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure at the head of the page. share draws a meter; alarm says that it is bad."""

    title: str
    value: str
    detail: str = ""
    share: float | None = None
    alarm: bool = False


def plan_view(plan: Plan) -> dict[str, Any]:
    """The template's variables."""
    schedules = loop_schedules(plan)
    return {
        "plan": plan,
        "is_run": False,
        "plan_digest": plan_sha256(plan),
        "model_line": model_text(plan),
        "cluster_line": cluster_text(plan.cluster),
        "noun": device_noun(plan.cluster),
        "figures": plan_figures(plan, schedules),
        "sections": plan_sections(plan),
        "placement_lead": _placement_lead(plan),
        "placement_chart": placement_map(plan),
        "idle": any(not block.groups for block in gpu_blocks(plan)),
        "nodes_of": {group.name: group_nodes(group, plan.cluster) for group in plan.graph.groups},
        "loops": [_loop_view(plan, schedule) for schedule in schedules],
        "memory": [_memory_view(plan, timeline) for timeline in plan.graph.memory if timeline.phases],
        "candidates_chart": candidates_chart(plan.candidates) if len(plan.candidates) > 1 else None,
        "routing": routing_sentences(plan),
        "syncs": sync_sentences(plan),
        "spec_text": json.dumps(plan.spec, indent=2, ensure_ascii=False, default=str),
        "graph_text": to_text(plan.graph),
    }


def plan_sections(plan: Plan) -> list[tuple[str, str]]:
    """(anchor, title) of the sections that have something to show."""
    there = {
        "warnings": bool(plan.diagnostics or plan.unread_fields),
        "decisions": bool(plan.decisions),
        "candidates": bool(plan.candidates),
        "precision": bool(plan.numerics or routing_sentences(plan)),
        "transfers": bool(plan.transfers),
        "failures": bool(plan.failures),
        "estimates": bool(plan.estimates),
    }
    return [(anchor, title) for anchor, title in SECTIONS if there.get(anchor, True)]


def plan_figures(plan: Plan, schedules: list[LoopSchedule]) -> list[Figure]:
    """Time of each loop, of all, and the fullest place of each kind."""
    figures = []
    for schedule in schedules:
        scale = seconds_scale(schedule.high_s)
        interval = f"{interval_text(schedule.low_s, schedule.high_s, scale)}{scale.suffix}"
        figures.append(Figure(f"Iteration of {schedule.loop.name}", seconds_text(schedule.iteration_s), interval))
    iterations = " + ".join(f"{schedule.loop.iterations:,}" for schedule in schedules)
    figures.append(Figure("All iterations", seconds_text(sum(each.total_s for each in schedules)), f"{iterations} iterations"))
    for timeline in tightest(plan):
        share = timeline.peak.total_bytes / max(1, timeline.capacity_bytes)
        detail = f"of {bytes_text(timeline.capacity_bytes)}, in '{timeline.peak.name}'"
        noun = f"Fullest {device_noun(plan.cluster) if timeline.place == 'gpu' else 'host'}"
        figures.append(Figure(noun, bytes_text(timeline.peak.total_bytes), detail, share, share > 1))
    if plan.diagnostics or plan.unread_fields:
        unread = plural(len(plan.unread_fields), "unread field")
        figures.append(Figure("Warnings", str(len(plan.diagnostics)), unread if plan.unread_fields else ""))
    return figures


def activity_keys(tasks: Iterable[AnyTask]) -> list[tuple[str, str]]:
    """The activities that occur, with their words, in the order of the legend."""
    found = {activity(task) for task in tasks}
    return [(name, words) for name, words in ACTIVITIES.items() if name in found]


def sync_sentences(plan: Plan) -> list[str]:
    """What each weight sync moves and how."""
    return [
        f"{task.name} moves {bytes_text(task.total_bytes)} by {task.transport} in buckets of {bytes_text(task.bucket_bytes)}"
        for task in plan.graph.of_kind(WeightSync)
        if isinstance(task, WeightSync)
    ]


def _placement_lead(plan: Plan) -> str:
    noun = device_noun(plan.cluster)
    used, total = gpus_in_use(plan.graph.groups), plan.cluster.num_gpus
    words = [f"{used:,} of {plural(total, noun)} in use", colocation_text(plan)]
    return f"{'; '.join(part for part in words if part)}."


def _loop_view(plan: Plan, schedule: LoopSchedule) -> dict[str, Any]:
    step = estimate_text(schedule.low_s, schedule.iteration_s, schedule.high_s, "s")
    lead = f"{step} an iteration, {schedule.loop.iterations:,} iterations = {seconds_text(schedule.total_s)}."
    rare = [run.task.name for run in schedule.runs if run.task.every > 1]
    if rare:
        lead += f" With {', '.join(rare)}: {seconds_text(schedule.full_s)}."
    if schedule.overlaps:
        lead += f" Iterations overlap: {overlap_text(schedule)}."
    name = f"Step chart of loop {schedule.loop.name}"
    return {
        "schedule": schedule,
        "lead": lead,
        "activities": activity_keys(run.task for run in schedule.runs),
        "chart": step_chart(plan, name, schedule.runs, schedule.critical, {}),
    }


def _memory_view(plan: Plan, timeline: MemoryTimeline) -> dict[str, Any]:
    """A timeline's chart, legend by owner, and rows of numbers."""
    terms = ordered_terms(timeline)
    place = memory_place(timeline, plan.cluster)
    return {
        "title": f"{place[0].upper()}{place[1:]}",
        "lead": _memory_lead(timeline),
        "chart": memory_chart(plan, timeline),
        "legend": [
            (owner, [(shade_class(plan, timeline, owner, name), name.replace("_", " ")) for of, name in terms if of == owner])
            for owner in dict.fromkeys(owner for owner, _ in terms)
        ],
        "terms": terms,
        "phases": [
            {
                "name": phase.name,
                "task": phase.task,
                "total": phase.total_bytes,
                "high": phase.high_bytes,
                "free": timeline.capacity_bytes - phase.total_bytes,
                "peak": phase is timeline.peak,
                "sizes": [
                    sum(term.size_bytes for term in phase.terms if (term.owner, term.name) == (owner, name))
                    for owner, name in terms
                ],
            }
            for phase in timeline.phases
        ],
    }


def _memory_lead(timeline: MemoryTimeline) -> str:
    """The fullest phase, its headroom, and what most of it is."""
    peak = timeline.peak
    left = timeline.capacity_bytes - peak.total_bytes
    room = f"{bytes_text(left)} free" if left >= 0 else f"{bytes_text(-left)} too much"
    words = f"Fullest in '{peak.name}': {bytes_text(peak.total_bytes)} of {bytes_text(timeline.capacity_bytes)}, {room}"
    if peak.terms:
        largest = max(peak.terms, key=lambda term: term.size_bytes)
        words += f"; the largest part is {largest.owner} {largest.name}, {bytes_text(largest.size_bytes)}"
    return f"{words}."
