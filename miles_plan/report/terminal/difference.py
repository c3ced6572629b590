"""The difference of two plans: what came, went and changed, section by section, and a count at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from miles_plan.report.compare import SECTIONS, Change, Comparison, value_text
from miles_plan.report.printable import printable
from miles_plan.report.terminal.page import Page, draw, text

MARK = {"added": ("+", "green"), "removed": ("-", "red"), "changed": ("~", "yellow")}
FIRST_FEW = 12


def render_difference(comparison: Comparison, console: Console, *, full: bool = False) -> None:
    """Print a comparison. full: every change, and long values whole."""
    page = Page(console, full)

    def draw_sections() -> None:
        if comparison.same:
            page.show(text(f"No difference: both are plan {comparison.before[:12]}."))
            return
        page.show(text(f"plan {comparison.before[:12]} → plan {comparison.after[:12]}", "dim"))
        for section in SECTIONS:
            if changes := comparison.of(section):
                _draw_section(page, section, changes)
        counts = [f"{comparison.count(kind)} {kind}" for kind in ("added", "removed", "changed")]
        page.show(Text(), text(", ".join(counts) + ".", "bold"))

    draw(console, draw_sections)


def _draw_section(page: Page, section: str, changes: list[Change]) -> None:
    """Changes under the record they belong to; a section that changed all over is cut short."""
    page.heading(section.capitalize(), f"{len(changes)}")
    shown = changes if page.full else changes[:FIRST_FEW]
    record = None
    for change in shown:
        if change.field and change.key and change.key != record:
            page.note(text(change.key, "bold"), indent=0)
        record = change.key
        indent = 2 if change.field and change.key else 0
        page.note(_line(page, change, indent), indent=indent)
    if len(shown) < len(changes):
        page.note(text(f"and {len(changes) - len(shown):,} more with --all", "dim"))


def _line(page: Page, change: Change, indent: int) -> Text:
    """One change; unless everything is asked for, on one line, the values cut to share it."""
    mark, style = MARK[change.kind]
    name, delta = printable(change.field or change.key), f"  {change.delta}" if change.delta else ""
    room = max(16, page.width - indent - cell_len(name) - cell_len(delta) - 4)
    if change.kind != "changed":
        value = change.after if change.kind == "added" else change.before
        return Text.assemble((f"{mark} ", style), name, "  ", _cut(page, _brief(value, change), room, "dim"))
    before, after = change.before_text, change.after_text
    half = (room - 3) // 2
    room_before = max(half, room - 3 - cell_len(after))
    room_after = max(half, room - 3 - cell_len(before))
    values = (_cut(page, before, room_before), (" → ", "dim"), _cut(page, after, room_after), (delta, "bold"))
    return Text.assemble((f"{mark} ", style), name, "  ", *values)


def _brief(value: Any, change: Change) -> str:
    """A field's value, or a whole record as its fields that say something."""
    if not isinstance(value, Mapping):
        return value_text(value, change.unit, change.field)
    said = {name: item for name, item in value.items() if item not in (None, "", [], {}, False, 0)}
    return value_text(said, change.unit, change.field)


def _cut(page: Page, words: str, room: int, style: str = "") -> Text:
    shown = text(words, style)
    if not page.full:
        shown.truncate(room, overflow="ellipsis")
    return shown
