"""Peak memory of a trainer, per GPU and per host, term by term.

The model counts what the caching allocator sees in Megatron-core with Transformer Engine, FSDP2, and the embedded torch
engine. It is exact bookkeeping: no term is fitted. Checked against 51 measured runs on H200 (docs/accuracy.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from miles_plan.catalog.architecture import LayerKind, ModelArchitecture
from miles_plan.catalog.ffns import DenseFfn, MoeFfn
from miles_plan.catalog.mixers import GroupedQuery
from miles_plan.cost.activations import Saved, saved_tensors
from miles_plan.cost.columns import Floats, LayoutColumns, group_layouts, microbatches_in_flight, stage_kinds
from miles_plan.cost.gemms import layer_gemms
from miles_plan.cost.interval import Interval, Term, merged
from miles_plan.cost.profile import HardwareProfile, default_profile
from miles_plan.cost.train_options import QUANTIZED, TrainMemoryOptions
from miles_plan.ir.layout import TrainLayout

_MIB = 1 << 20
CUBLAS_WORKSPACE_BYTES = 96 * _MIB
"""Workspaces Transformer Engine and cuBLAS keep after the first step on Hopper (measured: 100,666,368 bytes)."""
GROUPED_GEMM_WORKSPACE_BYTES = 175 * _MIB
"""What the first grouped GEMM adds and keeps (measured: 183,500,800 bytes)."""
FP8_BLOCK = 128
PEAK_ERROR = 0.02
"""Half width of the 90 % interval on allocated bytes: allocator rounding, routing imbalance, small buffers."""
FRAGMENTATION = 0.045
"""Reserved over allocated with expandable segments; 2 to 10 GB were seen without (docs/accuracy.md)."""


@dataclass(frozen=True, slots=True)
class MemoryBreakdown:
    """Bytes of the fullest rank.

    terms: what the allocator holds at the peak, summing to `peak_bytes.mid`; outside_terms: context, communicators,
    fragmentation. static_bytes: what stays between steps. device_bytes: what the driver reports at the peak.
    host_bytes: pinned host memory of one rank.
    """

    stage: int
    terms: tuple[Term, ...]
    outside_terms: tuple[Term, ...]
    static_bytes: float
    peak_bytes: Interval
    device_bytes: Interval
    host_bytes: float


@dataclass(frozen=True, slots=True)
class MemoryColumns:
    """The same for n layouts: every array has shape [n], of each layout's fullest stage."""

    stage: NDArray[np.intp]
    static_bytes: Floats
    peak_bytes: Floats
    device_bytes: Floats
    host_bytes: Floats
    terms: dict[str, Floats]


def train_memory(
    model: ModelArchitecture,
    layout: TrainLayout,
    options: TrainMemoryOptions,
    profile: HardwareProfile | None = None,
) -> MemoryBreakdown:
    """Memory of the fullest rank of one layout.

    Raises:
        ValueError: the layout cannot cut the model into its pipeline chunks.
    """
    columns = train_memory_columns(model, [layout], options, profile)
    terms = tuple(Term(name, float(values[0])) for name, values in columns.terms.items() if values[0])
    inside = tuple(term for term in terms if term.name not in OUTSIDE)
    outside = tuple(term for term in terms if term.name in OUTSIDE)
    peak, device = float(columns.peak_bytes[0]), float(columns.device_bytes[0])
    return MemoryBreakdown(
        stage=int(columns.stage[0]),
        terms=inside,
        outside_terms=outside,
        static_bytes=float(columns.static_bytes[0]),
        peak_bytes=Interval(peak * (1 - PEAK_ERROR), peak, peak * (1 + PEAK_ERROR), "calibrated", inside),
        device_bytes=Interval(peak * (1 - PEAK_ERROR), device, device * (1 + 2 * PEAK_ERROR), "calibrated", terms),
        host_bytes=float(columns.host_bytes[0]),
    )


OUTSIDE = frozenset({"cuda context", "communicators", "fragmentation"})
STATIC = (
    "parameters",
    "gradients",
    "optimizer",
    "fp8 weights",
    "reference model",
    "weight-gradient scratch",
    "workspace",
)


