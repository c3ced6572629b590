"""Megatron-core's layers on this package's kernels: its own classes, parameters and checkpoints, other arithmetic.

Needs megatron-core (written against 0.19.2), which `hooks_megatron` imports only when asked to. Each class overrides `forward`
alone, so what builds, shards, saves and loads a model does not notice.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear as MegatronColumnParallelLinear
from megatron.core.tensor_parallel.layers import RowParallelLinear as MegatronRowParallelLinear
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding as MegatronVocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    all_to_all,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import mlp
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer as MegatronMoELayer
from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router import TopKRouter as MegatronTopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from .attention import attention
from .embedding import embedding
from .expert_rows import expert_order, expert_rows
from .experts import swiglu_experts
from .matmul import matmul
from .moe_combine import moe_combine
from .parallel_linear import column_parallel_linear, row_parallel_linear
from .router import router
from .swiglu import swiglu

CAUSAL_MASKS = ("causal", "padding_causal")


# What these layers cover: a TransformerConfig's fields and the one value of each. A field that a release lacks is not asked for.
COVERED: dict[str, Any] = {
    "add_bias_linear": False, "add_qkv_bias": False, "normalization": "RMSNorm", "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu, "activation_func_clamp_value": None, "glu_linear_offset": 0.0,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "softmax_type": "vanilla", "apply_query_key_layer_scaling": False,
    "window_attn_skip_freq": None, "qk_clip": False, "context_parallel_size": 1, "fp8": None,
    "gradient_accumulation_fusion": False, "defer_embedding_wgrad_compute": False, "moe_expert_capacity_factor": None,
    "moe_apply_probs_on_input": False,
}  # fmt: skip


def check_config(config: Any) -> None:
    """Raise ValueError for what a TransformerConfig asks and these layers do not do; the message names the field."""
    for name, covered in COVERED.items():
        value = getattr(config, name, covered)
        if value != covered:
            allowed = getattr(covered, "__name__", repr(covered))
            raise ValueError(f"config.{name} is {value!r}; allowed with these kernels: {allowed}")


class ColumnParallelLinear(MegatronColumnParallelLinear):
    """On `column_parallel_linear`."""

    def forward(
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Megatron's; the second result is the bias, which is absent."""
        weight = self.weight if weight is None else weight
        if weight is None or self.bias is not None:
            raise ValueError("weight is None or the layer has a bias; allowed: a weight and no bias")
        out = column_parallel_linear(input_, weight, self.tp_group, sequence_parallel=self.sequence_parallel)
        gather = self.gather_output if runtime_gather_output is None else runtime_gather_output
        return (gather_from_tensor_model_parallel_region(out, group=self.tp_group) if gather else out), None


class RowParallelLinear(MegatronRowParallelLinear):
    """On `row_parallel_linear`."""

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Megatron's, for inputs that are split already; the second result is the bias, which is absent."""
        if self.bias is not None or not self.input_is_parallel:
            raise ValueError("the layer has a bias or input_is_parallel is False; allowed: no bias and split inputs")
        return row_parallel_linear(input_, self.weight, self.tp_group, sequence_parallel=self.sequence_parallel), None


class VocabParallelEmbedding(MegatronVocabParallelEmbedding):
    """On `embedding`: one rank adds a token's row, the others zeros, so the network's order cannot show."""

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        """ids [batch, tokens] to [batch, tokens, hidden], or [tokens / ranks, batch, hidden] with sequence parallelism."""
        out = embedding(input_, self.weight, self.vocab_start_index)
        if self.reduce_scatter_embeddings:
            out = reduce_scatter_to_sequence_parallel_region(out.transpose(0, 1).contiguous(), group=self.tp_group)
        elif self.tp_group.size() > 1:
            out = reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        return out


