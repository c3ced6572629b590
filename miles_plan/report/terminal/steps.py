"""The step timeline: tasks in order with start, duration and a bar; the critical path is marked."""

from __future__ import annotations

from rich.text import Text

from miles_plan.ir.plan import Plan
from miles_plan.report.palette import TERMINAL_ACTIVITY, activity
from miles_plan.report.schedule import LoopSchedule, PlannedRun, loop_schedules
from miles_plan.report.terminal.page import Page, bar, grid, text, widest
from miles_plan.report.units import estimate_text, number_text, plural, seconds_text
from miles_plan.report.wording import how_often, overlap_text

SHORTEST_BAR = 10


def draw_steps(page: Page, plan: Plan) -> None:
    """One table a loop."""
    for schedule in loop_schedules(plan):
        page.heading(f"Step of loop '{schedule.loop.name}'", _summary(schedule))
        _draw_tasks(page, schedule)
        page.note(Text("● critical path: ", style="dim"), Text(_shares(schedule), style="dim"))
        if schedule.overlaps:
            page.note(text(f"iterations overlap: {overlap_text(schedule)}", "dim"))


def _summary(schedule: LoopSchedule) -> str:
    step = estimate_text(schedule.low_s, schedule.iteration_s, schedule.high_s, "s")
    return f"{step}, {plural(schedule.loop.iterations, 'time')}"


def _draw_tasks(page: Page, schedule: LoopSchedule) -> None:
    names = [_name(run) for run in schedule.runs]
    takes = [_takes(run) for run in schedule.runs]
    starts = [seconds_text(run.start_s) for run in schedule.runs]
    groups = [run.task.group or "" for run in schedule.runs]
    fixed = sum(
        (widest((name.plain for name in names)) + 2, widest(groups, "group"), widest(starts, "start"), widest(takes, "takes"))
    )
    cells = min(72, page.width - fixed - 4 * 2)
    titles = ["  task", "group", "start", "takes"]
    table = grid(*titles, *([_axis(schedule, cells)] if cells >= SHORTEST_BAR else []), right=("start",), indent=0)
    for run, name, start, took, group in zip(schedule.runs, names, starts, takes, groups, strict=True):
        critical = run.task.name in schedule.critical
        mark = Text("● " if critical else "  ", style="bold" if critical else "")
        row = [Text.assemble(mark, name), text(group), text(start, "dim"), text(took)]
        if cells >= SHORTEST_BAR:
            row.append(_bar(run, schedule, cells, critical))
        table.add_row(*row)
    page.show(table)


def _name(run: PlannedRun) -> Text:
    often = how_often(run.task)
    return Text.assemble(text(run.task.name), (f" {often}" if often else "", "dim"))


def _takes(run: PlannedRun) -> str:
    estimate = run.task.estimate
    return estimate_text(estimate.low_s, estimate.mid_s, estimate.high_s, "s") if estimate else ""


def _bar(run: PlannedRun, schedule: LoopSchedule, cells: int, critical: bool) -> Text:
    whole = schedule.full_s or 1.0
    colour = TERMINAL_ACTIVITY[activity(run.task)]
    return bar(cells, [(run.start_s / whole, run.end_s / whole, "█" if critical else "▒", colour)])


def _axis(schedule: LoopSchedule, cells: int) -> str:
    """`0` at the left, the end of the iteration at the right."""
    end = seconds_text(schedule.full_s)
    return f"0{end:>{cells - 1}}"


def _shares(schedule: LoopSchedule) -> str:
    """The largest tasks on the critical path, with their share of it."""
    took = sorted(
        ((run.end_s - run.start_s, run.task.name) for run in schedule.runs if run.task.name in schedule.critical), reverse=True
    )
    whole = sum(seconds for seconds, _ in took) or 1.0
    named = [f"{name} {number_text(100 * seconds / whole, 2)}%" for seconds, name in took[:4]]
    rest = f", {plural(len(took) - 4, 'more task')}" if len(took) > 4 else ""
    return ", ".join(named) + rest
