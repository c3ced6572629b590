"""What this engine cannot do with a layout and a model, said before anything is built."""

from __future__ import annotations

from collections.abc import Iterator

from miles_plan.backends.megatron_engine.options import LayerSpec
from miles_plan.backends.megatron_engine.ranks import chunk_layers
from miles_plan.backends.megatron_engine.weight_map import VOCAB_MULTIPLE
from miles_plan.backends.training.decoder_config import DecoderConfig
from miles_plan.ir.layout import TrainLayout

VOCAB_CHUNKS = 16  # of miles_plan.kernels.cuda.log_prob, which this check does not import: it loads torch


def layout_problems(config: DecoderConfig, layout: TrainLayout, *, layers: LayerSpec = "transformer_engine") -> Iterator[str]:
    """Every reason, each with the sizes that collide; empty where the layout can run."""
    if problems := list(layout.problems()):
        yield from problems
        return
    yield from _divisions(config, layout)
    yield from _stages(config, layout)
    if layers == "batch_invariant":
        yield from _invariant(config, layout)
    if config.rope_scaling != 1.0:
        yield f"RoPE that scales cos and sin by {config.rope_scaling:.4g} (yarn); Megatron's rotary embedding does not"
    if config.output_bias:
        yield "a bias on the attention output (attention_bias); Megatron's add_bias_linear would put one on every layer"
    if layout.cp > 1 and layers != "transformer_engine":
        yield f"cp={layout.cp} with {layers} layers; context parallel attention is Transformer Engine's"
    if layout.sequence_parallel and layers == "local":
        yield "sequence_parallel with local layers; Megatron's torch norms do not take it"


def _invariant(config: DecoderConfig, layout: TrainLayout) -> Iterator[str]:
    """Log-probs are sums over sixteenths of the vocabulary, so that any tp adds in one order."""
    if config.vocab_size % VOCAB_MULTIPLE:
        yield f"a vocabulary of {config.vocab_size} for the same bits (allowed: multiples of {VOCAB_MULTIPLE})"
    if VOCAB_CHUNKS % layout.tp:
        yield f"tp={layout.tp} for the same bits (allowed: sizes that divide {VOCAB_CHUNKS})"
    if layout.etp > 1 and config.moe_layers:
        yield f"etp={layout.etp} for the same bits (allowed: 1)"
    if config.qkv_bias:
        yield "a bias on query, key and value for the same bits; our kernels have none"


def _divisions(config: DecoderConfig, layout: TrainLayout) -> Iterator[str]:
    sizes = [("tp", layout.tp, "attention heads", config.num_heads), ("tp", layout.tp, "key-value heads", config.num_kv_heads)]
    if len(config.moe_layers) < config.num_layers:
        sizes.append(("tp", layout.tp, "intermediate_size", config.intermediate_size))
    if config.moe_layers:
        sizes.append(("ep", layout.ep, "experts", config.num_experts))
        sizes.append(("etp", layout.etp, "moe_intermediate_size", config.expert_intermediate_size))
        if layout.tp > 1 and not layout.sequence_parallel:
            yield f"tp={layout.tp} without sequence_parallel for a mixture of experts: each rank would route every token"
    elif layout.ep > 1 or layout.etp not in (1, layout.tp):
        yield f"ep={layout.ep}, etp={layout.etp} for a model without experts (allowed: ep=1)"
    for name, size, what, total in sizes:
        if total % size:
            yield f"{name}={size} does not divide {what} = {total}"


def _stages(config: DecoderConfig, layout: TrainLayout) -> Iterator[str]:
    chunks = layout.pp * layout.vpp
    if layout.stage_layers and sum(layout.stage_layers) != config.num_layers:
        yield f"stage_layers add up to {sum(layout.stage_layers)}, the model has {config.num_layers} layers"
    elif any(not len(span) for span in chunk_layers(layout, config.num_layers)):
        yield f"pp={layout.pp}, vpp={layout.vpp}: {config.num_layers} layers leave some of {chunks} chunks empty"