class CoreAttention(torch.nn.Module):
    """Causal self-attention with the constructor and call that Megatron-core's SelfAttention uses.

    Queries, keys and values are [tokens, batch, heads, D], or packed [tokens, heads, D] with packed_seq_params. A mask tensor
    is not read: attention is causal, inside each packed sequence.
    """

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **options: Any) -> None:
        super().__init__()
        check_config(config)
        if attention_type != "self":
            raise ValueError(f"attention_type is {attention_type!r}; allowed: 'self'")
        self._check_mask(attn_mask_type)
        self.scale = options.get("softmax_scale") or config.softmax_scale
        window = getattr(config, "window_size", None)
        self.window = None if window is None else int(window[0]) + 1
        self.current_max_attn_logits = None  # Megatron's QK clipping looks here

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None, attention_bias: torch.Tensor | None = None, packed_seq_params: Any = None, **_: Any,
    ) -> torch.Tensor:  # fmt: skip
        """[tokens, batch, heads * D], or packed [tokens, heads * D]."""
        self._check_mask(attn_mask_type)
        if attention_bias is not None:
            raise ValueError("attention_bias is given; allowed: None")
        shared: dict[str, Any] = {"scale": self.scale, "window": self.window}
        if packed_seq_params is not None:
            padded = getattr(packed_seq_params, "cu_seqlens_q_padded", None)
            starts = (packed_seq_params.cu_seqlens_q if padded is None else padded).to(torch.int32)
            longest = int(packed_seq_params.max_seqlen_q)
            out = attention(query, key, value, q_starts=starts, max_q_len=longest, **shared)
            return out.flatten(1)
        tokens, batch = query.shape[:2]
        q, k, v = (x.transpose(0, 1).reshape(batch * tokens, *x.shape[2:]) for x in (query, key, value))
        starts = torch.arange(batch + 1, device=q.device, dtype=torch.int32) * tokens
        out = attention(q, k, v, q_starts=starts, max_q_len=tokens, **shared)
        return out.view(batch, tokens, -1).transpose(0, 1).contiguous()

    @staticmethod
    def _check_mask(kind: Any) -> None:
        if kind is not None and kind.name not in CAUSAL_MASKS:
            raise ValueError(f"attn_mask_type is {kind.name}; allowed: {', '.join(CAUSAL_MASKS)}")