def train_memory_columns(
    model: ModelArchitecture,
    layouts: Sequence[TrainLayout],
    options: TrainMemoryOptions,
    profile: HardwareProfile | None = None,
) -> MemoryColumns:
    """Memory of many layouts at once."""
    count = len(layouts)
    out = {name: np.zeros(count) for name in ("stage", "static", "peak", "device", "host")}
    terms: dict[str, Floats] = {}
    for rows, columns in group_layouts(layouts):
        by_stage = _stage_terms(model, columns, options, profile or default_profile())
        by_stage = _larger_phase(by_stage, _step_gradient_bytes(rank_params(model, columns), columns, options))
        allocated = sum_terms(by_stage, exclude=OUTSIDE)
        worst = np.argmax(allocated, axis=1)
        pick = (np.arange(len(columns)), worst)
        out["stage"][rows] = worst
        out["peak"][rows] = allocated[pick]
        out["device"][rows] = sum_terms(by_stage)[pick]
        out["static"][rows] = sum_terms({name: by_stage[name] for name in STATIC})[pick]
        out["host"][rows] = _host_bytes(model, columns, options)[pick]
        for name, values in by_stage.items():
            terms.setdefault(name, np.zeros(count))[rows] = values[pick]
    return MemoryColumns(out["stage"].astype(np.intp), out["static"], out["peak"], out["device"], out["host"], terms)


def _larger_phase(terms: dict[str, Floats], step_gradients: Floats) -> dict[str, Floats]:
    """The terms of forward and backward, or of the optimizer step where that holds more."""
    passing = {name for name in terms if name not in STATIC and name not in OUTSIDE}
    step_is_larger = step_gradients > sum_terms({name: terms[name] for name in passing})
    out = {name: np.where(step_is_larger & (name in passing), 0.0, values) for name, values in terms.items()}
    return out | {"step gradients": np.where(step_is_larger, step_gradients, 0.0)}


def sum_terms(terms: dict[str, Floats], exclude: frozenset[str] = frozenset()) -> Floats:
    """All terms but the excluded ones added together."""
    return np.asarray(sum(values for name, values in terms.items() if name not in exclude))


def _stage_terms(
    model: ModelArchitecture, columns: LayoutColumns, options: TrainMemoryOptions, profile: HardwareProfile
) -> dict[str, Floats]:
    """Every term at the peak of the step, shape [n, pp]."""
    if options.engine == "megatron":
        return _megatron_terms(model, columns, options, profile)
    if options.engine == "fsdp2":
        return _fsdp_terms(model, columns, options, profile)
    return _torch_terms(model, columns, options)


# ---------------------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True)
class ParamColumns:
    """Parameters of one rank by how they are replicated, shape [n, pp]."""

    dense: Floats
    expert: Floats
    quantizable: Floats

    @property
    def total(self) -> Floats:
        """All parameters of the rank."""
        return self.dense + self.expert


def rank_params(model: ModelArchitecture, columns: LayoutColumns) -> ParamColumns:
    """Parameters each pipeline rank holds, of the tensor and expert rank that holds most."""
    hidden = model.hidden_size
    counts = stage_kinds(model, columns.pp, columns.vpp, columns.stage_layers)
    sharded = counts @ np.array([kind.sharded_params(hidden) for kind in model.kinds], dtype=np.float64)
    copied = counts @ np.array([kind.replicated_params(hidden) for kind in model.kinds], dtype=np.float64)
    expert = counts @ np.array([kind.expert_params(hidden) for kind in model.kinds], dtype=np.float64)
    gemm = counts @ np.array([_dense_gemm_params(kind, hidden) for kind in model.kinds], dtype=np.float64)
    ends, head_split = _end_params(model, columns.pp)
    tp = columns.tp[:, None]
    dense = sharded / tp + copied + ends / tp + head_split
    experts = expert / (columns.ep * columns.etp)[:, None]
    return ParamColumns(dense=dense, expert=experts, quantizable=gemm / tp + experts)


def _dense_gemm_params(kind: LayerKind, hidden: int) -> float:
    gemms = (gemm for gemm in layer_gemms(kind, hidden) if not gemm.experts and gemm.name != "router")
    return float(sum(gemm.n * gemm.k for gemm in gemms))


