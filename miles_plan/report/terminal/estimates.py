"""Estimates with intervals and basis."""

from __future__ import annotations

from miles_plan.ir.plan import Plan
from miles_plan.report.terminal.page import Page, grid, text
from miles_plan.report.units import interval_text, quantity_text, scale_for, scaled_text


def draw_estimates(page: Page, plan: Plan) -> None:
    """One row a figure; with `full` the terms it is the sum of. Below: whose measurements they rest on, if not the shipped."""
    if not plan.estimates:
        return
    page.heading("Estimates", "expected value, interval, basis")
    table = grid("", "expected", "interval", "basis", right=("expected",), indent=0)
    for each in plan.estimates:
        scale = scale_for(each.unit, each.high)
        interval = interval_text(each.low, each.high, scale) if each.low < each.high else "exact"
        table.add_row(text(each.name), text(scaled_text(each.mid, scale), "bold"), text(interval), text(each.basis, "dim"))
        if page.full and each.terms:
            parts = ", ".join(f"{name} {quantity_text(value, each.unit)}" for name, value in each.terms)
            table.add_row("", "", "", text(parts, "dim"))
    page.show(table)
    for decision in plan.decisions:
        if decision.field == "cluster.profile":
            page.note(f"{decision.value}: {decision.reason}")
