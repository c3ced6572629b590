"""Workflow commands of GitHub Actions: findings become annotations on the lines of a pull request.

https://docs.github.com/actions/reference/workflows-and-actions/workflow-commands
"""

from __future__ import annotations

from miles_plan.diagnostics.view import DiagnosticView, Report


def render_github(report: Report) -> str:
    """One `::error file=...,line=...,col=...,title=MP201::message` line for each finding."""
    return "".join(f"{_command(view)}\n" for view in report["diagnostics"])


def _command(view: DiagnosticView) -> str:
    place = view["location"]
    properties: dict[str, object] = {}
    if place:
        properties["file"] = place["file"]
        if place["line"]:
            properties |= {"line": place["line"], "col": place["column"]}
            if place["end_line"] == place["line"] and place["end_column"]:
                properties |= {"endLine": place["end_line"], "endColumn": place["end_column"]}
    properties["title"] = view["code"]
    level = {"error": "error", "warning": "warning", "note": "notice"}[view["severity"]]
    text = f"{view['message']} ({view['help']})" if view["help"] else view["message"]
    listed = ",".join(f"{name}={_escaped(str(value), in_property=True)}" for name, value in properties.items())
    return f"::{level} {listed}::{_escaped(text)}"


def _escaped(text: str, *, in_property: bool = False) -> str:
    """A newline would start another command, so control characters become spaces: text of a file is never run as one."""
    escaped = "".join(each if each.isprintable() else " " for each in text).replace("%", "%25")
    return escaped.replace(":", "%3A").replace(",", "%2C") if in_property else escaped
