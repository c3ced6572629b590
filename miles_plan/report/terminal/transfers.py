"""Weight transfers: how tensors travel from trainer shards to engine shards."""

from __future__ import annotations

from miles_plan.ir.plan import Plan, TensorTransfer
from miles_plan.ir.tasks import WeightSync
from miles_plan.report.terminal.page import Page, text
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
    for each in plan.transfers:
        page.note(text(each.pattern), indent=0)
        page.note(text(_how(each), "dim"))


def _how(transfer: TensorTransfer) -> str:
    """How many tensors of which shape, how each side holds them, and when they travel."""
    shape = "x".join(str(size) for size in transfer.shape)
    size = f"{transfer.count:,} of {shape} {transfer.dtype}, {bytes_text(transfer.size_bytes)}"
    train = split_text(transfer.train_axis, transfer.train_parts)
    rollout = split_text(transfer.rollout_axis, transfer.rollout_parts)
    last = f"..{transfer.last_bucket}" if transfer.last_bucket > transfer.first_bucket else ""
    return f"{size}; {train} → {rollout}; bucket {transfer.first_bucket}{last}"