def _end_params(model: ModelArchitecture, pp: int) -> tuple[Floats, Floats]:
    """Embedding and head (split by tp) and what the ends replicate, shape [pp]."""
    split, copied = np.zeros(pp), np.zeros(pp)
    split[0] += model.vocab_size * model.hidden_size
    copied[0] += model.learned_positions * model.hidden_size + (model.vision.params if model.vision else 0)
    if not model.tie_embeddings or pp > 1:
        split[-1] += model.vocab_size * model.hidden_size
    copied[-1] += model.final_norm_vectors * model.hidden_size + model.extra_params
    return split, copied


def _state_terms(params: ParamColumns, columns: LayoutColumns, options: TrainMemoryOptions) -> dict[str, Floats]:
    """Parameters, gradients and optimizer state between steps."""
    size = options.element_bytes
    trained = options.trainable_fraction
    replicas, expert_replicas = (columns.dp * columns.cp)[:, None], columns.expert_dp[:, None]
    shard = params.dense / replicas + params.expert / expert_replicas
    state = shard if options.optimizer.distributed else params.total
    kept = options.optimizer.bytes_per_param * (1.0 - options.optimizer.offload_fraction)
    if options.precision == "fp32":
        kept = max(0.0, kept - options.optimizer.master_bytes)
    terms = {
        "parameters": params.total * size,
        "gradients": params.total * trained * options.grad_bytes,
        "optimizer": state * trained * kept,
        "fp8 weights": params.quantizable * (2.0 if options.precision in QUANTIZED else 0.0),
        "reference model": params.total * size * (1.0 if options.reference == "resident" else 0.0),
    }
    if options.forward_only:
        terms["gradients"] = terms["optimizer"] = np.zeros_like(params.total)
    return terms


def _step_gradient_bytes(params: ParamColumns, columns: LayoutColumns, options: TrainMemoryOptions) -> Floats:
    """With bf16 gradients the optimizer step makes an fp32 copy of its shard, freed before the next backward."""
    if options.grad_bytes >= 4 or options.optimizer.kind == "none" or options.forward_only:
        return np.zeros_like(params.total)
    shard = params.dense / (columns.dp * columns.cp)[:, None] + params.expert / columns.expert_dp[:, None]
    state = shard if options.optimizer.distributed else params.total
    return 4.0 * state * options.trainable_fraction


def _host_bytes(model: ModelArchitecture, columns: LayoutColumns, options: TrainMemoryOptions) -> Floats:
    """Pinned host bytes of one rank: offloaded optimizer state and a swapped reference model, shape [n, pp]."""
    params = rank_params(model, columns)
    shard = params.dense / (columns.dp * columns.cp)[:, None] + params.expert / columns.expert_dp[:, None]
    state = shard if options.optimizer.distributed else params.total
    moved = state * options.trainable_fraction * options.optimizer.bytes_per_param * options.optimizer.offload_fraction
    swapped = params.total * options.element_bytes * (1.0 if options.reference == "swapped" else 0.0)
    return moved + swapped


# --------------------------------------------------------------------------------------------------------- activations


def layer_saved_bytes(
    kind: LayerKind, hidden: int, columns: LayoutColumns, options: TrainMemoryOptions, modules: frozenset[str]
) -> Floats:
    """Bytes a layer keeps of one token of this rank's sequence, shape [n]; `modules` are recomputed."""
    if "op" in modules:
        return _op_saved_bytes(kind, hidden, columns, options)
    total = np.zeros(len(columns))
    for saved in saved_tensors(kind, hidden, options.element_bytes):
        if not saved.modules & modules:
            total += _saved_bytes(saved, columns, options)
    if "core_attn" in modules and isinstance(kind.mixer, GroupedQuery):
        # The checkpoint keeps the rotated query and key beside what the norms keep (measured, Megatron-core 0.19).
        total += (kind.mixer.query_dim + kind.mixer.kv_dim) * options.element_bytes / columns.tp
    return total


