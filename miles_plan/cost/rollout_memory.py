"""Memory of a rollout engine's GPU, and the tokens its cache pool holds, as SGLang sizes it."""

from __future__ import annotations

from dataclasses import dataclass

from miles_plan.catalog.architecture import ModelArchitecture
from miles_plan.catalog.gpus import Gpu
from miles_plan.cost.draft import Draft
from miles_plan.cost.interval import Interval, Term, around
from miles_plan.cost.profile import HardwareProfile, profile_for
from miles_plan.cost.rollout_shard import WEIGHT_BYTES, cache_bytes_per_token, rollout_shard
from miles_plan.ir.layout import RolloutLayout

_GIB = 1 << 30
SLEEPING_BYTES = 0.5 * _GIB
"""What a sleeping engine holds beside context and graphs (1,544 and 1,396 MiB in all of a 1.7B engine on its own kernels and on
this package's, process_memory_h200.json)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutMemoryOptions:
    """What an engine is started with.

    mem_fraction_static: share of free memory for weights and cache (SGLang's flag); resident_bytes: what others, such
    as a sleeping trainer, keep on the GPU; graph_batch: largest batch CUDA graphs are captured for, 0 = no graphs;
    saver: the engine can hand weights, cache and graphs back when it sleeps (torch_memory_saver); draft: what drafts
    tokens beside the model, with weights and a cache of its own.
    """

    weight_precision: str = "bf16"
    kv_bytes: float = 2.0
    mem_fraction_static: float = 0.85
    prefill_tokens: int = 8192
    max_running: int = 256
    graph_batch: int = 256
    resident_bytes: float = 0.0
    saver: bool = True
    draft: Draft | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.mem_fraction_static <= 1.0:
            raise ValueError(f"mem_fraction_static must be above 0 and at most 1, got {self.mem_fraction_static}")


@dataclass(frozen=True, slots=True)
class RolloutMemory:
    """Bytes on one GPU of an engine.

    pool_tokens: tokens the cache of one engine holds over its attention data-parallel ranks, 0 = it does not start;
    headroom_bytes: what is left of the non-static share after graphs and activations, negative = fails at run time;
    asleep_bytes: what stays when it sleeps: with torch_memory_saver its context and its graphs. Nothing goes to the host:
    weights come anew with the sync.
    """

    weight_bytes: float
    kv_bytes_per_token: float
    state_bytes_per_request: float
    pool_bytes: float
    pool_tokens: int
    graph_bytes: float
    activation_bytes: float
    outside_bytes: float
    headroom_bytes: float
    awake_bytes: Interval
    asleep_bytes: float

    @property
    def fits(self) -> bool:
        """Whether the engine starts and survives its first batch."""
        return self.pool_tokens > 0 and self.headroom_bytes >= 0


def rollout_memory(
    model: ModelArchitecture,
    layout: RolloutLayout,
    options: RolloutMemoryOptions,
    gpu: Gpu,
    profile: HardwareProfile | None = None,
) -> RolloutMemory:
    """Size one GPU of an engine.

    SGLang takes `free x mem_fraction_static` for weights and cache together, free being what it found before it loaded
    weights (model_runner_kv_cache_mixin); graphs and activations live in the rest.
    """
    known = profile or profile_for(gpu)
    shard = rollout_shard(model, layout, options.weight_precision, options.kv_bytes)
    ranks = layout.gpus_per_engine
    communicators = known.communicator_bytes + known.next_communicator_bytes * (layout.ep > 1) if ranks > 1 else 0.0
    outside = known.context_bytes + communicators
    free = max(0.0, gpu.usable_bytes - outside - options.resident_bytes)
    draft_weights, draft_cache = _draft_bytes(layout, options)
    weights, kv_bytes = shard.weight_bytes + draft_weights, shard.kv_bytes_per_token + draft_cache
    pool = max(0.0, free * options.mem_fraction_static - weights)
    per_request = shard.state_bytes_per_request + shard.window_bytes_per_request
    states = per_request * min(options.max_running / layout.dp_attention, 4096)
    tokens = int(max(0.0, pool - states) / kv_bytes) if kv_bytes else 0
    graphs = _graph_bytes(model, layout, options)
    activations = _activation_bytes(model, layout, options)
    headroom = free * (1.0 - options.mem_fraction_static) - graphs - activations
    awake = outside + weights + pool + graphs + activations
    terms = {
        "weights": weights,
        "cache pool": pool,
        "cuda graphs": graphs,
        "activations": activations,
        "context and communicators": outside,
    }
    return RolloutMemory(
        weight_bytes=weights,
        kv_bytes_per_token=kv_bytes,
        state_bytes_per_request=per_request,
        pool_bytes=pool,
        pool_tokens=tokens * layout.dp_attention,
        graph_bytes=graphs,
        activation_bytes=activations,
        outside_bytes=outside,
        headroom_bytes=headroom,
        awake_bytes=around(awake, 0.04, "calibrated", (Term(name, value) for name, value in terms.items())),
        asleep_bytes=outside + graphs + (SLEEPING_BYTES if options.saver else activations + pool + weights),
    )


def _draft_bytes(layout: RolloutLayout, options: RolloutMemoryOptions) -> tuple[float, float]:
    """A draft's weights on one GPU, its join whole, and its cache a token: one more layer that every token passes."""
    draft = options.draft
    if draft is None:
        return 0.0, 0.0
    layer = draft.layer.params(draft.hidden) / layout.tp * WEIGHT_BYTES[options.weight_precision]
    cache = cache_bytes_per_token(draft.layer, layout.tp / layout.dp_attention, options.kv_bytes)
    return layer + draft.join_params * WEIGHT_BYTES["bf16"], cache


def _graph_bytes(model: ModelArchitecture, layout: RolloutLayout, options: RolloutMemoryOptions) -> float:
    """Graphs share one pool as large as the largest batch's tensors; each captured kernel keeps its parameters."""
    if not options.graph_batch:
        return 0.0
    captured = 10 + options.graph_batch // 16
    nodes = captured * model.num_layers / layout.pp * 20
    return nodes * 2.0e3 + options.graph_batch * _token_bytes(model, layout) + 0.3 * _GIB


def _activation_bytes(model: ModelArchitecture, layout: RolloutLayout, options: RolloutMemoryOptions) -> float:
    """One layer's tensors of a prefill chunk, logits of the running batch in fp32, sampling copies."""
    logits = 3.0 * 4.0 * options.max_running * model.vocab_size / (1 if layout.dp_attention > 1 else layout.tp)
    return options.prefill_tokens * _token_bytes(model, layout) + logits


def _token_bytes(model: ModelArchitecture, layout: RolloutLayout) -> float:
    """Live bytes of one token inside the widest layer."""
    wide = 0.0
    for kind in model.kinds:
        ffn = kind.ffn
        if ffn is None:
            continue
        copies = getattr(ffn, "topk", 1)
        wide = max(wide, copies * (ffn.up_width + model.hidden_size) / layout.tp)
    return 2.0 * (6.0 * model.hidden_size + wide)
