"""Weight sync: which transport carries new weights to the rollout engines, in which buckets, tensor by tensor.

Every transport that the placement allows is priced and the cheapest wins. The transfer list says, for each name pattern, how
the trainer's shards become the engine's shards and in which buckets they travel: it is what moves, in that order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from miles_plan.catalog.tensors import weight_tensors
from miles_plan.diagnostics import Diagnostic
from miles_plan.ir.graph import Fact, TaskGraph
from miles_plan.ir.group import DeviceGroup
from miles_plan.ir.layout import RolloutLayout, TrainLayout
from miles_plan.ir.plan import Alternative, Decision, TensorTransfer
from miles_plan.ir.tasks import Transport, WeightSync
from miles_plan.passes.base import Outcome, Pass, PassContext
from miles_plan.passes.number_formats import DTYPE_BYTES
from miles_plan.passes.sync_price import bucket_size_bytes, layouts_of, linked_cluster, sync_price, transports_between


@dataclass(frozen=True)
class SyncWeights(Pass):
    """Choose the transport by price, lay out the buckets, and list what travels."""

    name: ClassVar[str] = "sync_weights"
    needs: ClassVar[frozenset[Fact]] = frozenset({"placed"})
    gives: ClassVar[frozenset[Fact]] = frozenset({"synced"})

    def run(self, graph: TaskGraph, ctx: PassContext) -> Outcome:
        """Jobs that never serve their weights have nothing to sync."""
        syncs = [task for task in graph.tasks if isinstance(task, WeightSync)]
        if not syncs:
            return Outcome(graph=graph)
        train, rollout = graph.group(graph.task("train").group or ""), graph.group(syncs[0].group or "")
        allowed = list(allowed_transports(train, rollout, ctx))
        cluster = linked_cluster(ctx, train, rollout)
        asked = ctx.job.weight_sync.transport
        if not allowed or (asked != "auto" and asked not in allowed):
            return Outcome(graph=graph, diagnostics=(_refusal(ctx, asked, allowed, train, rollout),))
        bucket_bytes = bucket_size_bytes(ctx)
        layouts = layouts_of(train, rollout)
        prices = {transport: sync_price(ctx, *layouts, transport, bucket_bytes, cluster).mid for transport in allowed}
        chosen: Transport = asked if asked != "auto" else min(prices, key=lambda transport: prices[transport])
        transfers = tuple(transfer_list(ctx, train, rollout, bucket_bytes))
        total_bytes = sum(transfer.size_bytes for transfer in transfers)
        graph = graph.with_replaced(
            *(replace(sync, transport=chosen, bucket_bytes=bucket_bytes, total_bytes=total_bytes) for sync in syncs)
        )
        return Outcome(graph=graph, decisions=(_decision(ctx, chosen, prices),), transfers=transfers)


def allowed_transports(train: DeviceGroup, rollout: DeviceGroup, ctx: PassContext) -> tuple[Transport, ...]:
    """Transports that can reach these engines from this trainer."""
    assert train.gpus is not None
    assert rollout.gpus is not None
    return transports_between(ctx, train.gpus, rollout.gpus)


def transfer_list(ctx: PassContext, train: DeviceGroup, rollout: DeviceGroup, bucket_bytes: int) -> Iterator[TensorTransfer]:
    """Tensor patterns in travel order, each with how both sides split it and its buckets."""
    train_layout, rollout_layout = layouts_of(train, rollout)
    width = DTYPE_BYTES[ctx.job.precision.rollout]
    sent_bytes = 0
    for tensor in weight_tensors(ctx.model):
        size_bytes = int(tensor.num_elements * width)
        train_parts, rollout_parts = _parts(tensor.of_expert, train_layout, rollout_layout)
        split = tensor.axis is not None
        yield TensorTransfer(
            pattern=tensor.pattern,
            count=tensor.count,
            shape=tensor.shape,
            dtype=ctx.job.precision.rollout,
            size_bytes=size_bytes,
            train_axis=tensor.axis if train_parts > 1 else None,
            train_parts=train_parts if split else 1,
            rollout_axis=tensor.axis if rollout_parts > 1 else None,
            rollout_parts=rollout_parts if split else 1,
            first_bucket=sent_bytes // bucket_bytes,
            last_bucket=max(sent_bytes, sent_bytes + size_bytes - 1) // bucket_bytes,
        )
        sent_bytes += size_bytes


def _parts(of_expert: bool, train: TrainLayout, rollout: RolloutLayout) -> tuple[int, int]:
    """Into how many pieces each side cuts one tensor."""
    if of_expert:
        return train.etp, rollout.tp // rollout.ep
    return train.tp, rollout.tp // rollout.dp_attention


def _decision(ctx: PassContext, chosen: Transport, prices: dict[Transport, float]) -> Decision:
    others = tuple(
        Alternative(value=transport, cost=f"{seconds:.3g} s", why_not=f"{seconds / max(prices[chosen], 1e-9):.2f}x as long")
        for transport, seconds in prices.items()
        if transport != chosen
    )
    asked = ctx.job.weight_sync.transport != "auto"
    reason = (
        "the spec asks for it" if asked else "the cheapest that the placement allows" if others else "the only one that reaches"
    )
    return Decision(
        field="weight_sync.transport",
        value=f"{chosen}, {prices[chosen]:.3g} s a sync",
        reason=reason,
        by=SyncWeights.name,
        alternatives=others,
    )


def _refusal(ctx: PassContext, asked: str, allowed: list[Transport], train: DeviceGroup, rollout: DeviceGroup) -> Diagnostic:
    together = "share GPUs" if train.shares_gpus_with(rollout) else "are on different GPUs"
    if not allowed:
        together = "span several nodes, and the torch engine's weights travel in shared memory"
    what = f"{asked} cannot carry weights" if asked != "auto" else "no transport carries weights"
    return ctx.error(
        "MP220",
        f"{what} from {train.engine} to {rollout.engine}: the engines {together}",
        "weight_sync.transport",
        help=f"use {' or '.join(allowed)}" if allowed else "use one node, or train.engine: megatron and rollout.engine: sglang",
    )
