"""Decisions: what each pass chose, why, and what the next best choice would have cost."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from miles_plan.ir.plan import Alternative, Decision, Plan
from miles_plan.report.terminal.page import Page, text, widest
from miles_plan.report.units import plural


def draw_decisions(page: Page, plan: Plan) -> None:
    """Field and value, the reason under them, then the next best; with `full` every alternative."""
    if not plan.decisions:
        return
    page.heading("Decisions", plural(len(plan.decisions), "decision"))
    fields = widest(decision.field for decision in plan.decisions)
    for decision in plan.decisions:
        _draw_decision(page, decision, fields)


def _draw_decision(page: Page, decision: Decision, fields: int) -> None:
    line = Table.grid(padding=(0, 2, 0, 0))
    line.add_column(width=fields)
    line.add_column(overflow="fold")
    line.add_row(text(decision.field), Text.assemble(text(decision.value, "bold"), "  ", text(decision.by, "dim")))
    page.show(line)
    page.note(text(decision.reason))
    shown = decision.alternatives if page.full else decision.alternatives[:1]
    for alternative in shown:
        page.note(_alternative(alternative))


def _alternative(alternative: Alternative) -> Text:
    cost = f": {alternative.cost}" if alternative.cost else ""
    why = f"; {alternative.why_not}" if alternative.why_not else ""
    return Text.assemble(("not ", "dim"), text(alternative.value), text(cost + why, "dim"))
