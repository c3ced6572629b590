"""Everything that Megatron-core is told, derived from the model, the layout and the options: one value, with a text form.

Field names are Megatron-core 0.19's own (TransformerConfig, DistributedDataParallelConfig, OptimizerConfig), so that its
documentation explains them. What is not named here keeps Megatron's default.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from miles_plan.backends.megatron_engine.options import MegatronEngineOptions
from miles_plan.backends.megatron_engine.ranks import chunk_layers
from miles_plan.backends.megatron_engine.weight_map import padded_vocab_size
from miles_plan.backends.training.decoder_config import DecoderConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArguments:
    """The model's shape."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    ffn_hidden_size: int
    padded_vocab_size: int
    max_sequence_length: int
    layernorm_epsilon: float
    qk_layernorm: bool
    add_qkv_bias: bool
    share_embeddings_and_output_weights: bool
    normalization: str = "RMSNorm"
    activation_func: str = "silu"
    gated_linear_unit: bool = True
    add_bias_linear: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeArguments:
    """The experts. No auxiliary loss and no dropped tokens: the policy gradient alone moves the router."""

    num_moe_experts: int
    moe_layer_freq: tuple[int, ...]
    moe_router_topk: int
    moe_ffn_hidden_size: int
    moe_router_pre_softmax: bool  # softmax over all experts and then the best, not renormalised
    moe_grouped_gemm: bool
    moe_permute_fusion: bool
    moe_router_dtype: str = "fp32"
    moe_router_load_balancing_type: str = "none"
    moe_aux_loss_coeff: float = 0.0
    moe_token_dispatcher_type: str = "alltoall"
    moe_enable_routing_replay: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelArguments:
    """How the model is spread. pipeline_layout: what each chunk holds, in model order; empty without stages."""

    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    virtual_pipeline_model_parallel_size: int | None
    context_parallel_size: int
    expert_model_parallel_size: int
    expert_tensor_parallel_size: int
    sequence_parallel: bool
    pipeline_layout: tuple[tuple[str, ...], ...]
    variable_seq_lengths: bool  # micro-batches are packed to a token budget: stages tell each other how long each is
    batch_p2p_comm: bool
    overlap_p2p_comm: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionArguments:
    """Arithmetic and recomputation."""

    params_dtype: str
    bf16: bool
    fp8: str | None
    fp8_recipe: str
    recompute_granularity: str | None
    recompute_method: str | None
    recompute_num_layers: int | None
    recompute_modules: tuple[str, ...]
    deterministic_mode: bool
    apply_rope_fusion: bool
    bias_activation_fusion: bool
    gradient_accumulation_fusion: bool
    transformer_impl: str
    layer_spec: str
    device: str
    attention_softmax_in_fp32: bool = True
    calculate_per_token_loss: bool = True  # our losses carry their own normalisation: gradients are summed, never averaged


@dataclass(frozen=True, slots=True, kw_only=True)
class DataParallelArguments:
    """Gradients: summed in float32, each data-parallel rank keeping the part whose optimizer state it owns."""

    use_distributed_optimizer: bool  # Megatron's is for GPUs only
    grad_reduce_in_fp32: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronArguments:
    """All of it. moe is None for a dense model."""

    model: ModelArguments
    moe: MoeArguments | None
    parallel: ParallelArguments
    precision: PrecisionArguments
    data_parallel: DataParallelArguments

    def to_text(self) -> str:
        """One `part.name = value` a line, in the order of the declarations."""
        return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        for part in ("model", "moe", "parallel", "precision", "data_parallel"):
            held = getattr(self, part)
            if held is not None:
                yield from (f"{part}.{name} = {value}" for name, value in asdict(held).items())


def derive_arguments(config: DecoderConfig, options: MegatronEngineOptions) -> MegatronArguments:
    """What this model under these options means to Megatron; a pure function."""
    fused = options.layers == "transformer_engine"
    return MegatronArguments(
        model=_model(config, options),
        moe=_moe(config, fused) if config.moe_layers else None,
        parallel=_parallel(config, options),
        precision=_precision(options, fused),
        data_parallel=DataParallelArguments(use_distributed_optimizer=options.device == "cuda"),
    )


def _model(config: DecoderConfig, options: MegatronEngineOptions) -> ModelArguments:
    return ModelArguments(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.intermediate_size,
        padded_vocab_size=padded_vocab_size(config.vocab_size, options.layout.tp, options.layers),
        max_sequence_length=config.max_positions,
        layernorm_epsilon=config.rms_norm_epsilon,
        qk_layernorm=config.query_key_norm,
        add_qkv_bias=config.qkv_bias,
        share_embeddings_and_output_weights=config.tied_embeddings,
    )


def _moe(config: DecoderConfig, fused: bool) -> MoeArguments:
    return MoeArguments(
        num_moe_experts=config.num_experts,
        moe_layer_freq=tuple(int(layer in config.moe_layers) for layer in range(config.num_layers)),
        moe_router_topk=config.experts_per_token,
        moe_ffn_hidden_size=config.expert_intermediate_size,
        moe_router_pre_softmax=not config.normalise_gates,
        moe_grouped_gemm=fused,
        moe_permute_fusion=fused,
    )


def _parallel(config: DecoderConfig, options: MegatronEngineOptions) -> ParallelArguments:
    layout = options.layout
    spans = chunk_layers(layout, config.num_layers)
    stages = []
    for number, span in enumerate(spans):
        first, last = ("embedding",) * (number == 0), ("loss",) * (number == len(spans) - 1)
        stages.append((*first, *("decoder",) * len(span), *last))
    return ParallelArguments(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp if config.moe_layers else layout.tp,
        sequence_parallel=layout.sequence_parallel,
        pipeline_layout=tuple(stages) if layout.pp > 1 else (),
        # Interleaved stages send both ways at once. With two stages both neighbours are the same rank, and Megatron 0.19 then
        # confuses batched messages, lengths among them (seen as a micro-batch that got its neighbour's length).
        variable_seq_lengths=layout.vpp == 1,
        batch_p2p_comm=layout.vpp == 1,
        overlap_p2p_comm=layout.vpp > 1,
    )


def _precision(options: MegatronEngineOptions, fused: bool) -> PrecisionArguments:
    recompute: dict[str, Any] = {"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None}
    if options.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif options.recompute == "selective":
        recompute["recompute_granularity"] = "selective"
    return PrecisionArguments(
        params_dtype=options.dtype,
        bf16=options.dtype == "bfloat16",
        fp8="e4m3" if options.fp8 else None,
        fp8_recipe="blockwise" if options.fp8 else "delayed",
        recompute_modules=options.recompute_modules if options.recompute == "selective" else (),
        deterministic_mode=options.deterministic,
        apply_rope_fusion=fused,
        bias_activation_fusion=fused,
        gradient_accumulation_fusion=fused,
        transformer_impl="transformer_engine" if fused else "local",
        layer_spec=options.layers,
        device=options.device,
        **recompute,
    )
