"""The decoder as functions of its weights: a packed forward for training, a paged one for rollout, the same arithmetic in both.

Every op is batch-invariant, so a token's hidden state has the same bits in either forward, for any batch, chunk, page size
and number of tensor- or expert-parallel ranks. Norms see rows, attention sees a token's own past, and all sums are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from miles_plan.backends.torch_engine.experts import Routing, experts_layer
from miles_plan.backends.torch_engine.mesh import Mesh
from miles_plan.backends.torch_engine.parallel import enter_tensor_parallel
from miles_plan.backends.torch_engine.prepared import PreparedWeights
from miles_plan.backends.torch_engine.weights import Shard, Weights, vocab_range
from miles_plan.backends.training.decoder_config import DecoderConfig
from miles_plan.kernels.attention import (
    PackedSequences,
    PreparedKeyValue,
    packed_attention,
    paged_attention,
    prepare_keys_values,
)
from miles_plan.kernels.embedding import embedding
from miles_plan.kernels.log_prob import log_prob
from miles_plan.kernels.matmul import matmul, row_parallel_matmul
from miles_plan.kernels.rms_norm import rms_norm
from miles_plan.kernels.rope import rope, rope_table
from miles_plan.kernels.swiglu import swiglu

Recompute = Literal["none", "selective", "full"]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

_MAX_LOGITS = 1 << 23  # logits worked on at a time: 64 MiB in float64


@dataclass(frozen=True, slots=True)
class StageOutput:
    """What a pipeline stage hands on: hidden states [M, H] before the final norm, and where its tokens went.

    routing: int64 [M, MoE layers of the stage, top_k], or None without any; mismatches and compared count (token, layer)
    pairs when experts were replayed.
    """

    hidden: Tensor
    routing: Tensor | None
    mismatches: int
    compared: int


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """New tokens of several sequences on their way into the KV cache.

    tokens, positions int64 [M]; page, offset int64 [M]: where each token's key and value go; page_table int64 [B, P] and
    context_tokens int64 [B] as in `paged_attention`; sequences: the new tokens of each, None when every one has one.
    """

    tokens: Tensor
    positions: Tensor
    page: Tensor
    offset: Tensor
    page_table: Tensor
    context_tokens: Tensor
    sequences: PackedSequences | None


class Decoder:
    """One rank's part of the model, without its weights: those are passed to every call."""

    def __init__(self, config: DecoderConfig, shard: Shard, mesh: Mesh, *, device: str = "cpu") -> None:
        self.config = config
        self.shard = shard
        self.mesh = mesh
        self.moe_layers = tuple(layer for layer in config.moe_layers if layer in shard.layers)
        table = rope_table(config.inverse_frequencies, config.max_positions, scaling=config.rope_scaling)
        self._rotations = table.to(device)
        self._vocab = vocab_range(config.vocab_size, shard.tp_rank, shard.tp)

    def embed(self, weights: Weights, tokens: Tensor) -> Tensor:
        """Hidden states [M, H] of token ids int64 [M]; first stage only. Collective over tp."""
        table = weights["model.embed_tokens.weight"]
        return embedding(tokens, table, vocab_start=self._vocab[0], group=self.mesh.tp)

    def forward_packed(
        self,
        weights: Weights,
        prepared: PreparedWeights,
        hidden: Tensor,
        sequences: PackedSequences,
        *,
        replay: Tensor | None = None,
        recompute: Recompute = "none",
    ) -> StageOutput:
        """This stage's layers over packed sequences: hidden [M, H] -> [M, H]. Differentiable. Collective over tp and ep.

        `replay` int64 [M, MoE layers of the stage, top_k] takes the place of the routers' choices. ValueError when it does
        not fit or names an expert that does not exist.
        """
        self._check_replay(replay, hidden.shape[0])
        rotation = self._rotations[sequences.positions]
        scale, max_context = self.config.softmax_scale, self.config.max_positions

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return packed_attention(queries, keys, values, sequences, scale=scale, max_context=max_context)

        return self._run_layers(weights, prepared, hidden, rotation, lambda _: attend, replay, recompute)

    @torch.no_grad()
    def forward_paged(
        self, weights: Weights, prepared: PreparedWeights, batch: PagedBatch, pools: Sequence[PreparedKeyValue]
    ) -> StageOutput:
        """All layers over new tokens, reading and filling the KV cache `pools` (one per layer). Collective over tp."""
        return self.layers_paged(weights, prepared, self.embed(weights, batch.tokens), batch, pools)

    @torch.no_grad()
    def layers_paged(
        self,
        weights: Weights,
        prepared: PreparedWeights,
        hidden: Tensor,
        batch: PagedBatch,
        pools: Sequence[PreparedKeyValue],
    ) -> StageOutput:
        """As `forward_paged`, from what enters the first layer, [M, H]."""
        rotation = self._rotations[batch.positions]

        def attend_in(layer: int) -> Attend:
            return lambda queries, keys, values: self._attend_paged(batch, pools[layer], queries, keys, values)

        return self._run_layers(weights, prepared, hidden, rotation, attend_in, None, "none")

    def logits(self, weights: Weights, prepared: PreparedWeights, hidden: Tensor) -> Tensor:
        """Final norm and output layer: float32 [M, own share of the vocabulary]; last stage only."""
        normed = rms_norm(hidden, weights["model.norm.weight"], epsilon=self.config.rms_norm_epsilon)
        name = "model.embed_tokens.weight" if self.config.tied_embeddings else "lm_head.weight"
        table = weights[name]
        inputs = enter_tensor_parallel(normed, self.mesh.tp)
        return matmul(inputs, table, prepared=prepared.get(name, table), out_dtype=torch.float32)

    @torch.no_grad()
    def likeliest(self, weights: Weights, prepared: PreparedWeights, hidden: Tensor) -> Tensor:
        """The likeliest token after each of hidden states [M, H], int64 [M]. Collective over tp."""
        blocks = torch.split(hidden, self._rows_of_logits)
        found = [self.gather_logits(self.logits(weights, prepared, block)).argmax(dim=-1) for block in blocks]
        return torch.cat(found)

    def log_probs(
        self, weights: Weights, prepared: PreparedWeights, hidden: Tensor, targets: Tensor, *, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probs of targets int64 [M] after hidden states [M, H], and entropies, float32 [M]. Collective over tp.

        Differentiable. Rows go in blocks, each recomputed in the backward where there are several, so the logits of a
        large vocabulary never stand in memory together.
        """

        def block_log_probs(block: Tensor, block_targets: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.logits(weights, prepared, block)
            return self.log_probs_of_logits(logits, block_targets, temperature=temperature)

        rows = self._rows_of_logits
        if len(targets) <= rows:
            return block_log_probs(hidden, targets)
        blocks = []
        for start in range(0, len(targets), rows):
            block = hidden[start : start + rows], targets[start : start + rows]
            if torch.is_grad_enabled():
                blocks.append(checkpoint(block_log_probs, *block, use_reentrant=False, preserve_rng_state=False))
            else:
                blocks.append(block_log_probs(*block))
        log_probs, entropies = zip(*blocks, strict=True)
        return torch.cat(log_probs), torch.cat(entropies)

    def log_probs_of_logits(self, logits: Tensor, targets: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
        """As `log_probs`, from this rank's logits."""
        return log_prob(
            logits,
            targets,
            temperature=temperature,
            vocab_size=self.config.vocab_size,
            vocab_start=self._vocab[0],
            group=self.mesh.tp,
        )

    def gather_logits(self, logits: Tensor) -> Tensor:
        """Logits over the whole vocabulary [M, V] on every tp rank, from each rank's share."""
        tp = self.mesh.tp
        if tp.size == 1:
            return logits
        shares = [vocab_range(self.config.vocab_size, rank, tp.size) for rank in range(tp.size)]
        widths = [stop - start for start, stop in shares]
        padded = torch.nn.functional.pad(logits, (0, max(widths) - logits.shape[1]))
        return torch.cat([part[:, :width] for part, width in zip(tp.all_gather(padded), widths, strict=True)], dim=1)

    @property
    def _rows_of_logits(self) -> int:
        """Rows whose logits stand in memory together; the same on all tp ranks, so that they take the same blocks."""
        return max(1, _MAX_LOGITS // -(-self.config.vocab_size // self.mesh.tp.size))

    def _run_layers(
        self,
        weights: Weights,
        prepared: PreparedWeights,
        hidden: Tensor,
        rotation: Tensor,
        attend_in: Callable[[int], Attend],
        replay: Tensor | None,
        recompute: Recompute,
    ) -> StageOutput:
        routings: list[Routing] = []
        for layer in self.shard.layers:
            column = self.moe_layers.index(layer) if layer in self.moe_layers else None
            own_replay = None if replay is None or column is None else replay[:, column]

            def attention(x: Tensor, layer: int = layer) -> Tensor:
                return self._attention(weights, prepared, layer, x, rotation, attend_in(layer))

            def feed_forward(
                x: Tensor, layer: int = layer, own_replay: Tensor | None = own_replay
            ) -> tuple[Tensor, Routing | None]:
                return self._feed_forward(weights, prepared, layer, x, own_replay)

            hidden, routing = _layer(attention, feed_forward, hidden, recompute)
            if routing is not None:
                routings.append(routing)
        record = torch.stack([routing.experts for routing in routings], dim=1) if routings else None
        compared = 0 if replay is None else len(routings) * hidden.shape[0]
        return StageOutput(hidden, record, sum(routing.mismatches for routing in routings), compared)

    def _attention(
        self,
        weights: Weights,
        prepared: PreparedWeights,
        layer: int,
        hidden: Tensor,
        rotation: Tensor,
        attend: Attend,
    ) -> Tensor:
        config, tp = self.config, self.mesh.tp
        name = f"model.layers.{layer}.self_attn"
        epsilon = config.rms_norm_epsilon
        x = rms_norm(hidden, weights[f"model.layers.{layer}.input_layernorm.weight"], epsilon=epsilon)
        weight = weights[f"{name}.qkv_proj.weight"]
        ready = prepared.get(f"{name}.qkv_proj.weight", weight)
        fused = matmul(enter_tensor_parallel(x, tp), weight, weights.get(f"{name}.qkv_proj.bias"), prepared=ready)
        heads, kv_heads = config.num_heads // tp.size, config.num_kv_heads // tp.size
        by_head = fused.view(-1, heads + 2 * kv_heads, config.head_dim)
        queries, keys, values = torch.split(by_head, [heads, kv_heads, kv_heads], dim=1)
        if config.query_key_norm:
            # each rank norms its own heads with the same weight, whose gradient is therefore a sum over ranks
            queries = rms_norm(queries, enter_tensor_parallel(weights[f"{name}.q_norm.weight"], tp), epsilon=epsilon)
            keys = rms_norm(keys, enter_tensor_parallel(weights[f"{name}.k_norm.weight"], tp), epsilon=epsilon)
        attended = attend(rope(queries, rotation), rope(keys, rotation), values).flatten(1)
        return self._row_parallel(weights, prepared, f"{name}.o_proj", attended, config.num_heads * config.head_dim)

    def _feed_forward(
        self, weights: Weights, prepared: PreparedWeights, layer: int, hidden: Tensor, replay: Tensor | None
    ) -> tuple[Tensor, Routing | None]:
        config, mesh = self.config, self.mesh
        name = f"model.layers.{layer}"
        x = rms_norm(hidden, weights[f"{name}.post_attention_layernorm.weight"], epsilon=config.rms_norm_epsilon)
        if layer in self.moe_layers:
            return experts_layer(config, weights, prepared, f"{name}.mlp", x, replay, tp=mesh.tp, ep=mesh.ep)
        up_name = f"{name}.mlp.gate_up_proj.weight"
        weight = weights[up_name]
        gate_up = matmul(enter_tensor_parallel(x, mesh.tp), weight, prepared=prepared.get(up_name, weight))
        inner = swiglu(*gate_up.chunk(2, dim=-1))
        return self._row_parallel(weights, prepared, f"{name}.mlp.down_proj", inner, config.intermediate_size), None

    def _row_parallel(self, weights: Weights, prepared: PreparedWeights, name: str, x: Tensor, k_full: int) -> Tensor:
        tp = self.mesh.tp
        weight = weights[f"{name}.weight"]
        ready = prepared.get(f"{name}.weight", weight, k_full=k_full, group=tp)
        return row_parallel_matmul(x, weight, weights.get(f"{name}.bias"), k_full=k_full, group=tp, prepared=ready)

    def _attend_paged(self, batch: PagedBatch, pool: PreparedKeyValue, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        fresh = prepare_keys_values(keys, values)
        for cached, new in ((pool.keys, fresh.keys), (pool.values, fresh.values), (pool.value_scale, fresh.value_scale)):
            cached[batch.page, :, batch.offset] = new
        scale, max_context = self.config.softmax_scale, self.config.max_positions
        table, context = batch.page_table, batch.context_tokens
        if batch.sequences is None:
            return paged_attention(queries[:, None], pool, table, context, scale=scale, max_context=max_context)[:, 0]
        packed = torch.empty_like(queries)
        for bucket in batch.sequences.buckets:
            own = bucket.sequences
            attended = paged_attention(
                queries[bucket.rows], pool, table[own], context[own], scale=scale, max_context=max_context
            )
            packed[bucket.tokens] = attended.flatten(0, 1)[bucket.slots]
        return packed

    def _check_replay(self, replay: Tensor | None, num_tokens: int) -> None:
        if replay is None or not self.moe_layers:
            return
        shape = (num_tokens, len(self.moe_layers), self.config.experts_per_token)
        if tuple(replay.shape) != shape or replay.dtype != torch.int64:
            raise ValueError(f"replay must be int64 {list(shape)}, got {replay.dtype} {list(replay.shape)}")
        if num_tokens and not 0 <= int(replay.min()) <= int(replay.max()) < self.config.num_experts:
            raise ValueError(f"replay names expert {int(replay.max())}, the model has {self.config.num_experts}")


def _layer(
    attention: Callable[[Tensor], Tensor],
    feed_forward: Callable[[Tensor], tuple[Tensor, Routing | None]],
    hidden: Tensor,
    recompute: Recompute,
) -> tuple[Tensor, Routing | None]:
    def whole(x: Tensor) -> tuple[Tensor, Routing | None]:
        x = x + attention(x)
        out, routing = feed_forward(x)
        return x + out, routing

    if recompute == "none" or not torch.is_grad_enabled():
        return whole(hidden)
    if recompute == "full":
        result: tuple[Tensor, Routing | None] = checkpoint(whole, hidden, use_reentrant=False, preserve_rng_state=False)
        return result
    hidden = hidden + checkpoint(attention, hidden, use_reentrant=False, preserve_rng_state=False)
    out, routing = feed_forward(hidden)
    return hidden + out, routing
