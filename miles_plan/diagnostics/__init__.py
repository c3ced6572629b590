"""What the user is told about mistakes: code, place, message, help and fix, and the ways to show them."""

from miles_plan.diagnostics.codes import PAGES, explanation
from miles_plan.diagnostics.diagnostic import Diagnostic, Edit, Fix, PlanError, Severity, by_place, error, warning
from miles_plan.diagnostics.excerpt import excerpt
from miles_plan.diagnostics.location import Location
from miles_plan.diagnostics.nearest import nearest
from miles_plan.diagnostics.page import Page
from miles_plan.diagnostics.render import Format, render
from miles_plan.diagnostics.view import Report, report

__all__ = [
    "PAGES",
    "Diagnostic",
    "Edit",
    "Fix",
    "Format",
    "Location",
    "Page",
    "PlanError",
    "Report",
    "Severity",
    "by_place",
    "error",
    "excerpt",
    "explanation",
    "nearest",
    "render",
    "report",
    "warning",
]
