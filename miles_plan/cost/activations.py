"""What autograd keeps of one token in one layer, tensor by tensor, and which recomputation lets go of what.

The list follows Megatron-core 0.19 with Transformer Engine: fused norms keep input and output, flash attention keeps
q, k, v, its output and one fp32 log-sum-exp a head, SwiGLU keeps its input and its output feeds the next product. GeGLU is
not fused (Megatron's grouped experts fuse SwiGLU only), so its gate stays too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from miles_plan.catalog.architecture import LayerKind
from miles_plan.catalog.ffns import DenseFfn, MoeFfn
from miles_plan.catalog.mixers import CompressedLatent, GatedDelta, GroupedQuery, Mamba2, Mixer, MultiLatent

Split = Literal["sequence", "tensor", "routed", "whole"]
Module = Literal["core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts", "mla_up_proj", "mixer", "op"]


@dataclass(frozen=True, slots=True)
class Saved:
    """Bytes a token leaves behind.

    split: `sequence` is divided by tensor parallelism only with sequence parallelism; `tensor` always; `routed` tokens
    are divided as the sequence is, then spread over experts (and cut inside them by etp where `cut_by_etp`); `whole`
    never. modules: recomputing any of them drops it. product_input: the tensor only feeds a matrix product, so fp8
    training keeps it in one byte an element.
    """

    name: str
    bytes: float
    split: Split
    modules: frozenset[Module] = frozenset()
    product_input: bool = False
    cut_by_etp: bool = False


_RSTD = 4.0
"""A norm keeps one fp32 reciprocal standard deviation a row."""


def _saved(name: str, size: float, split: Split, *modules: Module, product: bool = False, etp: bool = False) -> Saved:
    return Saved(name, size, split, frozenset(modules), product, etp)


@lru_cache(maxsize=4096)
def saved_tensors(kind: LayerKind, hidden: int, element_bytes: int = 2) -> tuple[Saved, ...]:
    """Everything one layer keeps, in forward order."""
    wide = float(hidden * element_bytes)
    out: list[Saved] = []
    if kind.mixer:
        out += _mixer_saved(kind.mixer, wide, element_bytes)
    if isinstance(kind.ffn, DenseFfn):
        out += _dense_saved(kind.ffn, wide, element_bytes)
    elif isinstance(kind.ffn, MoeFfn):
        out += _moe_saved(kind.ffn, hidden, wide, element_bytes)
    extra_norms = kind.norm_vectors - sum(1 for part in (kind.mixer, kind.ffn) if part)
    if extra_norms > 0:
        out.append(_saved("post_norms", extra_norms * wide, "sequence"))
    if kind.residual_streams > 1:
        out.append(_saved("residual_streams", 2 * kind.residual_streams * wide, "sequence"))
    return tuple(out)


def _mixer_saved(mixer: Mixer, wide: float, size: int) -> list[Saved]:
    norm = [
        _saved("mixer_norm_in", wide + _RSTD, "sequence"),
        _saved("mixer_norm_out", wide, "sequence", "layernorm", product=True),
    ]
    if isinstance(mixer, GroupedQuery):
        return norm + _grouped_saved(mixer, size)
    if isinstance(mixer, MultiLatent):
        return norm + _latent_saved(mixer, size)
    if isinstance(mixer, CompressedLatent):
        return norm + _compressed_saved(mixer, size)
    if isinstance(mixer, GatedDelta):
        return norm + _delta_saved(mixer, size)
    assert isinstance(mixer, Mamba2)
    return norm + _mamba_saved(mixer, size)


def _attention_core(query: float, key: float, value: float, out: float, heads: int, size: int) -> list[Saved]:
    return [
        _saved("qkv", (query + key + value) * size, "tensor"),
        _saved("attention_out", out * size, "tensor"),
        _saved("log_sum_exp", 4.0 * heads, "tensor", "core_attn"),
    ]


def _grouped_saved(mixer: GroupedQuery, size: int) -> list[Saved]:
    out = _attention_core(mixer.query_dim, mixer.kv_dim, mixer.kv_dim, mixer.query_dim, mixer.heads, size)
    if mixer.qk_norm != "none":
        rstd = _RSTD * (mixer.heads + mixer.kv_heads)
        out.append(_saved("qk_norm_in", (mixer.query_dim + mixer.kv_dim) * size + rstd, "tensor"))
    if mixer.value_norm:
        out.append(_saved("value_norm_in", mixer.kv_dim * size + _RSTD * mixer.kv_heads, "tensor"))
    if mixer.output_gate:
        out.append(_saved("gate", 2.0 * mixer.query_dim * size, "tensor"))
    return out


def _latent_saved(mixer: MultiLatent, size: int) -> list[Saved]:
    latent = mixer.q_lora_rank + mixer.kv_lora_rank
    query, value = mixer.query_dim, mixer.heads * mixer.value_dim
    expanded = [
        _saved("latent_qkv", (2 * query + value) * size, "tensor", "mla_up_proj"),
        _saved("attention_out", value * size, "tensor"),
        _saved("log_sum_exp", 4.0 * mixer.heads, "tensor", "core_attn"),
    ]
    small = [_saved("latents", (2.0 * latent + mixer.rope_dim) * size, "sequence")]
    if mixer.indexer:
        small.append(_saved("indexer", mixer.indexer.heads * mixer.indexer.head_dim * float(size), "whole"))
    return small + expanded


def _compressed_saved(mixer: CompressedLatent, size: int) -> list[Saved]:
    latent = 2.0 * (mixer.q_lora_rank + mixer.head_dim)
    out = _attention_core(mixer.query_dim, mixer.head_dim, 0.0, mixer.query_dim, mixer.heads, size)
    if mixer.compress_ratio:
        latent += 4.0 * mixer.head_dim
    if mixer.indexer:
        latent += mixer.indexer.heads * mixer.indexer.head_dim
    low_rank = float(mixer.output_groups * mixer.output_lora_rank * size)
    return [*out, _saved("latents", latent * size, "sequence"), _saved("output_latent", low_rank, "tensor")]


def _delta_saved(mixer: GatedDelta, size: int) -> list[Saved]:
    """Projection outputs, convolution outputs, normalised keys, chunk states and the gated output (flash-linear)."""
    mixed = 2.0 * mixer.keys_width + mixer.values_width
    states = mixer.value_heads * mixer.key_dim * mixer.value_dim / 64.0
    return [
        _saved("linear_in", (2.0 * mixed + mixer.values_width) * size, "tensor", "mixer"),
        _saved("linear_keys", 2.0 * mixer.keys_width * size, "tensor", "mixer"),
        _saved("linear_states", states * size, "tensor", "mixer"),
        _saved("linear_out", 3.0 * mixer.values_width * size, "tensor", "mixer"),
        _saved("linear_gates", 8.0 * mixer.value_heads, "tensor", "mixer"),
    ]


def _mamba_saved(mixer: Mamba2, size: int) -> list[Saved]:
    mixed = mixer.inner_width + 2.0 * mixer.groups * mixer.state_dim
    states = mixer.inner_width * mixer.state_dim / 128.0
    return [
        _saved("linear_in", (mixer.inner_width + mixed + mixer.heads) * size, "tensor", "mixer"),
        _saved("linear_states", states * size, "tensor", "mixer"),
        _saved("linear_out", 2.0 * mixer.inner_width * size, "tensor", "mixer"),
    ]


def _dense_saved(ffn: DenseFfn, wide: float, size: int) -> list[Saved]:
    out = [
        _saved("ffn_norm_in", wide + _RSTD, "sequence"),
        _saved("ffn_norm_out", wide, "sequence", "layernorm", "mlp", product=True),
        _saved("ffn_up", float(ffn.up_width * size), "tensor", "mlp"),
        _saved("ffn_act", float(ffn.size * size), "tensor", "mlp", product=True),
    ]
    if ffn.gelu and ffn.gated:
        out.append(_saved("ffn_gate", float(ffn.size * size), "tensor", "mlp"))
    return out


def _moe_saved(ffn: MoeFfn, hidden: int, wide: float, size: int) -> list[Saved]:
    into = float(ffn.expert_input(hidden) * size)
    out = [
        _saved("ffn_norm_in", wide + _RSTD, "sequence"),
        _saved("ffn_norm_out", wide, "sequence", "layernorm"),
        _saved("router", ffn.experts + 6.0 * ffn.topk, "sequence", "moe"),
        _saved("dispatched", ffn.topk * into, "routed", "moe", product=True),
        _saved("expert_up", float(ffn.topk * ffn.up_width * size), "routed", "moe", etp=True),
        _saved("expert_act", float(ffn.topk * ffn.size * size), "routed", "moe", "moe_act", product=True, etp=True),
    ]
    if ffn.gelu and ffn.gated:  # the gate, and the product before the router's weights scale it
        out.append(_saved("expert_gate", float(2 * ffn.topk * ffn.size * size), "routed", "moe", "moe_act", etp=True))
    if ffn.latent_size:
        out.append(_saved("latent", 2 * into, "sequence", "moe", product=True))
    if beside := ffn.shared_size + ffn.parallel_dense_size:
        up = float(beside * (2 if ffn.gated else 1) * size)
        out.append(_saved("shared_up", up, "tensor", "moe", "shared_experts"))
        out.append(_saved("shared_act", float(beside * size), "tensor", "moe", "shared_experts", product=True))
    return out
