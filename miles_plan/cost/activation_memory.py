"""Bytes of activations a rank holds: saved for the backward, in flight in the pipeline, live inside one layer."""

from __future__ import annotations

import numpy as np

from miles_plan.catalog.architecture import LayerKind, ModelArchitecture
from miles_plan.catalog.ffns import DenseFfn, MoeFfn
from miles_plan.catalog.mixers import GroupedQuery
from miles_plan.cost.activations import Saved, saved_tensors
from miles_plan.cost.columns import Floats, LayoutColumns, microbatches_in_flight, stage_kinds
from miles_plan.cost.gemms import layer_gemms
from miles_plan.cost.train_options import QUANTIZED, TrainMemoryOptions

FP8_BLOCK = 128
FLASH_HEAD_DIM = 256
"""Widest head of the flash attention kernels (Dao-AILab/flash-attention; cuDNN's on Hopper); wider ones keep their scores."""


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
    if "core_attn" in modules and isinstance(kind.mixer, GroupedQuery) and kind.mixer.qk_norm != "none":
        # The checkpoint keeps the rotated query and key beside what the norms keep (measured, Megatron-core 0.19).
        total += (kind.mixer.query_dim + kind.mixer.kv_dim) * options.element_bytes / columns.tp
    return total + _score_bytes(kind, columns, options, modules) + _unfused_bytes(kind, hidden, columns, options)


def _unfused_bytes(kind: LayerKind, hidden: int, columns: LayoutColumns, options: TrainMemoryOptions) -> Floats | float:
    """What layers keep beyond Transformer Engine's fused ones, shape [n].

    Batch-invariant ones keep a residual sum and the values whose heads they lay together. Transformers' keep float32 copies of
    what a norm gets, and a gate's activation apart from its product (measured on an H200:
    benchmarks/results/trainer_memory_h200.json, step_profile_1_7b.json).
    """
    wide = hidden * options.element_bytes / columns.sequence_split
    norms = float(kind.mixer is not None) + float(kind.ffn is not None)
    if options.layers == "batch_invariant":
        values = getattr(kind.mixer, "kv_dim", 0) * options.element_bytes / columns.tp
        return np.asarray(wide + values)
    if options.layers == "transformers":
        total = norms * 2.0 * wide
        if isinstance(kind.mixer, GroupedQuery) and kind.mixer.qk_norm != "none":
            total = total + 4.0 * (kind.mixer.query_dim + kind.mixer.kv_dim) / columns.tp
        if isinstance(kind.ffn, DenseFfn):
            total = total + kind.ffn.size * options.element_bytes / columns.tp
        return np.asarray(total)
    return 0.0


def _score_bytes(
    kind: LayerKind, columns: LayoutColumns, options: TrainMemoryOptions, modules: frozenset[str]
) -> Floats | float:
    """What attention without a fused kernel keeps besides: a query's probabilities, and keys and values for every head."""
    mixer = kind.mixer
    fused = not isinstance(mixer, GroupedQuery) or mixer.head_dim <= FLASH_HEAD_DIM
    if fused or options.engine != "megatron" or "core_attn" in modules:
        return 0.0
    assert isinstance(mixer, GroupedQuery)
    keys = np.minimum(options.seq_len, options.tokens_per_gpu * columns.cp)
    repeated = 2.0 * (mixer.query_dim - mixer.kv_dim)
    return np.asarray((mixer.heads * keys + repeated) * options.element_bytes / columns.tp)


def _op_saved_bytes(kind: LayerKind, hidden: int, columns: LayoutColumns, options: TrainMemoryOptions) -> Floats:
    """Per-operator selective checkpointing (torchtitan): input, attention output, every second product's output."""
    size = float(options.element_bytes)
    attention = getattr(kind.mixer, "query_dim", 0) * size + 4.0 * getattr(kind.mixer, "heads", 0)
    total = hidden * size / columns.sequence_split + attention / columns.tp
    for gemm in layer_gemms(kind, hidden):
        split = columns.tp if gemm.cut == "column" else columns.sequence_split
        total = total + 0.5 * gemm.n * gemm.times * size / split
    return np.asarray(total)


ADAPTED_OUTPUTS = frozenset({"qkv", "latent_qkv", "linear_in", "ffn_up", "expert_up", "shared_up"})
"""Outputs of adapted projections: the adapter's own output stays beside the sum."""


