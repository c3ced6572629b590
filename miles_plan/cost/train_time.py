"""Seconds of a training step and of a log-prob pass, for one layout or for thousands at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from miles_plan.catalog.architecture import ModelArchitecture
from miles_plan.catalog.ffns import MoeFfn
from miles_plan.catalog.gpus import Cluster
from miles_plan.cost.columns import LayoutColumns, group_layouts, stage_kinds
from miles_plan.cost.communication import Links, collective_s, links_of, point_to_point_s, ranks_in_domain
from miles_plan.cost.gemms import Gemm
from miles_plan.cost.interval import Interval, Term, around
from miles_plan.cost.layer_time import TERMS, ComputeOptions, Microbatch, gemm_seconds, layer_seconds
from miles_plan.cost.profile import HardwareProfile, relative_error
from miles_plan.cost.rank_params import rank_params
from miles_plan.cost.recompute_time import recomputed_layers, recomputed_shares
from miles_plan.cost.train_memory import train_memory_columns
from miles_plan.cost.train_options import Engine, OptimizerOptions, TrainMemoryOptions
from miles_plan.ir.layout import Recompute, TrainLayout

Floats = NDArray[np.float64]

STEP_ERROR = {"measured": 0.18, "calibrated": 0.25, "roofline": 0.45}
FORWARD_ERROR = {"measured": 0.14, "calibrated": 0.2, "roofline": 0.35}
"""Relative half width of the 90 % interval of a step and of a forward pass, by where the efficiencies come from
(docs/accuracy.md)."""
OPTIMIZER_BYTES = 44.0
"""HBM traffic of one parameter's Adam step: gradient norm and zeroing 8, gradient, master and moments read 16 and
written 12, bf16 copy 8."""
TENSOR_HOST_S = 27.0e-6
"""Host time an optimizer step spends on each weight: copies of gradients and masters are loops (measured: 100 to 2,100
weights), which the precision-aware optimizer does without."""
Scores = Literal["cross_entropy", "fused", "batch_invariant"]
LOSS_BYTES: dict[Scores, tuple[float, float]] = {
    "cross_entropy": (30.0, 5.0),  # Megatron's, over the parallel vocabulary: measured, not fused
    "fused": (2.0, 4.0),  # one kernel over bf16 logits each way, as this package's cluster trainers score
    "batch_invariant": (4.0, 4.0),  # exact log-probs beside it
}
"""HBM traffic of an element of the logits, forward and backward."""
CONTENTION = 0.2
"""How much a communication kernel slows the compute it runs beside (1.1 to 1.3 in arXiv 2412.01523 and Galvatron)."""
CPU_ADAM_BYTES_PER_S = 60.0e9
"""Host memory traffic one GPU's share of a node's cores sustains in a CPU Adam step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainWorkload:
    """What one step trains on.

    total_tokens, sum_squares: over all sequences of the step; longest: the longest of them; tokens_per_gpu: what a
    microbatch is packed up to on one GPU, after context parallelism cut it; gradient_steps: optimizer steps these make.
    """

    total_tokens: float
    sum_squares: float
    longest: float
    tokens_per_gpu: float
    gradient_steps: int = 1

    def __post_init__(self) -> None:
        if min(self.total_tokens, self.sum_squares, self.longest, self.tokens_per_gpu) <= 0:
            raise ValueError("a train workload needs positive token counts")


def fed_tokens(workload: TrainWorkload, budget: NDArray[np.intp] | int, dp: Floats | int, cp: Floats | int) -> NDArray[np.intp]:
    """Tokens a GPU of the fullest micro-batch: the budget, or a rank's whole share of an update where that is less.

    The longest sequence, cut over cp, is fed whatever the budget says. Broadcasts over its arguments.
    """
    share = np.ceil(workload.total_tokens / (np.asarray(dp) * workload.gradient_steps) / cp)
    return np.minimum(budget, np.maximum(share, np.ceil(workload.longest / np.asarray(cp)))).astype(np.intp)


