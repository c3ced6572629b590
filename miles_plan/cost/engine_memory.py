"""Terms at the peak of a step for each trainer engine: Megatron-core, FSDP2, and the embedded torch engine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from miles_plan.catalog.architecture import ModelArchitecture
from miles_plan.cost.activation_memory import activation_terms, backward_bytes, graph_terms
from miles_plan.cost.columns import Floats, LayoutColumns, stage_kinds
from miles_plan.cost.gemms import layer_gemms
from miles_plan.cost.profile import HardwareProfile
from miles_plan.cost.rank_params import rank_params
from miles_plan.cost.state_memory import EVEN_FRAGMENTATION, FRAGMENTATION, draft_terms, outside_terms, state_terms
from miles_plan.cost.train_options import TrainMemoryOptions

_MIB = 1 << 20
CUBLAS_WORKSPACE_BYTES = 96 * _MIB
"""Workspaces Transformer Engine and cuBLAS keep after the first step on Hopper (measured: 100,666,368 bytes)."""
GROUPED_GEMM_WORKSPACE_BYTES = 175 * _MIB
"""What the first grouped GEMM adds and keeps (measured: 183,500,800 bytes)."""
LIBRARIES_BYTES = 1392 * _MIB
"""Kernels and handles that Megatron-core, Transformer Engine and cuBLAS load into a bare context: of the 2,792 MiB that a
trainer held on an H200 with all states away, what context, scratch and workspaces leave (process_memory_h200.json)."""
OWN_LIBRARIES_BYTES = 1750 * _MIB
"""The same with dense batch-invariant layers, which keep no scratch: of 2,470 MiB."""


EAGER_LOSS_BYTES, PARALLEL_LOSS_BYTES = 12.0, 18.0
"""An element of the logits at the peak of PyTorch's cross entropy in fp32: the log-softmax it keeps, the gradient and
that of the picked entries; split over tensor parallelism (loss_parallel) also bf16 logits, shifted ones, exponents."""


def _scored_row_bytes(options: TrainMemoryOptions) -> float:
    """Of the scored rows in this package's trainers, by vocabulary entry: their bf16 logits, in a step with their gradient.

    Batch-invariant layers score twice, log-probs with their own kernel and entropies with the other, and add two gradients
    where the loss has an entropy term.
    """
    two = options.layers == "batch_invariant" and options.entropy
    copies = 1.0 if options.forward_only else 3.0 if two else 2.0
    return copies * 2.0 * options.scored_tokens


def _head_bytes(model: ModelArchitecture, columns: LayoutColumns, options: TrainMemoryOptions) -> Floats:
    """Logits, loss and the final norm on the last stage, shape [n].

    Megatron's vocabulary-parallel cross entropy holds bf16 logits and their fp32 softmax, then a bf16 gradient: six
    bytes an element at the peak (measured). An entropy term needs one more fp32 copy, a soft cap its tanh.
    """
    tokens = options.tokens_per_gpu
    element = options.logits_bytes or (6.0 + (4.0 if options.entropy else 0.0))
    element += 2.0 if model.logit_softcap else 0.0
    whole = element * tokens
    kept = max(2.0, min(4.0, element - 2.0))  # the softmax in fp32, or the gradient a fused loss left in its place
    whole += kept * tokens * options.mtp_layers
    if options.logits_chunk_tokens:  # the bf16 logits stay whole, and so does their gradient
        whole = np.minimum(whole, (2.0 if options.forward_only else 4.0) * tokens + element * options.logits_chunk_tokens)
    whole = _scored_row_bytes(options) if options.scored_tokens else whole
    logits = whole * model.vocab_size / columns.tp
    norm = 2.0 * tokens * model.hidden_size * options.element_bytes / columns.sequence_split
    return np.asarray(logits + norm)


def megatron_terms(
    model: ModelArchitecture, columns: LayoutColumns, options: TrainMemoryOptions, profile: HardwareProfile
) -> dict[str, Floats]:
    """Megatron-core with Transformer Engine: whole weights and gradients, sharded optimizer, in-flight microbatches."""
    params = rank_params(model, columns)
    terms = state_terms(params, columns, options)
    terms |= activation_terms(model, columns, options)
    graphs = graph_terms(model, columns, options)
    pool = {"graph pool": graphs.pop("graph pool")} if graphs else {}
    terms |= graphs
    shape = params.total.shape
    tokens = options.tokens_per_gpu
    last = np.arange(columns.pp) == columns.pp - 1
    head = np.where(last, _head_bytes(model, columns, options)[:, None], 0.0)
    # The head's peak and a layer's backward do not meet: the rank feels the larger.
    working = backward_bytes(model, columns, options)[:, None] + terms.pop("recomputed layer")
    terms["logits"] = np.broadcast_to(head, shape).copy()
    terms["backward"] = np.where(last, np.maximum(0.0, working - head), working)
    p2p = 2.0 * tokens * model.hidden_size * options.element_bytes / columns.sequence_split
    terms["pipeline buffers"] = np.where(last, 0.0, p2p[:, None]) * np.ones(shape)
    gather = tokens * model.hidden_size * options.element_bytes
    split = columns.sequence_parallel & (columns.tp > 1)
    terms["gather buffer"] = np.where(split, float(gather), 0.0)[:, None] * np.ones(shape)
    scratch = np.zeros(shape)
    own = _all_own(model, options)
    if options.fused_gradient_accumulation and not options.forward_only and not own:
        scratch = _dummy_gradient_bytes(model, columns, options)
    terms["weight-gradient scratch"] = scratch
    terms["workspace"] = np.full(shape, float(CUBLAS_WORKSPACE_BYTES + (GROUPED_GEMM_WORKSPACE_BYTES if model.moe else 0)))
    loaded, fragmentation = (OWN_LIBRARIES_BYTES, EVEN_FRAGMENTATION) if own else (LIBRARIES_BYTES, FRAGMENTATION)
    return terms | pool | outside_terms(terms, columns, profile, loaded_bytes=loaded, fragmentation=fragmentation)


def _all_own(model: ModelArchitecture, options: TrainMemoryOptions) -> bool:
    """Whether no layer is Transformer Engine's; with experts a run was seen to hold what one on its layers holds."""
    return options.layers == "batch_invariant" and not model.moe