def _op_saved_bytes(kind: LayerKind, hidden: int, columns: LayoutColumns, options: TrainMemoryOptions) -> Floats:
    """Per-operator selective checkpointing (torchtitan): input, attention output, every second product's output."""
    size = float(options.element_bytes)
    attention = getattr(kind.mixer, "query_dim", 0) * size + 4.0 * getattr(kind.mixer, "heads", 0)
    total = hidden * size / columns.sequence_split + attention / columns.tp
    for gemm in layer_gemms(kind, hidden):
        split = columns.tp if gemm.cut == "column" else columns.sequence_split
        total = total + 0.5 * gemm.n * gemm.times * size / split
    return np.asarray(total)


def _saved_bytes(saved: Saved, columns: LayoutColumns, options: TrainMemoryOptions) -> Floats:
    size = saved.bytes
    if saved.product_input and options.precision in QUANTIZED:
        size *= (1.0 + 4.0 / FP8_BLOCK) / 2.0  # one byte an element and an fp32 scale a block
    if saved.split == "tensor":
        return size / columns.tp
    if saved.split == "sequence":
        return size / columns.sequence_split
    if saved.split == "routed":
        # Every rank routes its share of the sequence; etp gathers the tokens of its peers and cuts the expert.
        gathered = size * options.moe_imbalance / columns.sequence_split
        return gathered if saved.cut_by_etp else gathered * columns.etp
    return np.full(len(columns), size)


def _activation_terms(
    model: ModelArchitecture, columns: LayoutColumns, options: TrainMemoryOptions
) -> dict[str, Floats]:
    """Saved activations at the peak of forward and backward, shape [n, pp]."""
    hidden, counts = model.hidden_size, stage_kinds(model, columns.pp, columns.vpp, columns.stage_layers)
    tokens = options.tokens_per_gpu
    modules: frozenset[str] = options.recompute_modules if options.recompute == "selective" else frozenset()
    full = np.stack([layer_saved_bytes(kind, hidden, columns, options, modules) for kind in model.kinds], axis=1)
    boundary = hidden * options.element_bytes / columns.sequence_split
    layers = counts.sum(axis=1)
    kept = full @ counts.T
    live = np.zeros_like(kept)
    if options.recompute == "full":
        recomputed = np.minimum(layers, options.recompute_layers or layers)
        share = np.where(layers > 0, recomputed / np.maximum(layers, 1), 0.0)
        kept = kept * (1 - share) + boundary[:, None] * recomputed
        live = np.max(np.where(counts[None] > 0, full[:, None, :], 0.0), axis=2) * (share > 0)
    flight = microbatches_in_flight(columns.pp, columns.vpp, options.num_microbatches)
    if options.forward_only:
        return {"activations": np.zeros_like(kept), "pipeline in flight": np.zeros_like(kept), "recomputed layer": live}
    first = kept * tokens
    return {
        "activations": first,
        "pipeline in flight": first * (flight - 1.0),
        "recomputed layer": live * tokens,
    }


def _head_bytes(model: ModelArchitecture, columns: LayoutColumns, options: TrainMemoryOptions) -> Floats:
    """Logits, loss and the final norm on the last stage, shape [n].

    Megatron's vocabulary-parallel cross entropy holds bf16 logits and their fp32 softmax, then a bf16 gradient: six
    bytes an element at the peak (measured). An entropy term needs one more fp32 copy.
    """
    tokens = options.tokens_per_gpu
    element = options.logits_bytes or (6.0 + (4.0 if options.entropy else 0.0))
    whole = element * tokens
    if options.logits_chunk_tokens:  # the bf16 logits stay whole, and so does their gradient
        whole = np.minimum(
            whole, (2.0 if options.forward_only else 4.0) * tokens + element * options.logits_chunk_tokens
        )
    logits = whole * model.vocab_size / columns.tp
    norm = 2.0 * tokens * model.hidden_size * options.element_bytes / columns.sequence_split
    return np.asarray(logits + norm)


def _backward_bytes(model: ModelArchitecture, columns: LayoutColumns, options: TrainMemoryOptions) -> Floats:
    """Gradients in flight inside one layer's backward: of its output and of its widest inner tensor, shape [n]."""
    tokens = options.tokens_per_gpu
    wide = np.zeros(len(columns))
    for kind in model.kinds:
        if isinstance(kind.ffn, DenseFfn):
            wide = np.maximum(wide, kind.ffn.size / columns.tp)
        elif isinstance(kind.ffn, MoeFfn):
            into = kind.ffn.expert_input(model.hidden_size) * columns.etp
            routed = kind.ffn.topk * np.maximum(into, kind.ffn.size) * options.moe_imbalance
            wide = np.maximum(wide, routed / columns.sequence_split)
    return np.asarray((model.hidden_size / columns.sequence_split + wide) * options.element_bytes * tokens)


