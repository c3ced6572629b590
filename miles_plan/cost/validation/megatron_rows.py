"""Holds a measured Megatron-core run against the estimates: allocated bytes of every rank, and seconds of its step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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
from miles_plan.cost.validation.row_fields import IncompleteRowError, Row
from miles_plan.ir.layout import TrainLayout


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
    config = row["config"]
    model, layout = _model(config), _layout(config, int(row["world"]))
    if problem := next(layout.problems(), None):
        raise IncompleteRowError(problem)
    yield from _memory(row, config, model, layout)
    yield from _time(row, config, model, layout)


def _model(config: Mapping[str, Any]) -> ModelArchitecture:
    experts = config["E"]
    published = {
        "model_type": "qwen3_moe" if experts else "qwen3",
        "hidden_size": config["h"],
        "num_hidden_layers": config["L"],
        "num_attention_heads": config["heads"],
        "num_key_value_heads": config["kv"],
        "head_dim": config["d"],
        "intermediate_size": config["ffn"],
        "vocab_size": config["vocab"],
        "tie_word_embeddings": config["tie"],
    }
    if experts:
        published |= {
            "num_experts": experts,
            "num_experts_per_tok": config["topk"],
            "moe_intermediate_size": config["ffe"],
            "shared_expert_intermediate_size": config["shared"] or 0,
        }
    return architecture_from_hf_config(published, str(config["name"]))


def _layout(config: Mapping[str, Any], world: int) -> TrainLayout:
    return TrainLayout(
        tp=config["tp"],
        pp=config["pp"],
        cp=config["cp"],
        ep=config["ep"],
        vpp=config["vpp"] or 1,
        dp=world // (config["tp"] * config["pp"] * config["cp"]),
        sequence_parallel=config["tp"] > 1,
    )


def _memory(row: Row, config: Mapping[str, Any], model: ModelArchitecture, layout: TrainLayout) -> Iterator[MegatronCheck]:
    options = TrainMemoryOptions(
        tokens_per_gpu=config["seq"] * config["mbs"] // config["cp"],
        seq_len=config["seq"],
        num_microbatches=config["nmb"],
        precision="fp8" if config["fp8"] else "bf16",
        grad_bytes=4.0 if config["grad32"] else 2.0,
        recompute=config["rec"] or "none",
        recompute_modules=frozenset(config["rec_modules"] or ()),
        fused_gradient_accumulation=row.get("gaf") is not None,
        optimizer=OptimizerOptions(distributed=config["distopt"]),
    )
    ((_, columns),) = group_layouts([layout])
    terms = stage_terms(model, columns, options, default_profile())
    by_stage = np.asarray(sum_terms(terms, exclude=OUTSIDE))[0]
    each = max(1, len(row["ranks"]) // layout.pp)
    for at, rank in enumerate(row["ranks"]):
        peak = around(float(by_stage[at // each]), PEAK_ERROR["megatron"], "calibrated")
        yield MegatronCheck("peak memory", peak, float(rank["peak_process_bytes"]))


def _time(row: Row, config: Mapping[str, Any], model: ModelArchitecture, layout: TrainLayout) -> Iterator[MegatronCheck]:
    sequences = config["mbs"] * config["nmb"] * layout.dp
    packed = config.get("thd") or 1
    seq_len = config["seq"]
    workload = TrainWorkload(
        total_tokens=seq_len * sequences,
        sum_squares=seq_len * seq_len * sequences / packed,
        longest=seq_len / packed,
        tokens_per_gpu=seq_len * config["mbs"] / config["cp"],
    )
    options = TrainTimeOptions(
        compute=ComputeOptions(precision="fp8" if config["fp8"] else "bf16"),
        recompute=config["rec"] or "none",
        recompute_modules=frozenset(config["rec_modules"] or ()),
        overlap_dp=False,
    )
    cluster = cluster_of("h200", 1)
    step = max(float(rank["step_s"]) for rank in row["ranks"])
    yield MegatronCheck("step time", train_step_time(model, layout, workload, cluster, options), step)
    forward = max(float(rank["fwd_only_s"]) for rank in row["ranks"])
    yield MegatronCheck("forward pass", log_prob_time(model, layout, workload, cluster, options), forward)