def _saved_bytes(saved: Saved, columns: LayoutColumns, options: TrainMemoryOptions) -> Floats:
    size = saved.bytes
    adapters = options.trainable_fraction < 1.0
    if adapters and saved.name in ADAPTED_OUTPUTS:
        size *= 2.0
    if saved.product_input and options.precision in QUANTIZED:
        size *= (1.0 + 4.0 / FP8_BLOCK) / 2.0  # one byte an element and an fp32 scale a block
    if saved.split == "tensor":
        return size / columns.tp
    if saved.split == "sequence":
        whole = size if adapters and saved.product_input else 0.0  # adapters keep their input gathered besides
        return whole * (columns.sequence_split > 1) + size / columns.sequence_split
    if saved.split == "routed":
        # Every rank routes its share of the sequence; etp gathers the tokens of its peers and cuts the expert.
        gathered = size * options.moe_imbalance / columns.sequence_split
        return gathered if saved.cut_by_etp else gathered * columns.etp
    return np.full(len(columns), size)


def activation_terms(model: ModelArchitecture, columns: LayoutColumns, options: TrainMemoryOptions) -> dict[str, Floats]:
    """Saved activations at the peak of forward and backward, shape [n, pp]."""
    hidden, counts = model.hidden_size, stage_kinds(model, columns)
    tokens = options.tokens_per_gpu
    modules: frozenset[str] = options.recompute_modules if options.recompute == "selective" else frozenset()
    eager = modules | options.graphed_modules
    full = np.stack([layer_saved_bytes(kind, hidden, columns, options, eager) for kind in model.kinds], axis=1)
    boundary = hidden * options.element_bytes / columns.sequence_split
    layers = counts.sum(axis=1)
    kept = full @ counts.T
    live = np.zeros_like(kept)
    if options.recompute == "full":
        recomputed = np.minimum(layers, options.recompute_layers or layers)
        share = np.where(layers > 0, recomputed / np.maximum(layers, 1), 0.0)
        chunk = np.minimum(np.maximum(1.0, options.recompute_chunk), np.maximum(recomputed, 1.0))
        kept = kept * (1 - share) + boundary[:, None] * np.ceil(recomputed / chunk)
        live = np.max(np.where(counts[None] > 0, full[:, None, :], 0.0), axis=2) * (share > 0) * chunk
    if modules & {"op", "moe", "mlp"}:  # what one layer dropped is all there again while its backward runs
        whole = [layer_saved_bytes(kind, hidden, columns, options, frozenset()) for kind in model.kinds]
        again = np.stack(whole, axis=1) - (0.0 if "op" in modules else full)
        live = np.max(np.where(counts[None] > 0, again[:, None, :], 0.0), axis=2)
    flight = microbatches_in_flight(columns.pp, columns.vpp, options.num_microbatches)
    if options.forward_only:
        return {"activations": np.zeros_like(kept), "pipeline in flight": np.zeros_like(kept), "recomputed layer": live}
    first = kept * tokens
    return {
        "activations": first,
        "pipeline in flight": first * (flight - 1.0),
        "recomputed layer": live * tokens,
    }


def graph_terms(model: ModelArchitecture, columns: LayoutColumns, options: TrainMemoryOptions) -> dict[str, Floats]:
    """What CUDA graphs of modules hold, shape [n, pp].

    One graph a layer and microbatch in flight (Transformer Engine's make_graphed_callables): its saved activations lie in a
    private pool, and its input and output are static buffers.
    """
    modules: frozenset[str] = options.recompute_modules if options.recompute == "selective" else frozenset()
    graphed = options.graphed_modules - modules
    if not graphed or options.recompute == "full" or options.forward_only:
        return {}
    hidden, counts = model.hidden_size, stage_kinds(model, columns)
    whole = np.stack([layer_saved_bytes(kind, hidden, columns, options, modules) for kind in model.kinds], axis=1)
    rest = np.stack([layer_saved_bytes(kind, hidden, columns, options, modules | graphed) for kind in model.kinds], axis=1)
    tokens = options.tokens_per_gpu * microbatches_in_flight(columns.pp, columns.vpp, options.num_microbatches)
    ends = 2.0 * hidden * options.element_bytes / columns.sequence_split
    return {"graph pool": (whole - rest) @ counts.T * tokens, "graph buffers": ends[:, None] * counts.sum(axis=1) * tokens}


def backward_bytes(model: ModelArchitecture, columns: LayoutColumns, options: TrainMemoryOptions) -> Floats:
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