# ------------------------------------------------------------------------------------------------------------- engines


def _megatron_terms(
    model: ModelArchitecture, columns: LayoutColumns, options: TrainMemoryOptions, profile: HardwareProfile
) -> dict[str, Floats]:
    params = rank_params(model, columns)
    terms = _state_terms(params, columns, options)
    terms |= _activation_terms(model, columns, options)
    shape = params.total.shape
    tokens = options.tokens_per_gpu
    last = np.arange(columns.pp) == columns.pp - 1
    head = np.where(last, _head_bytes(model, columns, options)[:, None], 0.0)
    # The head's peak and a layer's backward do not meet: the rank feels the larger.
    working = _backward_bytes(model, columns, options)[:, None] + terms.pop("recomputed layer")
    terms["logits"] = np.broadcast_to(head, shape).copy()
    terms["backward"] = np.where(last, np.maximum(0.0, working - head), working)
    p2p = 2.0 * tokens * model.hidden_size * options.element_bytes / columns.sequence_split
    terms["pipeline buffers"] = np.where(last, 0.0, p2p[:, None]) * np.ones(shape)
    gather = tokens * model.hidden_size * options.element_bytes
    split = columns.sequence_parallel & (columns.tp > 1)
    terms["gather buffer"] = np.where(split, float(gather), 0.0)[:, None] * np.ones(shape)
    scratch = np.zeros(shape)
    if options.fused_gradient_accumulation and not options.forward_only:
        scratch = _dummy_gradient_bytes(model, columns, options)
    terms["weight-gradient scratch"] = scratch
    terms["workspace"] = np.full(
        shape, float(CUBLAS_WORKSPACE_BYTES + (GROUPED_GEMM_WORKSPACE_BYTES if model.moe else 0))
    )
    return terms | _outside_terms(terms, columns, profile)


def _dummy_gradient_bytes(model: ModelArchitecture, columns: LayoutColumns, options: TrainMemoryOptions) -> Floats:
    """Transformer Engine returns one shared scratch gradient a distinct weight shape when it fuses accumulation."""
    hidden, counts = model.hidden_size, stage_kinds(model, columns.pp, columns.vpp, columns.stage_layers)
    size = float(options.element_bytes)
    out = np.zeros((len(columns), columns.pp))
    seen: dict[tuple[int, int, str], NDArray[np.bool_]] = {}
    for at, kind in enumerate(model.kinds):
        for gemm in layer_gemms(kind, hidden):
            if gemm.name == "router":
                continue
            key = (gemm.n, gemm.k, "expert" if gemm.experts else gemm.cut)
            seen[key] = seen.get(key, np.zeros(columns.pp, dtype=bool)) | (counts[:, at] > 0)
    for (wide, deep, cut), present in seen.items():
        split = columns.etp if cut == "expert" else columns.tp if cut != "whole" else np.ones(len(columns))
        out += np.where(present[None], wide * deep * size / split[:, None], 0.0)
    out[:, -1] += model.vocab_size * hidden * size / columns.tp
    return out


def _outside_terms(terms: dict[str, Floats], columns: LayoutColumns, profile: HardwareProfile) -> dict[str, Floats]:
    """What the driver reports besides the allocator: context, communicators, fragmentation."""
    allocated = sum_terms(terms)
    groups = 1.0 + (columns.tp > 1) + (columns.cp > 1) + 2.0 * (columns.ep > 1) + 1.0 * (columns.pp > 1)
    world = columns.tp * columns.cp * columns.dp * columns.pp
    communicators = np.where(
        world > 1, profile.communicator_bytes + (groups - 1) * profile.next_communicator_bytes, 0.0
    )
    return {
        "cuda context": np.full(allocated.shape, profile.context_bytes),
        "communicators": communicators[:, None] * np.ones(allocated.shape),
        "fragmentation": allocated * FRAGMENTATION,
    }


