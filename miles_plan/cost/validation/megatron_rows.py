"""Holds a measured Megatron-core run against the estimates: allocated bytes of every rank, and seconds of its step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from miles_plan.catalog.architecture import ModelArchitecture
from miles_plan.catalog.gpus import cluster_of
from miles_plan.catalog.hf_config import architecture_from_hf_config
from miles_plan.cost.columns import group_layouts
from miles_plan.cost.interval import Interval, around
from miles_plan.cost.layer_time import ComputeOptions
from miles_plan.cost.profile import default_profile
from miles_plan.cost.state_memory import sum_terms
from miles_plan.cost.train_memory import OUTSIDE, PEAK_ERROR, stage_terms
from miles_plan.cost.train_options import OptimizerOptions, TrainMemoryOptions
from miles_plan.cost.train_time import TrainTimeOptions, TrainWorkload, log_prob_time, train_step_time
from miles_plan.cost.validation.row_fields import IncompleteRowError, Row, figure_of, size_of
from miles_plan.ir.layout import Recompute, TrainLayout


@dataclass(frozen=True, slots=True)
class MegatronCheck:
    """One figure of one run, or of one of its ranks."""

    what: str
    estimate: Interval
    measured: float


def is_megatron_row(row: Row) -> bool:
    """Whether a row is a measured Megatron run."""
    return "config" in row and "ranks" in row


def check_megatron(row: Row) -> Iterator[MegatronCheck]:
    """Peak bytes of every rank, then the slowest rank's step and forward pass."""
    config, ranks = row["config"], row["ranks"]
    if not isinstance(config, Mapping) or not isinstance(ranks, list) or not ranks:
        raise IncompleteRowError("config and ranks are not a mapping and a list")
    for name in ("L", "h", "heads", "kv", "d", "ffn", "vocab", "seq", "mbs", "nmb", "tp", "pp", "cp", "ep"):
        if not size_of(config, name, 0):
            raise IncompleteRowError(f"config.{name} is not stated")
    model, layout = _model(config), _layout(config, size_of(row, "world"))
    if problem := next(layout.problems(), None):
        raise IncompleteRowError(problem)
    yield from _memory(row, config, model, layout)
    yield from _time(row, config, model, layout)


def _model(config: Mapping[str, Any]) -> ModelArchitecture:
    experts = size_of(config, "E", 0)
    published = {
        "model_type": ("qwen3_moe" if experts else "qwen3") if config.get("qkn", True) else "llama",
        "hidden_size": size_of(config, "h"),
        "num_hidden_layers": size_of(config, "L"),
        "num_attention_heads": size_of(config, "heads"),
        "num_key_value_heads": size_of(config, "kv"),
        "head_dim": size_of(config, "d"),
        "intermediate_size": size_of(config, "ffn"),
        "vocab_size": size_of(config, "vocab"),
        "tie_word_embeddings": bool(config.get("tie")),
    }
    if experts:
        published |= {
            "num_experts": experts,
            "num_experts_per_tok": size_of(config, "topk"),
            "moe_intermediate_size": size_of(config, "ffe"),
            "shared_expert_intermediate_size": size_of(config, "shared", 0),
        }
    return architecture_from_hf_config(published, str(config.get("name")))


def _recompute(config: Mapping[str, Any]) -> Recompute:
    said = config.get("rec") or "none"
    if said not in ("none", "selective", "full"):
        raise IncompleteRowError(f"config.rec is {said!r}")
    return cast(Recompute, said)


def _layout(config: Mapping[str, Any], world: int) -> TrainLayout:
    tp, pp, cp = (size_of(config, name) for name in ("tp", "pp", "cp"))
    return TrainLayout(
        tp=tp,
        pp=pp,
        cp=cp,
        ep=size_of(config, "ep"),
        vpp=size_of(config, "vpp"),
        dp=max(1, world // (tp * pp * cp)),
        sequence_parallel=tp > 1,
    )


def _memory(row: Row, config: Mapping[str, Any], model: ModelArchitecture, layout: TrainLayout) -> Iterator[MegatronCheck]:
    options = TrainMemoryOptions(
        tokens_per_gpu=max(1, size_of(config, "seq") * size_of(config, "mbs") // layout.cp),
        seq_len=size_of(config, "seq"),
        num_microbatches=size_of(config, "nmb"),
        precision="fp8" if config.get("fp8") else "bf16",
        grad_bytes=4.0 if config.get("grad32", True) else 2.0,
        recompute=_recompute(config),
        recompute_modules=frozenset(config.get("rec_modules") or ()),
        recompute_chunk=size_of(config, "rec_n"),
        fused_gradient_accumulation=row.get("gaf") is not None,
        optimizer=OptimizerOptions(distributed=bool(config.get("distopt", True))),
    )
    ((_, columns),) = group_layouts([layout])
    terms = stage_terms(model, columns, options, default_profile())
    by_stage = np.asarray(sum_terms(terms, exclude=OUTSIDE))[0]
    each = max(1, len(row["ranks"]) // layout.pp)
    for at, rank in enumerate(row["ranks"]):
        peak = around(float(by_stage[at // each]), PEAK_ERROR["megatron"], "calibrated")
        yield MegatronCheck("peak memory", peak, figure_of(rank, "peak_process_bytes"))


def _time(row: Row, config: Mapping[str, Any], model: ModelArchitecture, layout: TrainLayout) -> Iterator[MegatronCheck]:
    sequences = size_of(config, "mbs") * size_of(config, "nmb") * layout.dp
    packed = size_of(config, "thd")
    seq_len = size_of(config, "seq")
    workload = TrainWorkload(
        total_tokens=seq_len * sequences,
        sum_squares=seq_len * seq_len * sequences / packed,
        longest=seq_len / packed,
        tokens_per_gpu=seq_len * size_of(config, "mbs") / layout.cp,
    )
    options = TrainTimeOptions(
        compute=ComputeOptions(precision="fp8" if config.get("fp8") else "bf16"),
        recompute=_recompute(config),
        recompute_modules=frozenset(config.get("rec_modules") or ()),
        overlap_dp=False,
    )
    cluster = cluster_of("h200", 1)
    step = max(figure_of(rank, "step_s") for rank in row["ranks"])
    yield MegatronCheck("step time", train_step_time(model, layout, workload, cluster, options), step)
    forward = max(figure_of(rank, "fwd_only_s") for rank in row["ranks"])
    yield MegatronCheck("forward pass", log_prob_time(model, layout, workload, cluster, options), forward)
