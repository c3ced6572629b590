"""Maps a row of training throughput to a job with a fixed layout and prices its step."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import cast

from miles_plan.catalog.architecture import ModelArchitecture
from miles_plan.catalog.gpus import Cluster, Gpu, cluster_of, find_gpu
from miles_plan.cost.gemms import layer_gemms
from miles_plan.cost.interval import Interval
from miles_plan.cost.train_options import OptimizerOptions
from miles_plan.cost.train_time import TrainTimeOptions, TrainWorkload, train_step_time
from miles_plan.cost.validation.recipes import recipe_facts
from miles_plan.cost.validation.row_fields import (
    IncompleteRowError,
    Row,
    UnmappedRowError,
    figure_of,
    row_gpu,
    row_model,
    seconds_of,
    size_of,
    words_of,
)
from miles_plan.cost.validation.software import (
    TORCHTITAN,
    Software,
    compute_options,
    is_adapter,
    is_frozen,
    recomputation,
    software_of,
)
from miles_plan.ir.layout import Recompute, TrainLayout

CONSISTENT_FLOPS = (0.5, 1.8)
"""Stated over counted model FLOPs of a token: conventions differ on adapters, embeddings, windows and prediction heads."""
IMAGE_RECIPE = re.compile(r"_vl_|_omni_")
BRIDGE_PRETRAIN_TOKENS, BRIDGE_FINETUNE_TOKENS = 4096, 2048
"""Sequence lengths Megatron-Bridge's recipes start from (recipes/common.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """A training run as a row states it: every sequence is seq_len long, micro_batch of them a microbatch."""

    model: ModelArchitecture
    gpu: Gpu
    software: Software
    layout: TrainLayout
    seq_len: int
    micro_batch: int
    global_batch: int

    @property
    def cluster(self) -> Cluster:
        """As many nodes as the job's GPUs fill."""
        size = self.layout.world_size
        return cluster_of(self.gpu, max(1, -(-size // self.gpu.gpus_per_node)), min(size, self.gpu.gpus_per_node))

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.seq_len * self.global_batch


def train_job(row: Row, needs_batch: bool = True) -> TrainJob:
    """The job a row describes; a global batch that is not needed may be 0.

    Raises:
        UnmappedRowError: a size the estimate needs is not stated, or the sizes contradict each other.
    """
    model, software = row_model(row), software_of(row)
    gpu = row_gpu(row) if needs_batch else _any_gpu(row)
    gpus = size_of(row, "num_gpus", 0) or (0 if needs_batch else _fewest_gpus(row))
    if not gpus:
        raise IncompleteRowError("num_gpus is not stated")
    if all(row.get(name) is None for name in ("tp", "pp", "ep", "cp", "fsdp", "dp", "zero")):
        raise IncompleteRowError("no parallel size is stated")
    seq_len, global_batch = _batch(row, software, needs_batch)
    layout = train_layout(row, model, gpus)
    micro_batch = size_of(row, "micro_batch")
    if software is TORCHTITAN and layout.pp > 1:
        global_batch = global_batch or micro_batch * layout.dp
        micro_batch = 1  # its pipeline schedules cut the local batch into microbatches of one sequence
    return TrainJob(
        model=model,
        gpu=gpu,
        software=software,
        layout=layout,
        seq_len=seq_len,
        micro_batch=micro_batch,
        global_batch=global_batch,
    )


def _any_gpu(row: Row) -> Gpu:
    """The GPU of a memory row; bookkeeping of bytes is the same on a GPU that the catalog lacks."""
    try:
        return row_gpu(row)
    except UnmappedRowError:
        return find_gpu("h100")


def _expert_tensor_parallel(row: Row, etp: int, tp: int) -> int:
    """Megatron cuts experts as it cuts the rest unless told otherwise; recipes with expert parallelism say 1."""
    return tp if row.get("etp") is None and size_of(row, "ep") == 1 else etp


def _check_flops(row: Row, job: TrainJob, seconds: float) -> None:
    """Where a row states its model FLOPs too, they must belong to the batch it states."""
    stated = figure_of(row, "model_tflops_per_gpu", 0.0) * 1e12 * seconds * job.layout.world_size / job.tokens
    if not stated:
        return
    ratio = stated / _train_flops_per_token(job.model, job.seq_len)
    if not CONSISTENT_FLOPS[0] <= ratio <= CONSISTENT_FLOPS[1]:
        raise IncompleteRowError(f"its batch and its model FLOPs differ {max(ratio, 1 / ratio):.1f}-fold")


def _train_flops_per_token(model: ModelArchitecture, seq_len: int) -> float:
    """Forward and backward, causal attention counted half."""
    forward = 2.0 * model.vocab_size * model.hidden_size
    for kind, count in model.layers():
        products = sum(2.0 * gemm.n * gemm.k * gemm.times for gemm in layer_gemms(kind, model.hidden_size))
        scores = float(getattr(kind.mixer, "score_flops_per_pair", 0.0)) * seq_len / 2.0
        forward += count * (products + scores)
    return 3.0 * forward


def _fewest_gpus(row: Row) -> int:
    """The smallest world the sizes fit in: more replicas only shrink sharded state."""
    tp, pp, cp, ep, etp = (size_of(row, name) for name in ("tp", "pp", "cp", "ep", "etp"))
    return pp * math.lcm(tp * cp, ep * etp)


def _batch(row: Row, software: Software, needs_batch: bool) -> tuple[int, int]:
    """Sequence length and global batch; either follows from the other where the row has the tokens of a step."""
    tokens = size_of(row, "tokens_per_step_derived", 0)
    seq_len, batch = size_of(row, "seq_len", 0) or software.seq_len, size_of(row, "global_batch", 0)
    if not seq_len and batch and tokens:
        seq_len = tokens // batch
    if not batch and seq_len and tokens:
        batch = max(1, round(tokens / seq_len))
    if not batch and software is TORCHTITAN:
        batch = size_of(row, "micro_batch") * size_of(row, "fsdp")
    if not seq_len and "Megatron-Bridge" in str(row.get("source")):
        seq_len = BRIDGE_FINETUNE_TOKENS if is_adapter(row) or "sft" in str(row).lower() else BRIDGE_PRETRAIN_TOKENS
    if not seq_len:
        raise IncompleteRowError("seq_len is not stated")
    if not batch and needs_batch:
        raise IncompleteRowError("global_batch is not stated")
    return seq_len, batch


def train_layout(row: Row, model: ModelArchitecture, gpus: int) -> TrainLayout:
    """The parallel sizes a row states, data parallelism taking what is left of its GPUs."""
    tp, pp, cp, ep, vpp, etp = (size_of(row, name) for name in ("tp", "pp", "cp", "ep", "vpp", "etp"))
    if gpus % (tp * pp * cp):
        raise IncompleteRowError(f"tp x pp x cp = {tp * pp * cp} does not divide num_gpus = {gpus}")
    if model.num_layers + 2 < pp * vpp:
        vpp = 1
    layout = TrainLayout(
        tp=tp,
        pp=pp,
        cp=cp,
        vpp=vpp,
        dp=gpus // (tp * pp * cp),
        ep=min(ep, gpus // pp) if model.moe else 1,
        etp=_expert_tensor_parallel(row, etp, tp) if model.moe else 1,
        sequence_parallel=tp > 1 and "qwen35_vl_27b" not in str(row.get("recipe")),
    )
    if problem := next(layout.problems(), None):
        raise IncompleteRowError(problem)
    return layout


def train_time_options(row: Row, job: TrainJob) -> TrainTimeOptions:
    """How the row's step ran."""
    mode, modules = recomputation(row, job.software)
    sharded = size_of(row, "fsdp") > 1
    facts = recipe_facts(job.model.name, str(row.get("recipe") or ""), job.software.tuned)
    return TrainTimeOptions(
        compute=compute_options(row, job.software, job.model, job.gpu),
        recompute=cast(Recompute, mode),
        recompute_modules=modules,
        optimizer=OptimizerOptions(
            kind="none" if is_frozen(row) else "adam",
            precision_aware=facts.precision_aware,
            offload_fraction=figure_of(row, "optimizer_offload_fraction", 0.0),
        ),
        engine="fsdp2" if sharded else job.software.engine,
        mtp_layers=facts.mtp_layers,
    )


def train_workload(job: TrainJob) -> TrainWorkload:
    """Full sequences, as benchmarks train on."""
    return TrainWorkload(
        total_tokens=job.tokens,
        sum_squares=float(job.seq_len) * job.tokens,
        longest=job.seq_len,
        tokens_per_gpu=job.micro_batch * job.seq_len / job.layout.cp,
    )


def _measured_seconds(row: Row, job: TrainJob) -> float:
    """The step's time that a row's time or rate stands for."""
    metric = words_of(row, "metric")
    if metric in ("iteration_time", "step_time"):
        return seconds_of(row, "s")
    work = {
        "tokens_per_sec_per_gpu": job.tokens / job.layout.world_size,
        "tokens_per_sec": float(job.tokens),
        "samples_per_sec": float(job.global_batch),
    }.get(metric)
    if work is None:
        raise IncompleteRowError(f"{metric} is not a time or a rate")
    if not (rate := figure_of(row, "value")) > 0:
        raise IncompleteRowError("the value is not a positive number")
    return work / rate


def step_seconds(row: Row) -> tuple[Interval, float]:
    """Estimated and measured seconds of the row's step.

    Raises:
        UnmappedRowError: the row cannot become a job, or its figure is not a time.
    """
    if IMAGE_RECIPE.search(str(row.get("recipe"))):
        raise IncompleteRowError("the images of its batch are not stated")
    job = train_job(row)
    measured = _measured_seconds(row, job)
    _check_flops(row, job, measured)
    return train_step_time(job.model, job.layout, train_workload(job), job.cluster, train_time_options(row, job)), measured
