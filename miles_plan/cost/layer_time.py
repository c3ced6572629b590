"""Seconds one layer takes for one microbatch on one rank, forward and backward, by what the time goes to.

Roofline a kernel: matrix products by FLOPs over what large products reach, less what the last wave of tiles, a short
inner dimension and half-empty expert tiles waste; flash attention by its own reached rate; everything else by bytes
over what streaming kernels reach. Communication by topology.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from miles_plan.catalog.architecture import LayerKind
from miles_plan.catalog.ffns import DenseFfn, MoeFfn
from miles_plan.catalog.mixers import CompressedLatent, GatedDelta, GroupedQuery, Mamba2, MultiLatent
from miles_plan.cost.columns import LayoutColumns
from miles_plan.cost.communication import Links, collective_s, ranks_in_domain
from miles_plan.cost.gemms import Gemm, layer_gemms

Floats = NDArray[np.float64]

TILE_M, TILE_N = 128, 256
"""Output tile of the large-product kernels of cuBLAS and DeepGEMM on Hopper and Blackwell."""
K_RAMP = 256
"""Inner length that the prologue and epilogue of one tile are worth."""
BACKWARD_ATTENTION_FLOPS = 2.5
"""Backward over forward FLOPs of flash attention: five products for two (arXiv 2205.14135)."""
FORWARD_KERNELS, MOE_FORWARD_KERNELS = 16, 45
"""Kernels the host launches for a layer's forward in Megatron-core; backward launches twice as many."""
HOST_S_PER_KERNEL = 7.0e-6
"""Host time to launch one kernel through PyTorch and autograd without CUDA graphs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """One microbatch before context parallelism cuts it: tokens, and the sum of squares of its sequence lengths.

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
    """precision of matrix products; dispatch_bytes: bytes an element of what the experts' all-to-all carries;
    moe_imbalance: tokens of the fullest expert rank over the mean; cuda_graphs: launches do not wait for the host;
    tp_overlap: share of tensor-parallel communication hidden behind products; ep_overlap: the same for the experts'."""

    precision: str = "bf16"
    dispatch_bytes: float = 2.0
    moe_imbalance: float = 1.0
    cuda_graphs: bool = False
    tp_overlap: float = 0.0
    ep_overlap: float = 0.0


LayerSeconds = dict[str, Floats]


def layer_seconds(
    kind: LayerKind, hidden: int, columns: LayoutColumns, batch: Microbatch, links: Links, options: ComputeOptions
) -> tuple[LayerSeconds, LayerSeconds]:
    """Forward and backward seconds of one layer by term, shape [n]: gemm, attention, memory, tp, ep, host."""
    tokens = np.asarray(batch.tokens / columns.cp)
    forward: LayerSeconds = {name: np.zeros(len(columns)) for name in TERMS}
    backward: LayerSeconds = {name: np.zeros(len(columns)) for name in TERMS}
    for gemm in layer_gemms(kind, hidden):
        seconds = gemm_seconds(gemm, tokens, columns, links, options)
        forward["gemm"] = forward["gemm"] + seconds
        backward["gemm"] = backward["gemm"] + 2.0 * seconds
    flops = _score_flops(kind, batch) / (columns.cp * columns.tp)
    peak = links.gpu.rate("bf16" if "bf16" in links.gpu.flops else "fp32")
    forward["attention"] = flops / (peak * links.profile.attention_forward_fraction)
    backward["attention"] = flops * BACKWARD_ATTENTION_FLOPS / (peak * links.profile.attention_backward_fraction)
    moved = _moved_bytes(kind, hidden, columns, options) * tokens
    reached = links.gpu.hbm_bytes_per_s * links.profile.hbm_fraction
    forward["memory"], backward["memory"] = moved / reached, 2.0 * moved / reached
    tp_forward, tp_backward = _tp_seconds(kind, hidden, tokens, columns, links)
    forward["tp"], backward["tp"] = tp_forward * (1 - options.tp_overlap), tp_backward * (1 - options.tp_overlap)
    forward["cp"], backward["cp"] = _cp_seconds(kind, tokens, columns, links, forward["attention"])
    exchange = _ep_seconds(kind, hidden, tokens, columns, links, options) * (1 - options.ep_overlap)
    forward["ep"], backward["ep"] = exchange, exchange
    if not options.cuda_graphs:
        kernels = MOE_FORWARD_KERNELS if isinstance(kind.ffn, MoeFfn) else FORWARD_KERNELS
        _wait_for_host(forward, kernels * HOST_S_PER_KERNEL)
        _wait_for_host(backward, 2 * kernels * HOST_S_PER_KERNEL)
    return forward, backward


TERMS = ("gemm", "attention", "memory", "tp", "cp", "ep", "host")


def _wait_for_host(seconds: LayerSeconds, host: float) -> None:
    """What the host's launches take beyond the GPU's own work."""
    busy = sum(seconds[name] for name in ("gemm", "attention", "memory"))
    seconds["host"] = np.maximum(0.0, host - np.asarray(busy))


