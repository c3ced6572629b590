"""What the page of a run shows beside its plan: results, curves, planned against measured, events, files."""

from __future__ import annotations

from typing import Any

from miles_plan.ir.critical_path import critical_path
from miles_plan.report.charts.curves import curve_chart
from miles_plan.report.charts.steps import Measured, step_chart
from miles_plan.report.charts.times import times_chart
from miles_plan.report.metrics import (
    COMPARED,
    LOG_PROB_DIFF,
    REWARD,
    ROUTING,
    Series,
    log_prob_verdict,
    loops_of,
    metrics_of,
    series,
    total,
)
from miles_plan.report.plan_view import Figure, activity_keys, plan_view
from miles_plan.report.run_facts import SHOWN_AS_SLICES, event_text, is_quiet, reward_ends, run_facts
from miles_plan.report.run_files import RunRecord, is_number
from miles_plan.report.schedule import iteration_runs
from miles_plan.report.task_times import coverage, iteration_begin, iteration_times, task_times, typical_iteration
from miles_plan.report.units import number_text, plural, quantity_text, scale_for, seconds_text

SECTIONS = (("results", "Results"), ("curves", "Curves"), ("measured", "Measured"), ("events", "Events"), ("files", "Files"))
LOG_AXIS = frozenset({LOG_PROB_DIFF, "mean_abs_log_prob_diff"})
BEST_AT_ZERO = LOG_AXIS | {ROUTING, "train_routing_mismatches", "log_prob_mismatches", "reward_failures", "skipped_steps"}
MOST_EVENTS = 300


def run_view(record: RunRecord) -> dict[str, Any]:
    """The template's variables: the plan's own, and the run's over them."""
    view = plan_view(record.plan)
    curves = [_curves_of(record, loop) for loop in loops_of(record)]
    times = [found for loop in record.plan.graph.loops if (found := _times_of(record, loop.name))]
    there = {"curves": bool(curves), "measured": bool(times), "events": bool(record.events)}
    own = [(anchor, title) for anchor, title in SECTIONS if there.get(anchor, True)]
    return view | {
        "record": record,
        "is_run": True,
        "run_name": record.path.resolve().name,
        "figures": _figures(record),
        "sections": own + [(anchor, "Planned step" if anchor == "steps" else title) for anchor, title in view["sections"]],
        "facts": run_facts(record),
        "curves": curves,
        "times": times,
        **_events(record),
    }


def _figures(record: RunRecord) -> list[Figure]:
    """The head of the page: reward, exactness, time, restarts."""
    figures = []
    for loop in loops_of(record):
        if ends := reward_ends(record, loop):
            figures.append(Figure(f"Reward of {loop}", number_text(ends[1]), f"from {number_text(ends[0])}"))
    figures += _exactness(record)
    if is_number(record.summary.get("wall_s")):
        figures.append(Figure("Wall time", seconds_text(float(record.summary["wall_s"]))))
    else:
        figures.append(Figure("State", "not finished", plural(len(record.metrics), "iteration") + " so far"))
    inside, runs = coverage([each for loop in record.plan.graph.loops for each in task_times(record, loop.name)])
    if runs:
        share = inside / runs
        figures.append(Figure("Inside the plan", quantity_text(share, "fraction"), f"of {plural(runs, 'task run')}", share))
    if is_number(record.summary.get("restarts")):
        figures.append(Figure("Restarts", str(record.summary["restarts"])))
    return figures


def _exactness(record: RunRecord) -> list[Figure]:
    """How far apart rollout and trainer were, an exact zero written as such."""
    values = [row[LOG_PROB_DIFF] for row in record.metrics if is_number(row.get(LOG_PROB_DIFF))]
    if not values:
        return []
    compared = total(record, COMPARED)
    detail = f"over {compared:,} tokens" if compared is not None else "largest of the run"
    return [Figure("Log-prob difference", "exactly 0" if max(values) == 0 else f"{max(values):.3g} nats", detail)]


def _curves_of(record: RunRecord, loop: str) -> dict[str, Any]:
    """The chief metrics of a loop, and the rest apart."""
    metrics = metrics_of(record, loop)
    panels = [(metric.chief, _panel(record, series(record, loop, metric))) for metric in metrics]
    return {
        "loop": loop,
        "lead": f"{plural(sum(row['loop'] == loop for row in record.metrics), 'iteration')}.",
        "panels": [panel for chief, panel in panels if chief],
        "more": [panel for chief, panel in panels if not chief],
    }


