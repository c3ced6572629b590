"""Seconds of one decode step and of prefill in a rollout engine, for any batch and cache size at once.

A decode step reads every weight its tokens touch and every cached key and value once; it takes the longer of that and
of its FLOPs, plus the all-reduces of each layer and a floor a kernel. Experts touched by a batch of B tokens: E (1 - (1
- k/E)^B) (independent routing).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from miles_plan.catalog.architecture import LayerKind, ModelArchitecture
from miles_plan.catalog.ffns import MoeFfn
from miles_plan.catalog.gpus import Gpu
from miles_plan.catalog.mixers import CompressedLatent, GroupedQuery, MultiLatent
from miles_plan.cost.communication import Links, collective_s
from miles_plan.cost.gemms import layer_gemms
from miles_plan.cost.interval import Interval, Term
from miles_plan.cost.profile import HardwareProfile, profile_for
from miles_plan.cost.rollout_shard import WEIGHT_BYTES, cache_bytes_per_token, rollout_shard
from miles_plan.ir.layout import RolloutLayout

Floats = NDArray[np.float64]

DECODE_ERROR = {"measured": 0.2, "calibrated": 0.3, "roofline": 0.4}
"""Relative half width of the 90 % interval on a decode step (docs/accuracy.md)."""
KERNELS_PER_LAYER, MOE_KERNELS_PER_LAYER = 9, 14
GRAPH_KERNEL_S = 2.5e-6
"""Floor of one kernel inside a CUDA graph: launch, ramp and drain."""
STEP_S = 1.0e-3
"""Scheduler, sampling and the copy of token ids to the host between two steps, partly hidden by overlap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """Speculative decoding: tokens accepted a step, tokens verified a step, draft cost over one target step."""

    accept_length: float = 1.0
    draft_tokens: int = 1
    draft_cost: float = 0.0

    def __post_init__(self) -> None:
        if not 1.0 <= self.accept_length <= max(1, self.draft_tokens) + 1:
            raise ValueError(f"accept_length {self.accept_length} of {self.draft_tokens} draft tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeModel:
    """One engine of a model on a GPU, ready to price steps."""

    model: ModelArchitecture
    layout: RolloutLayout
    gpu: Gpu
    profile: HardwareProfile
    weight_precision: str = "bf16"
    kv_bytes: float = 2.0
    speculation: Speculation = field(default_factory=Speculation)

    @property
    def links(self) -> Links:
        """Links inside the engine."""
        domain = self.gpu.nvlink_domain if self.gpu.nvlink_domain > 8 else min(self.gpu.nvlink_domain, 8)
        return Links(self.gpu, self.profile, domain)

    def step_terms(self, batch: ArrayLike, cached_tokens: ArrayLike) -> dict[str, Floats]:
        """Seconds of one decode step of the whole engine by term.

        batch: running requests of the engine; cached_tokens: cached tokens of all of them. Arrays broadcast.
        """
        running = np.maximum(np.asarray(batch, dtype=np.float64), 1e-9)
        cached = np.asarray(cached_tokens, dtype=np.float64)
        verified = float(self.speculation.draft_tokens if self.speculation.accept_length > 1 else 1)
        tokens = running * verified
        weights, products = self._weight_seconds(tokens)
        terms = {
            "weights": weights,
            "flops": products,
            "cache": self._cache_seconds(running, cached),
            "communication": self._communication_seconds(tokens),
            "kernels": np.full_like(running, self._kernel_seconds()),
            "scheduler": np.full_like(running, STEP_S),
        }
        terms["draft"] = self.speculation.draft_cost * np.asarray(sum(terms.values()))
        return terms

    def step_seconds(self, batch: ArrayLike, cached_tokens: ArrayLike) -> Floats:
        """Seconds of one decode step."""
        return np.asarray(sum(self.step_terms(batch, cached_tokens).values()))

    def _weight_seconds(self, tokens: Floats) -> tuple[Floats, Floats]:
        """Reading the touched weights, and what the products take beyond that."""
        layout, size = self.layout, WEIGHT_BYTES[self.weight_precision]
        local = tokens / layout.dp_attention
        shard = rollout_shard(self.model, layout, self.weight_precision, self.kv_bytes)
        moe = self.model.moe
        touched = np.zeros_like(tokens)
        if moe:
            # Each GPU holds E / ep experts cut by tp / ep; the share of them a batch touches is the same everywhere.
            touched = 1.0 - (1.0 - moe.topk / moe.experts) ** tokens
        head = self.model.vocab_size * self.model.hidden_size / layout.tp * 2.0
        read = shard.dense_params * size + shard.expert_params * touched * size + head
        reached = self.gpu.hbm_bytes_per_s * self.profile.hbm_fraction
        weights = read * layout.pp / reached
        flops = 2.0 * (shard.dense_params * local + self._expert_flop_params() * tokens) * layout.pp
        precision = self.weight_precision if self.weight_precision in self.gpu.flops else "bf16"
        rate = self.gpu.rate(precision) * self.profile.gemm_fraction.get(precision, 0.6)
        return weights, np.maximum(0.0, flops / rate - weights)

    def _expert_flop_params(self) -> float:
        """Expert parameters one token meets on one GPU, balanced routing."""
        hidden = self.model.hidden_size
        met = sum(
            count * kind.ffn.topk * kind.ffn.one_expert_params(hidden)
            for kind, count in self.model.layers()
            if isinstance(kind.ffn, MoeFfn)
        )
        return met / self.layout.gpus_per_engine

    def _cache_seconds(self, running: Floats, cached: Floats) -> Floats:
        """Reading the cache of the requests on one attention rank, states read and written."""
        attention_tp = self.layout.tp / self.layout.dp_attention
        shard = rollout_shard(self.model, self.layout, self.weight_precision, self.kv_bytes)
        total = np.zeros_like(running)
        for kind, count in self.model.layers():
            seen = self._tokens_read(kind, running, cached)
            bytes_per_token = _read_bytes_per_token(kind, attention_tp, self.kv_bytes)
            total = total + count / self.layout.pp * bytes_per_token * seen / self.layout.dp_attention
        total = total + 2.0 * shard.state_bytes_per_request * running / self.layout.dp_attention
        return total * self.layout.pp / (self.gpu.hbm_bytes_per_s * self.profile.hbm_fraction)

    def _tokens_read(self, kind: LayerKind, running: Floats, cached: Floats) -> Floats:
        mixer = kind.mixer
        if isinstance(mixer, GroupedQuery) and mixer.window_tokens:
            return np.minimum(cached, running * mixer.window_tokens)
        if isinstance(mixer, MultiLatent) and mixer.indexer:
            # The indexer's keys are read whole, the latents only where it points.
            share = mixer.indexer.head_dim / mixer.cache_elements_per_token
            chosen = np.minimum(cached, running * mixer.indexer.topk_tokens)
            return cached * share + chosen * (1.0 - share)
        return cached

    def _communication_seconds(self, tokens: Floats) -> Floats:
        """Two sums a layer over tp; with expert parallelism the second is a dispatch and a combine."""
        layout, links = self.layout, self.links
        parts = sum(count * (bool(kind.mixer) + bool(kind.ffn)) for kind, count in self.model.layers())
        local = min(layout.tp, links.domain)
        size = tokens / layout.dp_attention * self.model.hidden_size * 2.0
        reduce = collective_s("all_reduce", size, layout.tp, local, links)
        # Small sums inside a node go through one-shot kernels that need a fraction of a ring's latency.
        one_shot = 6.0e-6 + size * (layout.tp - 1) / links.nvlink("all_reduce")
        reduce = np.minimum(reduce, one_shot) if 1 < layout.tp <= links.domain else reduce
        return np.asarray(parts * reduce)

    def _kernel_seconds(self) -> float:
        kernels = sum(
            count * (MOE_KERNELS_PER_LAYER if isinstance(kind.ffn, MoeFfn) else KERNELS_PER_LAYER)
            for kind, count in self.model.layers()
        )
        return kernels * GRAPH_KERNEL_S

    def prefill_seconds(self, tokens: ArrayLike, length: ArrayLike) -> Floats:
        """Seconds to prefill `tokens` prompt tokens in sequences of `length`, by FLOPs over all GPUs of the engine."""
        count, each = np.asarray(tokens, dtype=np.float64), np.asarray(length, dtype=np.float64)
        hidden = self.model.hidden_size
        products = pairs = 0.0
        for kind, layers in self.model.layers():
            products += layers * sum(gemm.flops_per_token for gemm in layer_gemms(kind, hidden))
            pairs += layers * (kind.mixer.score_flops_per_pair if kind.mixer else 0)
        ranks = self.layout.gpus_per_engine
        precision = self.weight_precision if self.weight_precision in self.gpu.flops else "bf16"
        rate = self.gpu.rate(precision) * self.profile.gemm_fraction.get(precision, 0.6) * 0.8
        scores = pairs * count * each / 2.0 / (self.gpu.rate("bf16") * self.profile.attention_forward_fraction)
        return np.asarray((count * products / rate + scores) / ranks)


def _read_bytes_per_token(kind: LayerKind, attention_tp: float, kv_bytes: float) -> float:
    """Bytes read of one cached token; a window stores few tokens but reads them like any other."""
    mixer = kind.mixer
    if isinstance(mixer, GroupedQuery):
        return 2.0 * max(mixer.kv_heads / attention_tp, 1.0) * mixer.head_dim * kv_bytes
    if isinstance(mixer, CompressedLatent):
        return mixer.cache_elements_per_token * kv_bytes
    return cache_bytes_per_token(kind, attention_tp, kv_bytes)


def decode_time_per_token(
    model: ModelArchitecture,
    layout: RolloutLayout,
    batch: float,
    context_tokens: float,
    gpu: Gpu,
    weight_precision: str = "bf16",
    kv_bytes: float = 2.0,
    speculation: Speculation | None = None,
    profile: HardwareProfile | None = None,
) -> Interval:
    """Seconds between two tokens of a request in an engine that runs `batch` of them at `context_tokens` each."""
    known = profile or profile_for(gpu)
    engine = DecodeModel(
        model=model,
        layout=layout,
        gpu=gpu,
        profile=known,
        weight_precision=weight_precision,
        kv_bytes=kv_bytes,
        speculation=speculation or Speculation(),
    )
    accepted = engine.speculation.accept_length
    terms = engine.step_terms(batch, batch * context_tokens)
    parts = tuple(Term(name, float(value) / accepted) for name, value in terms.items() if value)
    mid = sum(part.value for part in parts)
    error = DECODE_ERROR.get(known.basis, max(DECODE_ERROR.values()))
    return Interval(mid / (1 + error), mid, mid * (1 + error), "roofline", parts)
