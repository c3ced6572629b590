"""Placement: each group's engine, GPUs, nodes, layout and tasks, and where it lies in the cluster."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from miles_plan.ir.group import DeviceGroup, gpus_in_use
from miles_plan.ir.plan import Plan
from miles_plan.report.palette import TERMINAL_ROLE
from miles_plan.report.terminal.page import Page, bar, padded, text, widest
from miles_plan.report.units import plural
from miles_plan.report.wording import colocation_text, device_noun, group_nodes


def draw_placement(page: Page, plan: Plan) -> None:
    """One row a group with its tasks under it, then the cluster as one line a group."""
    noun = device_noun(plan.cluster)
    used = f"{gpus_in_use(plan.graph.groups):,} of {plural(plan.cluster.num_gpus, noun)}"
    page.heading("Placement", ", ".join(part for part in (used, colocation_text(plan)) if part))
    titles = [text(title, "dim") for title in ("group", "engine", f"{noun}s", "nodes", "layout")]
    rows = [_cells(plan, group) for group in plan.graph.groups]
    widths = [max(cell.cell_len for cell in column) for column in zip(titles, *rows, strict=True)]
    page.show(_line(titles, widths))
    for group, row in zip(plan.graph.groups, rows, strict=True):
        page.show(_line(row, widths))
        page.note(
            text(", ".join(task.name for task in plan.graph.tasks if task.group == group.name), "dim"), indent=widths[0] + 2
        )
    _draw_map(page, plan)


def _line(cells: Sequence[Text], widths: Sequence[int]) -> Text:
    """Cells side by side, each as wide as its column."""
    return Text("  ").join(padded(cell, width) for cell, width in zip(cells, widths, strict=True))


def _cells(plan: Plan, group: DeviceGroup) -> list[Text]:
    return [
        Text.assemble(("■ ", TERMINAL_ROLE[group.role]), text(group.name, "bold")),
        text(group.engine if group.role != "host" else "processes"),
        text(group.gpus or ""),
        text(group_nodes(group, plan.cluster)),
        text(group.layout or ""),
    ]


def _draw_map(page: Page, plan: Plan) -> None:
    """Which part of the cluster each group holds: only worth drawing where parts differ."""
    groups = [group for group in plan.graph.groups if group.gpus is not None]
    total = plan.cluster.num_gpus
    if all(group.gpus and group.gpus.count == total for group in groups):
        return
    name_width = widest(group.name for group in groups)
    cells = min(64, page.width - name_width - 6)
    for group in groups:
        assert group.gpus is not None
        held = (group.gpus.first / total, group.gpus.end / total, "█", TERMINAL_ROLE[group.role])
        row = bar(cells, [(0.0, 1.0, "·", "dim"), held])
        page.show(Text.assemble("  ", padded(text(group.name), name_width), "  ", row))
    ends = f"0{total - 1:>{cells - 1}}"
    page.show(Text(f"  {'':<{name_width}}  {ends}", style="dim"))
