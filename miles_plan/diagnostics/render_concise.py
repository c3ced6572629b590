"""One line a finding, in the form that editors and grep know."""

from __future__ import annotations

from miles_plan.diagnostics.view import DiagnosticView, Report


def render_concise(report: Report) -> str:
    """`file:line:column: error[MP201]: message (help: ...)` for each finding."""
    return "".join(f"{_line(view)}\n" for view in report["diagnostics"])


def _line(view: DiagnosticView) -> str:
    place = view["location"]
    where = "-" if place is None else f"{place['file']}:{place['line']}:{place['column']}" if place["line"] else place["file"]
    help = f" (help: {view['help']})" if view["help"] else ""
    text = f"{where}: {view['severity']}[{view['code']}]: {view['message']}{help}"
    return "".join(each if each.isprintable() else " " for each in text)
