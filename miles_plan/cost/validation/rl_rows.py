"""Maps a row of RL step time to its engines and prices the step from its parts."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from miles_plan.catalog.architecture import ModelArchitecture
from miles_plan.catalog.gpus import Cluster, Gpu, cluster_of
from miles_plan.cost.interval import Interval
from miles_plan.cost.layer_time import ComputeOptions
from miles_plan.cost.lengths import fit_lengths
from miles_plan.cost.rl_step import RlStepParts, Schedule, rl_step_time
from miles_plan.cost.rollout_memory import RolloutMemoryOptions, rollout_memory
from miles_plan.cost.rollout_time import RolloutWorkload, simulate_rollout
from miles_plan.cost.train_options import OptimizerOptions
from miles_plan.cost.train_time import (
    TrainTimeOptions,
    TrainWorkload,
    log_prob_time,
    train_step_time,
    workload_of_lengths,
)
from miles_plan.cost.validation.recipes import NATURAL_IMBALANCE
from miles_plan.cost.validation.row_fields import (
    IncompleteRowError,
    Row,
    figure_of,
    row_gpu,
    row_model,
    row_precision,
    seconds_of,
    size_of,
    words_of,
)
from miles_plan.cost.validation.sync_rows import VLLM_LOAD_BYTES_PER_S
from miles_plan.cost.weight_sync import SyncOptions, offload_time, weight_sync_time
from miles_plan.ir.layout import Recompute, RolloutLayout, TrainLayout

LARGEST_BATCH = 1_000_000
PROMPT_TOKENS = 150
"""A question with its chat template (OpenMathInstruct-2 and GSM8K), where a row does not say."""
RECOMPUTED = re.compile(r"deepseek|235b|llama", re.IGNORECASE)
"""NeMo-RL recipes with activation checkpointing (examples/configs/recipes/llm/performance)."""
EIGHT_STEPS_ROLLOUT_SHARE, ROLLOUT_SHARE = 1.0 / 3.0, 0.5
"""GPUs that generate in NeMo-RL's asynchronous recipes: 8 of 24 nodes eight steps off policy, half of them one."""
MEMORY_SHARE = {"colocated": 0.6, "overlapped": 0.8, "split": 0.8}
"""gpu_memory_utilization of those recipes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RlJob:
    """An RL step as a row states it."""

    model: ModelArchitecture
    gpu: Gpu
    schedule: Schedule
    train: TrainLayout
    rollout: RolloutLayout
    samples: int
    batch: int
    max_tokens: int
    mean_tokens: float
    recompute: Recompute
    train_precision: str
    rollout_precision: str
    staleness: int = 0

    @property
    def gradient_steps(self) -> int:
        """Optimizer steps one rollout feeds."""
        return max(1, self.samples // self.batch)


def rl_step_seconds(row: Row) -> tuple[Interval, float]:
    """Estimated and measured seconds of one step.

    Raises:
        UnmappedRowError: engines, batch or lengths are not stated.
    """
    if (metric := words_of(row, "metric")) != "step_time":
        raise IncompleteRowError(f"{metric} is not the time of one step")
    measured = seconds_of(row, "s")
    job = rl_job(row)
    return rl_step_time(rl_parts(job), job.schedule), measured


def rl_job(row: Row) -> RlJob:
    """The job a row describes."""
    model, gpu, gpus = row_model(row), row_gpu(row), size_of(row, "num_gpus", 0)
    for name in ("num_gpus", "gen_parallel", "train_parallel", "seq_len", "avg_seq_len", "gen_batch", "global_batch"):
        if not row.get(name):
            raise IncompleteRowError(f"{name} is not stated")
    if size_of(row, "gen_batch") > LARGEST_BATCH:
        raise IncompleteRowError(f"gen_batch is {size_of(row, 'gen_batch'):g}")
    mode = str(row.get("policy_mode") or "").lower()
    schedule: Schedule = "overlapped" if "off" in mode or "async" in mode else "colocated"
    rollout_gpus = train_gpus = gpus
    if schedule == "overlapped":
        rollout_gpus = round(gpus * (EIGHT_STEPS_ROLLOUT_SHARE if mode.startswith("8") else ROLLOUT_SHARE))
        train_gpus = gpus - rollout_gpus
    precision = str(row.get("precision") or "")
    halves = {part.split()[0].lower(): part for part in precision.split(", ") if part.strip()}
    return RlJob(
        model=model,
        gpu=gpu,
        schedule=schedule,
        train=_train_layout(str(row["train_parallel"]), train_gpus, model),
        rollout=_rollout_layout(str(row["gen_parallel"]), rollout_gpus),
        samples=size_of(row, "gen_batch"),
        batch=size_of(row, "global_batch"),
        max_tokens=size_of(row, "seq_len"),
        mean_tokens=figure_of(row, "avg_seq_len"),
        recompute="full" if RECOMPUTED.search(str(row["model"])) else "none",
        train_precision=row_precision({"precision": halves.get("training")}),
        rollout_precision=row_precision({"precision": halves.get("generation")}),
        staleness=int(mode[0]) if mode[:1].isdigit() else 0,
    )


def _bracketed(text: str) -> list[int]:
    """The numbers of `TP,PP=[2,1]`; `n/a` counts as 1."""
    inside = re.search(r"\[(.*?)\]", text)
    if not inside:
        raise IncompleteRowError(f"parallel sizes are not readable: {text}")
    return [int(each) if each.strip().isdigit() else 1 for each in inside.group(1).split(",")]


def _train_layout(text: str, gpus: int, model: ModelArchitecture) -> TrainLayout:
    sizes = _bracketed(text)
    tp, pp, vpp = sizes[0], sizes[-2], sizes[-1]
    cp, ep = (sizes[1], sizes[2]) if len(sizes) == 5 else (1, 1)
    if "EP" not in text.split("=")[0] or len(sizes) == 4:
        cp, ep = 1, 1
    if gpus % (tp * pp * cp):
        raise IncompleteRowError(f"tp x pp x cp = {tp * pp * cp} does not divide {gpus} trainer GPUs")
    dp = gpus // (tp * pp * cp)
    ep = ep if model.moe else 1
    layout = TrainLayout(tp=tp, pp=pp, vpp=vpp, cp=cp, dp=dp, ep=ep, sequence_parallel=tp > 1)
    if problem := next(layout.problems(), None):
        raise IncompleteRowError(problem)
    return layout


def _rollout_layout(text: str, gpus: int) -> RolloutLayout:
    tp, pp = _bracketed(text)[:2]
    return RolloutLayout(engines=max(1, gpus // (tp * pp)), tp=tp, pp=pp)


def _cluster(gpu: Gpu, gpus: int) -> Cluster:
    return cluster_of(gpu, max(1, -(-gpus // gpu.gpus_per_node)), min(gpus, gpu.gpus_per_node))


def rl_parts(job: RlJob) -> RlStepParts:
    """Every part of the step priced on its own GPUs."""
    train_cluster = _cluster(job.gpu, job.train.world_size)
    batch = _train_batch(job)
    options = TrainTimeOptions(
        compute=ComputeOptions(precision=job.train_precision, moe_imbalance=NATURAL_IMBALANCE if job.model.moe else 1.0),
        recompute=job.recompute,
        optimizer=OptimizerOptions(precision_aware=True, moment_bytes=8.0),
        grad_bytes=2.0,
    )
    forward = log_prob_time(job.model, job.train, replace(batch, gradient_steps=1), train_cluster, options)
    sync = weight_sync_time(
        job.model,
        job.train,
        job.rollout,
        "cuda_ipc" if job.schedule == "colocated" else "nccl_broadcast",
        _cluster(job.gpu, job.train.world_size + job.rollout.world_size),
        SyncOptions(rollout_precision=job.rollout_precision, engine_load_bytes_per_s=VLLM_LOAD_BYTES_PER_S),
    )
    state = job.model.params_total * 14.0 / job.train.world_size
    return RlStepParts(
        rollout=_rollout(job),
        log_prob=forward,
        reference=forward,
        train=train_step_time(job.model, job.train, batch, train_cluster, options),
        sync=sync,
        moves=offload_time(state, train_cluster, "out") + offload_time(state, train_cluster, "in"),
    )


def _train_batch(job: RlJob) -> TrainWorkload:
    lengths = fit_lengths(job.max_tokens, job.mean_tokens).sample(job.samples)
    return workload_of_lengths(lengths, job.max_tokens / job.train.cp, job.gradient_steps)


def _rollout(job: RlJob) -> Interval:
    options = RolloutMemoryOptions(
        weight_precision=job.rollout_precision, mem_fraction_static=MEMORY_SHARE[job.schedule], saver=False
    )
    held = rollout_memory(job.model, job.rollout, options, job.gpu)
    responses = fit_lengths(job.max_tokens - PROMPT_TOKENS, max(1.0, job.mean_tokens - PROMPT_TOKENS))
    # Samples may be that many steps old, so as many more batches are in flight and share one tail.
    batches = 1 + (job.staleness if job.staleness > 1 else 0)
    workload = RolloutWorkload(
        prompts=max(1, batches * job.samples // 16),
        samples_per_prompt=16,
        prompt_tokens=PROMPT_TOKENS,
        responses=responses,
        weight_precision=job.rollout_precision,
    )
    return simulate_rollout(job.model, job.rollout, workload, job.gpu, held.pool_tokens).makespan.scaled(1.0 / batches)
