"""What happens around the graph: entering a loop, saving when asked to stop, and the final export."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from miles_plan.backends.executor.checkpoints import Manifest
from miles_plan.backends.executor.dataflow import tasks_of
from miles_plan.backends.executor.engines import TrainRank
from miles_plan.backends.executor.operations.checkpoint import DEFAULT_KEEP, saved
from miles_plan.backends.executor.operations.operation import Context, Wait, Waiting, places
from miles_plan.backends.executor.operations.publish import train_group
from miles_plan.ir.tasks import Checkpoint, Logprobs


def snapshot_rank(rank: TrainRank) -> None:
    """The reference becomes the policy as it is."""
    rank.engine.snapshot_reference()


def export_rank(rank: TrainRank, version: int, folder: Path) -> str:
    """Write the final checkpoint and return the weights' digest."""
    engine = rank.at(version)
    engine.export_checkpoint(folder)
    return engine.weights_sha256()


def enter_loop(context: Context, loop: str) -> Waiting[None]:
    """A loop that follows another takes the policy that the other left behind as its reference."""
    graph = context.flow.graph
    uses_reference = any(task.model == "reference" and task.loop == loop for task in tasks_of(graph, Logprobs))
    if uses_reference and graph.loops[0].name != loop:
        trainer = context.members[train_group(context).name]
        yield Wait(f"{places(trainer)}: take the policy as reference", trainer.call(snapshot_rank))


def save_now(context: Context, loop: str, iteration: int, done: dict[str, int]) -> Waiting[Manifest]:
    """A checkpoint outside the graph's own."""
    keeps = [task.keep for task in tasks_of(context.flow.graph, Checkpoint)]
    return (yield from saved(context, loop, iteration, done, keep=max(keeps, default=DEFAULT_KEEP)))


@dataclass(frozen=True, slots=True)
class Exported:
    """The trained policy on disk."""

    weights_sha256: str


def export(context: Context, folder: Path) -> Waiting[Exported]:
    """The policy as a Hugging Face checkpoint, and the digest of its weights. What a killed session left is written again."""
    shutil.rmtree(folder, ignore_errors=True)
    trainer = context.members[train_group(context).name]
    calls = trainer.call(export_rank, context.state.trainer_version, folder)
    digests = yield Wait(f"{places(trainer)}: write the trained policy", calls)
    return Exported(digests[0])
