"""The order of a plan's page: what to draw by default, what on request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType

from rich.console import Console

from miles_plan.ir.plan import Plan
from miles_plan.report.terminal.candidates import draw_candidates
from miles_plan.report.terminal.decisions import draw_decisions
from miles_plan.report.terminal.estimates import draw_estimates
from miles_plan.report.terminal.failures import draw_failures
from miles_plan.report.terminal.findings import draw_environment, draw_warnings
from miles_plan.report.terminal.memory import draw_memory
from miles_plan.report.terminal.page import Page, draw
from miles_plan.report.terminal.placement import draw_placement
from miles_plan.report.terminal.precision import draw_precision
from miles_plan.report.terminal.steps import draw_steps
from miles_plan.report.terminal.summary import draw_summary
from miles_plan.report.terminal.transfers import draw_transfers

SECTIONS: MappingProxyType[str, Callable[[Page, Plan], None]] = MappingProxyType(
    {
        "summary": draw_summary,
        "placement": draw_placement,
        "steps": draw_steps,
        "memory": draw_memory,
        "decisions": draw_decisions,
        "candidates": draw_candidates,
        "precision": draw_precision,
        "transfers": draw_transfers,
        "failures": draw_failures,
        "estimates": draw_estimates,
        "environment": draw_environment,
        "warnings": draw_warnings,  # last: what a reader must not miss stands above the prompt
    }
)
DEFAULT_SECTIONS = ("summary", "placement", "steps", "memory", "decisions", "candidates", "precision", "estimates", "warnings")


def render_plan(plan: Plan, console: Console, *, sections: Sequence[str] | None = None, full: bool = False) -> None:
    """Print a plan's sections in their order: those asked for, else the default ones.

    full: every row of a section, and every section if none is asked for. ValueError for one that does not exist.
    """
    sections = sections or (tuple(SECTIONS) if full else DEFAULT_SECTIONS)
    if unknown := [name for name in sections if name not in SECTIONS]:
        raise ValueError(f"no section '{unknown[0]}', there are: {', '.join(SECTIONS)}")
    page = Page(console, full)

    def draw_sections() -> None:
        for name, draw_section in SECTIONS.items():
            if name in sections:
                draw_section(page, plan)

    draw(console, draw_sections)
