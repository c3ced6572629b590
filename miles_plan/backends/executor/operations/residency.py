"""Offload and onload: parts of an engine leave its GPUs and come back."""

from __future__ import annotations

import sys
from typing import Any

from miles_plan.backends.engine import MemoryReport
from miles_plan.backends.executor.engines import RolloutRank, TrainRank
from miles_plan.backends.executor.operations.operation import Context, Operation, Outcome, Wait, places
from miles_plan.ir.tasks import Offload, Onload


def offload_rank(rank: TrainRank | RolloutRank, parts: tuple[Any, ...]) -> MemoryReport:
    """Move parts off this rank's device. A rollout that gives up its weights serves none."""
    if isinstance(rank, TrainRank):
        return rank.engine.offload(parts)
    if "weights" in parts:
        rank.version = None
    return rank.engine.sleep(parts)


def onload_rank(rank: TrainRank | RolloutRank, parts: tuple[Any, ...]) -> MemoryReport:
    """Bring parts back. What a trainer's allocator keeps for its next step makes room for a rollout engine beside it."""
    if isinstance(rank, TrainRank):
        return rank.engine.onload(parts)
    give_back_cached_memory()
    return rank.engine.wake(parts)


def give_back_cached_memory() -> None:
    """Free what torch holds on this process's GPU for tensors to come; nothing where it has not used one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def residency(context: Context) -> Operation:
    """Offload or onload on every rank of the group."""
    task = context.task
    assert isinstance(task, Offload | Onload)
    away = isinstance(task, Offload)
    calls = context.group.call(offload_rank if away else onload_rank, task.parts)
    verb = "offload" if away else "onload"
    reports = yield Wait(f"{places(context.group)}: {verb} {', '.join(task.parts)}", calls)
    if away and "weights" in task.parts and context.flow.graph.group(task.group or "").role == "rollout":
        context.state.served[context.group.slot] = None
    held = max(sum(report.device_bytes.values()) for report in reports)
    return Outcome(figures={f"{task.name}_device_bytes": held})
