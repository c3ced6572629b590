"""The precision table and routing replay: where trainer and rollout differ, and what is done about it."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from miles_plan.ir.plan import Plan
from miles_plan.report.terminal.page import Page, grid, text
from miles_plan.report.wording import routing_sentences

Verdict = Literal["same", "removed", "replayed", "corrected", "accepted"]
VERDICT_STYLE: dict[Verdict, str] = {
    "accepted": "yellow",
    "corrected": "yellow",
    "replayed": "green",
    "removed": "green",
    "same": "dim",
}


def draw_precision(page: Page, plan: Plan) -> None:
    """The operators that differ between trainer and rollout (with `full` all), then how routing is replayed."""
    routing = routing_sentences(plan)
    if not plan.numerics and not routing:
        return
    counts = Counter(row.verdict for row in plan.numerics)
    page.heading("Precision", ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICT_STYLE if counts[verdict]))
    rows = [row for row in plan.numerics if page.full or row.verdict != "same"]
    if rows:
        table = grid("operator", "train", "rollout", "verdict", "reason", indent=0)
        for row in rows:
            cells = (text(row.op), text(row.train), text(row.rollout), text(row.verdict, VERDICT_STYLE[row.verdict]))
            table.add_row(*cells, text(row.reason, "dim"))
        page.show(table)
    for sentence in routing:
        page.note(text(f"routing: {sentence}"), indent=0)
