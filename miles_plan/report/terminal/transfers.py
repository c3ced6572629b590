"""Weight transfers: how tensors travel from trainer shards to engine shards."""

from __future__ import annotations

from miles_plan.ir.plan import Plan
from miles_plan.ir.tasks import WeightSync
from miles_plan.report.terminal.page import Page, grid, text
from miles_plan.report.units import bytes_text, plural
from miles_plan.report.wording import split_text


def draw_transfers(page: Page, plan: Plan) -> None:
    """Each sync in one line, then every name pattern."""
    if not plan.transfers:
        return
    tensors = sum(transfer.count for transfer in plan.transfers)
    page.heading("Weight transfers", f"{plural(tensors, 'tensor')}, {plural(len(plan.transfers), 'pattern')}")
    for task in plan.graph.of_kind(WeightSync):
        assert isinstance(task, WeightSync)
        size = f"{bytes_text(task.total_bytes)} in buckets of {bytes_text(task.bucket_bytes)}"
        page.note(text(f"{task.name}: {task.transport}, {size}"), indent=0)
    table = grid(
        "pattern", "tensors", "shape", "dtype", "size", "trainer", "engine", "buckets", right=("tensors", "size"), indent=0
    )
    for each in plan.transfers:
        buckets = f"{each.first_bucket}..{each.last_bucket}" if each.last_bucket > each.first_bucket else str(each.first_bucket)
        sides = (split_text(each.train_axis, each.train_parts), split_text(each.rollout_axis, each.rollout_parts))
        shape = "x".join(str(size) for size in each.shape)
        cells = (each.pattern, f"{each.count:,}", shape, each.dtype, bytes_text(each.size_bytes), *sides, buckets)
        table.add_row(*(text(cell) for cell in cells))
    page.show(table)
