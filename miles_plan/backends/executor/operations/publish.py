"""Publishing weights: the trainer puts a version where rollout engines can take it, and frees it when nobody will ask again."""

from __future__ import annotations

from collections.abc import Sequence

from miles_plan.backends.engine import EngineError, WeightBucket
from miles_plan.backends.executor.dataflow import tasks_of
from miles_plan.backends.executor.engines import TrainRank
from miles_plan.backends.executor.operations.operation import Context, Wait, Waiting, places
from miles_plan.backends.executor.run_state import Publication, still_wanted
from miles_plan.ir.group import DeviceGroup
from miles_plan.ir.tasks import WeightSync

DEFAULT_BUCKET_BYTES = 64 << 20


def export_rank(rank: TrainRank, version: int, bucket_bytes: int) -> list[WeightBucket]:
    """The buckets this rank owns."""
    return list(rank.at(version).export_weights(version, bucket_bytes=bucket_bytes))


def release_rank(rank: TrainRank, version: int) -> None:
    """Free what this rank published of a version."""
    rank.engine.release_weights(version)


def publish(context: Context, version: int) -> Waiting[Publication]:
    """Export a version on all trainer ranks; returns where it lies. EngineError if the buckets do not add up."""
    trainer = context.members[train_group(context).name]
    calls = trainer.call(export_rank, version, bucket_bytes(context))
    reports = yield Wait(f"{places(trainer)}: export weights version {version}", calls)
    buckets = sorted((bucket for report in reports for bucket in report), key=lambda bucket: bucket.index)
    check_buckets(buckets, version)
    total_bytes = sum(tensor.size_bytes for bucket in buckets for tensor in bucket.tensors)
    publication = Publication(trainer.slot, buckets, total_bytes)
    context.state.published[version] = publication
    context.event("weights_published", f"version {version}", buckets=len(buckets), bytes=total_bytes)
    return publication


def check_buckets(buckets: Sequence[WeightBucket], version: int) -> None:
    """Every index once, from 0, of one version, the last one marked so."""
    if [bucket.index for bucket in buckets] != list(range(len(buckets))) or not buckets or not buckets[-1].last:
        raise EngineError(f"weights version {version}: buckets {[bucket.index for bucket in buckets]} are not whole")
    if wrong := {bucket.version for bucket in buckets} - {version}:
        raise EngineError(f"weights version {version}: buckets of version {sorted(wrong)} among them")


def release_unwanted(context: Context) -> Waiting[None]:
    """Free published versions that no sync and no checkpoint to come will ask for, the running task counted as done."""
    wanted = still_wanted(context.flow, context.flow.after(context.done, context.instance), context.state)
    for version in [each for each in context.state.published if each not in wanted]:
        publication = context.state.published.pop(version)
        calls = context.members[publication.group].call(release_rank, version)
        yield Wait(f"{places(context.members[publication.group])}: release weights version {version}", calls)
        context.event("weights_released", f"version {version}")


def train_group(context: Context) -> DeviceGroup:
    """The group that trains the policy."""
    return next(group for group in context.flow.graph.groups if group.role == "train")


def bucket_bytes(context: Context) -> int:
    """Bytes of a bucket, as the plan's weight sync says."""
    return max((task.bucket_bytes for task in tasks_of(context.flow.graph, WeightSync)), default=0) or DEFAULT_BUCKET_BYTES
