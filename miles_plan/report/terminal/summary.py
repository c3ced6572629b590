"""The head of the page: job, model, cluster, step time, fullest place."""

from __future__ import annotations

from miles_plan.ir.plan import Plan, plan_sha256
from miles_plan.report.schedule import loop_schedules
from miles_plan.report.terminal.page import Page, head
from miles_plan.report.units import bytes_text, estimate_text, plural, seconds_text
from miles_plan.report.wording import cluster_text, memory_place, model_text, tightest


def draw_summary(page: Page, plan: Plan) -> None:
    """Six lines that answer: what, on what, how long, does it fit, is anything odd."""
    head(page, plan.name, f"plan {plan_sha256(plan)[:12]}", _facts(plan))


def _facts(plan: Plan) -> list[tuple[str, str]]:
    facts = [("model", model_text(plan)), ("cluster", cluster_text(plan.cluster))]
    for schedule in loop_schedules(plan):
        step = estimate_text(schedule.low_s, schedule.iteration_s, schedule.high_s, "s")
        loop = f"{schedule.loop.name}: {step} an iteration"
        facts.append(("time", f"{loop}, {schedule.loop.iterations:,} times = {seconds_text(schedule.total_s)}"))
    if len(plan.graph.loops) > 1:
        facts.append(("", f"all loops: {seconds_text(sum(each.total_s for each in loop_schedules(plan)))}"))
    for timeline in tightest(plan):
        peak = timeline.peak
        free = bytes_text(timeline.capacity_bytes - peak.total_bytes)
        facts.append(
            (
                "memory",
                f"{memory_place(timeline, plan.cluster)}: {bytes_text(peak.total_bytes)} of "
                f"{bytes_text(timeline.capacity_bytes)} in '{peak.name}', {free} free",
            )
        )
    if plan.diagnostics or plan.unread_fields:
        facts.append(
            ("notes", f"{plural(len(plan.diagnostics), 'warning')}, {plural(len(plan.unread_fields), 'unread field')}")
        )
    return facts
