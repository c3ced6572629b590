"""Seconds one layer takes for one microbatch on one rank, forward and backward, by what the time goes to.

Roofline a kernel: matrix products by FLOPs over what large products reach, less what the last wave of tiles, a short
inner dimension and half-empty expert tiles waste; flash attention by its own reached rate; everything else by bytes
over what streaming kernels reach; and the host, which launches every kernel unless CUDA graphs replay them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from miles_plan.catalog.architecture import LayerKind
from miles_plan.catalog.ffns import DenseFfn, MoeFfn
from miles_plan.catalog.mixers import CompressedLatent, GatedDelta, GroupedQuery, Mamba2, MultiLatent
from miles_plan.cost.columns import LayoutColumns
from miles_plan.cost.communication import Links, collective_s, dispatch_s, ranks_in_domain
from miles_plan.cost.gemms import Gemm, layer_gemms
from miles_plan.cost.train_options import QUANTIZED

Floats = NDArray[np.float64]

TILE_M, TILE_N = 128, 128
"""Output tile of the large-product kernels of cuBLAS and DeepGEMM on Hopper and Blackwell."""
WAVE_LOSS = 0.1
"""Work lost to the unfinished last wave, in waves: cuBLAS picks smaller tiles where waves are few."""
K_RAMP = 64
"""Inner length that the prologue and epilogue of one tile are worth."""
BACKWARD_ATTENTION_FLOPS = 2.5
"""Backward over forward FLOPs of flash attention: five products for two (arXiv 2205.14135)."""
BACKWARD_MOVED = 1.6
"""Backward over forward bytes of the kernels between products (measured, Megatron-core 0.19 on H200)."""
MOVED_PASSES = 3.0
"""Bytes those kernels really move over the ideal of reading inputs and writing outputs once: casts, copies into
contiguous heads, statistics (measured, the same runs)."""
ROUTED_PASSES, FUSED_ROUTED_PASSES = 3.0, 0.3
"""The same for routed tokens: permutation, activation and quantisation apart, or fused (NeMo 26.06 and later)."""
SHORTEST_ROW = 2048
"""Elements of a routed row below which permutation is bound by rows, not bytes."""
BIASED_EXPERT_PASSES = 3.0
"""Expert biases and clamped activations (gpt-oss) run as kernels of their own."""
LATENT_HOST = 1.3
"""Launches of a latent-attention layer over a grouped-query one."""
FORWARD_HOST_S, BACKWARD_HOST_S = 1.9e-3, 2.7e-3
"""Host time to launch one dense layer of Megatron-core with Transformer Engine (measured: 28 layers, 60 and 76 ms)."""
MOE_FORWARD_HOST_S, MOE_BACKWARD_HOST_S = 4.0e-3, 5.0e-3
"""The same of a layer with experts: router, dispatch, a wait for token counts (measured)."""
EXPERT_FORWARD_HOST_S, EXPERT_BACKWARD_HOST_S = 20.0e-6, 40.0e-6
"""Per local expert: the grouped product is a loop of launches, two forward and four backward (measured)."""
QUANTIZED_EXPERT_HOST_S = 100.0e-6
"""What quantising each expert's inputs and weights on their own adds either way (measured, FP8 in blocks of 128; block-scaled
formats of Blackwell quantise all experts in one kernel)."""
HYPER_FORWARD_HOST_S, HYPER_BACKWARD_HOST_S = 9.0e-3, 14.0e-3
"""What manifold hyper-connections add to a layer: twenty Sinkhorn iterations twice, small kernels each, run again backward
(DeepSeek-V4 in Megatron-Bridge; three verification cards whose steps are the host's)."""

UNFUSED_FORWARD_BYTES, UNFUSED_BACKWARD_BYTES = 40.0, 80.0
"""HBM traffic of one attention score without a fused kernel: masking, scaling and softmax in fp32, pass by pass
(Megatron-Bridge's long-context finetuning cards, where 24 and 36 layers agree within a fifth)."""

Dispatcher = Literal["alltoall", "deepep"]
LayerSeconds = dict[str, Floats]
TERMS = ("gemm", "attention", "memory", "tp", "cp", "ep", "host")


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """One microbatch of the whole context-parallel group: tokens, and the sum of squares of its sequence lengths.

    longest is the longest sequence, which bounds what a sliding window sees.
    """

    tokens: Floats
    sum_squares: Floats
    longest: float

    def pairs(self, window: int) -> Floats:
        """Causal query-key pairs, with a sliding window of that many keys where it is not 0."""
        whole = np.asarray((self.sum_squares + self.tokens) / 2.0)
        return np.asarray(np.minimum(whole, self.tokens * window)) if window else whole


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeOptions:
    """How a layer runs.

    precision: of matrix products. dispatcher: deepep sends a token once to each node and in bf16 or fp8
    (dispatch_bytes), alltoall once to each expert. moe_imbalance: tokens of the fullest expert rank over the mean.
    cuda_graphs: share of the launches that graphs replay, 0 to 1. host_scale: the host's time to launch a layer over
    that of Megatron-core alone (adapters, packed sequences and framework hooks add to it). tp_overlap, ep_overlap:
    share of that communication hidden behind compute. attention_scale: reached rate of the attention kernel over the
    profile's fused one. moved_scale: bytes moved between products over those of Transformer Engine's fused kernels.
    weight_gradients: False where the base weights are frozen (adapters). fused_experts: permutation, activation and
    quantisation of routed tokens run inside the grouped products. fused_attention: False where scores go through
    memory whole, which long sequences feel.
    """

    precision: str = "bf16"
    dispatcher: Dispatcher = "alltoall"
    dispatch_bytes: float = 2.0
    moe_imbalance: float = 1.0
    cuda_graphs: float = 0.0
    host_scale: float = 1.0
    tp_overlap: float = 0.0
    ep_overlap: float = 0.0
    attention_scale: float = 1.0
    moved_scale: float = 1.0
    weight_gradients: bool = True
    fused_experts: bool = False
    fused_attention: bool = True


def layer_seconds(
    kind: LayerKind, hidden: int, columns: LayoutColumns, batch: Microbatch, links: Links, options: ComputeOptions
) -> tuple[LayerSeconds, LayerSeconds]:
    """Forward and backward seconds of one layer by term, shape [n]."""
    tokens = np.asarray(batch.tokens / columns.cp)
    forward: LayerSeconds = {name: np.zeros(len(columns)) for name in TERMS}
    backward: LayerSeconds = {name: np.zeros(len(columns)) for name in TERMS}
    for gemm in layer_gemms(kind, hidden):
        seconds = gemm_seconds(gemm, tokens, columns, links, options)
        forward["gemm"] = forward["gemm"] + seconds
        backward["gemm"] = backward["gemm"] + (2.0 if options.weight_gradients else 1.0) * seconds
    _attention_seconds(kind, batch, columns, links, options, forward, backward)
    moved = _moved_bytes(kind, hidden, columns, options) * tokens * options.moved_scale
    reached = links.gpu.hbm_bytes_per_s * links.profile.hbm_fraction
    forward["memory"], backward["memory"] = moved / reached, BACKWARD_MOVED * moved / reached
    tp_forward, tp_backward = _tp_seconds(kind, hidden, tokens, columns, links)
    forward["tp"], backward["tp"] = tp_forward * (1 - options.tp_overlap), tp_backward * (1 - options.tp_overlap)
    forward["cp"], backward["cp"] = _cp_seconds(kind, tokens, columns, links, forward["attention"])
    exchange = _ep_seconds(kind, hidden, tokens, columns, links, options) * (1 - options.ep_overlap)
    forward["ep"], backward["ep"] = exchange, exchange
    ahead, back = host_seconds(kind, columns, links, quantized=options.precision == "fp8")
    _wait_for_host(forward, ahead * options.host_scale * (1 - options.cuda_graphs))
    _wait_for_host(backward, back * options.host_scale * (1 - options.cuda_graphs))
    return forward, backward


def host_seconds(kind: LayerKind, columns: LayoutColumns, links: Links, *, quantized: bool = False) -> tuple[Floats, Floats]:
    """Host time to launch a layer's forward and backward, scaled by how the profile's host compares."""
    mixer = LATENT_HOST if isinstance(kind.mixer, MultiLatent | CompressedLatent) else float(bool(kind.mixer))
    share = 0.5 * (mixer + bool(kind.ffn))
    ahead, back = np.full(len(columns), FORWARD_HOST_S * share), np.full(len(columns), BACKWARD_HOST_S * share)
    if isinstance(kind.ffn, MoeFfn):
        local = kind.ffn.experts / columns.ep
        ahead = ahead + MOE_FORWARD_HOST_S - FORWARD_HOST_S / 2 + local * EXPERT_FORWARD_HOST_S
        back = back + MOE_BACKWARD_HOST_S - BACKWARD_HOST_S / 2 + local * EXPERT_BACKWARD_HOST_S
        if quantized:
            ahead, back = ahead + local * QUANTIZED_EXPERT_HOST_S, back + local * QUANTIZED_EXPERT_HOST_S
    if kind.residual_streams > 1:
        ahead, back = ahead + HYPER_FORWARD_HOST_S, back + HYPER_BACKWARD_HOST_S
    return ahead * links.profile.host_scale, back * links.profile.host_scale


def _wait_for_host(seconds: LayerSeconds, host: Floats) -> None:
    """What the host's launches take beyond the GPU's own work."""
    busy = np.asarray(sum(seconds[name] for name in ("gemm", "attention", "memory", "tp", "ep")))
    seconds["host"] = np.maximum(0.0, host - busy)


def gemm_seconds(gemm: Gemm, tokens: Floats, columns: LayoutColumns, links: Links, options: ComputeOptions) -> Floats:
    """Forward seconds of one product on one rank: FLOPs at the reached rate, or its weights and tensors over HBM."""
    gpu, profile = links.gpu, links.profile
    quantized = options.precision in QUANTIZED and gemm.name not in ("router", "head")
    precision = options.precision if quantized or options.precision in ("fp32", "tf32") else "bf16"
    peak = gpu.rate(precision) * profile.gemm_fraction.get(precision, profile.gemm_fraction["bf16"])
    split = columns.etp if gemm.experts else columns.tp
    wide = gemm.n / split if gemm.cut == "column" else np.full(len(columns), float(gemm.n))
    deep = gemm.k / split if gemm.cut == "row" else np.full(len(columns), float(gemm.k))
    if gemm.experts:
        rows = tokens * gemm.times * columns.etp / columns.tp * options.moe_imbalance
        local = gemm.experts / columns.ep
        fill = rows / local
        grouped = 1.0 if options.fused_experts else profile.grouped_gemm_fraction
        usable, weights = grouped * fill / (fill + TILE_M / 2), local
    else:
        rows, usable, weights = tokens * gemm.times, np.ones(len(columns)), np.ones(len(columns))
    usable = usable * wave_fraction(rows, wide, gpu.sms) * deep / (deep + K_RAMP)
    size = 1.0 if quantized else 2.0
    traffic = (rows * deep + weights * wide * deep) * size + rows * wide * 2.0
    reached = gpu.hbm_bytes_per_s * profile.hbm_fraction
    seconds = np.maximum(2.0 * rows * wide * deep / (peak * usable), traffic / reached)
    if quantized:  # inputs are read in bf16 and written in two quantised orientations
        seconds = seconds + 4.0 * rows * deep / reached
    return np.asarray(seconds + profile.kernel_launch_s)


def wave_fraction(rows: ArrayLike, wide: ArrayLike, sms: int) -> Floats:
    """Share of the tiles' slots that have work."""
    tiles = np.ceil(np.asarray(rows) / TILE_M) * np.ceil(np.asarray(wide) / TILE_N)
    waves = tiles / sms
    return np.asarray(waves / (waves + WAVE_LOSS))


def _attention_seconds(
    kind: LayerKind,
    batch: Microbatch,
    columns: LayoutColumns,
    links: Links,
    options: ComputeOptions,
    forward: LayerSeconds,
    backward: LayerSeconds,
) -> None:
    flops = _score_flops(kind, batch) / (columns.cp * columns.tp) / options.attention_scale
    peak = links.gpu.rate("bf16" if "bf16" in links.gpu.flops else "fp32")
    if isinstance(kind.mixer, GatedDelta | Mamba2):
        seconds = flops / (peak * links.profile.scan_fraction)
        forward["attention"], backward["attention"] = seconds, BACKWARD_ATTENTION_FLOPS * seconds
        return
    forward["attention"] = flops / (peak * links.profile.attention_forward_fraction)
    backward["attention"] = flops * BACKWARD_ATTENTION_FLOPS / (peak * links.profile.attention_backward_fraction)
    if not options.fused_attention and kind.mixer:
        scores = batch.sum_squares * float(getattr(kind.mixer, "heads", 0)) / (columns.cp * columns.tp)
        passed = scores / (links.gpu.hbm_bytes_per_s * links.profile.hbm_fraction)
        forward["attention"] = forward["attention"] + passed * UNFUSED_FORWARD_BYTES
        backward["attention"] = backward["attention"] + passed * UNFUSED_BACKWARD_BYTES


def _score_flops(kind: LayerKind, batch: Microbatch) -> Floats:
    """Forward FLOPs of the token mixer's core over all ranks."""
    mixer = kind.mixer
    if isinstance(mixer, GroupedQuery):
        return batch.pairs(mixer.window_tokens) * mixer.score_flops_per_pair
    if isinstance(mixer, MultiLatent):
        return _latent_flops(mixer, batch)
    if isinstance(mixer, CompressedLatent):
        return _compressed_flops(mixer, batch)
    if isinstance(mixer, GatedDelta):
        chunk = 64.0  # intra-chunk scores plus the state update, per value head (flash-linear-attention)
        width = mixer.value_heads * (mixer.key_dim + mixer.value_dim)
        return batch.tokens * (2.0 * chunk * width + 6.0 * mixer.value_heads * mixer.key_dim * mixer.value_dim)
    if isinstance(mixer, Mamba2):
        chunk = 128.0
        scores = 2.0 * chunk * (mixer.groups * mixer.state_dim + mixer.inner_width)
        return batch.tokens * (scores + 4.0 * mixer.inner_width * mixer.state_dim)
    return np.zeros_like(batch.tokens)


def _latent_flops(mixer: MultiLatent, batch: Microbatch) -> Floats:
    pairs = batch.pairs(0)
    if mixer.indexer is None:
        return pairs * mixer.score_flops_per_pair
    read = np.minimum(pairs, batch.tokens * mixer.indexer.topk_tokens)
    return read * mixer.score_flops_per_pair + pairs * 2.0 * mixer.indexer.heads * mixer.indexer.head_dim


def _compressed_flops(mixer: CompressedLatent, batch: Microbatch) -> Floats:
    pairs = batch.pairs(mixer.window_tokens)
    if mixer.compress_ratio:
        blocks = batch.pairs(0) / mixer.compress_ratio
        if mixer.indexer:
            index = blocks * 2.0 * mixer.indexer.heads * mixer.indexer.head_dim
            blocks = np.minimum(blocks, batch.tokens * mixer.indexer.topk_tokens)
            return (pairs + blocks) * mixer.score_flops_per_pair + index
        pairs = pairs + blocks
    return pairs * mixer.score_flops_per_pair


def _moved_bytes(kind: LayerKind, hidden: int, columns: LayoutColumns, options: ComputeOptions) -> Floats:
    """Bytes a token moves in a layer's forward outside products and attention: norms, residuals, rotary, activation."""
    residual = (2.0 * 2.0 + 3.0 * 2.0) * hidden * sum(1 for part in (kind.mixer, kind.ffn) if part)
    total = residual * kind.residual_streams / columns.sequence_split
    mixer = kind.mixer
    if isinstance(mixer, GroupedQuery):
        passes = 2.0 if mixer.qk_norm != "none" else 1.0
        total = total + passes * 4.0 * (mixer.query_dim + mixer.kv_dim) / columns.tp
    elif isinstance(mixer, MultiLatent | CompressedLatent):
        total = total + 8.0 * mixer.query_dim / columns.tp
    elif isinstance(mixer, GatedDelta):
        total = total + 8.0 * (2 * mixer.keys_width + 3 * mixer.values_width) / columns.tp
    elif isinstance(mixer, Mamba2):
        total = total + 8.0 * (3 * mixer.inner_width + 2 * mixer.groups * mixer.state_dim) / columns.tp
    ffn = kind.ffn
    if isinstance(ffn, DenseFfn):
        total = total + 2.0 * (ffn.up_width + ffn.size) / columns.tp
    total = np.asarray(total) * MOVED_PASSES
    return total + _moe_moved(ffn, hidden, columns, options) if isinstance(ffn, MoeFfn) else total


def _moe_moved(ffn: MoeFfn, hidden: int, columns: LayoutColumns, options: ComputeOptions) -> Floats:
    """Permutation and its inverse on both sides of the exchange, activation, router scores."""
    into = max(ffn.expert_input(hidden), SHORTEST_ROW)
    passes = FUSED_ROUTED_PASSES if options.fused_experts and ffn.gated and not ffn.bias else ROUTED_PASSES
    passes = passes * (BIASED_EXPERT_PASSES if ffn.bias else 1.0)
    routed = ffn.topk * (8.0 * into + 2.0 * (ffn.up_width + ffn.size)) * options.moe_imbalance * passes
    beside = 2.0 * 3.0 * (ffn.shared_size + ffn.parallel_dense_size) / columns.tp
    return np.asarray((routed + 24.0 * ffn.experts) / columns.sequence_split + beside)


def _tp_seconds(kind: LayerKind, hidden: int, tokens: Floats, columns: LayoutColumns, links: Links) -> tuple[Floats, Floats]:
    """Tensor-parallel exchanges: two a part with sequence parallelism (gather and scatter), one sum without.

    Backward gathers the input once more for the weight gradient. Expert parts exchange by `ep` instead.
    """
    parts = (1 if kind.mixer else 0) + (1 if isinstance(kind.ffn, DenseFfn) or _has_shared(kind) else 0)
    size = tokens * hidden * 2.0
    local = ranks_in_domain(columns.tp, np.ones(len(columns)), links.domain)
    gather = collective_s("all_gather", size, columns.tp, local, links)
    scatter = collective_s("reduce_scatter", size, columns.tp, local, links)
    reduce = collective_s("all_reduce", size, columns.tp, local, links)
    forward = np.where(columns.sequence_parallel, gather + scatter, reduce) * parts
    backward = np.where(columns.sequence_parallel, 2.0 * gather + scatter, reduce) * parts
    return np.asarray(forward), np.asarray(backward)


def _has_shared(kind: LayerKind) -> bool:
    return isinstance(kind.ffn, MoeFfn) and kind.ffn.shared_size + kind.ffn.parallel_dense_size > 0


def _cp_seconds(
    kind: LayerKind, tokens: Floats, columns: LayoutColumns, links: Links, attention: Floats
) -> tuple[Floats, Floats]:
    """Context parallelism passes keys and values around a ring while attention runs; what does not hide is exposed."""
    mixer = kind.mixer
    if isinstance(mixer, GroupedQuery):
        width = 2.0 * mixer.kv_dim
    elif isinstance(mixer, MultiLatent):
        width = float(mixer.heads * (mixer.nope_dim + mixer.rope_dim + mixer.value_dim))
    else:
        width = 0.0
    size = tokens * columns.cp * width * 2.0 / columns.tp
    local = ranks_in_domain(columns.cp, columns.tp, links.domain)
    ring = collective_s("all_gather", size, columns.cp, local, links)
    forward = np.maximum(0.0, ring - attention)
    backward = np.maximum(0.0, 2.0 * ring - BACKWARD_ATTENTION_FLOPS * attention)
    return forward, backward


def _ep_seconds(
    kind: LayerKind, hidden: int, tokens: Floats, columns: LayoutColumns, links: Links, options: ComputeOptions
) -> Floats:
    """Dispatch and combine of one pass; expert tensor parallelism gathers and scatters the same tokens besides."""
    if not isinstance(kind.ffn, MoeFfn):
        return np.zeros(len(columns))
    ffn = kind.ffn
    own = tokens / columns.tp * ffn.expert_input(hidden) * options.moe_imbalance
    local = ranks_in_domain(columns.ep, columns.etp, links.domain)
    once = options.dispatcher == "deepep"
    out = dispatch_s(own * options.dispatch_bytes, ffn.topk, columns.ep, local, links, once)
    back = dispatch_s(own * 2.0, ffn.topk, columns.ep, local, links, once)
    peers = ranks_in_domain(columns.etp, np.ones(len(columns)), links.domain)
    gathered = collective_s("all_gather", own * ffn.topk * 2.0 * columns.etp, columns.etp, peers, links)
    return np.asarray(out + back + 2.0 * gathered)
