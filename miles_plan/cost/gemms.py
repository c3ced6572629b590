"""The matrix products of a layer, named as Megatron names them, with how parallelism cuts them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from miles_plan.catalog.architecture import LayerKind
from miles_plan.catalog.ffns import DenseFfn, MoeFfn
from miles_plan.catalog.mixers import CompressedLatent, GatedDelta, GroupedQuery, Indexer, Mamba2, Mixer, MultiLatent

Cut = Literal["column", "row", "whole"]


@dataclass(frozen=True, slots=True)
class Gemm:
    """y[tokens, n] = x[tokens, k] @ w[k, n].

    cut: which side tensor parallelism divides, or neither. times: how often a token goes through it (top-k for routed
    experts). experts: weights of that shape, 0 for an ordinary product.
    """

    name: str
    n: int
    k: int
    cut: Cut
    times: float = 1.0
    experts: int = 0

    @property
    def flops_per_token(self) -> float:
        """Forward FLOPs of one token over all ranks."""
        return 2.0 * self.n * self.k * self.times


@lru_cache(maxsize=4096)
def layer_gemms(kind: LayerKind, hidden: int) -> tuple[Gemm, ...]:
    """All products of one layer in order."""
    mixer = _mixer_gemms(kind.mixer, hidden) if kind.mixer else []
    if isinstance(kind.ffn, MoeFfn):
        return tuple(mixer + _moe_gemms(kind.ffn, hidden))
    if isinstance(kind.ffn, DenseFfn):
        return tuple(mixer + _ffn_gemms("fc", hidden, kind.ffn.size, kind.ffn.gated))
    return tuple(mixer)


def _mixer_gemms(mixer: Mixer, hidden: int) -> list[Gemm]:
    if isinstance(mixer, GroupedQuery):
        wide = mixer.query_dim * (2 if mixer.output_gate else 1) + mixer.kv_dim * (1 if mixer.value_is_key else 2)
        return [Gemm("qkv", wide, hidden, "column"), Gemm("proj", hidden, mixer.query_dim, "row")]
    if isinstance(mixer, MultiLatent):
        return _latent_gemms(mixer, hidden)
    if isinstance(mixer, CompressedLatent):
        return _compressed_gemms(mixer, hidden)
    if isinstance(mixer, GatedDelta):
        wide = 2 * mixer.keys_width + 2 * mixer.values_width + 2 * mixer.value_heads
        return [Gemm("in_proj", wide, hidden, "column"), Gemm("out_proj", hidden, mixer.values_width, "row")]
    assert isinstance(mixer, Mamba2)
    wide = 2 * mixer.inner_width + 2 * mixer.groups * mixer.state_dim + mixer.heads
    return [Gemm("in_proj", wide, hidden, "column"), Gemm("out_proj", hidden, mixer.inner_width, "row")]


def _latent_gemms(mixer: MultiLatent, hidden: int) -> list[Gemm]:
    out = []
    if mixer.q_lora_rank:
        out.append(Gemm("q_down", mixer.q_lora_rank, hidden, "whole"))
    out += [
        Gemm("q_up", mixer.query_dim, mixer.q_lora_rank or hidden, "column"),
        Gemm("kv_down", mixer.kv_lora_rank + mixer.rope_dim, hidden, "whole"),
        Gemm("kv_up", mixer.heads * (mixer.nope_dim + mixer.value_dim), mixer.kv_lora_rank, "column"),
        Gemm("proj", hidden, mixer.heads * mixer.value_dim, "row"),
    ]
    return out + (_indexer_gemms(mixer.indexer, hidden, mixer.q_lora_rank or hidden) if mixer.indexer else [])


def _indexer_gemms(indexer: Indexer, hidden: int, query_in: int) -> list[Gemm]:
    return [
        Gemm("index_q", indexer.heads * indexer.head_dim, query_in, "whole"),
        Gemm("index_k", indexer.head_dim + indexer.heads, hidden, "whole"),
    ]


def _compressed_gemms(mixer: CompressedLatent, hidden: int) -> list[Gemm]:
    out = [
        Gemm("q_down", mixer.q_lora_rank, hidden, "whole"),
        Gemm("q_up", mixer.query_dim, mixer.q_lora_rank, "column"),
        Gemm("kv", mixer.head_dim, hidden, "whole"),
        Gemm("proj_down", mixer.output_groups * mixer.output_lora_rank, mixer.query_dim // mixer.output_groups, "row"),
        Gemm("proj_up", hidden, mixer.output_groups * mixer.output_lora_rank, "row"),
    ]
    if mixer.compress_ratio:
        out.append(Gemm("compress", 2 * mixer.head_dim * (2 if mixer.indexer else 1), hidden, "whole"))
    if mixer.indexer:
        out += _indexer_gemms(mixer.indexer, hidden, mixer.q_lora_rank)
    return out


def _ffn_gemms(name: str, hidden: int, size: int, gated: bool) -> list[Gemm]:
    return [
        Gemm(f"{name}1", size * (2 if gated else 1), hidden, "column"),
        Gemm(f"{name}2", hidden, size, "row"),
    ]


def _moe_gemms(ffn: MoeFfn, hidden: int) -> list[Gemm]:
    into = ffn.expert_input(hidden)
    out = [Gemm("router", ffn.experts, hidden, "whole")]
    if ffn.latent_size:
        out += [Gemm("latent_down", into, hidden, "whole"), Gemm("latent_up", hidden, into, "whole")]
    out += [
        Gemm("expert_fc1", ffn.up_width, into, "column", times=ffn.topk, experts=ffn.experts),
        Gemm("expert_fc2", into, ffn.size, "row", times=ffn.topk, experts=ffn.experts),
    ]
    if beside := ffn.shared_size + ffn.parallel_dense_size:
        out += _ffn_gemms("shared_fc", hidden, beside, ffn.gated)
    return out
