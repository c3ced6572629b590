"""A plan or a run as text that reads well at 80 columns, in pipes and without colour."""

from miles_plan.report.terminal.difference import render_difference
from miles_plan.report.terminal.plan_page import DEFAULT_SECTIONS, SECTIONS, render_plan
from miles_plan.report.terminal.run_page import render_run

__all__ = ["DEFAULT_SECTIONS", "SECTIONS", "render_difference", "render_plan", "render_run"]
