"""Every way to train on a number of GPUs that fits their memory, priced: the trainer's half of the joint search.

A way is a layout with a recomputation, a micro-batch budget and a place for the optimizer state. All layouts of one combination
are priced in one vectorised call; nothing is sampled, so the cheapest one found is the cheapest there is.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from miles_plan.catalog.gpus import Cluster, NodeGroup
from miles_plan.cost.communication import links_of
from miles_plan.cost.draft import draft_of
from miles_plan.cost.profile import profile_for
from miles_plan.cost.software_release import release_compute
from miles_plan.cost.train_memory import train_memory_columns
from miles_plan.cost.train_options import OptimizerOptions, TrainMemoryOptions
from miles_plan.cost.train_time import TrainTimeOptions, TrainWorkload, train_step_columns
from miles_plan.ir.graph import TaskGraph
from miles_plan.ir.layout import Recompute, TrainLayout
from miles_plan.ir.tasks import TrainStep
from miles_plan.passes.base import PassContext
from miles_plan.passes.layout_space import Room, even_stages, train_layouts, train_obstacles
from miles_plan.passes.number_formats import COST_PRECISION
from miles_plan.passes.workload import StepWorkload
from miles_plan.spec.train import TrainLayoutSpec

SMALLEST_BUDGET_TOKENS = 1024
LARGEST_BUDGET_TOKENS = 65_536
# NCCL channels opened late, fragmentation of long runs and what the driver keeps: the share of a GPU that no plan may count on.
MARGIN_FRACTION = 0.04
GRADIENT_BYTES = {"fp32": 4.0, "bf16": 2.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainChoice:
    """One priced way to train. Seconds are of one optimizer step's tokens times `updates`; bytes are of the fullest rank."""

    layout: TrainLayout
    recompute: Recompute
    tokens_per_gpu: int
    optimizer_offload: bool
    step_s: float
    log_prob_s: float
    peak_bytes: float
    static_bytes: float
    host_bytes: float


