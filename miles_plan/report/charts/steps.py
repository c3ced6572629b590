"""The step chart: tasks by group over the time of one iteration, with intervals and the critical path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from miles_plan.ir.plan import Plan
from miles_plan.report.charts.axis import Axis, time_ticks
from miles_plan.report.palette import activity
from miles_plan.report.schedule import PlannedRun
from miles_plan.report.svg import NARROWEST, element, figure, label, line, named, polyline, rectangle, text_width
from miles_plan.report.units import estimate_text, scaled_text, seconds_scale, seconds_text
from miles_plan.report.wording import device_noun, how_often

WIDTH, LEFT, RIGHT = 1040, 210, 96
ROW, BAR, HEAD, TOP = 24, 14, 26, 30
Measured = Mapping[str, tuple[float, float]]  # begin and end of a task, in seconds since its iteration began


@dataclass(frozen=True, slots=True)
class Bar:
    """One task's place in the chart: its planned run, the measured one where there is one, the row's middle."""

    run: PlannedRun
    measured: tuple[float, float] | None
    y: float


def step_chart(plan: Plan, name: str, runs: Sequence[PlannedRun], critical: Sequence[str], measured: Measured) -> Markup:
    """One iteration. A group's tasks stand under its name, by start; critical tasks are joined by a line.

    Where `measured` has a task, its planned bar is pale and the measured one stands below it, in full colour.
    """
    bars, heads, height = _rows(plan, runs, measured)
    span_s = max([run.end_s for run in runs] + [end for _, end in measured.values()], default=0.0) or 1.0
    longest = max([_high_end(run) for run in runs if run.task.name not in measured], default=span_s)
    x = Axis(0.0, max(span_s * 1.02, min(longest * 1.01, span_s * 1.3)), LEFT, WIDTH - RIGHT)
    parts = [*_time_axis(x, height), *heads]
    if not measured:
        parts.append(_critical_line([bar for bar in bars if bar.run.task.name in critical], x))
    for bar in bars:
        parts += _bar(bar, x, critical=bar.run.task.name in critical)
    return figure(WIDTH, height + 8, f"{name}: {len(bars)} tasks in {seconds_text(span_s)}", parts, narrowest=NARROWEST)


def _rows(plan: Plan, runs: Sequence[PlannedRun], measured: Measured) -> tuple[list[Bar], list[Markup], float]:
    """Bars with their rows, group headings, and the height taken."""
    bars: list[Bar] = []
    heads: list[Markup] = []
    y: float = TOP
    noun = device_noun(plan.cluster)
    for group in plan.graph.groups:
        own = [run for run in runs if run.task.group == group.name]
        if not own:
            continue
        where = f"{group.engine}, {noun}s {group.gpus}" if group.gpus else "host processes"
        heads.append(rectangle(0, y + 5, 3, HEAD + ROW * len(own) - 10, f"mark role-{group.role}", round_=1.5))
        heads.append(named(12, y + 17, group.name, where, "label strong"))
        y += HEAD
        for run in own:
            bars.append(Bar(run, measured.get(run.task.name), y + ROW / 2))
            y += ROW
    return bars, heads, y


def _time_axis(x: Axis, height: float) -> list[Markup]:
    scale = seconds_scale(x.high)
    parts = []
    for tick in time_ticks(x.high, 7):
        parts.append(line(x.at(tick), TOP - 6, x.at(tick), height, "gridline"))
        parts.append(label(x.at(tick), TOP - 12, scaled_text(tick, scale), "tick", "middle"))
    return parts


def _bar(bar: Bar, x: Axis, *, critical: bool) -> list[Markup]:
    """Name at the left, bar or bars, whisker of the interval, and the duration where there is room."""
    task = bar.run.task
    often = how_often(task)
    parts = [named(12, bar.y + 4, task.name, often, "label strong" if critical else "label")]
    shape = f"mark act-{activity(task)} {'critical' if critical else 'slack'}"
    if bar.measured is None:
        parts += _planned(bar, x, f"{shape} {'rare' if often else ''}", bar.y - BAR / 2, BAR)
        right = x.at(max(_high_end(bar.run), bar.run.end_s))
        shown_s = bar.run.end_s - bar.run.start_s
    else:
        begin, end = bar.measured
        parts += _planned(bar, x, f"mark act-{activity(task)} planned", bar.y - BAR / 2 - 1, BAR / 2)
        tip = f"{task.name}: measured {seconds_text(end - begin)}, from {seconds_text(begin)}; planned {_planned_text(bar.run)}"
        parts.append(rectangle(x.at(begin), bar.y + 1, max(2.0, x.at(end) - x.at(begin)), BAR / 2, shape, tip, 2))
        right, shown_s = x.at(max(end, bar.run.end_s)), end - begin
    words = seconds_text(shown_s)
    if right + 8 + text_width(words, 11) < WIDTH:
        return [*parts, label(right + 7, bar.y + 4, words, "tick")]
    return [*parts, label(x.at(bar.run.start_s) - 6, bar.y + 4, words, "tick", "end")]


def _planned(bar: Bar, x: Axis, shape: str, top: float, height: float) -> list[Markup]:
    """The planned bar, with a whisker over the interval of its end where the chart is wide enough to show one."""
    run, estimate = bar.run, bar.run.task.estimate
    begin, end = x.at(run.start_s), x.at(run.end_s)
    often = how_often(run.task)
    when = f"from {seconds_text(run.start_s)}{f'; {often}' if often else ''}"
    tip = f"{run.task.name} ({run.task.kind}): {_planned_text(run)}; {when}"
    parts = [rectangle(begin, top, max(2.0, end - begin), height, shape, tip, 2)]
    if estimate and bar.measured is None:
        low, high = x.at(run.start_s + estimate.low_s), x.at(run.start_s + estimate.high_s)
        if high - low >= 4:
            inside = [low, high] if _high_end(run) <= x.high else [low]  # an open end runs on beyond the chart
            parts += [line(at, bar.y - 4, at, bar.y + 4, "whisker") for at in inside]
            parts.append(line(low, bar.y, high, bar.y, "whisker"))
    return parts


def _planned_text(run: PlannedRun) -> str:
    estimate = run.task.estimate
    return f"{estimate_text(estimate.low_s, estimate.mid_s, estimate.high_s, 's')}, {estimate.basis}" if estimate else "nothing"


def _critical_line(bars: list[Bar], x: Axis) -> Markup:
    """Steps from the end of each critical task to the begin of the next."""
    ordered = sorted(bars, key=lambda bar: (bar.run.start_s, bar.run.end_s))
    joints = [
        polyline([(x.at(one.run.end_s), one.y), (x.at(one.run.end_s), two.y), (x.at(two.run.start_s), two.y)], "critical-line")
        for one, two in pairwise(ordered)
    ]
    return element("g", *joints)


def _high_end(run: PlannedRun) -> float:
    return run.start_s + run.task.estimate.high_s if run.task.estimate else run.end_s
