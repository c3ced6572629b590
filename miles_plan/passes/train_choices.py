"""Every way to train on a number of GPUs that fits their memory, priced: the trainer's half of the joint search.

A way is a layout with a recomputation, a micro-batch budget and a place for the optimizer state. All layouts of one combination
are priced in one vectorised call; nothing is sampled, so the cheapest one found is the cheapest there is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from miles_plan.catalog.gpus import Cluster, NodeGroup
from miles_plan.cost.communication import links_of
from miles_plan.cost.draft import draft_of
from miles_plan.cost.profile import profile_for
from miles_plan.cost.software_release import release_compute
from miles_plan.cost.train_options import Layers, OptimizerOptions, TrainMemoryOptions
from miles_plan.cost.train_time import Scores, TrainTimeOptions, TrainWorkload, fed_tokens
from miles_plan.ir.graph import TaskGraph
from miles_plan.ir.layout import Recompute, TrainLayout
from miles_plan.ir.tasks import TrainStep
from miles_plan.passes.alignment import choose_alignment
from miles_plan.passes.base import PassContext
from miles_plan.passes.layout_space import (
    ANY_SIZES,
    Room,
    Sizes,
    even_stages,
    train_layouts,
    train_layouts_with,
    train_obstacles,
)
from miles_plan.passes.number_formats import COST_PRECISION
from miles_plan.passes.train_prices import (
    RECOMPUTE_ORDER,
    PriceJob,
    PriceRows,
    PriceTable,
    SizedLayouts,
    each_row,
    size_layouts,
)
from miles_plan.passes.workload import StepWorkload
from miles_plan.spec.train import TrainLayoutSpec

SMALLEST_BUDGET_TOKENS = 1024
LARGEST_BUDGET_TOKENS = 65_536
SEVERAL = 4  # sequences in a micro-batch, of which the mean says enough
# NCCL channels opened late, fragmentation of long runs and what the driver keeps: the share of a GPU that no plan may count on.
MARGIN_FRACTION = 0.04
PASSES_OF_UPDATE = 2.0  # an update is a forward pass and a backward one that takes no less
GRADIENT_BYTES = {"fp32": 4.0, "bf16": 2.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainChoice:
    """One priced way to train. Seconds are of one optimizer step's tokens times `updates`; bytes are of the fullest rank,
    `asleep_bytes` what it keeps on its GPU when all states are away."""

    layout: TrainLayout
    recompute: Recompute
    tokens_per_gpu: int
    optimizer_offload: bool
    step_s: float
    log_prob_s: float
    peak_bytes: float
    static_bytes: float
    asleep_bytes: float
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
        asleep_bytes=0.0,
        host_bytes=0.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSearch:
    """What was found: the table of all rows that fit, why others were left out with how many, and the smallest of all."""

    table: PriceTable
    left_out: Counter[str]
    smallest: TrainChoice | None

    def choice(self, row: int) -> TrainChoice:
        """One row of the table."""
        return _choice(self.table.layouts, self.table.rows, row)

    @property
    def choices(self) -> Iterator[TrainChoice]:
        """Choices that fit, fastest update and log-prob pass first."""
        return (self.choice(row) for row in each_row(self.table))


def _choice(layouts: Sequence[TrainLayout], rows: PriceRows, at: int) -> TrainChoice:
    return TrainChoice(
        layout=layouts[rows.layout[at]],
        recompute=RECOMPUTE_ORDER[rows.recompute[at]],
        tokens_per_gpu=int(rows.tokens_per_gpu[at]),
        optimizer_offload=bool(rows.offload[at]),
        step_s=float(rows.step_s[at]),
        log_prob_s=float(rows.log_prob_s[at]),
        peak_bytes=float(rows.peak_bytes[at]),
        static_bytes=float(rows.static_bytes[at]),
        asleep_bytes=float(rows.asleep_bytes[at]),
        host_bytes=float(rows.host_bytes[at]),
    )


def usable_bytes(group: NodeGroup) -> int:
    """Memory of one GPU that a plan may use: what the driver offers, less the margin."""
    return int(group.gpu.usable_bytes * (1.0 - MARGIN_FRACTION))


def train_room(ctx: PassContext, cluster: Cluster, num_gpus: int, workload: StepWorkload) -> Room:
    """What a trainer's layout on `num_gpus` of `cluster` has to fit."""
    return Room(
        num_gpus=num_gpus,
        gpus_per_node=min(num_gpus, cluster.gpus_per_node),
        nvlink_domain=min(num_gpus, cluster.groups[0].gpu.nvlink_domain),
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


def size_trainers(
    ctx: PassContext, cluster: Cluster, num_gpus: int, workload: StepWorkload, sizes: Sizes = ANY_SIZES
) -> SizedLayouts:
    """Every way to train on `num_gpus` of `cluster` that the spec (and `sizes`) leave open, with its bytes."""
    room = train_room(ctx, cluster, num_gpus, workload)
    fixed = asked_layout(ctx, num_gpus)
    if sizes:
        layouts, _ = train_layouts_with(ctx.model, room, sizes)
    elif fixed is None:
        layouts = train_layouts(ctx.model, room)
    else:
        layouts = [] if any(train_obstacles(fixed, ctx.model, room)) else [fixed]
    return size_layouts(layouts, price_job(ctx, cluster, workload))


def train_search(table: PriceTable) -> TrainSearch:
    """A table with why others are not in it."""
    left_out = Counter({"peak memory over capacity": table.overflowing} if table.overflowing else {})
    return TrainSearch(table=table, left_out=left_out, smallest=smallest_of(table.layouts, table.smallest))


def smallest_of(layouts: Sequence[TrainLayout], smallest: PriceRows) -> TrainChoice | None:
    """The one row of `smallest` as a choice; None where there is no layout at all."""
    return _choice(layouts, smallest, 0) if len(smallest) else None


def overflowing_trainers(ctx: PassContext, sized: SizedLayouts, under_s: float, at_most_bytes: float) -> PriceTable:
    """What does not fit, by no more than `at_most_bytes` say, and might train, log-prob passes included, in under `under_s`."""
    passes = PASSES_OF_UPDATE + passes_per_step(ctx)
    worth = sized.passed_too_large(lambda rows: (passes * rows.log_prob_s < under_s) & (rows.peak_bytes <= at_most_bytes))
    return worth.updated()


def passes_per_step(ctx: PassContext) -> float:
    """Log-prob passes of a step, in passes of the policy: its own, a reference's where there is one, a teacher's by size."""
    reference = 1 if ctx.job.algorithm.kl_loss_coef or ctx.job.algorithm.kl_reward_coef else 0
    # A teacher's pass costs as the policy's, by active weights: close enough to choose by; `price_tasks` prices it properly.
    teacher = ctx.teacher.params_active / ctx.model.params_active if ctx.teacher else 0.0
    return 1.0 + reference + teacher


def search_train(ctx: PassContext, cluster: Cluster, num_gpus: int, workload: StepWorkload) -> TrainSearch:
    """All choices on `num_gpus` of `cluster` that fit its smallest GPU."""
    return train_search(size_trainers(ctx, cluster, num_gpus, workload).timed())


def price_job(ctx: PassContext, cluster: Cluster, workload: StepWorkload) -> PriceJob:
    """The spec's open options and the cost models' view of them."""
    train = ctx.job.train
    recomputes: tuple[Recompute, ...] = RECOMPUTE_ORDER if train.recompute == "auto" else (train.recompute,)
    if train.engine == "torch" and train.recompute == "auto":
        recomputes = ("none", "full")  # the embedded decoder recomputes whole layers or nothing
    on_cpu = cluster.groups[0].gpu.vendor == "cpu"  # moving state from host memory to host memory gains nothing
    offloads = {"auto": (False,) if on_cpu else (False, True), "off": (False,), "host": (True,)}[train.optimizer.offload]
    asked = train.tokens_per_gpu
    return PriceJob(
        model=ctx.model,
        links=links_of(cluster, profile_for(cluster.groups[0].gpu)),
        workload=train_workload(ctx, workload, 1),
        capacity_bytes=min(usable_bytes(group) for group in cluster.groups),
        recomputes=recomputes,
        offloads=offloads,
        budgets=lambda cp: budget_candidates(workload, cp) if asked == "auto" else [asked],
        memory=lambda tokens, recompute, offload: memory_options(
            ctx, workload, _Options(recompute, tokens, offload), microbatches=1
        ),
        time=lambda recompute, offload: time_options(ctx, _Options(recompute, 1, offload)),
    )


@dataclass(frozen=True, slots=True)
class _Options:
    recompute: Recompute
    tokens_per_gpu: int
    optimizer_offload: bool


def budget_candidates(workload: StepWorkload, cp: int) -> list[int]:
    """Micro-batch budgets worth pricing: the longest sequence's share, doubled until one holds a whole step on one GPU.

    A budget below the longest sequence only fails when that sequence comes.
    """
    floor = max(SMALLEST_BUDGET_TOKENS, -(-workload.longest_tokens // cp))
    budgets = [floor]
    while budgets[-1] < workload.total_tokens and budgets[-1] * 2 <= LARGEST_BUDGET_TOKENS:
        budgets.append(budgets[-1] * 2)
    return budgets


def memory_options(
    ctx: PassContext, workload: StepWorkload, options: TrainChoice | _Options, *, microbatches: int
) -> TrainMemoryOptions:
    """The cost model's description of one choice."""
    reference = bool(ctx.job.algorithm.kl_loss_coef or ctx.job.algorithm.kl_reward_coef)
    swapped = ctx.job.train.engine != "torch"
    scored = options.tokens_per_gpu * scored_share(workload) if ctx.job.train.engine != "torch" else 0.0
    return TrainMemoryOptions(
        engine=ctx.job.train.engine,
        tokens_per_gpu=options.tokens_per_gpu,
        scored_tokens=scored,
        layers=layers_of(ctx),
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


def fed(ctx: PassContext, workload: StepWorkload, choice: TrainChoice) -> TrainChoice:
    """The choice with the tokens that its fullest micro-batch holds in place of its budget: what its memory is counted by."""
    batch = train_workload(ctx, workload, choice.tokens_per_gpu)
    return replace(choice, tokens_per_gpu=int(fed_tokens(batch, choice.tokens_per_gpu, choice.layout.dp, choice.layout.cp)))


def layers_of(ctx: PassContext) -> Layers:
    """Whose layers the trainer runs."""
    if ctx.job.train.engine == "fsdp2":
        return "transformers"
    exact = ctx.job.train.engine == "megatron" and choose_alignment(ctx)[0] == "exact"
    return "batch_invariant" if exact else "fused"


def scored_share(workload: StepWorkload) -> float:
    """Share of a micro-batch's tokens that predict a response: the mean's where every micro-batch holds several sequences,
    else that of the longest sequence."""
    mean, longest = workload.lengths.mean_tokens, float(workload.max_response_tokens)
    response = mean if SEVERAL * workload.longest_tokens <= SMALLEST_BUDGET_TOKENS else longest
    return response / (workload.prompt_tokens + response)


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
        engine=ctx.job.train.engine,
        compute=replace(compute, fused_attention=ctx.job.train.engine != "torch"),
        recompute=options.recompute,
        optimizer=_optimizer(ctx, options),
        grad_bytes=GRADIENT_BYTES[ctx.job.train.gradients],
        scores=_scores(ctx),
    )


def _scores(ctx: PassContext) -> Scores:
    """How the trainer scores: the embedded engine in full precision, the others in a kernel, exact ones in one more."""
    if ctx.job.train.engine == "torch":
        return "cross_entropy"
    return "batch_invariant" if layers_of(ctx) == "batch_invariant" else "fused"


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