def _dummy_gradient_bytes(model: ModelArchitecture, columns: LayoutColumns, options: TrainMemoryOptions) -> Floats:
    """Transformer Engine returns one shared scratch gradient a distinct weight shape when it fuses accumulation."""
    hidden, counts = model.hidden_size, stage_kinds(model, columns)
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


def fsdp_terms(
    model: ModelArchitecture, columns: LayoutColumns, options: TrainMemoryOptions, profile: HardwareProfile
) -> dict[str, Floats]:
    """FSDP2 with a unit a layer and one for embedding and head: fp32 shards of everything, plus what is gathered."""
    params = rank_params(model, columns)
    size, tokens = options.element_bytes, options.tokens_per_gpu
    sharded = params.total / (columns.dp * columns.cp)[:, None]
    trained = options.trainable_fraction
    state = options.optimizer.bytes_per_param - options.optimizer.offloaded_bytes_per_param
    if options.offload_shards:
        sharded, state = np.zeros_like(sharded), 0.0
    terms = {
        "parameters": sharded * 4.0 if state else sharded * size,
        "gradients": sharded * trained * 4.0,
        "optimizer": sharded * trained * max(0.0, state - options.optimizer.master_bytes),
        "fp8 weights": np.zeros_like(sharded),
        "reference model": sharded * size * (1.0 if options.reference == "resident" else 0.0),
    }
    terms |= draft_terms(columns, options, sharded)
    gathered_units = _gathered_terms(model, columns, params.total, options)
    if options.scored_tokens:  # a rank alone holds whole units: only the root's is cast and stays (measured)
        alone = (columns.dp * columns.cp == 1)[:, None]
        root = size * model.vocab_size * model.hidden_size * (1.0 if model.tie_embeddings else 2.0)
        only = {"gathered units": root, "unsharded gradients": 0.0}
        gathered_units = {name: np.where(alone, only[name], term) for name, term in gathered_units.items()}
    terms |= gathered_units
    terms |= activation_terms(model, columns, options)
    head = np.zeros_like(sharded)
    chunk = np.minimum(tokens, options.logits_chunk_tokens) if options.logits_chunk_tokens else tokens
    element = options.logits_bytes or np.where(columns.tp > 1, PARALLEL_LOSS_BYTES, EAGER_LOSS_BYTES)
    final_norm = (3.0 * size + 4.0) * tokens * model.hidden_size / columns.sequence_split  # one copy of it in fp32
    whole = 0.0 if options.async_tp else 2.0 * size * tokens * model.hidden_size  # a gathered input and its gradient
    gathered = np.where(columns.sequence_parallel & (columns.tp > 1), whole, 0.0)
    whole_rows = _scored_row_bytes(options) if options.scored_tokens else element * chunk
    head[:, -1] = whole_rows * model.vocab_size / columns.tp + final_norm + gathered
    working = (backward_bytes(model, columns, options) + gathered)[:, None] + terms.pop("recomputed layer")
    terms["logits"] = head
    terms["backward"] = np.maximum(0.0, working - head)
    if options.merged_outputs:
        kept = np.zeros_like(sharded)
        kept[:, -1] = 2.0 * size * tokens * options.num_microbatches * model.vocab_size / columns.tp
        terms["merged outputs"] = kept
    if columns.pp > 1:  # torch.distributed.pipelining receives every microbatch and its gradient in a buffer of its own
        boundary = options.num_microbatches * tokens * model.hidden_size * size / columns.sequence_split
        stage = np.arange(columns.pp)
        terms["pipeline buffers"] = boundary[:, None] * ((stage > 0) * 1.0 + (stage < columns.pp - 1)) * columns.vpp
    terms["weight-gradient scratch"] = np.zeros_like(sharded)
    terms["workspace"] = np.full_like(sharded, 32.0 * _MIB)
    return terms | outside_terms(terms, columns, profile)


