"""Checkpoint: every rank writes and hashes its files, older weights that syncs still ask for lie beside them, manifest last."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from miles_plan.backends.engine import WeightBucket
from miles_plan.backends.executor.checkpoints import FileRecord, Manifest, commit, keep_newest, open_writing, record_files
from miles_plan.backends.executor.engines import TrainRank
from miles_plan.backends.executor.operations.operation import Context, Operation, Outcome, Wait, Waiting, places
from miles_plan.backends.executor.operations.publish import train_group
from miles_plan.backends.executor.run_state import still_wanted
from miles_plan.backends.executor.weight_files import save_buckets
from miles_plan.ir.tasks import Checkpoint

DEFAULT_KEEP = 2


@dataclass(frozen=True, slots=True)
class Saved:
    """A rank's files, and the seconds it took to write them and to hash them."""

    files: tuple[FileRecord, ...]
    write_s: float
    hash_s: float


def save_rank(rank: TrainRank, version: int, folder: Path) -> Saved:
    """This rank's files below `folder`, on disk and hashed; nobody else reads them on the way."""
    began = time.monotonic()
    written = rank.at(version).save(folder)
    between = time.monotonic()
    files = record_files(folder, [_relative(folder, name) for name in written])
    return Saved(files, between - began, time.monotonic() - between)


def save_published(rank: TrainRank, folder: Path, name: str, buckets: Sequence[WeightBucket]) -> tuple[FileRecord, ...]:
    """Published weights as files below `folder / name`."""
    return record_files(folder, [f"{name}/{file}" for file in save_buckets(folder / name, buckets)])


def _relative(folder: Path, name: str) -> str:
    path = Path(name)
    return str(path.relative_to(folder)) if path.is_absolute() else name


def checkpoint(context: Context) -> Operation:
    """Save the run as of this iteration, then forget the oldest checkpoints."""
    task = context.task
    assert isinstance(task, Checkpoint)
    done = context.flow.cut(task.loop, context.instance.iteration, task.name)
    began = time.monotonic()
    manifest = yield from saved(context, task.loop, context.instance.iteration, done, keep=task.keep)
    seconds = time.monotonic() - began
    total = sum(record.size_bytes for record in manifest.files)
    return Outcome(figures={"checkpoint_s": seconds, "checkpoint_bytes": total}, weight_version=manifest.weight_version)


def saved(context: Context, loop: str, iteration: int, done: dict[str, int], *, keep: int) -> Waiting[Manifest]:
    """Write a checkpoint of the cut `done`; returns its manifest."""
    state, began = context.state, time.monotonic()
    version = state.trainer_version
    trainer = context.members[train_group(context).name]
    folder = open_writing(context.services.directory.checkpoints, version)
    try:
        calls = trainer.call(save_rank, version, folder)
        ranks: list[Saved] = yield Wait(f"{places(trainer)}: save weights version {version}", calls)
        files = [record for each in ranks for record in each.files]
        older = {}
        for each in sorted(still_wanted(context.flow, done, state) - {version}):
            older[str(each)] = name = f"weights-version-{each:06d}"
            calls = trainer.part([0]).call(save_published, folder, name, state.published[each].buckets)
            (report,) = yield Wait(f"{places(trainer)}: save weights version {each}", calls)
            files += report
        cursors, made = state.at_cut(context.flow, done)
        manifest = Manifest(
            plan_sha256=context.services.plan_sha256,
            loop=loop,
            iteration=iteration,
            weight_version=version,
            done=done,
            cursors={str(each): rows for each, rows in cursors.items()},
            older_weights=older,
            weights_made={str(each): number for each, number in made.items()},
            metrics=context.services.unwritten_metrics(loop, iteration),
            journal_row=context.services.journal_row(),
            seed=context.services.plan.run.seed,
            files=tuple(sorted(files, key=lambda record: record.path)),
        )
        final = commit(folder, manifest)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    state.saved = dict(done)
    forgotten = keep_newest(context.services.directory.checkpoints, keep)
    context.event(
        "checkpoint_written",
        final.name,
        iteration=iteration,
        loop=loop,
        bytes=sum(record.size_bytes for record in manifest.files),
        seconds=round(time.monotonic() - began, 3),
        write_s=round(max(each.write_s for each in ranks), 3),
        hash_s=round(max(each.hash_s for each in ranks), 3),
        forgotten=forgotten,
    )
    return manifest
