"""Bringing a version of the weights to rollout engines, by the transport that the plan chose.

shared_memory: the trainer publishes, engines read. cuda_ipc: trainer and engine share GPUs, so each process streams bucket by
bucket from one to the other, and no bucket waits for the driver. nccl_broadcast: trainer and engines meet in a process group;
the engines are told beforehand what comes, and receive while the trainer sends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from miles_plan.backends.engine import BucketLayout, EngineError, WeightBucket
from miles_plan.backends.executor.actors import Members
from miles_plan.backends.executor.cluster import free_port
from miles_plan.backends.executor.dataflow import tasks_of
from miles_plan.backends.executor.engines import RolloutRank, TrainRank
from miles_plan.backends.executor.operations.operation import Context, Wait, Waiting, places
from miles_plan.backends.executor.operations.publish import bucket_bytes, publish, train_group
from miles_plan.backends.executor.run_state import Link
from miles_plan.ir.layout import RolloutLayout
from miles_plan.ir.tasks import Transport, WeightSync

PROBES_A_TENSOR = 2
PROBED_TENSORS_A_BUCKET = 8
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Delivered:
    """What a delivery moved. probes: elements of the weights that were looked at on both sides afterwards."""

    total_bytes: int
    buckets: int
    probes: int = 0


def deliver(context: Context, rollout: Members, version: int) -> Waiting[Delivered]:
    """Bring every rank of the rollout engines to a version. EngineError when one does not acknowledge it."""
    transport = transport_of(context)
    if transport == "cuda_ipc":
        delivered = yield from _streamed(context, rollout, version)
    elif transport == "nccl_broadcast":
        delivered = yield from _broadcast(context, rollout, version)
    else:
        delivered = yield from _published(context, rollout, version)
    return delivered


def transport_of(context: Context) -> Transport:
    """The way that the plan's weights travel."""
    return next((task.transport for task in tasks_of(context.flow.graph, WeightSync) if task.transport), "shared_memory")


# shared memory


def take_weights(rank: RolloutRank, version: int, buckets: Sequence[WeightBucket]) -> int:
    """Take every bucket, then serve the version; until the commit the rank serves nothing. Returns the version held."""
    rank.version = None
    for bucket in buckets:
        rank.engine.update_weights(bucket)
    rank.version = rank.engine.commit_weights(version)
    return rank.version


def _published(context: Context, rollout: Members, version: int) -> Waiting[Delivered]:
    publication = context.state.published.get(version)
    if publication is None:
        publication = yield from publish(context, version)
    calls = rollout.call(take_weights, version, publication.buckets)
    acknowledged = yield Wait(f"{places(rollout)}: take weights version {version}", calls)
    check_acknowledged(rollout, acknowledged, version)
    return Delivered(publication.total_bytes, len(publication.buckets))


def check_acknowledged(rollout: Members, acknowledged: Sequence[int | None], version: int) -> None:
    """EngineError naming the ranks that hold another version."""
    if wrong := [place for place, each in zip(rollout.places, acknowledged, strict=True) if each != version]:
        raise EngineError(f"weights version {version} was not acknowledged by {', '.join(wrong)}")


# from GPU memory to GPU memory


def hand_over(train: TrainRank, rollout: RolloutRank | None, version: int, bytes_a_bucket: int) -> dict[str, Any]:
    """Stream this process's trainer into the rollout engine of which it holds the first rank; every rank streams along."""
    first = rollout is not None and rollout.rank == 0
    if rollout is not None:
        rollout.version = None
    report: dict[str, Any] = {"bytes": 0, "buckets": 0, "probes": 0}
    probes: list[dict[str, Any]] = []
    engine: Any = train.at(version)
    for bucket in engine.stream_weights(version, bucket_bytes=bytes_a_bucket):
        report["bytes"] += bucket.layout.size_bytes
        report["buckets"] += 1
        if first and rollout is not None:
            probes += probes_of_bucket(bucket.layout, bucket.data, version)
            rollout.engine.update_weights(lent_bucket(bucket.layout, bucket.data, version))
    if rollout is not None:
        confirm(rollout, version, probes)
        report |= {"probes": len(probes), "acknowledged": rollout.version}
    return report


def lent_bucket(layout: BucketLayout, data: Any, version: int) -> WeightBucket:
    """A bucket in this process's GPU memory for another process: with a checksum a tensor, computed where the bytes are."""
    import torch

    from miles_plan.backends.weight_transport.cuda_ipc import lend, with_checksums

    tensors = with_checksums(data, layout.tensors)
    torch.cuda.synchronize()  # the borrower's stream knows nothing of ours
    return WeightBucket(
        transport="cuda_ipc", version=version, index=layout.index, handle=lend(data), tensors=tensors, last=layout.last
    )


def probes_of_bucket(layout: BucketLayout, data: Any, version: int) -> list[dict[str, Any]]:
    """Some elements of some tensors of a bucket, others for each version, to look for in the engine after the sync."""
    import torch

    from miles_plan.backends.sglang_engine.placed_weights import can_probe, probes_of
    from miles_plan.backends.weight_transport.cuda_ipc import view_of

    generator = torch.Generator().manual_seed(version * 4099 + layout.index)
    candidates = [tensor for tensor in layout.tensors if can_probe(tensor.name)]
    order = torch.randperm(len(candidates), generator=generator).tolist()[:PROBED_TENSORS_A_BUCKET]
    return [
        probe
        for each in order
        for probe in probes_of(candidates[each].name, view_of(data, candidates[each]), PROBES_A_TENSOR, generator)
    ]


