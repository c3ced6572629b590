"""Seconds of one decode step and of prefill in a rollout engine, for any batch and cache size at once.

A step is the sum of its kernels as SGLang launches them from a CUDA graph: products, attention, experts, all-reduces
and the small ones between, each a floor plus the bytes it reads plus its FLOPs. The costs of the kernels come from the
hardware profile. Experts touched by a batch of B tokens: E (1 - (1 + s B k / E)^(-1/s)), the expected number when the
popularity of experts is gamma-distributed with relative variance s.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from miles_plan.catalog.architecture import LayerKind, ModelArchitecture
from miles_plan.catalog.ffns import DenseFfn, MoeFfn
from miles_plan.catalog.gpus import Gpu
from miles_plan.catalog.mixers import CompressedLatent, GatedDelta, GroupedQuery, Indexer, Mamba2, MultiLatent
from miles_plan.cost.communication import Links, collective_s
from miles_plan.cost.gemms import Gemm, layer_gemms
from miles_plan.cost.interval import Interval, Term
from miles_plan.cost.profile import HardwareProfile, OpCost, profile_for, relative_error
from miles_plan.cost.rollout_shard import WEIGHT_BYTES
from miles_plan.ir.layout import RolloutLayout

Floats = NDArray[np.float64]

DECODE_ERROR = {"measured": 0.25, "calibrated": 0.3, "roofline": 0.5}
"""Relative half width of the 90 % interval on a decode step (docs/accuracy.md)."""
EXPERT_SKEW = 1.0
"""Relative variance of how popular experts are in decoding."""
ROUTING_S = 14.0e-6
"""Top-k, sorting tokens by expert and scattering them back, beyond the grouped products."""
STEP_S, REQUEST_S = 1.0e-3, 6.0e-6
"""Scheduling, sampling and token bookkeeping of a step, and of one request in it, that overlap does not hide (measured: steps
of 512 requests on SGLang 0.5.16; published rows, of up to 256, say little about it)."""
PREFILL_LAYER_S = 1.0e-3
"""Host time to launch one layer of a prefill, which runs without CUDA graphs."""
SPARSE_PREFILL = 1.9
"""A prefill with a sparse-attention indexer over one without, at the same FLOPs."""
SMALL_KERNELS = {"gqa": 4, "mla": 6, "compressed": 8, "gdn": 5, "mamba": 5}
"""Norm, rotary, cache write and residual kernels around each token mixer."""


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
        wide = self.gpu.nvlink_domain > self.gpu.gpus_per_node
        return Links(self.gpu, self.profile, self.gpu.nvlink_domain if wide else self.gpu.gpus_per_node)

    @property
    def deciding_constants(self) -> tuple[str, ...]:
        """Constants of the hardware profile that a step rests on."""
        ops = {f"product_{self.weight_precision}"}
        for kind in self.model.kinds:
            if isinstance(kind.mixer, GatedDelta | Mamba2):
                ops.add("linear")
            elif kind.mixer is not None:
                ops.add("attention" if isinstance(kind.mixer, GroupedQuery) else "latent")
            if isinstance(kind.ffn, MoeFfn):
                ops.add(f"experts_{self.weight_precision}")
        return tuple(sorted(f"decode_ops.{name}" for name in ops | ({"reduce"} if self.layout.tp > 1 else set())))

    @property
    def attention_tp(self) -> float:
        """GPUs that share one request's attention."""
        return self.layout.tp / self.layout.dp_attention

    def step_terms(self, batch: ArrayLike, cached_tokens: ArrayLike) -> dict[str, Floats]:
        """Seconds of one decode step of the whole engine by term.

        batch: running requests of the engine; cached_tokens: cached tokens of all of them. Arrays broadcast.
        """
        running = np.maximum(np.asarray(batch, dtype=np.float64), 1e-9)
        cached = np.asarray(cached_tokens, dtype=np.float64)
        tokens = running * float(self.speculation.draft_tokens if self.speculation.accept_length > 1 else 1)
        terms = {name: np.zeros_like(running) for name in ("products", "experts", "attention", "small", "reduce")}
        for kind, count in self.model.layers():
            for name, seconds in self._layer_terms(kind, tokens, running, cached).items():
                terms[name] = terms[name] + count * seconds
        head = Gemm("head", self.model.vocab_size, self.model.hidden_size, "column")
        terms["products"] = terms["products"] + self._product_s(head, tokens / self.layout.dp_attention, "bf16")
        terms["scheduler"] = STEP_S + REQUEST_S * running
        terms["draft"] = self.speculation.draft_cost * np.asarray(sum(terms.values()))
        return terms

    def step_seconds(self, batch: ArrayLike, cached_tokens: ArrayLike) -> Floats:
        """Seconds of one decode step."""
        return np.asarray(sum(self.step_terms(batch, cached_tokens).values()))

    def _op(self, kind: str, precision: str = "") -> OpCost:
        """The cost of a kernel kind at a precision, or at the nearest one the profile knows."""
        ops = self.profile.decode_ops
        for name in (precision, {"mxfp8": "fp8", "int8": "fp8", "int4": "nvfp4"}.get(precision, ""), "fp8", "bf16"):
            if f"{kind}_{name}" in ops:
                return ops[f"{kind}_{name}"]
        return ops[kind]

    def _rate(self, precision: str) -> float:
        return self.gpu.flops.get(precision, self.gpu.rate("bf16"))

    def _layer_terms(self, kind: LayerKind, tokens: Floats, running: Floats, cached: Floats) -> dict[str, Floats]:
        local = tokens / self.layout.dp_attention
        products = np.zeros_like(tokens)
        for gemm in self._fused_products(kind):
            products = products + self._product_s(gemm, local, self.weight_precision)
        small = self._op("small").floor_s * self._small_kernels(kind)
        parts = bool(kind.mixer) + bool(kind.ffn)
        return {
            "products": products,
            "experts": self._experts_s(kind, tokens),
            "attention": self._attention_s(kind, running, cached),
            "small": np.full_like(tokens, small),
            "reduce": parts * self._reduce_s(local),
        }

    def _fused_products(self, kind: LayerKind) -> list[Gemm]:
        """The layer's dense products as the engine fuses them; shared experts run beside the routed ones."""
        out = []
        for gemm in layer_gemms(kind, self.model.hidden_size):
            if gemm.experts or gemm.name.startswith(("shared", "index")) or gemm.name == "kv_down":
                continue
            if gemm.name == "q_down" and isinstance(kind.mixer, MultiLatent):
                wide = gemm.n + kind.mixer.kv_lora_rank + kind.mixer.rope_dim
                out.append(Gemm("down", wide, gemm.k, "whole"))
                continue
            if gemm.name == "kv_up":  # absorbed: the key half before attention, the value half after it
                out += [Gemm("absorb", gemm.n // 2, gemm.k, "column")] * 2
                continue
            out.append(gemm)
        return out

    def _product_s(self, gemm: Gemm, tokens: Floats, precision: str) -> Floats:
        exact = gemm.name in ("router", "head", "absorb")
        op = self._op("product", "bf16" if exact else precision)
        size = 2.0 if exact else WEIGHT_BYTES[precision]
        split = self.layout.tp if gemm.name.startswith(("fc", "head")) else self.attention_tp
        wide = gemm.n / split if gemm.cut == "column" else float(gemm.n)
        deep = gemm.k / split if gemm.cut == "row" else float(gemm.k)
        moved = wide * deep * size + tokens * (wide + deep) * 2.0
        reached = self.gpu.hbm_bytes_per_s * op.hbm_fraction
        rate = self._rate("bf16" if exact else precision) * op.peak_fraction
        return np.asarray(op.floor_s + moved / reached + 2.0 * tokens * wide * deep / rate)

    def _experts_s(self, kind: LayerKind, tokens: Floats) -> Floats:
        ffn = kind.ffn
        if not isinstance(ffn, MoeFfn):
            return np.zeros_like(tokens)
        hidden, op = self.model.hidden_size, self._op("experts", self.weight_precision)
        each = ffn.one_expert_params(hidden) / self.layout.tp
        met = tokens * ffn.topk / ffn.experts
        touched = 1.0 - (1.0 + EXPERT_SKEW * met) ** (-1.0 / EXPERT_SKEW)
        size = WEIGHT_BYTES[self.weight_precision]
        shared = ffn.sharded_params(hidden) / self.layout.tp
        moved = (ffn.experts * each * touched + shared) * size
        flops = 2.0 * tokens * (ffn.topk * each + shared)
        rate = self._rate(self.weight_precision) * op.peak_fraction
        reached = self.gpu.hbm_bytes_per_s * op.hbm_fraction
        return np.asarray(op.floor_s + ROUTING_S + moved / reached + flops / rate)

    def _small_kernels(self, kind: LayerKind) -> int:
        count = SMALL_KERNELS[kind.mixer.kind] if kind.mixer else 0
        return count + (1 if isinstance(kind.ffn, MoeFfn | DenseFfn) else 0)

    def _attention_s(self, kind: LayerKind, running: Floats, cached: Floats) -> Floats:
        """Reading the cache of the requests on one attention rank, or their recurrent states there and back."""
        mixer, share = kind.mixer, 1.0 / self.layout.dp_attention
        if mixer is None:
            return np.zeros_like(running)
        if isinstance(mixer, GatedDelta | Mamba2):
            state = 2.0 * 4.0 * mixer.state_elements_per_request / self.attention_tp
            return self._streamed(self._op("linear"), state * running * share)
        if isinstance(mixer, GroupedQuery):
            seen = np.minimum(cached, running * mixer.window_tokens) if mixer.window_tokens else cached
            each = 2.0 * max(mixer.kv_heads / self.attention_tp, 1.0) * mixer.head_dim * self.kv_bytes
            return self._streamed(self._op("attention"), each * seen * share)
        if isinstance(mixer, CompressedLatent):
            window = np.minimum(cached, running * mixer.window_tokens)
            blocks = cached / mixer.compress_ratio if mixer.compress_ratio else np.zeros_like(cached)
            index = self._indexer_s(mixer.indexer, blocks * share) if mixer.indexer else 0.0
            chosen = np.minimum(blocks, running * mixer.indexer.topk_tokens) if mixer.indexer else blocks
            moved = (window + chosen) * mixer.head_dim * self.kv_bytes * share
            return index + self._streamed(self._op("latent"), moved)
        return self._latent_s(mixer, running, cached, share)

    def _latent_s(self, mixer: MultiLatent, running: Floats, cached: Floats, share: float) -> Floats:
        each = (mixer.kv_lora_rank + mixer.rope_dim) * self.kv_bytes
        if mixer.indexer is None:
            return self._streamed(self._op("latent"), each * cached * share)
        chosen = np.minimum(cached, running * mixer.indexer.topk_tokens)
        return self._indexer_s(mixer.indexer, cached * share) + self._streamed(self._op("latent"), each * chosen * share)

    def _indexer_s(self, indexer: Indexer, entries: Floats) -> Floats:
        """The indexer's keys, one byte an element, read whole; its products are in the floor."""
        return self._streamed(self._op("indexer"), entries * indexer.head_dim * 1.0)

    def _streamed(self, op: OpCost, moved: Floats) -> Floats:
        return np.asarray(op.floor_s + moved / (self.gpu.hbm_bytes_per_s * op.hbm_fraction))

    def _reduce_s(self, tokens: Floats) -> Floats:
        """One sum over tensor-parallel ranks: one-shot kernels inside a domain, NCCL's ring beyond it."""
        layout, links = self.layout, self.links
        if layout.tp == 1:
            return np.zeros_like(tokens)
        size, op = tokens * self.model.hidden_size * 2.0, self._op("reduce")
        if layout.tp <= links.domain:
            return np.asarray(op.floor_s + 2.0 * size / (links.gpu.nvlink_bytes_per_s * op.hbm_fraction))
        return collective_s("all_reduce", size, layout.tp, links.domain, links)

    def prefill_seconds(self, tokens: ArrayLike, length: ArrayLike) -> Floats:
        """Seconds to prefill `tokens` prompt tokens in sequences of `length`: products, scores, and the launches.

        Launches are counted once for what fits one prefill of 8,192 tokens.
        """
        count, each = np.asarray(tokens, dtype=np.float64), np.asarray(length, dtype=np.float64)
        hidden, products, pairs, sparse = self.model.hidden_size, 0.0, 0.0, False
        for kind, layers in self.model.layers():
            products += layers * sum(gemm.flops_per_token for gemm in layer_gemms(kind, hidden))
            indexer = getattr(kind.mixer, "indexer", None)
            sparse = sparse or indexer is not None
            pairs += layers * (kind.mixer.score_flops_per_pair if kind.mixer and indexer is None else 0)
        precision = {"nvfp4": "fp8", "int4": "bf16"}.get(self.weight_precision, self.weight_precision)
        scores = pairs * count * each / 2.0 / (self.gpu.rate("bf16") * self.profile.attention_forward_fraction)
        flops = count * products / (self._rate(precision) * self.profile.prefill_fraction)
        launches = np.maximum(1.0, count / 8192.0) * self.model.num_layers * PREFILL_LAYER_S * self.profile.host_scale
        busy = (flops + scores) / self.layout.gpus_per_engine
        return np.asarray((busy + launches) * (SPARSE_PREFILL if sparse else 1.0))


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
    engine = DecodeModel(
        model=model,
        layout=layout,
        gpu=gpu,
        profile=profile or profile_for(gpu),
        weight_precision=weight_precision,
        kv_bytes=kv_bytes,
        speculation=speculation or Speculation(),
    )
    terms = engine.step_terms(batch, batch * context_tokens)
    return _figure(engine, {name: float(value) for name, value in terms.items()})


def serving_time_per_token(engine: DecodeModel, concurrency: float, input_tokens: float, output_tokens: float) -> Interval:
    """Seconds between two tokens under a closed loop of `concurrency` requests.

    While one request decodes, each of the others finishes once and prefills its successor, which stalls it.
    """
    context = input_tokens + output_tokens / 2.0
    terms = {name: float(value) for name, value in engine.step_terms(concurrency, concurrency * context).items()}
    stall = float(engine.prefill_seconds(input_tokens, input_tokens)) * max(0.0, concurrency - 1.0) / output_tokens
    return _figure(engine, terms | {"prefill of others": stall})


def _figure(engine: DecodeModel, terms: dict[str, float]) -> Interval:
    accepted = engine.speculation.accept_length
    parts = tuple(Term(name, value / accepted) for name, value in terms.items() if value)
    mid = sum(part.value for part in parts)
    constants = engine.deciding_constants
    error = relative_error(DECODE_ERROR, engine.profile, constants)
    return Interval(mid / (1 + error), mid, mid * (1 + error), engine.profile.basis_of(constants), parts)