def chosen_train(graph: TaskGraph) -> TrainChoice:
    """The choice that placement wrote into the graph, its prices left out."""
    step = graph.task("train")
    assert isinstance(step, TrainStep)
    layout = graph.group(step.group or "").train_layout
    assert layout is not None
    return TrainChoice(
        layout=layout,
        recompute=step.recompute,
        tokens_per_gpu=step.tokens_per_gpu,
        optimizer_offload=step.optimizer_offload,
        step_s=0.0,
        log_prob_s=0.0,
        peak_bytes=0.0,
        static_bytes=0.0,
        host_bytes=0.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSearch:
    """What was found: choices that fit, cheapest first, and why others were left out with how many there were of each."""

    choices: tuple[TrainChoice, ...]
    left_out: Counter[str]
    smallest: TrainChoice | None


def usable_bytes(group: NodeGroup) -> int:
    """Memory of one GPU that a plan may use: what the driver offers, less the margin."""
    return int(group.gpu.usable_bytes * (1.0 - MARGIN_FRACTION))


def train_room(ctx: PassContext, num_gpus: int, workload: StepWorkload) -> Room:
    """What a trainer's layout on `num_gpus` has to fit."""
    return Room(
        num_gpus=num_gpus,
        gpus_per_node=min(num_gpus, ctx.cluster.gpus_per_node),
        nvlink_domain=min(num_gpus, ctx.cluster.groups[0].gpu.nvlink_domain),
        sequences=workload.samples,
        longest_sequence_tokens=workload.longest_tokens,
        engine=ctx.job.train.engine,
    )


def asked_layout(ctx: PassContext, num_gpus: int) -> TrainLayout | None:
    """The layout that the spec fixes, its data parallelism filled in; None under `auto`."""
    asked = ctx.job.train.layout
    if not isinstance(asked, TrainLayoutSpec):
        return None
    model_parallel = asked.tp * asked.pp * asked.cp
    dp = max(1, num_gpus // model_parallel) if asked.dp == "auto" else asked.dp
    uneven = even_stages(ctx.model.num_layers, asked.pp) if asked.vpp == 1 else ()
    sequence_parallel = asked.tp > 1 and ctx.job.train.engine == "megatron"
    etp = asked.etp
    if ctx.job.train.engine == "torch" and ctx.model.moe is not None:
        etp = asked.tp
    return TrainLayout(
        dp=dp,
        tp=asked.tp,
        pp=asked.pp,
        vpp=asked.vpp,
        cp=asked.cp,
        ep=asked.ep,
        etp=etp,
        sequence_parallel=sequence_parallel if asked.sequence_parallel == "auto" else asked.sequence_parallel,
        stage_layers=asked.stage_layers or uneven,
    )


def search_train(ctx: PassContext, cluster: Cluster, num_gpus: int, workload: StepWorkload) -> TrainSearch:
    """All choices on `num_gpus` of `cluster` that fit its smallest GPU."""
    room = train_room(ctx, num_gpus, workload)
    fixed = asked_layout(ctx, num_gpus)
    if fixed is None:
        layouts = train_layouts(ctx.model, room)
    else:
        layouts = [] if any(train_obstacles(fixed, ctx.model, room)) else [fixed]
    return price_layouts(ctx, cluster, layouts, workload)


def price_layouts(ctx: PassContext, cluster: Cluster, layouts: Sequence[TrainLayout], workload: StepWorkload) -> TrainSearch:
    """Price `layouts` under every combination of options the spec leaves open, dominated ones left out.

    Recomputing more never makes the same layout, budget and offload faster. So what fits with less of it is not priced again
    with more, and the cheapest choice found is still the cheapest there is. (Optimizer state on the host is not dominated:
    the step is slower, but a colocated trainer then has less to put away.)
    """
    capacity = min(usable_bytes(group) for group in cluster.groups)
    found: list[TrainChoice] = []
    left_out: Counter[str] = Counter()
    smallest: TrainChoice | None = None
    for cp in sorted({layout.cp for layout in layouts}):
        overflowing: dict[tuple[Recompute, bool], set[TrainLayout]] = defaultdict(set)  # by smaller budgets already
        for budget in _budgets(ctx, workload, cp):
            fitting: dict[_Options, set[TrainLayout]] = {}
            for options in _option_space(ctx, budget):
                known = overflowing[options.recompute, options.optimizer_offload]
                lighter = known.union(*(fits for other, fits in fitting.items() if other.dominates(options)))
                remaining = [layout for layout in layouts if layout.cp == cp and layout not in lighter]
                fits, nearest = _price(ctx, cluster, remaining, workload, options, capacity)
                found += fits
                fitting[options] = {choice.layout for choice in fits}
                known.update(layout for layout in remaining if layout not in fitting[options])
                left_out["peak memory over capacity"] += len(remaining) - len(fits)
                if nearest is not None and (smallest is None or nearest.peak_bytes < smallest.peak_bytes):
                    smallest = nearest
    found.sort(key=lambda choice: (choice.step_s + choice.log_prob_s, choice.optimizer_offload, choice.peak_bytes))
    return TrainSearch(choices=tuple(found), left_out=left_out, smallest=smallest)


RECOMPUTE_ORDER: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True, slots=True)
class _Options:
    recompute: Recompute
    tokens_per_gpu: int
    optimizer_offload: bool

    def dominates(self, other: _Options) -> bool:
        """Whether this is at least as good for every layout: it recomputes no more, all else being equal."""
        lighter = RECOMPUTE_ORDER.index(self.recompute) <= RECOMPUTE_ORDER.index(other.recompute)
        return lighter and self.optimizer_offload == other.optimizer_offload


def _option_space(ctx: PassContext, budget: int) -> Iterator[_Options]:
    """Options in an order in which whatever dominates comes first."""
    train = ctx.job.train
    recomputes: tuple[Recompute, ...] = RECOMPUTE_ORDER if train.recompute == "auto" else (train.recompute,)
    if train.engine == "torch" and train.recompute == "auto":
        recomputes = ("none", "full")  # the embedded decoder recomputes whole layers or nothing
    on_cpu = ctx.cluster.groups[0].gpu.vendor == "cpu"  # moving state from host memory to host memory gains nothing
    offloads = {"auto": (False,) if on_cpu else (False, True), "off": (False,), "host": (True,)}[train.optimizer.offload]
    for offload in offloads:
        for recompute in recomputes:
            yield _Options(recompute, budget, offload)


def _budgets(ctx: PassContext, workload: StepWorkload, cp: int) -> list[int]:
    asked = ctx.job.train.tokens_per_gpu
    return budget_candidates(workload, cp) if asked == "auto" else [asked]


def budget_candidates(workload: StepWorkload, cp: int) -> list[int]:
    """Micro-batch budgets worth pricing: powers of two from the longest sequence's share up to the whole step on one GPU.

    A budget below the longest sequence only fails when that sequence comes.
    """
    floor = max(SMALLEST_BUDGET_TOKENS, -(-workload.longest_tokens // cp))
    ceiling = min(max(LARGEST_BUDGET_TOKENS, floor), max(floor, int(workload.total_tokens)))
    budgets = [floor]
    while budgets[-1] * 2 <= ceiling:
        budgets.append(budgets[-1] * 2)
    return budgets


def memory_options(
    ctx: PassContext, workload: StepWorkload, options: TrainChoice | _Options, *, microbatches: int
) -> TrainMemoryOptions:
    """The cost model's description of one choice."""
    reference = bool(ctx.job.algorithm.kl_loss_coef or ctx.job.algorithm.kl_reward_coef)
    swapped = ctx.job.train.engine != "torch"
    return TrainMemoryOptions(
        engine=ctx.job.train.engine,
        tokens_per_gpu=options.tokens_per_gpu,
        seq_len=workload.longest_tokens,
        num_microbatches=max(1, microbatches),
        precision=COST_PRECISION[ctx.job.precision.train],
        grad_bytes=GRADIENT_BYTES[ctx.job.train.gradients],
        recompute=options.recompute,
        optimizer=_optimizer(ctx, options),
        draft_params=trained_draft_params(ctx),
        entropy=ctx.job.algorithm.entropy_coef > 0,
        reference="none" if not reference else "swapped" if swapped else "resident",
    )


def trained_draft_params(ctx: PassContext) -> float:
    """Parameters of the draft that learns inside the step; 0 without one."""
    speculative = ctx.job.rollout.speculative
    trains = speculative != "off" and speculative.train
    return float(draft_of(ctx.model, speculative.method).params) if speculative != "off" and trains else 0.0


def time_options(ctx: PassContext, options: TrainChoice | _Options) -> TrainTimeOptions:
    """The same for the time model."""
    precision, gpu = COST_PRECISION[ctx.job.precision.train], ctx.cluster.groups[0].gpu
    compute = release_compute(ctx.job.train.release, precision, ctx.model, gpu)
    return TrainTimeOptions(
        compute=replace(compute, fused_attention=ctx.job.train.engine != "torch"),
        recompute=options.recompute,
        optimizer=_optimizer(ctx, options),
        grad_bytes=GRADIENT_BYTES[ctx.job.train.gradients],
    )


def _optimizer(ctx: PassContext, options: TrainChoice | _Options) -> OptimizerOptions:
    asked = ctx.job.train.optimizer
    offloaded = asked.offload_fraction
    return OptimizerOptions(
        kind=asked.kind,
        moment_bytes=8.0 if asked.moments == "fp32" else 4.0,
        precision_aware=asked.precision_aware,
        offload_fraction=offloaded if options.optimizer_offload else 0.0,
    )


def train_workload(ctx: PassContext, workload: StepWorkload, tokens_per_gpu: int) -> TrainWorkload:
    """The step's sequences, as the time model wants them."""
    return TrainWorkload(
        total_tokens=workload.total_tokens,
        sum_squares=workload.sum_squares,
        longest=float(workload.longest_tokens),
        tokens_per_gpu=float(tokens_per_gpu),
        gradient_steps=ctx.job.algorithm.updates_per_rollout,
    )


def _price(
    ctx: PassContext,
    cluster: Cluster,
    layouts: list[TrainLayout],
    workload: StepWorkload,
    options: _Options,
    capacity: int,
) -> tuple[list[TrainChoice], TrainChoice | None]:
    """The layouts that fit, with their times, and the one whose peak is smallest. Only what fits is worth timing."""
    if not layouts:
        return [], None
    links = links_of(cluster, profile_for(cluster.groups[0].gpu))
    batch = train_workload(ctx, workload, options.tokens_per_gpu)
    per_rank = workload.total_tokens / ctx.job.algorithm.updates_per_rollout / min(layout.dp for layout in layouts)
    microbatches = int(np.ceil(per_rank / (options.tokens_per_gpu * layouts[0].cp)))
    held = train_memory_columns(
        ctx.model, layouts, memory_options(ctx, workload, options, microbatches=microbatches), links.profile
    )

    def choice(index: int, step_s: float, log_prob_s: float) -> TrainChoice:
        return TrainChoice(
            layout=layouts[index],
            recompute=options.recompute,
            tokens_per_gpu=options.tokens_per_gpu,
            optimizer_offload=options.optimizer_offload,
            step_s=step_s,
            log_prob_s=log_prob_s,
            peak_bytes=float(held.device_bytes[index]),
            static_bytes=float(held.static_bytes[index]),
            host_bytes=float(held.host_bytes[index]),
        )

    nearest = choice(int(np.argmin(held.device_bytes)), 0.0, 0.0)
    rows = np.flatnonzero(held.device_bytes <= capacity)
    if not len(rows):
        return [], nearest
    fitting = [layouts[row] for row in rows]
    time = time_options(ctx, options)
    step = sum(train_step_columns(ctx.model, fitting, batch, links, time).values())
    passes = sum(train_step_columns(ctx.model, fitting, batch, links, time, forward_only=True).values())
    times = zip(np.atleast_1d(step), np.atleast_1d(passes), strict=True)
    return [choice(int(row), float(one), float(other)) for row, (one, other) in zip(rows, times, strict=True)], nearest