def workload_of_lengths(lengths: Iterable[float], tokens_per_gpu: float, gradient_steps: int = 1) -> TrainWorkload:
    """A workload from the length of every sequence of the step."""
    every = np.fromiter(lengths, dtype=np.float64)
    if every.size == 0:
        raise ValueError("a train workload needs at least one sequence")
    return TrainWorkload(
        total_tokens=float(every.sum()),
        sum_squares=float((every**2).sum()),
        longest=float(every.max()),
        tokens_per_gpu=tokens_per_gpu,
        gradient_steps=gradient_steps,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainTimeOptions:
    """How a step runs. grad_bytes: bytes a gradient element has on the wire; overlap_dp: reduction and gathering run
    behind the last backward and first forward. mtp_layers: multi-token-prediction layers that train along, each with a
    pass of its own through the head. scores: what turns logits into log-probs."""

    compute: ComputeOptions = field(default_factory=ComputeOptions)
    recompute: Recompute = "none"
    recompute_modules: frozenset[str] = frozenset({"core_attn"})
    recompute_layers: int = 0
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    engine: Engine = "megatron"
    grad_bytes: float = 4.0
    overlap_dp: bool = True
    mtp_layers: int = 0
    scores: Scores = "cross_entropy"


def train_step_time(
    model: ModelArchitecture,
    layout: TrainLayout,
    workload: TrainWorkload,
    cluster: Cluster,
    options: TrainTimeOptions | None = None,
    profile: HardwareProfile | None = None,
) -> Interval:
    """Seconds of forward, backward and optimizer over the whole step's tokens."""
    links = links_of(cluster, profile)
    seconds = train_step_columns(model, [layout], workload, links, options or TrainTimeOptions())
    return _interval(seconds, links.profile, STEP_ERROR, deciding_constants(model, layout, links))


def log_prob_time(
    model: ModelArchitecture,
    layout: TrainLayout,
    workload: TrainWorkload,
    cluster: Cluster,
    options: TrainTimeOptions | None = None,
    profile: HardwareProfile | None = None,
) -> Interval:
    """Seconds of one forward-only pass over the whole step's tokens."""
    links = links_of(cluster, profile)
    seconds = train_step_columns(model, [layout], workload, links, options or TrainTimeOptions(), forward_only=True)
    return _interval(seconds, links.profile, FORWARD_ERROR, deciding_constants(model, layout, links))


def deciding_constants(model: ModelArchitecture, layout: TrainLayout, links: Links) -> tuple[str, ...]:
    """Constants of the hardware profile that a step of this layout rests on."""
    names = ["gemm_fraction", "attention_forward_fraction", "attention_backward_fraction", "hbm_fraction"]
    names += ["grouped_gemm_fraction"] * bool(model.moe)
    names += ["nvlink_bus_fraction.all_reduce"] * (layout.world_size > 1)
    names += ["rdma_bus_fraction"] * (layout.world_size > links.domain)
    return tuple(names)


def _interval(
    seconds: dict[str, Floats], profile: HardwareProfile, errors: dict[str, float], constants: tuple[str, ...]
) -> Interval:
    terms = tuple(Term(name, float(values[0])) for name, values in seconds.items() if values[0])
    mid = sum(term.value for term in terms)
    return around(mid, relative_error(errors, profile, constants), profile.basis_of(constants), terms)


def train_step_columns(
    model: ModelArchitecture,
    layouts: Sequence[TrainLayout],
    workload: TrainWorkload,
    links: Links,
    options: TrainTimeOptions,
    forward_only: bool = False,
) -> dict[str, Floats]:
    """Seconds of a step by term for many layouts, each of shape [n]."""
    out: dict[str, Floats] = {}
    for rows, columns in group_layouts(layouts, 0 if forward_only else options.mtp_layers):
        terms = _group_seconds(model, columns, workload, links, options, forward_only)
        for name, values in terms.items():
            out.setdefault(name, np.zeros(len(layouts)))[rows] = values
    return out


def _group_seconds(
    model: ModelArchitecture,
    columns: LayoutColumns,
    workload: TrainWorkload,
    links: Links,
    options: TrainTimeOptions,
    forward_only: bool,
) -> dict[str, Floats]:
    tokens_per_replica = workload.total_tokens / columns.dp
    room = np.maximum(workload.tokens_per_gpu * columns.cp, workload.longest)
    microbatches = np.maximum(1.0, np.ceil(tokens_per_replica / workload.gradient_steps / room)) * workload.gradient_steps
    batch = Microbatch(
        tokens=tokens_per_replica / microbatches,
        sum_squares=workload.sum_squares / columns.dp / microbatches,
        longest=workload.longest,
    )
    forward, backward = _stage_seconds(model, columns, batch, links, options)
    stage = {name: forward[name] + (0.0 if forward_only else backward[name]) for name in forward}
    whole = np.asarray(sum(stage.values()))
    slowest = (np.arange(len(columns)), np.argmax(whole, axis=1))
    out = {name: values[slowest] * microbatches for name, values in stage.items()}
    out["bubble"] = whole[slowest] * (columns.pp - 1) / columns.vpp * workload.gradient_steps
    out["pp"] = _pipeline_seconds(model, columns, batch, links) * microbatches * (1.0 if forward_only else 2.0)
    if options.engine == "fsdp2":
        ahead = np.asarray(sum(forward.values()))[slowest]
        out["fsdp"] = _gather_seconds(model, columns, links, ahead, whole[slowest], forward_only) * microbatches
    if not forward_only:
        out |= _update_seconds(model, columns, links, options, whole[slowest])
        for name in ("dp", "optimizer"):
            out[name] = out[name] * workload.gradient_steps
    return out


def _gather_seconds(
    model: ModelArchitecture,
    columns: LayoutColumns,
    links: Links,
    forward: Floats,
    whole: Floats,
    forward_only: bool,
) -> Floats:
    """FSDP2's gathering of weights in forward and backward and scattering of gradients, every microbatch.

    It runs beside compute, which it slows while it lasts; what is longer than compute is exposed.
    """
    params = rank_params(model, columns).total.max(axis=1)
    replicas = columns.dp * columns.cp
    near = ranks_in_domain(replicas, columns.tp, links.domain)
    gather = collective_s("all_gather", params * 2.0, replicas, near, links)
    scatter = collective_s("reduce_scatter", params * 2.0, replicas, near, links)
    exposed = np.maximum(0.0, gather - forward) + CONTENTION * np.minimum(gather, forward)
    if forward_only:
        return np.asarray(exposed)
    backward, moving = whole - forward, gather + scatter
    return np.asarray(exposed + np.maximum(0.0, moving - backward) + CONTENTION * np.minimum(moving, backward))


def _stage_seconds(
    model: ModelArchitecture, columns: LayoutColumns, batch: Microbatch, links: Links, options: TrainTimeOptions
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Forward and backward of one microbatch on every stage, shape [n, pp], recomputation in the backward."""
    counts = stage_kinds(model, columns)
    shape = (len(columns), columns.pp)
    forward = {name: np.zeros(shape) for name in (*TERMS, "head", "recompute")}
    backward = {name: np.zeros(shape) for name in forward}
    for at, kind in enumerate(model.kinds):
        ahead, back = layer_seconds(kind, model.hidden_size, columns, batch, links, options.compute)
        for name in TERMS:
            forward[name] += ahead[name][:, None] * counts[None, :, at]
            backward[name] += back[name][:, None] * counts[None, :, at]
        again = recomputed_layers(options.recompute, options.recompute_layers, counts.sum(axis=1))
        shares = recomputed_shares(kind, model.hidden_size, options.recompute, options.recompute_modules)
        parts = np.zeros(len(columns)) + sum(ahead[name] * share for name, share in shares.items())
        backward["recompute"] += parts[:, None] * (counts[None, :, at] * again[None])
    head = Gemm("head", model.vocab_size, model.hidden_size, "column")
    tokens = np.asarray(batch.tokens / columns.cp)
    product = gemm_seconds(head, tokens, columns, links, ComputeOptions())
    reached = links.gpu.hbm_bytes_per_s * links.profile.hbm_fraction
    element = tokens * model.vocab_size / columns.tp / reached
    heads = 1.0 + columns.mtp_layers
    ahead_bytes, back_bytes = LOSS_BYTES[options.scores]
    forward["head"][:, -1] = heads * (product + element * ahead_bytes)
    backward["head"][:, -1] = heads * (2.0 * product + element * back_bytes)
    return forward, backward


def _pipeline_seconds(model: ModelArchitecture, columns: LayoutColumns, batch: Microbatch, links: Links) -> Floats:
    """Seconds a stage waits for its neighbours' tensors a microbatch; interleaving sends vpp times as often."""
    if columns.pp == 1:
        return np.zeros(len(columns))
    size = batch.tokens / columns.cp * model.hidden_size * 2.0 / columns.sequence_split
    crosses = columns.tp * columns.cp * columns.dp * 2 > links.domain
    return point_to_point_s(size, crosses, links) * columns.vpp


def _update_seconds(
    model: ModelArchitecture, columns: LayoutColumns, links: Links, options: TrainTimeOptions, microbatch: Floats
) -> dict[str, Floats]:
    """Gradient reduction, parameter gathering and the optimizer of the fullest stage."""
    params = rank_params(model, columns)
    at = (np.arange(len(columns)), np.argmax(params.total, axis=1))
    dense, expert = params.dense[at], params.expert[at]
    replicas, expert_replicas = columns.dp * columns.cp, columns.expert_dp
    near = ranks_in_domain(replicas, columns.tp, links.domain)
    near_expert = ranks_in_domain(expert_replicas, columns.etp * columns.ep, links.domain)

    def both(op: str, size: float) -> Floats:
        if op == "reduce":
            return collective_s("reduce_scatter", dense * size, replicas, near, links) + collective_s(
                "reduce_scatter", expert * size, expert_replicas, near_expert, links
            )
        return collective_s("all_gather", dense * size, replicas, near, links) + collective_s(
            "all_gather", expert * size, expert_replicas, near_expert, links
        )

    reduce, gather = both("reduce", options.grad_bytes), both("gather", 2.0)
    exposed = reduce + gather
    if options.engine == "fsdp2":
        exposed = np.zeros_like(exposed)
    elif options.overlap_dp:  # the last backward hides most of the reduction, the first forward most of the gathering
        exposed = np.maximum(0.1 * reduce, reduce - 0.6 * microbatch) + np.maximum(0.1 * gather, gather - 0.3 * microbatch)
    shard = dense / replicas + expert / expert_replicas
    shard = shard if options.optimizer.distributed else dense + expert
    optimizer = _optimizer_seconds(shard, links, options.optimizer)
    if options.engine == "megatron" and options.optimizer.kind != "none" and not options.optimizer.precision_aware:
        optimizer = optimizer + _tensors(model, columns)[at] * TENSOR_HOST_S * links.profile.host_scale
    return {"dp": exposed, "optimizer": optimizer}


def _tensors(model: ModelArchitecture, columns: LayoutColumns) -> Floats:
    """Weights of each rank as Megatron holds them, one an expert and projection, shape [n, pp]."""
    counts = stage_kinds(model, columns)
    whole = counts @ np.array([4.0 * sum(1 for part in (kind.mixer, kind.ffn) if part) for kind in model.kinds])
    experts = counts @ np.array([2.0 * kind.ffn.experts if isinstance(kind.ffn, MoeFfn) else 0.0 for kind in model.kinds])
    return np.asarray(whole[None] + experts[None] / columns.ep[:, None])


def _optimizer_seconds(shard: Floats, links: Links, optimizer: OptimizerOptions) -> Floats:
    if optimizer.kind == "none":
        return np.zeros_like(shard)
    moved = shard * optimizer.offload_fraction
    on_gpu = (shard - moved) * OPTIMIZER_BYTES / (links.gpu.hbm_bytes_per_s * links.profile.hbm_fraction)
    over_link = moved * (4.0 / links.profile.device_to_host_bytes_per_s + 2.0 / links.profile.host_to_device_bytes_per_s)
    on_host = moved * OPTIMIZER_BYTES / CPU_ADAM_BYTES_PER_S
    return np.asarray(on_gpu + over_link + on_host)


@dataclass(frozen=True, slots=True)
class TrainPrices:
    """Prices of n layouts, arrays of shape [n]; infeasible marks layouts that cannot hold a step, or a reason why."""

    step_s: Floats
    log_prob_s: Floats
    peak_bytes: Floats
    device_bytes: Floats
    static_bytes: Floats
    host_bytes: Floats
    terms: dict[str, Floats]


def price_train_layouts(
    model: ModelArchitecture,
    layouts: Sequence[TrainLayout],
    workload: TrainWorkload,
    cluster: Cluster,
    memory: TrainMemoryOptions,
    time: TrainTimeOptions,
    profile: HardwareProfile | None = None,
) -> TrainPrices:
    """Memory and time of many layouts under the same options, for the search."""
    links = links_of(cluster, profile)
    held = train_memory_columns(model, layouts, memory, links.profile)
    step = train_step_columns(model, layouts, workload, links, time)
    passes = train_step_columns(model, layouts, workload, links, time, forward_only=True)
    return TrainPrices(
        step_s=np.asarray(sum(step.values())),
        log_prob_s=np.asarray(sum(passes.values())),
        peak_bytes=held.peak_bytes,
        device_bytes=held.device_bytes,
        static_bytes=held.static_bytes,
        host_bytes=held.host_bytes,
        terms=step,
    )
