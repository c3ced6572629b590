"""Bytes a rank keeps between steps, and what the driver takes besides the allocator."""

from __future__ import annotations

import numpy as np

from miles_plan.catalog.architecture import ModelArchitecture
from miles_plan.cost.columns import Floats, LayoutColumns
from miles_plan.cost.profile import HardwareProfile
from miles_plan.cost.rank_params import ParamColumns, rank_params
from miles_plan.cost.train_options import QUANTIZED, TrainMemoryOptions

FRAGMENTATION = 0.045
"""Reserved over allocated with expandable segments; 2 to 10 GB were seen without (docs/accuracy.md)."""
EVEN_FRAGMENTATION = 0.005
"""The same where sizes repeat: 70.76 of 70.56 GiB, where Transformer Engine's layers reserved 73.36 of 68.80
(step_profile_1_7b.json)."""


def state_terms(params: ParamColumns, columns: LayoutColumns, options: TrainMemoryOptions) -> dict[str, Floats]:
    """Parameters, gradients and optimizer state between steps."""
    size = options.element_bytes
    trained = params.trained(options.frozen_vision).total * options.trainable_fraction
    kept = options.optimizer.bytes_per_param - options.optimizer.offloaded_bytes_per_param
    if options.precision == "fp32":
        kept = max(0.0, kept - options.optimizer.master_bytes)
    terms = {
        "parameters": params.total * size,
        "gradients": trained * options.grad_bytes,
        "optimizer": optimizer_elements(params, columns, options) * kept,
        "fp8 weights": params.quantizable * _quantized_copy_bytes(options),
        "reference model": params.total * size * (1.0 if options.reference == "resident" else 0.0),
    }
    if options.forward_only:
        terms["gradients"] = terms["optimizer"] = np.zeros_like(params.total)
    return terms | draft_terms(columns, options, params.total)


def draft_terms(columns: LayoutColumns, options: TrainMemoryOptions, like: Floats) -> dict[str, Floats]:
    """A draft's weights, gradients and state on the last stage, cut by tp, the state sharded over the replicas."""
    if not options.draft_params or options.forward_only:
        return {}
    own = options.draft_params / columns.tp
    shards = columns.dp * columns.cp if options.optimizer.distributed and options.engine != "torch" else 1.0
    weights, states = np.zeros_like(like), np.zeros_like(like)
    weights[:, -1] = own * options.element_bytes
    states[:, -1] = own * options.grad_bytes + own / shards * options.optimizer.bytes_per_param
    return {"draft": weights, "draft states": states}


def optimizer_elements(params: ParamColumns, columns: LayoutColumns, options: TrainMemoryOptions) -> Floats:
    """Parameters whose optimizer state a rank keeps: its shard over the replicas, or all of them."""
    trained = params.trained(options.frozen_vision)
    shard = trained.dense / (columns.dp * columns.cp)[:, None] + trained.expert / columns.expert_dp[:, None]
    return (shard if options.optimizer.distributed else trained.total) * options.trainable_fraction


def _quantized_copy_bytes(options: TrainMemoryOptions) -> float:
    """Both orientations of a quantised weight; primary fp8 weights take the place of the 16-bit ones."""
    if options.precision not in QUANTIZED:
        return 0.0
    return 2.0 - (options.element_bytes if options.primary_fp8 else 0.0)


def step_gradient_bytes(params: ParamColumns, columns: LayoutColumns, options: TrainMemoryOptions) -> Floats:
    """With bf16 gradients the optimizer step makes an fp32 copy of its shard, freed before the next backward.

    A precision-aware optimizer reads them as they are.
    """
    none = options.grad_bytes >= 4 or options.optimizer.kind == "none" or options.forward_only
    if none or options.optimizer.precision_aware:
        return np.zeros_like(params.total)
    return 4.0 * optimizer_elements(params, columns, options)


def host_bytes(model: ModelArchitecture, columns: LayoutColumns, options: TrainMemoryOptions) -> Floats:
    """Pinned host bytes of one rank: offloaded optimizer state and a swapped reference model, shape [n, pp]."""
    params = rank_params(model, columns)
    moved = optimizer_elements(params, columns, options) * options.optimizer.offloaded_bytes_per_param
    if options.offload_shards:  # fp32 parameters and gradients beside the state
        moved = params.total / (columns.dp * columns.cp)[:, None] * (options.optimizer.bytes_per_param + 4.0)
    swapped = params.total * options.element_bytes * (1.0 if options.reference == "swapped" else 0.0)
    return moved + swapped


def outside_terms(
    terms: dict[str, Floats], columns: LayoutColumns, profile: HardwareProfile, *, loaded_bytes: float = 0.0,
    fragmentation: float = FRAGMENTATION,
) -> dict[str, Floats]:  # fmt: skip
    """What the driver reports besides the allocator: context, what libraries load into it, communicators, fragmentation.

    Communicators: of all ranks, of tensor, context, expert (twice) and pipeline parallelism, of embeddings at both ends of a
    pipeline, and of a whole model: 840 MiB for the first, about 484 for each next (communicator_memory_h200.json).
    """
    allocated = sum_terms(terms)
    staged = columns.pp > 1
    groups = 1.0 + (columns.tp > 1) + (columns.cp > 1) + 2.0 * (columns.ep > 1) + 2.0 * staged + (columns.tp * columns.pp > 1)
    world = columns.tp * columns.cp * columns.dp * columns.pp
    communicators = np.where(world > 1, profile.communicator_bytes + (groups - 1) * profile.next_communicator_bytes, 0.0)
    return {
        "cuda context": np.full(allocated.shape, profile.context_bytes),
        "libraries": np.full(allocated.shape, loaded_bytes),
        "communicators": communicators[:, None] * np.ones(allocated.shape),
        "fragmentation": allocated * fragmentation,
    }


def sum_terms(terms: dict[str, Floats], exclude: frozenset[str] = frozenset()) -> Floats:
    """All terms but the excluded ones added together."""
    return np.asarray(sum(values for name, values in terms.items() if name not in exclude))