class Mlp(mlp.MLP):
    """On `swiglu`, between two parallel linear layers of this file."""

    def forward(
        self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Megatron's, without a bias; experts' outputs are scaled where they are combined, not here."""
        if per_token_scale is not None:
            raise ValueError("per_token_scale is given; allowed: None")
        return self.linear_fc2(swiglu(self.linear_fc1(hidden_states)[0]))  # type: ignore[no-any-return]  # Megatron is untyped here


class SharedExperts(SharedExpertMLP):
    """Experts that every token takes: `swiglu` between two parallel linear layers of this file, and their gate."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[tokens, batch, hidden] to the same."""
        out: torch.Tensor = self.linear_fc2(swiglu(self.linear_fc1(hidden_states)[0]))[0]
        return out * torch.sigmoid(matmul(hidden_states, self.gate_weight)) if self.use_shared_expert_gate else out


class GroupedExperts(SequentialMLP):
    """All experts of a rank as two `grouped_matmul`s. SequentialMLP's one weight an expert is kept, and stacked for each call."""

    def forward(
        self, rows: torch.Tensor, tokens_per_expert: torch.Tensor, permuted_probs: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, None]:
        """Rows sorted by expert to rows; tokens_per_expert int32 [experts]. Nothing is weighted here."""
        if permuted_probs is not None:
            raise ValueError("permuted_probs is given; allowed: None, as moe_combine weights the rows")
        up = torch.stack([expert.linear_fc1.weight for expert in self.local_experts])
        down = torch.stack([expert.linear_fc2.weight for expert in self.local_experts])
        return swiglu_experts(rows, up, down, tokens_per_expert), None


class TopKRouter(MegatronTopKRouter):
    """On `matmul` and `router`: ties to the lower index, Megatron's replay of recorded experts, its auxiliary losses."""

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [tokens, batch, experts], whatever moe_router_dtype says."""
        if self.bias is not None:
            raise ValueError("the router has a bias; allowed: none")
        return matmul(input, self.weight, out_dtype=torch.float32)

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [tokens, experts], zero where not chosen, and the map of the chosen."""
        if self.routing_type in ("sinkhorn", "quantile_balancing"):
            raise ValueError(f"moe_router_load_balancing_type is {self.routing_type!r}; allowed: aux_loss, seq_aux_loss, none")
        tokens, batch = logits.shape[:2]
        logits = logits.view(-1, logits.shape[-1])
        mask = None if padding_mask is None else padding_mask.reshape(-1)
        logits = self.apply_z_loss(logits, padding_mask=mask)
        weights, ids = self._choose(logits)
        dense = torch.zeros_like(logits).scatter(1, ids.long(), weights)
        chosen = torch.zeros(logits.shape, device=logits.device, dtype=torch.bool).scatter(1, ids.long(), True)
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            load, scores = compute_routing_scores_for_aux_loss(logits, self.topk, self.score_function, padding_mask=mask)
            padded = {"with_padding_mask": mask is not None}
            dense = self._apply_aux_loss(dense, scores, load, **padded)
            dense = self._apply_seq_aux_loss(dense, scores, load, tokens, batch, **padded)
            dense = self._apply_global_aux_loss(dense, scores, load, **padded)
        self._apply_expert_bias(chosen, padding_mask=mask)
        return dense, chosen

    def _choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and ids [tokens, top k], from the replay where one is on."""
        sigmoid = self.score_function == "sigmoid"
        options: dict[str, Any] = {
            "scoring": self.score_function, "bias": self.expert_bias,
            "renormalize": self.topk > 1 if sigmoid else not self.config.moe_router_pre_softmax,
            "scale": self.config.moe_router_topk_scaling_factor or 1.0,
        }  # fmt: skip
        if self.config.moe_router_group_topk:
            options |= {"groups": self.config.moe_router_num_groups, "groups_kept": self.config.moe_router_group_topk}

        def choose(scores: torch.Tensor, topk: int, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
            weights, ids = router(scores, topk, **options)
            return weights, ids.long()

        if self.router_replay is None:
            return router(logits, self.topk, **options)
        _, ids = self.router_replay.get_replay_topk(logits, self.topk, None, None, choose)
        return router(logits, self.topk, ids=ids.to(torch.int32).contiguous(), **options)


class MoELayer(MegatronMoELayer):
    """Experts whose outputs are added per token in ascending expert number, on any number of expert-parallel ranks.

    Rows travel one a (token, slot); no rank and no network adds two of them. Token dispatchers of Megatron are not used.
    """

    def forward(
        self, hidden_states: torch.Tensor, intermediate_tensors: Any = None, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, None]:
        """[tokens, batch, hidden] to the same."""
        if intermediate_tensors is not None:
            raise ValueError("intermediate_tensors is given; allowed: None (no captured parts of the layer)")
        if self.config.moe_latent_size or self.shared_expert_overlap or self.experts.tp_group.size() > 1:
            raise ValueError(
                "moe_latent_size, moe_shared_expert_overlap or expert tensor parallelism is on; allowed: none of them"
            )
        if self.attn_tp_group.size() > 1 and not self.config.sequence_parallel:
            raise ValueError("sequence_parallel is False with tensor parallelism and experts; allowed: True")
        mask = None if padding_mask is None else padding_mask.transpose(0, 1).bool()
        dense, chosen = self.router(hidden_states, mask)
        # True sorts before False and ties keep their place: the chosen experts in ascending order
        ids = torch.argsort(~chosen, dim=1, stable=True)[:, : self.router.topk]
        weights = dense.gather(1, ids).float()
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        order = expert_order(ids, self.config.num_moe_experts)
        sent = expert_rows(rows, order)
        back = self._on_ranks(sent, order.counts) if self.ep_group.size() > 1 else self.experts(sent, order.counts)[0]
        out = moe_combine(back, order.place, weights.contiguous()).view(hidden_states.shape)
        return (out + self.shared_experts(hidden_states) if self.use_shared_expert else out), None

    def _on_ranks(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Rows sorted by expert through the ranks that own the experts, and back to the same order."""
        ranks = self.ep_group.size()
        theirs = torch.empty_like(counts)
        torch.distributed.all_to_all_single(theirs, counts, group=self.ep_group)
        by_rank = theirs.view(ranks, -1)  # [source rank, local expert]
        send, receive = counts.view(ranks, -1).sum(1).tolist(), by_rank.sum(1).tolist()
        arrived = all_to_all(self.ep_group, rows, receive, send)
        local = torch.arange(by_rank.shape[1], device=rows.device).repeat(ranks)
        order = expert_order(local.repeat_interleave(by_rank.flatten())[:, None], by_rank.shape[1])
        out, _ = self.experts(expert_rows(arrived, order), order.counts)
        return all_to_all(self.ep_group, out.index_select(0, order.place[:, 0].long()), send, receive)  # type: ignore[no-any-return]  # Megatron is untyped here