def confirm(rank: RolloutRank, version: int, probes: Sequence[Mapping[str, Any]]) -> int:
    """Look for the trainer's elements in the engine's parameters, then serve the version. EngineError names what differs."""
    engine: Any = rank.engine
    if probes and hasattr(engine, "probe"):
        wrong = engine.probe(probes)
        if wrong:
            raise EngineError(f"weights version {version} arrived changed: {'; '.join(wrong[:4])} ({len(wrong)} in all)")
    rank.version = engine.commit_weights(version)
    return version


def _streamed(context: Context, rollout: Members, version: int) -> Waiting[Delivered]:
    trainer = context.members[train_group(context).name]
    calls = trainer.call_with(rollout.slot, hand_over, version, bucket_bytes(context))
    reports = yield Wait(f"{places(trainer)}: hand weights version {version} to @{rollout.slot}", calls)
    acknowledged = [report["acknowledged"] for report in reports if "acknowledged" in report]
    check_acknowledged(rollout, acknowledged, version)
    return Delivered(reports[0]["bytes"], reports[0]["buckets"], sum(report["probes"] for report in reports))


# through a process group


def join_as_sender(rank: TrainRank, port: int, world_size: int, name: str) -> None:
    """The trainer's first rank joins a group that it will send in."""
    from miles_plan.backends.weight_transport.nccl_group import join_as_sender as join

    rank.senders[name] = join(LOOPBACK, port, world_size=world_size, name=name)


def join_as_receiver(rank: RolloutRank, port: int, layout: RolloutLayout, name: str) -> None:
    """An engine joins with all of its ranks, which follow those of the engines before it."""
    if rank.rank == 0:
        engine: Any = rank.engine
        offset = 1 + rank.index * layout.gpus_per_engine
        engine.join(LOOPBACK, port, rank_offset=offset, world_size=1 + layout.world_size, name=name)


def layout_of_weights(rank: TrainRank, bytes_a_bucket: int) -> tuple[BucketLayout, ...]:
    """What a stream of this trainer's weights will hold."""
    engine: Any = rank.engine
    layouts: tuple[BucketLayout, ...] = engine.weight_layout(bucket_bytes=bytes_a_bucket)
    return layouts


def send_weights(rank: TrainRank, version: int, bytes_a_bucket: int, group: str) -> list[dict[str, Any]]:
    """Stream the weights, and on the rank that is in the group broadcast each bucket; returns elements to look for."""
    import torch.distributed as dist

    from miles_plan.backends.weight_transport.cuda_ipc import packed

    engine: Any = rank.at(version)
    probes: list[dict[str, Any]] = []
    sender = rank.senders.get(group)
    for bucket in engine.stream_weights(version, bucket_bytes=bytes_a_bucket):
        if sender is not None:
            probes += probes_of_bucket(bucket.layout, bucket.data, version)
            dist.broadcast(packed(bucket.data, bucket.layout.tensors), src=0, group=sender)
    return probes


def receive_weights(rank: RolloutRank, version: int, layouts: Sequence[BucketLayout]) -> None:
    """Receive every bucket; nothing is served until `confirm`."""
    rank.version = None
    for each in layouts:
        rank.engine.update_weights(
            WeightBucket(
                transport="nccl_broadcast",
                version=version,
                index=each.index,
                handle="",
                tensors=each.tensors,
                last=each.last,
            )
        )


def _broadcast(context: Context, rollout: Members, version: int) -> Waiting[Delivered]:
    state, size = context.state, bucket_bytes(context)
    trainer = context.members[train_group(context).name]
    first = trainer.part([0])
    link = state.links.get(rollout.slot)
    if link is None or link.actors != (first.actors, rollout.actors):  # at the start, and after engines were made anew
        link = state.links[rollout.slot] = yield from _join(context, first, rollout)
    (layouts,) = yield Wait(f"{places(first)}: what will be sent", first.call(layout_of_weights, size))
    sending = trainer.call(send_weights, version, size, link.name)
    both = rollout.call(receive_weights, version, layouts).beside(sending)
    reports = yield Wait(f"{places(rollout)}: receive weights version {version}", both)
    probes = reports[len(rollout)]
    acknowledged = yield Wait(f"{places(rollout)}: look at version {version}", rollout.call(confirm, version, probes))
    check_acknowledged(rollout, acknowledged, version)
    total = sum(tensor.size_bytes for each in layouts for tensor in each.tensors)
    return Delivered(total, len(layouts), len(probes))


def _join(context: Context, first: Members, rollout: Members) -> Waiting[Link]:
    layout = context.flow.graph.group(rollout.slot).rollout_layout
    assert layout is not None, "a rollout group has a rollout layout"
    port = free_port()
    name = f"miles-plan-{rollout.slot}-{port}"
    receiving = rollout.call(join_as_receiver, port, layout, name)
    sending = first.call(join_as_sender, port, 1 + layout.world_size, name)
    yield Wait(f"{places(rollout)}: join the trainer's group '{name}'", receiving.beside(sending))
    return Link((first.actors, rollout.actors), name)
