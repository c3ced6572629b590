"""Seconds to bring new weights from the trainer to the rollout engines, to move state off the GPU, and to save it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from miles_plan.catalog.architecture import ModelArchitecture
from miles_plan.catalog.ffns import MoeFfn
from miles_plan.catalog.gpus import Cluster
from miles_plan.cost.communication import Links, links_of
from miles_plan.cost.interval import Basis, Interval, Term
from miles_plan.cost.profile import HardwareProfile
from miles_plan.cost.rollout_shard import WEIGHT_BYTES
from miles_plan.ir.layout import RolloutLayout, TrainLayout

Transport = Literal["shared_memory", "cuda_ipc", "nccl_broadcast", "p2p", "disk_delta"]
TRANSPORTS: tuple[Transport, ...] = ("shared_memory", "cuda_ipc", "nccl_broadcast", "p2p", "disk_delta")

SYNC_ERROR = 0.5
"""Relative half width of the 90 % interval; published syncs of one transport spread this much (docs/accuracy.md)."""
PAUSE_S = 0.25
"""Draining and pausing the engines, and flushing their caches."""
TENSOR_S = 2.0e-4
"""Host work a tensor: names, shapes, the loader's copy into the engine's fused layout."""
BUCKET_S = 8.0e-3
"""A bucket's control message to every engine and its answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncOptions:
    """bucket_bytes: weights sent at once; rollout_precision: what the engine loads, quantised on the way when it is
    not bf16; changed_fraction: share of bytes a delta carries; disk_bytes_per_s: shared storage of one node."""

    bucket_bytes: float = 1 << 30
    rollout_precision: str = "bf16"
    changed_fraction: float = 0.03
    disk_bytes_per_s: float = 2.0e9


def weight_sync_time(
    model: ModelArchitecture,
    train: TrainLayout,
    rollout: RolloutLayout,
    transport: Transport,
    cluster: Cluster,
    options: SyncOptions | None = None,
    profile: HardwareProfile | None = None,
) -> Interval:
    """Seconds from pausing generation to the last engine's last loaded tensor.

    Raises:
        ValueError: no such transport.
    """
    if transport not in TRANSPORTS:
        raise ValueError(f"no transport {transport!r}, only {', '.join(TRANSPORTS)}")
    how, links = options or SyncOptions(), links_of(cluster, profile)
    total = model.params_total * 2.0
    buckets = math.ceil(total / how.bucket_bytes)
    terms = _transport_terms(model, train, rollout, transport, links, how)
    terms["tensors"] = num_tensors(model) * TENSOR_S
    terms["buckets"] = buckets * BUCKET_S if transport != "disk_delta" else 0.0
    terms["quantize"] = _quantize_seconds(total / (train.tp * train.ep), links, how)
    terms["pause"] = PAUSE_S if transport != "shared_memory" else 0.0  # embedded engines have no server to drain
    return _figure(terms, SYNC_ERROR, "roofline")


def num_tensors(model: ModelArchitecture) -> int:
    """Tensors of the engine's checkpoint format, one an expert matrix."""
    count = 3
    for kind, layers in model.layers():
        ffn = kind.ffn
        experts = ffn.experts * ffn.matrices if isinstance(ffn, MoeFfn) else 3
        count += layers * (8 + experts)
    return count


def _transport_terms(
    model: ModelArchitecture,
    train: TrainLayout,
    rollout: RolloutLayout,
    transport: Transport,
    links: Links,
    how: SyncOptions,
) -> dict[str, float]:
    total, local = model.params_total * 2.0, model.params_total * WEIGHT_BYTES[how.rollout_precision]
    nvlink, nic = links.nvlink("all_gather"), links.nic("p2p")
    hbm = links.gpu.hbm_bytes_per_s * links.profile.hbm_fraction
    split = train.tp * train.pp * max(train.ep, 1)
    crosses = train.tp * max(train.ep, 1) > links.domain
    gather = total / train.pp / (nic if crosses else nvlink) if split > 1 else 0.0
    per_engine_gpu = total / rollout.gpus_per_engine
    if transport == "cuda_ipc":
        # Every trainer rank rebuilds whole tensors in buckets; the engine on the same GPU copies its own slice.
        return {"gather": gather * train.pp, "copy": 2.0 * per_engine_gpu / hbm}
    if transport == "shared_memory":
        link = links.profile.host_to_device_bytes_per_s
        return {"gather": gather * train.pp, "copy": total / link + per_engine_gpu / link}
    if transport == "nccl_broadcast":
        # One sender a pipeline stage in turn; a pipelined broadcast runs at one NIC whatever the number of engines.
        return {"gather": gather * train.pp, "broadcast": total / nic}
    if transport == "p2p":
        senders = max(1, min(train.world_size, rollout.world_size))
        out = local * rollout.engines / senders / nic
        return {"gather": gather, "send": max(out, per_engine_gpu / nic)}
    changed = total * how.changed_fraction
    written = changed / how.disk_bytes_per_s
    scan = total / split * 2.0 / links.profile.device_to_host_bytes_per_s
    return {"scan": scan, "write": written, "read": changed / how.disk_bytes_per_s}


def _quantize_seconds(bytes_on_rank: float, links: Links, how: SyncOptions) -> float:
    if WEIGHT_BYTES[how.rollout_precision] >= 2.0:
        return 0.0
    return 3.0 * bytes_on_rank / (links.gpu.hbm_bytes_per_s * links.profile.hbm_fraction)


def offload_time(
    bytes_per_gpu: float,
    cluster: Cluster,
    direction: Literal["out", "in"] = "out",
    profile: HardwareProfile | None = None,
) -> Interval:
    """Seconds to move a GPU's state to pinned host memory or back, all GPUs of a node at once."""
    links = links_of(cluster, profile)
    known = links.profile
    rate = known.device_to_host_bytes_per_s if direction == "out" else known.host_to_device_bytes_per_s
    return _figure({"copy": bytes_per_gpu / rate, "unmap": 0.1}, 0.3, "measured")


def checkpoint_time(bytes_on_all_gpus: float, cluster: Cluster, disk_bytes_per_s: float = 2.0e9) -> Interval:
    """Seconds to write a sharded checkpoint, every node writing its part to storage of that bandwidth a node."""
    return _figure({"write": bytes_on_all_gpus / (cluster.num_nodes * disk_bytes_per_s)}, 1.0, "roofline")


def _figure(terms: dict[str, float], error: float, basis: Basis) -> Interval:
    parts = tuple(Term(name, value) for name, value in terms.items() if value)
    mid = sum(part.value for part in parts)
    return Interval(mid / (1 + error), mid, mid * (1 + error), basis, parts)
