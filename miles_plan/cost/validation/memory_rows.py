"""Maps a row of training memory to a job with a fixed layout and estimates the fullest GPU."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import cast

from miles_plan.cost.activations import Module
from miles_plan.cost.interval import Interval, Term, around
from miles_plan.cost.train_memory import MemoryBreakdown, train_memory
from miles_plan.cost.train_options import OptimizerOptions, TrainMemoryOptions, TrainPrecision
from miles_plan.cost.validation.recipes import RecipeFacts, graphed_modules, recipe_facts
from miles_plan.cost.validation.row_fields import IncompleteRowError, Row, figure_of, row_precision, words_of
from miles_plan.cost.validation.software import TORCHTITAN, is_frozen, recomputation
from miles_plan.cost.validation.train_rows import TrainJob, train_job
from miles_plan.ir.layout import Recompute

ADAPTER_SHARE = 0.005
"""Trained over all parameters of a rank-32 adapter on every projection."""
STATED_ERROR = 0.06
"""Half width of the interval of published peaks, where part of the options comes from the recipe's code."""
BRIDGE_LOOP_BYTES = 5.5 * (1 << 30)
"""What Megatron-Bridge's general training loop holds besides, on real data: eight verification cards of three models, on H100
and GB200, with full weights and adapters, all lie 5 to 8 GiB above what is accounted for, runs of its studies do not. Which
allocation it is no card says, so plans do not count it."""
EAGER_TITAN_LOSS_BYTES = 14.0
"""An element of torchtitan's logits at the peak of its loss without torch.compile: the bf16 logits stay beside the rest."""
_UNITS = {"B": 1.0, "bytes": 1.0, "MB": 1e6, "MiB": float(1 << 20), "GB": 1e9, "GiB": float(1 << 30), "TiB": float(1 << 40)}
_GIB_CALLED_GB = re.compile("mbridge memory_estimator")  # its README turns 8947.57 MB into 8.74 GB
_METRICS = re.compile(r"peak|allocated|real_total|real_vs_tool")


def peak_bytes(row: Row) -> tuple[Interval, float]:
    """Estimated and measured peak bytes of the fullest GPU.

    Raises:
        UnmappedRowError: the row cannot become a job, or measures something else.
    """
    metric = words_of(row, "metric")
    if not _METRICS.search(metric):
        raise IncompleteRowError(f"{metric} is not a peak of training")
    unit = _UNITS.get("GiB" if _GIB_CALLED_GB.search(str(row.get("source"))) else str(row.get("unit")))
    if unit is None:
        raise IncompleteRowError("the unit is not bytes")
    between_steps = metric == "allocated"
    if not between_steps and not (row.get("micro_batch") and (row.get("seq_len") or row.get("recipe") or _titan(row))):
        raise IncompleteRowError("the tokens of a microbatch are not stated")
    job = train_job(row, needs_batch=False)
    options = memory_options(row, job)
    if "after_iter1" in metric:  # the first backward comes before the first moments
        options = replace(options, optimizer=replace(options.optimizer, moment_bytes=0.0))
    held = train_memory(job.model, job.layout, options)
    if between_steps:
        held = replace(held, peak_bytes=around(held.static_bytes, STATED_ERROR, "calibrated"))
    return _as_measured(row, job, held), figure_of(row, "value") * unit


def _titan(row: Row) -> bool:
    return "torchtitan" in str(row.get("source"))


def _loop_bytes(row: Row, job: TrainJob) -> float:
    """What the training loop of a recipe on real data holds besides."""
    recipe = str(row.get("recipe") or "mock")
    return BRIDGE_LOOP_BYTES if job.software is not TORCHTITAN and "mock" not in recipe else 0.0


def _as_measured(row: Row, job: TrainJob, held: MemoryBreakdown) -> Interval:
    """torchtitan prints what the allocator reserved, the others what it handed out."""
    if job.software is not TORCHTITAN:
        peak = held.peak_bytes
        loop = Term("training loop", _loop_bytes(row, job))
        return around(peak.mid + loop.value, STATED_ERROR, "calibrated", (*peak.terms, loop))
    fragments = next(term for term in held.outside_terms if term.name == "fragmentation")
    return held.peak_bytes + Interval(0.0, fragments.value, 2.0 * fragments.value, "calibrated", (fragments,))


def memory_options(row: Row, job: TrainJob) -> TrainMemoryOptions:
    """How the row's run held its state and activations."""
    titan = job.software is TORCHTITAN
    tuned = job.software.tuned
    recipe = f"{row.get('recipe') or ''} {row.get('num_gpus') if tuned else ''}gpu"
    facts = RecipeFacts() if titan else recipe_facts(job.model.name, recipe, tuned)
    mode, modules = recomputation(row, job.software)
    if mode == "none" and facts.recompute:
        mode, modules = ("full", frozenset()) if facts.recompute == "full" else ("selective", frozenset(facts.recompute))
    precision = "bf16" if titan else row_precision(row)
    technique = str(row.get("technique") or "").lower()
    compiled = "compile" in technique
    graphed = graphed_modules(str(row.get("model")), job.gpu.name, precision)
    layout = job.layout
    microbatches = max(1, job.global_batch // (layout.dp * job.micro_batch)) if job.global_batch else 8 * layout.pp
    return TrainMemoryOptions(
        engine=job.software.engine,
        tokens_per_gpu=max(1, job.seq_len * job.micro_batch // layout.cp),
        seq_len=job.seq_len,
        num_microbatches=microbatches,
        precision=cast(TrainPrecision, precision),
        grad_bytes=facts.grad_bytes,
        recompute=cast(Recompute, mode),
        recompute_modules=cast("frozenset[Module]", modules),
        trainable_fraction=ADAPTER_SHARE if is_frozen(row) else 1.0,
        optimizer=OptimizerOptions(
            master_bytes=facts.master_bytes,
            moment_bytes=facts.moment_bytes,
            precision_aware=facts.precision_aware,
            offload_master=facts.precision_aware,
            offload_fraction=figure_of(row, "optimizer_offload_fraction", figure_of(row, "offload_fraction", 0.0)),
        ),
        moe_imbalance=facts.imbalance,
        logits_bytes=2.0 if facts.fused_loss else EAGER_TITAN_LOSS_BYTES if titan and not compiled and layout.tp == 1 else 0.0,
        async_tp="async" in technique,
        primary_fp8=tuned and precision != "nvfp4",
        mtp_layers=facts.mtp_layers,
        merged_outputs=titan and layout.pp > 1,
        graphed_modules=graphed,
        frozen_vision=facts.frozen_vision,
    )


_RAN_OUT = re.compile(r"\bOOM(?:ed|s)?\b|\b(?:out of|ran out of) memory", re.IGNORECASE)


def said_to_fit(row: Row) -> bool | None:
    """Whether a plan would have taken a run that ran out of memory; None for a run that did not, or is not stated."""
    said = " ".join(str(row.get(name) or "") for name in ("notes", "result", "status", "value"))
    if not _RAN_OUT.search(said):
        return None
    job = train_job(row, needs_batch=False)
    held = train_memory(job.model, job.layout, memory_options(row, job))
    return held.needed_bytes(expandable_segments(row)) + _loop_bytes(row, job) <= job.gpu.usable_bytes


def expandable_segments(row: Row) -> bool:
    """Whether a row says that the allocator's segments grow in place; PyTorch's default is that they do not."""
    return "expandable_segments:True" in str(row)
