"""What one GPU of a rollout engine holds and reads: its share of the weights, and cache bytes a token and a request."""

from __future__ import annotations

from dataclasses import dataclass

from miles_plan.catalog.architecture import LayerKind, ModelArchitecture
from miles_plan.catalog.mixers import CompressedLatent, GroupedQuery, MultiLatent
from miles_plan.ir.layout import RolloutLayout

WEIGHT_BYTES = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "mxfp8": 1.03,
    "int8": 1.0,
    "int4": 0.53,
    "nvfp4": 0.56,
}
"""Bytes of a quantised weight with its block scales (a byte for 32 or 16 weights, four for 128 x 128)."""


@dataclass(frozen=True, slots=True)
class RolloutShard:
    """Per GPU: parameters by how they are stored, cache bytes a token and state bytes a request."""

    dense_params: float
    expert_params: float
    full_precision_params: float
    weight_bytes: float
    kv_bytes_per_token: float
    window_bytes_per_request: float
    state_bytes_per_request: float


def rollout_shard(
    model: ModelArchitecture, layout: RolloutLayout, weight_precision: str = "bf16", kv_bytes: float = 2.0
) -> RolloutShard:
    """The fullest GPU of one engine.

    Attention is cut by tp / dp_attention, the feed-forward by tp (experts by ep and the rest of tp), as SGLang does;
    embedding, head and norms stay in bf16 whatever the weights are.

    Raises:
        ValueError: no such weight precision.
    """
    if weight_precision not in WEIGHT_BYTES:
        raise ValueError(f"no weight precision {weight_precision!r}, only {', '.join(WEIGHT_BYTES)}")
    hidden, attention_tp = model.hidden_size, layout.tp / layout.dp_attention
    dense = expert = whole = 0.0
    cache = window = state = 0.0
    for kind, count in model.layers():
        share = count / layout.pp
        mixer, ffn = _layer_shard(kind, hidden, attention_tp, layout.tp)
        dense += share * (mixer + ffn)
        whole += share * kind.norm_params(hidden)
        expert += share * kind.expert_params(hidden) / layout.tp
        cache += share * cache_bytes_per_token(kind, attention_tp, kv_bytes)
        window += share * _window_bytes(kind, attention_tp, kv_bytes)
        state += share * _state_bytes(kind, attention_tp)
    ends = (model.embedding_params + model.head_params) / layout.tp / min(layout.pp, 2)
    whole += ends + (model.vision.params if model.vision else 0)
    weights = (dense + expert) * WEIGHT_BYTES[weight_precision] + whole * 2.0
    return RolloutShard(dense, expert, whole, weights, cache, window, state)


def _layer_shard(kind: LayerKind, hidden: int, attention_tp: float, tp: int) -> tuple[float, float]:
    mixer = ffn = 0.0
    if kind.mixer:
        mixer = kind.mixer.sharded_params(hidden) / attention_tp + kind.mixer.replicated_params(hidden)
    if kind.ffn:
        ffn = kind.ffn.sharded_params(hidden) / tp + kind.ffn.replicated_params(hidden)
    return mixer, ffn


def cache_bytes_per_token(kind: LayerKind, attention_tp: float, kv_bytes: float) -> float:
    """Cache one token adds on one GPU in a layer without a window; latents are whole on every rank."""
    mixer = kind.mixer
    if isinstance(mixer, GroupedQuery):
        if mixer.window_tokens:
            return 0.0
        return 2.0 * max(mixer.kv_heads / attention_tp, 1.0) * mixer.head_dim * kv_bytes
    if isinstance(mixer, MultiLatent | CompressedLatent):
        return mixer.cache_elements_per_token * kv_bytes
    return 0.0


def _window_bytes(kind: LayerKind, attention_tp: float, kv_bytes: float) -> float:
    mixer = kind.mixer
    if isinstance(mixer, GroupedQuery) and mixer.window_tokens:
        return 2.0 * max(mixer.kv_heads / attention_tp, 1.0) * mixer.head_dim * kv_bytes * mixer.window_tokens
    return 0.0


def _state_bytes(kind: LayerKind, attention_tp: float) -> float:
    """Recurrent state in fp32 for a live request; DeepSeek-V4's window of shared keys in bf16."""
    mixer = kind.mixer
    if mixer is None or not mixer.state_elements_per_request:
        return 0.0
    if isinstance(mixer, CompressedLatent):
        return 2.0 * mixer.state_elements_per_request
    return 4.0 * mixer.state_elements_per_request / attention_tp
