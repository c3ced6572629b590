"""Planned against measured, task by task, on one logarithmic axis of seconds: the planned interval and the measured spread."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from miles_plan.report.charts.axis import Axis, log_ticks
from miles_plan.report.palette import activity
from miles_plan.report.svg import NARROWEST, element, figure, label, line, rectangle
from miles_plan.report.task_times import TaskTimes
from miles_plan.report.units import estimate_text, seconds_text

WIDTH, LEFT, RIGHT, TOP, ROW = 1040, 190, 84, 28, 26
SHORTEST_S = 1e-4  # below it the clock and the scheduler are what is measured


def times_chart(times: Sequence[TaskTimes]) -> Markup:
    """A row a task: a pale bar for the planned interval, a tick for its middle, a line and a dot for the measured runs."""
    ends = [seconds for each in times for seconds in _ends(each) if seconds > 0]
    low, high = max(SHORTEST_S, min(ends, default=SHORTEST_S)), max(ends, default=1.0)
    x = Axis(low / 1.3, max(high, low * 2) * 1.3, LEFT, WIDTH - RIGHT, log=True)
    height = TOP + ROW * len(times)
    parts: list[Markup] = []
    for tick in log_ticks(x.low, x.high):
        parts.append(line(x.at(tick), TOP - 6, x.at(tick), height, "gridline"))
        parts.append(label(x.at(tick), TOP - 12, seconds_text(tick), "tick", "middle"))
    parts.append(label(WIDTH, TOP - 12, "measured / planned", "tick", "end"))
    for at, each in enumerate(times):
        parts += _row(each, x, TOP + ROW * at + ROW / 2)
    return figure(WIDTH, height + 6, f"Planned against measured time of {len(times)} tasks", parts, narrowest=NARROWEST)


def _ends(times: TaskTimes) -> list[float]:
    estimate = times.task.estimate
    planned = [estimate.low_s, estimate.high_s] if estimate else []
    return [*planned, times.took_s[0], times.took_s[-1]]


def _row(times: TaskTimes, x: Axis, y: float) -> list[Markup]:
    task, estimate = times.task, times.task.estimate
    shape = f"act-{activity(task)}"
    measured = estimate_text(times.took_s[0], times.median_s, times.took_s[-1], "s")
    tip = f"{task.name}: measured {measured} over {len(times.took_s):,} runs"
    parts = [label(12, y + 4, task.name, "label")]
    if estimate:
        planned = estimate_text(estimate.low_s, estimate.mid_s, estimate.high_s, "s")
        tip += f"; planned {planned}, {estimate.basis}"
        begin, end = x.at(estimate.low_s), x.at(estimate.high_s)
        parts.append(rectangle(begin, y - 8, max(2.0, end - begin), 16, f"mark planned {shape}", tip, 3))
        parts.append(line(x.at(estimate.mid_s), y - 8, x.at(estimate.mid_s), y + 8, "planned-middle"))
    parts.append(line(x.at(times.took_s[0]), y, x.at(times.took_s[-1]), y, f"measured-line {shape}"))
    dot = element("circle", element("title", tip), cx=x.at(times.median_s), cy=y, r=4.5, class_=f"mark measured {shape}")
    ratio = f"{times.ratio:.2f}" if times.ratio is not None else "not planned"
    return [*parts, dot, label(WIDTH, y + 4, ratio, "label", "end")]
