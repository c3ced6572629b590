"""What a reader must not miss: warnings of compilation and fields that nothing read; and the environment a run needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from miles_plan.ir.plan import Plan
from miles_plan.report.terminal.page import Page, grid, text


def draw_environment(page: Page, plan: Plan) -> None:
    """What must be installed or set, which user code the run imports, and where the plan comes from."""
    page.heading("Environment", f"miles-plan {plan.tool_version}")
    table = grid("", "", indent=0)
    for name, value in plan.environment:
        table.add_row(text(name), text(value))
    for entry_point in plan.imports:
        table.add_row("imports", text(entry_point))
    for path, digest in plan.sources:
        table.add_row(text(path), text(f"sha256 {digest[:12]}", "dim"))
    page.show(table)


def draw_warnings(page: Page, plan: Plan) -> None:
    """Each warning with its place and help, then the unread fields."""
    if not plan.diagnostics and not plan.unread_fields:
        return
    page.heading("Warnings")
    for finding in plan.diagnostics:
        page.note(finding_text(finding), indent=0)
        if finding.get("help"):
            page.note(text(f"help: {finding['help']}", "dim"))
    for field in plan.unread_fields:
        page.note(Text.assemble(("unread: ", "yellow"), text(field), (" is set, and nothing uses it", "dim")), indent=0)


def finding_text(finding: Mapping[str, Any]) -> Text:
    """`warning[MP214]: message (file:line:column)` of a diagnostic's JSON form."""
    head = f"{finding.get('severity', 'warning')}[{finding.get('code', '?')}]"
    place = place_text(finding.get("location"))
    message = text(f": {finding.get('message', '')}")
    return Text.assemble(text(head, "bold yellow"), message, text(f" ({place})" if place else "", "dim"))


def place_text(location: object) -> str:
    """`file:line:column` of a location in JSON form, or of one that is text already."""
    if not isinstance(location, Mapping):
        return str(location or "")
    parts = [location.get("file", ""), location.get("line"), location.get("column")]
    return ":".join(str(part) for part in parts if part)