def _panel(record: RunRecord, curve: Series) -> dict[str, Any]:
    """One metric: a chart, or one sentence where it never moved from zero."""
    band = _band(record, curve) if curve.metric.key == REWARD else None
    still = bool(curve.values) and min(curve.values) == max(curve.values) == 0.0
    drawn = bool(curve.values) and not still
    log = curve.metric.key in LOG_AXIS
    odd = f"Not a finite number in {plural(len(curve.odd), 'iteration')}, first in {curve.odd[0]}." if curve.odd else ""
    note = "mean, band of one standard deviation" if band else ""
    scale = scale_for(curve.metric.unit, max((abs(value) for value in curve.values), default=0.0))
    return {
        "title": curve.metric.title,
        "unit": scale.suffix.strip(),
        "note": note,
        "chart": curve_chart(curve, band, log=log) if drawn else None,
        "flat": _flat(record, curve) if still else "no finite value",
        "good": still and curve.metric.key in BEST_AT_ZERO,
        "odd": odd,
    }


def _flat(record: RunRecord, curve: Series) -> str:
    if curve.metric.key == LOG_PROB_DIFF and (verdict := log_prob_verdict(record)):
        return verdict
    return f"exactly 0 in all {len(curve.values):,} iterations"


def _band(record: RunRecord, curve: Series) -> list[float] | None:
    """The standard deviation beside each mean; None unless every iteration has one."""
    rows = {int(row["iteration"]): row.get("reward_std") for row in record.metrics if row["loop"] == curve.loop}
    halves = [float(half) for iteration in curve.iterations if (half := rows.get(iteration)) is not None and is_number(half)]
    return halves if len(halves) == len(curve.iterations) else None


def _times_of(record: RunRecord, loop: str) -> dict[str, Any] | None:
    """Planned against measured of one loop; None if nothing of it ran."""
    times = task_times(record, loop)
    if not times:
        return None
    inside, runs = coverage(times)
    took = sorted(iteration_times(record, loop).values())
    lead = f"{plural(len(took), 'iteration')}, {seconds_text(took[len(took) // 2])} each in the middle, "
    lead += f"{seconds_text(took[0])} to {seconds_text(took[-1])}. "
    lead += f"{inside:,} of {runs:,} task runs took a time inside the planned interval."
    if again := sum(each.again for each in times):
        lead += f" {plural(again, 'run')} repeated."
    found = {"loop": loop, "lead": lead, "chart": times_chart(times), "rows": times}
    return found | _typical_iteration(record, loop)


def _typical_iteration(record: RunRecord, loop: str) -> dict[str, Any]:
    """The iteration of median duration, planned and measured in one chart."""
    iteration = typical_iteration(record, loop)
    if iteration is None:
        return {"gantt": None}
    begin = iteration_begin(record, loop, iteration)
    own = [run for run in record.runs if run.loop == loop and run.iteration == iteration]
    measured: Measured = {run.task: (run.start_s - begin, run.end_s - begin) for run in own}
    graph = record.plan.graph
    tasks = sorted(graph.topological(loop), key=lambda task: task.start_s or 0.0)
    active = [task for task in tasks if task.name in measured]
    critical = [task.name for task in critical_path(graph, active)]
    name = f"Iteration {iteration} of loop {loop}, planned and measured"
    chart = step_chart(record.plan, name, iteration_runs(tasks, active), critical, measured)
    return {"gantt": chart, "iteration": iteration, "activities": activity_keys(active)}


def _events(record: RunRecord) -> dict[str, Any]:
    """Events out of the ordinary apart; of very many, the last."""
    loud = [event for event in record.events if not is_quiet(event)]
    told = [event for event in record.events if event["kind"] not in SHOWN_AS_SLICES]
    kept = told[-MOST_EVENTS:]
    title = f"The last {plural(len(kept), 'event')} that are no task's start or end; events.jsonl has all"
    return {
        "events_lead": f"{plural(len(record.events), 'event')}, {len(loud):,} out of the ordinary.",
        "loud_events": [(float(event["time_s"]), event_text(event)) for event in loud[-MOST_EVENTS:]],
        "all_events": [(float(event["time_s"]), event_text(event)) for event in kept],
        "all_events_title": title,
    }
