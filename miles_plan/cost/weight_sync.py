"""Seconds to bring new weights from the trainer to the rollout engines, to move state off the GPU, and to save it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from miles_plan.catalog.architecture import ModelArchitecture
from miles_plan.catalog.ffns import MoeFfn
from miles_plan.catalog.gpus import Cluster
from miles_plan.catalog.mixers import CompressedLatent, MultiLatent
from miles_plan.cost.communication import Links, links_of
from miles_plan.cost.interval import Basis, Interval, Term
from miles_plan.cost.profile import HardwareProfile
from miles_plan.cost.rollout_shard import WEIGHT_BYTES
from miles_plan.ir.layout import RolloutLayout, TrainLayout

Transport = Literal["shared_memory", "cuda_ipc", "nccl_broadcast", "p2p", "disk_delta"]
TRANSPORTS: tuple[Transport, ...] = ("shared_memory", "cuda_ipc", "nccl_broadcast", "p2p", "disk_delta")

SYNC_ERROR = 0.5
"""Relative half width of the 90 % interval; published syncs of one transport spread this much (docs/accuracy.md)."""
PAUSE_S = 0.1
"""Pausing the engines' schedulers and flushing their caches."""
GATHER_TENSOR_S = 7.0e-5
"""Gathering one tensor over tensor and expert parallelism and renaming it to the checkpoint's format, on the host
(Miles' broadcast of 30 B-parameter models with 9,000 and 19,000 tensors)."""
BROADCAST_NIC_FRACTION = 0.97
"""Reached over nominal bandwidth of one NIC in large NCCL broadcasts (48.5 of 50 GB/s in nccl-tests on 400 Gb/s)."""
BUCKET_S = 1.0e-3
"""A bucket's control message to every engine and its answer."""
LATENT_LOAD_S = 2.8e-4
"""After every bucket the engine derives the absorbed projections of each latent-attention layer anew, twice as long
where it quantises them (SGLang's post_load_weights; GLM-5 and Kimi-K2 against models without latents)."""
REPLICA_BYTES_PER_S = 3.6e9
"""Rate at which a sender re-shards gathered weights into its pinned buffers with the engine's own loaders (Miles' P2P)."""
IPC_NVLINK_FRACTION = 0.055
"""Colocated gathering, flattening and copying of buckets over one-way NVLink: 25 GB/s on H100."""
IPC_TENSOR_S = 3.5e-4
"""Host work of one tensor when handles pass between processes of one GPU (slime after its fix for experts: 8 s for 30 B)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncOptions:
    """bucket_bytes: weights sent at once; rollout_precision: what the engine loads, quantised on the way when it is
    not bf16; changed_fraction: share of bytes a delta carries; disk_bytes_per_s: shared storage of one node;
    adapter_fraction: share of the parameters that travels where only adapters train; draft_params: of a draft that travels
    along; running: engines are in the middle of generating and must be paused, as servers are; exposed_receive_bytes: what an
    engine's rank must have before its loader starts (NCCL into staging buffers; RDMA writes the next bucket while this one
    loads); engine_load_bytes_per_s: rate of an engine whose loader copies what it receives (vLLM), 0 where tensors land in
    place (SGLang)."""

    bucket_bytes: float = 1 << 30
    rollout_precision: str = "bf16"
    changed_fraction: float = 0.03
    disk_bytes_per_s: float = 2.0e9
    adapter_fraction: float = 1.0
    engine_load_bytes_per_s: float = 0.0
    draft_params: float = 0.0
    exposed_receive_bytes: float = 0.0
    running: bool = True


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
    move = {
        "nccl_broadcast": _broadcast_terms,
        "p2p": _direct_terms,
        "cuda_ipc": _ipc_terms,
        "shared_memory": _shared_memory_terms,
        "disk_delta": _delta_terms,
    }[transport]
    size = _payload(model, how)
    terms = move(size, train, rollout, links, how)
    terms["quantize"] = _quantize_seconds(size.bf16_bytes / (train.tp * train.ep), links, how)
    stopped = how.running and transport != "shared_memory"  # embedded engines have no server to drain
    terms["pause"] = PAUSE_S if stopped else 0.0
    if how.exposed_receive_bytes:
        terms["receive"] = how.exposed_receive_bytes / links.nic("p2p")
    if how.engine_load_bytes_per_s:
        terms["engine load"] = size.wire_bytes / rollout.gpus_per_engine / how.engine_load_bytes_per_s
    return _figure(terms, SYNC_ERROR, "calibrated")


@dataclass(frozen=True, slots=True)
class _Payload:
    """What travels: bytes as trained and on the wire, tensors, buckets, and layers the engine finishes each bucket."""

    bf16_bytes: float
    wire_bytes: float
    tensors: float
    buckets: int
    latent_layers: int


def _payload(model: ModelArchitecture, how: SyncOptions) -> _Payload:
    share = how.adapter_fraction
    total, whole = model.params_total * share + how.draft_params, share == 1.0
    latent = sum(count for kind, count in model.layers() if isinstance(kind.mixer, MultiLatent | CompressedLatent))
    wire = total * WEIGHT_BYTES[how.rollout_precision]
    adapters = 16.0 * model.num_layers  # two tensors a projection; adapters leave experts alone
    return _Payload(
        bf16_bytes=total * 2.0,
        wire_bytes=wire,
        tensors=float(num_tensors(model)) if whole else adapters,
        buckets=math.ceil(wire / how.bucket_bytes),
        latent_layers=latent if whole else 0,
    )


Terms = dict[str, float]


def _gather_seconds(size: _Payload, train: TrainLayout, links: Links) -> float:
    """One pipeline stage's tensors gathered over its tensor and expert ranks."""
    split = train.tp * max(train.ep, 1)
    rate = links.nvlink("all_gather") if split <= links.domain else links.nic("all_gather")
    moved = size.bf16_bytes / train.pp / rate if split > 1 else 0.0
    return max(moved, size.tensors / train.pp * GATHER_TENSOR_S)


