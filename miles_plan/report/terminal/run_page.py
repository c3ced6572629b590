"""A run in the terminal: what it reached, where it differed from its plan, what happened, where its files are."""

from __future__ import annotations

import math
from itertools import pairwise

from rich.console import Console
from rich.text import Text

from miles_plan.report.metrics import Series, loops_of, metrics_of, series
from miles_plan.report.run_facts import event_text, is_quiet, run_facts
from miles_plan.report.run_files import RunRecord
from miles_plan.report.task_times import TaskTimes, coverage, task_times
from miles_plan.report.terminal.page import Page, draw, grid, head, text, widest
from miles_plan.report.units import (
    EN_DASH,
    bytes_text,
    estimate_text,
    interval_text,
    plural,
    quantity_text,
    scale_for,
    scaled_text,
    seconds_text,
)

SPARKS = "▁▂▃▄▅▆▇█"
LAST_EVENTS = 12


def render_run(record: RunRecord, console: Console, *, full: bool = False) -> None:
    """Print a run. full: every event, not only the last that were out of the ordinary."""
    page = Page(console, full)

    def draw_sections() -> None:
        head(page, record.plan.name, f"run {record.path.name}", run_facts(record))
        for loop in loops_of(record):
            _draw_curves(page, record, loop)
        for each in record.plan.graph.loops:
            _draw_times(page, record, each.name)
        _draw_events(page, record)
        _draw_files(page, record)

    draw(console, draw_sections)


def _draw_curves(page: Page, record: RunRecord, loop: str) -> None:
    """One line a metric: first, last, lowest and highest value, and its course."""
    metrics = metrics_of(record, loop)
    curves = [series(record, loop, metric) for metric in metrics if metric.chief or page.full]
    count = max((len(curve.values) for curve in curves), default=0)
    page.heading(f"Curves of loop '{loop}'", f"{count:,} iterations")
    titles = ("metric", "first", "last", f"lowest{EN_DASH}highest")
    rows = [_curve_cells(curve) for curve in curves]
    taken = sum(widest((row[at].plain for row in rows), title) + 2 for at, title in enumerate(titles))
    table = grid(*titles, "course", right=("first", "last"), indent=0)
    for curve, row in zip(curves, rows, strict=True):
        table.add_row(*row, _course(curve, max(8, min(60, page.width - taken))))
    page.show(table)
    if len(curves) < len(metrics):
        page.note(text(f"{plural(len(metrics) - len(curves), 'more metric')} with --all", "dim"))


def _curve_cells(curve: Series) -> list[Text]:
    if not curve.values:
        return [text(curve.metric.title), Text("-"), Text("-"), Text("-")]
    low, high = min(curve.values), max(curve.values)
    scale = scale_for(curve.metric.unit, max(abs(low), abs(high)))
    ends = [text(scaled_text(value, scale)) for value in (curve.values[0], curve.values[-1])]
    span = "exactly 0" if low == high == 0 else interval_text(low, high, scale)
    return [text(curve.metric.title), *ends, text(span, "dim")]


def _course(curve: Series, cells: int) -> Text:
    if curve.odd:
        return text(f"{len(curve.odd):,} not finite, first in iteration {curve.odd[0]}", "red")
    flat = not curve.values or min(curve.values) == max(curve.values)
    return Text("" if flat else sparkline(curve.values, cells))


def sparkline(values: tuple[float, ...], cells: int) -> str:
    """The course of finite values in at most `cells` characters, each the mean of its share of them."""
    low, high = min(values), max(values)
    cells = max(1, min(cells, len(values)))
    edges = [round(at * len(values) / cells) for at in range(cells + 1)]
    means = [math.fsum(values[begin:end]) / (end - begin) for begin, end in pairwise(edges)]
    steps = [0 if high == low else round((mean - low) / (high - low) * (len(SPARKS) - 1)) for mean in means]
    return "".join(SPARKS[step] for step in steps)


def _draw_times(page: Page, record: RunRecord, loop: str) -> None:
    """One row a task: planned, measured, their ratio, and how often the plan's interval held."""
    times = task_times(record, loop)
    if not times:
        return
    inside, runs = coverage(times)
    share = f", {quantity_text(inside / runs, 'fraction')} inside the plan" if runs else ""
    page.heading(f"Plan and run of loop '{loop}'", f"{plural(sum(len(each.took_s) for each in times), 'task run')}{share}")
    table = grid("task", "planned", "measured", "ratio", "inside", right=("ratio", "inside"), indent=0)
    for each in times:
        table.add_row(*_time_cells(each))
    page.show(table)
    if again := [f"{each.task.name} {each.again:,}" for each in times if each.again]:
        page.note(text(f"run again: {', '.join(again)}", "yellow"))


def _time_cells(times: TaskTimes) -> list[Text]:
    estimate, ratio = times.task.estimate, times.ratio
    planned = estimate_text(estimate.low_s, estimate.mid_s, estimate.high_s, "s") if estimate else "-"
    measured = estimate_text(times.took_s[0], times.median_s, times.took_s[-1], "s")
    inside = f"{times.inside_count:,}/{len(times.took_s):,}" if times.inside_count is not None else f"-/{len(times.took_s):,}"
    return [
        text(times.task.name),
        text(planned),
        text(measured),
        text(f"{ratio:.2f}" if ratio is not None else "-"),
        text(inside, _inside_style(times)),
    ]


def _inside_style(times: TaskTimes) -> str:
    """Yellow below 90% inside, red below half."""
    if times.inside_count is None or times.inside_count >= 0.9 * len(times.took_s):
        return ""
    return "yellow" if times.inside_count >= 0.5 * len(times.took_s) else "red"


def _draw_events(page: Page, record: RunRecord) -> None:
    odd = [event for event in record.events if not is_quiet(event)]
    shown = record.events if page.full else odd[-LAST_EVENTS:]
    if not shown:
        return
    page.heading("Events", f"{len(odd):,} out of the ordinary, {len(record.events):,} in all")
    table = grid("at", "event", right=("at",), indent=0)
    for event in shown:
        table.add_row(
            text(seconds_text(float(event["time_s"])), "dim"), text(event_text(event), "dim" if is_quiet(event) else "")
        )
    page.show(table)


def _draw_files(page: Page, record: RunRecord) -> None:
    page.heading("Files", str(record.path))
    table = grid("", "", right=(), indent=0)
    for file in record.files:
        table.add_row(text(f"{file.name}/" if file.is_directory else file.name), text(bytes_text(file.size_bytes), "dim"))
    page.show(table)
