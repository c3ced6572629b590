"""The formats findings can be shown in."""

from __future__ import annotations

import json
from typing import Literal, assert_never

from miles_plan.diagnostics.render_concise import render_concise
from miles_plan.diagnostics.render_full import render_full
from miles_plan.diagnostics.render_github import render_github
from miles_plan.diagnostics.render_sarif import render_sarif
from miles_plan.diagnostics.view import Report

Format = Literal["full", "concise", "json", "sarif", "github"]


def render(report: Report, format: Format, *, color: bool = False) -> str:
    """The report as text of the given format, ending in a newline unless empty; only `full` knows color."""
    match format:
        case "full":
            return render_full(report, color=color)
        case "concise":
            return render_concise(report)
        case "json":
            return json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        case "sarif":
            return render_sarif(report)
        case "github":
            return render_github(report)
    assert_never(format)
