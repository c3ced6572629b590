"""Maps a row of weight synchronisation to a trainer and a rollout layout and prices the transfer."""

from __future__ import annotations

import re

from miles_plan.catalog.gpus import cluster_of
from miles_plan.cost.interval import Interval
from miles_plan.cost.validation.row_fields import (
    IncompleteRowError,
    Row,
    figure_of,
    row_gpu,
    row_model,
    seconds_of,
    size_of,
    words_of,
)
from miles_plan.cost.weight_sync import SyncOptions, Transport, weight_sync_time
from miles_plan.ir.layout import RolloutLayout, TrainLayout

VLLM_LOAD_BYTES_PER_S = 8.0e9
"""What vLLM's loader copies a second of what a rank receives (NeMo-RL's checkpoint engine, 70 GiB in 9 s)."""
QUANTIZED_MODELS = re.compile(r"kimi-k2", re.IGNORECASE)
"""Models whose published checkpoints, and so the engines that load them, are fp8 where the row does not say."""
_METRICS = ("update_weights_time", "refit_time", "sync_time")


def sync_seconds(row: Row) -> tuple[Interval, float]:
    """Estimated and measured seconds.

    Raises:
        UnmappedRowError: the row states no layout, or measures part of a synchronisation only.
    """
    if (metric := words_of(row, "metric")) not in _METRICS:
        raise IncompleteRowError(f"{metric} is part of a synchronisation")
    if "before fix" in str(row.get("method")):
        raise IncompleteRowError("measured before a fix")
    measured = seconds_of(row, "s")
    model, gpu, gpus = row_model(row), row_gpu(row), size_of(row, "num_gpus", 0)
    if not gpus:
        raise IncompleteRowError("num_gpus is not stated")
    train, rollout = _layouts(row, gpus)
    nodes = max(1, -(-gpus // gpu.gpus_per_node))
    cluster = cluster_of(gpu, nodes, min(gpus, gpu.gpus_per_node))
    transport = _transport(row)
    estimate = weight_sync_time(model, train, rollout, transport, cluster, _options(row, rollout))
    return estimate, measured


def _transport(row: Row) -> Transport:
    method = str(row.get("method") or "").lower()
    if "colocate" in method or "ipc" in method:
        return "cuda_ipc"
    if "delta" in method or "disk" in method:
        return "disk_delta"
    if "full-expert" in method:  # every rank receives every expert, as in a broadcast
        return "nccl_broadcast"
    if "p2p" in method or "nixl" in method or row.get("bytes_per_rollout_rank_gib"):
        return "p2p"
    if "broadcast" in method or "nccl" in method:
        return "nccl_broadcast"
    raise IncompleteRowError("the transport is not stated")


def _options(row: Row, rollout: RolloutLayout) -> SyncOptions:
    text = f"{row.get('precision') or ''} {row.get('method') or ''}".lower()
    quantized = "fp8" in text or QUANTIZED_MODELS.search(str(row.get("model")))
    bucket = figure_of(row, "bucket_gib", 0.0) or figure_of(row, "bucket_mib", 0.0) / 1024 or 0.5
    per_rank = figure_of(row, "bytes_per_rollout_rank_gib", 0.0) * (1 << 30)
    load = 0.0
    if "vllm" in str(row.get("gen_parallel")).lower() and per_rank:
        load = VLLM_LOAD_BYTES_PER_S * _row_share(row, rollout, per_rank)
    return SyncOptions(
        bucket_bytes=bucket * (1 << 30),
        rollout_precision="fp8" if quantized else "bf16",
        adapter_fraction=0.005 if "lora" in text else 1.0,
        engine_load_bytes_per_s=load,
        exposed_receive_bytes=per_rank if "nccl" in text else 0.0,
    )


def _row_share(row: Row, rollout: RolloutLayout, per_rank: float) -> float:
    """An even share of the weights over what a rank is stated to receive."""
    return row_model(row).params_total * 2.0 / rollout.gpus_per_engine / per_rank


def _layouts(row: Row, gpus: int) -> tuple[TrainLayout, RolloutLayout]:
    stated = row.get("train_parallel") or row.get("gen_parallel")
    if not stated and _transport(row) != "cuda_ipc":
        raise IncompleteRowError("no parallel size is stated")
    there = sizes_in(str(row.get("gen_parallel") or ""))
    here = sizes_in(str(row.get("train_parallel") or ""))
    colocated = _transport(row) == "cuda_ipc"
    train_gpus = gpus if colocated else here.get("nodes", 0) * 8 or gpus // 2
    rollout_gpus = gpus if colocated else there.get("nodes", 0) * 8 or gpus - train_gpus
    tp, pp, cp = here.get("tp", 1), here.get("pp", 1), here.get("cp", 1)
    if train_gpus % (tp * pp * cp):
        raise IncompleteRowError(f"tp x pp x cp = {tp * pp * cp} does not divide {train_gpus} trainer GPUs")
    train = TrainLayout(tp=tp, pp=pp, cp=cp, dp=train_gpus // (tp * pp * cp), ep=here.get("ep", 1))
    engine_tp = there.get("tp", min(8, rollout_gpus))
    rollout = RolloutLayout(engines=max(1, rollout_gpus // engine_tp), tp=engine_tp, ep=there.get("ep", 1))
    return train, rollout


_SIZE = re.compile(r"\b(TP|PP|CP|EP|ETP|VPP|DP)\s*=?\s*(\d+)", re.IGNORECASE)
_NODES = re.compile(r"(\d+)\s+nodes?")


def sizes_in(text: str) -> dict[str, int]:
    """Parallel sizes written as `TP4 PP1 EP8, 2 nodes`."""
    found = {name.lower(): int(value) for name, value in _SIZE.findall(text)}
    nodes = _NODES.search(text)
    return found | ({"nodes": int(nodes.group(1))} if nodes else {})