def _broadcast_terms(size: _Payload, train: TrainLayout, _rollout: RolloutLayout, links: Links, how: SyncOptions) -> Terms:
    """Stages send in turn, each at one NIC whatever the number of engines; a stage gathers while others send."""
    quantized = 2.0 if WEIGHT_BYTES[how.rollout_precision] < 2.0 else 1.0
    finish = 0.0 if how.engine_load_bytes_per_s else quantized * size.latent_layers * LATENT_LOAD_S
    return {
        "gather": size.tensors / train.pp * GATHER_TENSOR_S,
        "broadcast": size.wire_bytes / (links.nic("p2p") * BROADCAST_NIC_FRACTION / links.profile.rdma_bus_fraction["p2p"]),
        "buckets": size.buckets * (BUCKET_S + finish),
    }


def _direct_terms(size: _Payload, train: TrainLayout, rollout: RolloutLayout, links: Links, how: SyncOptions) -> Terms:
    """Every stage's ranks share the engine ranks as targets; loading a target's shard overlaps gathering the next."""
    senders = max(1, train.world_size // train.pp)
    shards = max(1.0, min(rollout.world_size, rollout.gpus_per_engine) / senders)
    load = size.wire_bytes / train.pp / rollout.gpus_per_engine * shards / REPLICA_BYTES_PER_S
    gather = _gather_seconds(size, train, links)
    sent = size.wire_bytes * rollout.engines / max(1, train.world_size)
    finish = size.latent_layers * LATENT_LOAD_S * (50.0 if WEIGHT_BYTES[how.rollout_precision] < 2.0 else 1.0)
    return {"gather": gather, "shard": max(0.0, load - gather), "send": sent / links.nic("p2p"), "finish": finish}


def _ipc_terms(size: _Payload, _train: TrainLayout, rollout: RolloutLayout, links: Links, _how: SyncOptions) -> Terms:
    """Every rank rebuilds whole tensors in buckets; the engine on the same GPU copies its own slice."""
    hbm = links.gpu.hbm_bytes_per_s * links.profile.hbm_fraction
    return {
        "gather": size.bf16_bytes / (links.gpu.nvlink_bytes_per_s * IPC_NVLINK_FRACTION),
        "tensors": size.tensors * IPC_TENSOR_S,
        "buckets": size.buckets * BUCKET_S,
        "copy": 2.0 * size.wire_bytes / rollout.gpus_per_engine / hbm,
    }


def _shared_memory_terms(size: _Payload, train: TrainLayout, rollout: RolloutLayout, links: Links, _how: SyncOptions) -> Terms:
    """The embedded engines: written once to host memory, read by every engine of the host."""
    link = links.profile.host_to_device_bytes_per_s
    return {
        "gather": _gather_seconds(size, train, links),
        "copy": size.bf16_bytes / link + size.bf16_bytes / rollout.gpus_per_engine / link,
    }


def _delta_terms(size: _Payload, train: TrainLayout, _rollout: RolloutLayout, links: Links, how: SyncOptions) -> Terms:
    """Old and new weights compared on the host, the changed bytes written to shared storage and read by every engine."""
    changed = size.wire_bytes * how.changed_fraction
    split = train.tp * train.pp * max(train.ep, 1)
    scan = size.bf16_bytes / split * 2.0 / links.profile.device_to_host_bytes_per_s
    return {"scan": scan, "write": changed / how.disk_bytes_per_s, "read": changed / how.disk_bytes_per_s}


def num_tensors(model: ModelArchitecture) -> int:
    """Tensors of the engine's checkpoint format, one an expert matrix."""
    count = 3
    for kind, layers in model.layers():
        ffn = kind.ffn
        experts = ffn.experts * ffn.matrices if isinstance(ffn, MoeFfn) else 3
        count += layers * (8 + experts)
    return count


def _quantize_seconds(bytes_on_rank: float, links: Links, how: SyncOptions) -> float:
    if WEIGHT_BYTES[how.rollout_precision] >= 2.0:
        return 0.0
    return 3.0 * bytes_on_rank / (links.gpu.hbm_bytes_per_s * links.profile.hbm_fraction)


UNMAP_S = 0.02
"""Unmapping or mapping an engine's memory, or a trainer's turn beside its copies: 13 to 30 ms a task on an H200 for engines of
13 GiB (benchmarks/results/engines_gpu_grpo_0_6b_colocated.json)."""


STORE_BYTES_PER_S = 4.0e9
"""Writing and hashing a trainer's state: 8.35 GB of one H200's trainer took 2.07 s into memory (Qwen3-0.6B's shape on
Megatron-core, 21 November 2026). A slower disk bounds it: hence the interval's width."""


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
    return _figure({"copy": bytes_per_gpu / rate, "unmap": UNMAP_S}, 0.3, "measured")


def checkpoint_time(bytes_on_all_gpus: float, cluster: Cluster, disk_bytes_per_s: float = STORE_BYTES_PER_S) -> Interval:
    """Seconds to write and hash a sharded checkpoint, every node writing its part to storage of that bandwidth a node."""
    return _figure({"write": bytes_on_all_gpus / (cluster.num_nodes * disk_bytes_per_s)}, 1.0, "roofline")


def _figure(terms: dict[str, float], error: float, basis: Basis) -> Interval:
    parts = tuple(Term(name, value) for name, value in terms.items() if value)
    mid = sum(part.value for part in parts)
    return Interval(mid / (1 + error), mid, mid * (1 + error), basis, parts)
