"""What a weight sync costs, and by which transports it can go: asked by the search and by the pass that writes the choice."""

from __future__ import annotations

from miles_plan.catalog.gpus import Cluster
from miles_plan.cost.interval import Interval
from miles_plan.cost.weight_sync import SyncOptions, weight_sync_time
from miles_plan.ir.group import DeviceGroup, GpuSpan
from miles_plan.ir.layout import RolloutLayout, TrainLayout
from miles_plan.ir.tasks import Transport
from miles_plan.passes.base import PassContext
from miles_plan.passes.number_formats import ROLLOUT_PRECISION
from miles_plan.passes.placements import cluster_of_span
from miles_plan.passes.train_choices import trained_draft_params

MIB = 1 << 20
# Miles' --update-weight-buffer-size default; the embedded engines' models are small, so that several buckets are exercised.
BUCKET_BYTES = {"torch": 4 * MIB, "megatron": 512 * MIB, "fsdp2": 512 * MIB}
CHECKSUM_BYTES = 96 * MIB  # words, their places and products, a chunk at a time (`backends.weight_transport.cuda_ipc`)


def bucket_size_bytes(ctx: PassContext) -> int:
    """The spec's bucket, or the trainer engine's usual one."""
    asked = ctx.job.weight_sync.bucket_mib
    return BUCKET_BYTES[ctx.job.train.engine] if asked == "auto" else asked * MIB


def staging_bytes(ctx: PassContext) -> int:
    """What a bucket takes on a GPU: the embedding gets one of its own where it is larger, and checksums need room beside it."""
    if ctx.job.train.engine == "torch":
        return bucket_size_bytes(ctx)
    embedding = ctx.model.vocab_size * ctx.model.hidden_size * 2
    return max(bucket_size_bytes(ctx), embedding) + CHECKSUM_BYTES


def sync_price(
    ctx: PassContext,
    train: TrainLayout,
    rollout: RolloutLayout,
    transport: Transport,
    bucket_bytes: int,
    cluster: Cluster | None = None,
) -> Interval:
    """Seconds of one sync by `transport`, over `cluster` where that is not all of the job's."""
    options = SyncOptions(
        bucket_bytes=bucket_bytes,
        rollout_precision=ROLLOUT_PRECISION[ctx.job.precision.rollout],
        draft_params=trained_draft_params(ctx),
        running=False,  # a rollout task ends before the next sync begins
    )
    return weight_sync_time(ctx.model, train, rollout, transport, cluster or ctx.cluster, options)


def price_class(ctx: PassContext, transport: Transport, train: TrainLayout) -> tuple[int, ...]:
    """What a transport's price takes from the trainer's layout: layouts of equal class sync in equal time.

    Together with the GPU count, which a split fixes. Handing over on the GPU and broadcasting ask for little, unless each
    rank quantises its own part first.
    """
    quantised = ROLLOUT_PRECISION[ctx.job.precision.rollout] not in ("bf16", "fp32")
    if transport in ("cuda_ipc", "nccl_broadcast") and not quantised:
        return (train.pp,) if transport == "nccl_broadcast" else ()
    return (train.pp, train.tp, train.ep)


def transports_between(ctx: PassContext, train: GpuSpan, rollout: GpuSpan) -> tuple[Transport, ...]:
    """Transports that can bring weights from a trainer to engines on these GPUs, whatever the spec asks for."""
    if "torch" in (ctx.job.train.engine, ctx.job.rollout.engine):
        return ("shared_memory",) if _one_host(ctx, train, rollout) else ()
    if train.overlaps(rollout):
        return ("cuda_ipc",)
    if ctx.job.train.engine == "megatron":
        return ("nccl_broadcast", "p2p", "disk_delta")
    return ("nccl_broadcast", "disk_delta")


def _one_host(ctx: PassContext, *spans: GpuSpan) -> bool:
    """Whether all the GPUs are in one node: shared memory reaches no further."""
    per_node = ctx.cluster.gpus_per_node
    return len({gpu // per_node for span in spans for gpu in (span.first, span.end - 1)}) <= 1


def layouts_of(train: DeviceGroup, rollout: DeviceGroup) -> tuple[TrainLayout, RolloutLayout]:
    """The two groups' layouts, which placement has set."""
    assert train.train_layout is not None
    assert rollout.rollout_layout is not None
    return train.train_layout, rollout.rollout_layout


def linked_cluster(ctx: PassContext, train: DeviceGroup, rollout: DeviceGroup) -> Cluster:
    """The nodes that a sync between the two groups runs over."""
    assert train.gpus is not None
    assert rollout.gpus is not None
    first, second = cluster_of_span(ctx.cluster, train.gpus), cluster_of_span(ctx.cluster, rollout.gpus)
    return first if first == second else Cluster((*first.groups, *second.groups))