def _gathered_terms(
    model: ModelArchitecture, columns: LayoutColumns, params: Floats, options: TrainMemoryOptions
) -> dict[str, Floats]:
    """Unsharded weights and gradients, shape [n, pp].

    Without a pipeline: the root unit stays gathered through the step, two layer units and the buffer of the third, one
    gradient with the fp32 inputs of two reductions. With one: units stay gathered between microbatches and gradients
    add up unsharded in fp32 until the last (FSDP2 with reshard_after_forward off, gradients unsynced).
    """
    size = float(options.element_bytes)
    layers = stage_kinds(model, columns).sum(axis=1)
    root = np.zeros_like(params)
    ends = model.vocab_size * model.hidden_size / columns.tp
    root[:, 0] += ends
    if columns.pp > 1 or not model.tie_embeddings:
        root[:, -1] += ends
    unit = np.maximum(0.0, params - root) / np.maximum(layers, 1)
    backward = 0.0 if options.forward_only or not options.trainable_fraction else 1.0
    if columns.pp > 1:
        return {"gathered units": params * size, "unsharded gradients": backward * 4.0 * (params + unit)}
    gradients = backward * (unit * (size + 8.0) + ends[:, None] * size)
    return {"gathered units": root * size + 3.0 * unit * size, "unsharded gradients": gradients}


def torch_terms(
    model: ModelArchitecture, columns: LayoutColumns, options: TrainMemoryOptions, _profile: HardwareProfile
) -> dict[str, Floats]:
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
    terms |= draft_terms(columns, options, params.total)
    terms |= activation_terms(model, columns, options)
    counts = stage_kinds(model, columns)
    heads = np.array([getattr(kind.mixer, "heads", 0) if kind.mixer else 0 for kind in model.kinds], dtype=np.float64)
    keep = counts if options.recompute == "none" else np.minimum(counts, 1.0)
    # Softmax input, output and the fp32 copy between them, for each query of the microbatch and key of its sequence.
    scores = (
        (8.0 + options.element_bytes) * tokens * np.minimum(options.seq_len, options.tokens_per_gpu * columns.cp) / columns.tp
    )
    terms["attention scores"] = scores[:, None] * (keep @ heads)
    head = np.zeros_like(params.total)
    head[:, -1] = (options.logits_bytes or 12.0) * tokens * model.vocab_size / columns.tp
    terms["logits"] = head
    terms["backward"] = backward_bytes(model, columns, options)[:, None] + terms.pop("recomputed layer")
    terms["weight-gradient scratch"] = np.zeros_like(params.total)
    terms["workspace"] = np.zeros_like(params.total)
    return terms