def gemm_seconds(gemm: Gemm, tokens: Floats, columns: LayoutColumns, links: Links, options: ComputeOptions) -> Floats:
    """Forward seconds of one product on one rank: FLOPs at the reached rate, or its weights and tensors over HBM."""
    gpu, profile = links.gpu, links.profile
    quantized = options.precision not in ("bf16", "fp16", "fp32", "tf32") and gemm.name not in ("router",)
    precision = options.precision if quantized or options.precision in ("fp32", "tf32") else "bf16"
    peak = gpu.rate(precision) * profile.gemm_fraction.get(precision, profile.gemm_fraction["bf16"])
    split = columns.etp if gemm.experts else columns.tp
    wide = gemm.n / split if gemm.cut == "column" else np.full(len(columns), float(gemm.n))
    deep = gemm.k / split if gemm.cut == "row" else np.full(len(columns), float(gemm.k))
    if gemm.experts:
        rows = tokens * gemm.times * columns.etp / columns.tp * options.moe_imbalance
        local = gemm.experts / columns.ep
        fill = rows / local
        usable = profile.grouped_gemm_fraction * fill / (fill + TILE_M / 2)
        weights = local
    else:
        rows, usable, weights = tokens * gemm.times, np.ones(len(columns)), np.ones(len(columns))
    usable = usable * wave_fraction(rows, wide, gpu.sms) * deep / (deep + K_RAMP)
    size = 1.0 if quantized else 2.0
    traffic = (rows * deep + weights * wide * deep) * size + rows * wide * 2.0
    reached = gpu.hbm_bytes_per_s * profile.hbm_fraction
    return np.asarray(np.maximum(2.0 * rows * wide * deep / (peak * usable), traffic / reached) + profile.kernel_launch_s)


def wave_fraction(rows: ArrayLike, wide: ArrayLike, sms: int) -> Floats:
    """Share of the tiles' slots that have work: the last wave is half full on average."""
    tiles = np.ceil(np.asarray(rows) / TILE_M) * np.ceil(np.asarray(wide) / TILE_N)
    waves = tiles / sms
    return np.asarray(waves / (waves + 0.5))


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
    elif isinstance(ffn, MoeFfn):
        total = total + _moe_moved(ffn, hidden, columns, options)
    return np.asarray(total)


def _moe_moved(ffn: MoeFfn, hidden: int, columns: LayoutColumns, options: ComputeOptions) -> Floats:
    """Permutation and its inverse on both sides of the exchange, activation, router scores."""
    into = ffn.expert_input(hidden)
    routed = ffn.topk * (8.0 * into + 2.0 * (ffn.up_width + ffn.size)) * options.moe_imbalance
    beside = 2.0 * 3.0 * (ffn.shared_size + ffn.parallel_dense_size) / columns.tp
    return np.asarray((routed + 12.0 * ffn.experts) / columns.sequence_split + beside)


def _tp_seconds(kind: LayerKind, hidden: int, tokens: Floats, columns: LayoutColumns, links: Links) -> tuple[Floats, Floats]:
    """Tensor-parallel exchanges: two a part with sequence parallelism (gather and scatter), one sum without.

    Backward gathers the input once more for the weight gradient. Expert parts exchange by `ep` instead.
    """
    parts = (1 if kind.mixer else 0) + (1 if isinstance(kind.ffn, DenseFfn) or _has_shared(kind) else 0)
    size = tokens * hidden * 2.0
    local = ranks_in_domain(columns.tp, np.ones(len(columns)), links.domain)

    def one(op: str) -> Floats:
        return _collectives[op](size, columns.tp, local, links)

    gather, scatter, reduce = one("all_gather"), one("reduce_scatter"), one("all_reduce")
    forward = np.where(columns.sequence_parallel, gather + scatter, reduce) * parts
    backward = np.where(columns.sequence_parallel, 2.0 * gather + scatter, reduce) * parts
    return np.asarray(forward), np.asarray(backward)


def _has_shared(kind: LayerKind) -> bool:
    return isinstance(kind.ffn, MoeFfn) and kind.ffn.shared_size + kind.ffn.parallel_dense_size > 0


_collectives: dict[str, Callable[[Floats, Floats, Floats, Links], Floats]] = {
    "all_gather": lambda size, n, k, links: collective_s("all_gather", size, n, k, links),
    "reduce_scatter": lambda size, n, k, links: collective_s("reduce_scatter", size, n, k, links),
    "all_reduce": lambda size, n, k, links: collective_s("all_reduce", size, n, k, links),
}


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
    into = kind.ffn.expert_input(hidden)
    copies = tokens / columns.tp * kind.ffn.topk * into * options.moe_imbalance
    local = ranks_in_domain(columns.ep, columns.etp, links.domain)
    out = collective_s("all_to_all", copies * options.dispatch_bytes, columns.ep, local, links)
    back = collective_s("all_to_all", copies * 2.0, columns.ep, local, links)
    peers = ranks_in_domain(columns.etp, np.ones(len(columns)), links.domain)
    gathered = collective_s("all_gather", copies * 2.0 * columns.etp, columns.etp, peers, links)
    return np.asarray(out + back + 2.0 * gathered)
