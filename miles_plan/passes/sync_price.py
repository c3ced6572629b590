"""What a weight sync costs: shared by the search, which compares placements, and the pass that chooses the transport."""

from __future__ import annotations

from miles_plan.cost.interval import Interval
from miles_plan.cost.weight_sync import SyncOptions, weight_sync_time
from miles_plan.ir.group import DeviceGroup
from miles_plan.ir.layout import RolloutLayout, TrainLayout
from miles_plan.ir.tasks import Transport
from miles_plan.passes.base import PassContext
from miles_plan.passes.number_formats import ROLLOUT_PRECISION
from miles_plan.passes.train_choices import trained_draft_params

MIB = 1 << 20
# Miles' --update-weight-buffer-size default; the embedded engines' models are small, so that several buckets are exercised.
BUCKET_BYTES = {"torch": 4 * MIB, "megatron": 512 * MIB, "fsdp2": 512 * MIB}


def bucket_size_bytes(ctx: PassContext) -> int:
    """The spec's bucket, or the trainer engine's usual one."""
    asked = ctx.job.weight_sync.bucket_mib
    return BUCKET_BYTES[ctx.job.train.engine] if asked == "auto" else asked * MIB


def sync_price(
    ctx: PassContext, train: TrainLayout, rollout: RolloutLayout, transport: Transport, bucket_bytes: int
) -> Interval:
    """Seconds of one sync by `transport`."""
    options = SyncOptions(
        bucket_bytes=bucket_bytes,
        rollout_precision=ROLLOUT_PRECISION[ctx.job.precision.rollout],
        draft_params=trained_draft_params(ctx),
    )
    return weight_sync_time(ctx.model, train, rollout, transport, ctx.cluster, options)


def layouts_of(train: DeviceGroup, rollout: DeviceGroup) -> tuple[TrainLayout, RolloutLayout]:
    """The two groups' layouts, which placement has set."""
    assert train.train_layout is not None
    assert rollout.rollout_layout is not None
    return train.train_layout, rollout.rollout_layout