def _fsdp_terms(
    model: ModelArchitecture, columns: LayoutColumns, options: TrainMemoryOptions, profile: HardwareProfile
) -> dict[str, Floats]:
    """FSDP2: fp32 shards of everything, two gathered units, one unsharded gradient (xtuner's accounting)."""
    params = rank_params(model, columns)
    size, tokens = options.element_bytes, options.tokens_per_gpu
    shards = (columns.dp * columns.cp)[:, None]
    sharded = params.total / shards
    layers = stage_kinds(model, columns.pp, columns.vpp, columns.stage_layers).sum(axis=1)
    ends = model.vocab_size * model.hidden_size / columns.tp[:, None]
    unit = (params.total - ends) / np.maximum(layers, 1)
    trained = options.trainable_fraction
    state = options.optimizer.bytes_per_param * (1.0 - options.optimizer.offload_fraction)
    terms = {
        "parameters": sharded * 4.0 if state else sharded * size,
        "gradients": sharded * trained * 4.0,
        "optimizer": sharded * trained * max(0.0, state - options.optimizer.master_bytes),
        "fp8 weights": np.zeros_like(sharded),
        "reference model": sharded * size * (1.0 if options.reference == "resident" else 0.0),
        "gathered units": 2.0 * unit * size + unit * (4.0 if trained else 0.0),
    }
    terms |= _activation_terms(model, columns, options)
    head = np.zeros_like(sharded)
    element = options.logits_bytes or 10.0
    chunk = np.minimum(tokens, options.logits_chunk_tokens) if options.logits_chunk_tokens else tokens
    head[:, -1] = element * chunk * model.vocab_size / columns.tp
    working = _backward_bytes(model, columns, options)[:, None] + terms.pop("recomputed layer")
    terms["logits"] = head
    terms["backward"] = np.maximum(0.0, working - head)
    terms["weight-gradient scratch"] = np.zeros_like(sharded)
    terms["workspace"] = np.full_like(sharded, 32.0 * _MIB)
    return terms | _outside_terms(terms, columns, profile)


def _torch_terms(model: ModelArchitecture, columns: LayoutColumns, options: TrainMemoryOptions) -> dict[str, Floats]:
    """The embedded engine: fp32 masters and moments unsharded, attention scores whole, no communicator memory."""
    params = rank_params(model, columns)
    tokens = options.tokens_per_gpu
    state = options.optimizer.bytes_per_param
    copies = options.element_bytes if options.precision != "fp32" else 0
    terms = {
        "parameters": params.total * (4.0 + copies),
        "gradients": params.total * 4.0,
        "optimizer": params.total * max(0.0, state - options.optimizer.master_bytes),
        "fp8 weights": np.zeros_like(params.total),
        "reference model": params.total * options.element_bytes * (1.0 if options.reference == "resident" else 0.0),
    }
    terms |= _activation_terms(model, columns, options)
    counts = stage_kinds(model, columns.pp, columns.vpp, columns.stage_layers)
    heads = np.array([getattr(kind.mixer, "heads", 0) if kind.mixer else 0 for kind in model.kinds], dtype=np.float64)
    keep = counts if options.recompute == "none" else np.minimum(counts, 1.0)
    # Softmax input, output and the fp32 copy between them, for each query of the microbatch and key of its sequence.
    scores = (
        (8.0 + options.element_bytes)
        * tokens
        * np.minimum(options.seq_len, options.tokens_per_gpu * columns.cp)
        / columns.tp
    )
    terms["attention scores"] = scores[:, None] * (keep @ heads)
    head = np.zeros_like(params.total)
    head[:, -1] = (options.logits_bytes or 12.0) * tokens * model.vocab_size / columns.tp
    terms["logits"] = head
    terms["backward"] = _backward_bytes(model, columns, options)[:, None] + terms.pop("recomputed layer")
    terms["weight-gradient scratch"] = np.zeros_like(params.total)
    terms["workspace"] = np.zeros_like(params.total)
    return terms


def term_list(terms: dict[str, float]) -> tuple[Term, ...]:
    """Named terms without the empty ones."""
    return merged(Term(name, value) for name, value in terms.items() if value)
