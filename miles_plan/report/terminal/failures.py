"""The failure table: deadline of each task, and what happens when it fails or outlives it."""

from __future__ import annotations

from collections import Counter

from miles_plan.ir.plan import Plan
from miles_plan.report.terminal.page import Page, grid, text
from miles_plan.report.units import seconds_text

RESTART_STYLE = {"retry": "green", "rebuild": "yellow", "rollback": "yellow", "fatal": "red"}


def draw_failures(page: Page, plan: Plan) -> None:
    """One row a task."""
    if not plan.failures:
        return
    counts = Counter(row.restart for row in plan.failures)
    page.heading("Failures", ", ".join(f"{count} {restart}" for restart, count in counts.items()))
    table = grid("task", "deadline", "restart", "recovers from", right=("deadline",), indent=0)
    for row in plan.failures:
        restart = text(row.restart, RESTART_STYLE.get(row.restart, ""))
        table.add_row(text(row.task), text(seconds_text(row.deadline_s)), restart, text(row.recovers_from, "dim"))
    page.show(table)
