"""A mixture-of-experts feed-forward layer, its experts spread over ranks.

Each token has top_k slots. Slots are sorted by expert, sent to the rank that owns it, computed, sent back and added per
token in slot order. A slot's row is computed alone (exact sums), so neither the spread nor the other tokens change a bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from miles_plan.backends.torch_engine.parallel import enter_tensor_parallel, exchange_rows
from miles_plan.backends.torch_engine.prepared import PreparedWeights
from miles_plan.backends.torch_engine.weights import Weights
from miles_plan.backends.training.decoder_config import DecoderConfig
from miles_plan.kernels.collectives import RankGroup
from miles_plan.kernels.grouped_matmul import grouped_matmul
from miles_plan.kernels.matmul import matmul
from miles_plan.kernels.moe_combine import moe_combine
from miles_plan.kernels.router import choose_experts, count_mismatches, gate_weights
from miles_plan.kernels.swiglu import swiglu


@dataclass(frozen=True, slots=True)
class Routing:
    """Where the tokens of one layer went: experts int64 [M, top_k]; mismatches: tokens whose own choice was another set."""

    experts: Tensor
    mismatches: int


def experts_layer(
    config: DecoderConfig,
    weights: Weights,
    prepared: PreparedWeights,
    name: str,
    x: Tensor,
    replay: Tensor | None,
    *,
    tp: RankGroup,
    ep: RankGroup,
) -> tuple[Tensor, Routing]:
    """The layer `name` ("model.layers.3.mlp") on x [M, H]; `replay` int64 [M, top_k] takes the place of the router's choice.

    Gate weights are computed from the router's logits at the experts used, so gradients reach the router. Collective
    over tp and ep.
    """
    gate = weights[f"{name}.gate.weight"]
    logits = matmul(x, gate, prepared=prepared.get(f"{name}.gate.weight", gate), out_dtype=torch.float32)
    chosen = choose_experts(logits, config.experts_per_token)
    experts = chosen if replay is None else replay
    gates = gate_weights(logits, experts, normalise=config.normalise_gates)
    order = torch.sort(experts.flatten(), stable=True).indices
    counts = torch.bincount(experts.flatten(), minlength=config.num_experts)
    rows = enter_tensor_parallel(x, tp).index_select(0, order // config.experts_per_token)
    rows = _run_spread(config, weights, prepared, name, rows, counts, tp, ep)
    slots = rows.index_select(0, _inverse(order)).view(*experts.shape, x.shape[-1])
    mismatches = 0 if replay is None else count_mismatches(chosen, replay)
    return moe_combine(slots, gates), Routing(experts, mismatches)


def _run_spread(
    config: DecoderConfig,
    weights: Weights,
    prepared: PreparedWeights,
    name: str,
    rows: Tensor,
    counts: Tensor,
    tp: RankGroup,
    ep: RankGroup,
) -> Tensor:
    """Rows sorted by expert, through the ranks that own the experts, and back in the same order."""
    if ep.size == 1:
        return _run_local(config, weights, prepared, name, rows, counts, tp)
    sending = counts.view(ep.size, -1)
    receiving = ep.all_to_all(sending, [1] * ep.size, [1] * ep.size)
    send_rows, receive_rows = sending.sum(dim=1).tolist(), receiving.sum(dim=1).tolist()
    received = exchange_rows(rows, send_rows, receive_rows, ep)
    local_experts = torch.arange(sending.shape[1], device=rows.device).repeat(ep.size)
    by_expert = torch.sort(local_experts.repeat_interleave(receiving.flatten()), stable=True).indices
    computed = _run_local(config, weights, prepared, name, received.index_select(0, by_expert), receiving.sum(dim=0), tp)
    return exchange_rows(computed.index_select(0, _inverse(by_expert)), receive_rows, send_rows, ep)


def _run_local(
    config: DecoderConfig,
    weights: Weights,
    prepared: PreparedWeights,
    name: str,
    rows: Tensor,
    counts: Tensor,
    tp: RankGroup,
) -> Tensor:
    """down(silu(gate x) * up x) of rows sorted by local expert; the inner dimension is sharded over tp."""
    per_expert = counts.tolist()
    up_name, down_name = f"{name}.experts.gate_up_proj", f"{name}.experts.down_proj"
    up, down = weights[up_name], weights[down_name]
    gate_up = grouped_matmul(rows, up, per_expert, prepared=prepared.get(up_name, up))
    inner = swiglu(*gate_up.chunk(2, dim=-1))
    k_full = config.expert_intermediate_size
    ready = prepared.get(down_name, down, k_full=k_full, group=tp)
    return grouped_matmul(inner, down, per_expert, k_full=k_full, group=tp, prepared=ready)


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
