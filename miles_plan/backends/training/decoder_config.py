"""What the decoder must know of a model, read from Hugging Face's config.json."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A pre-norm decoder with grouped-query attention, RoPE and SwiGLU, dense or mixture-of-experts layer by layer.

    moe_layers lists the layers with experts, in order: the columns of a routing record. inverse_frequencies and rope_scaling
    define RoPE (scaling multiplies cos and sin). max_positions bounds a sequence and fixes the grid of attention's sums.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    rms_norm_epsilon: float
    inverse_frequencies: tuple[float, ...]
    rope_scaling: float
    query_key_norm: bool
    qkv_bias: bool
    output_bias: bool
    tied_embeddings: bool
    moe_layers: tuple[int, ...] = ()
    num_experts: int = 0
    experts_per_token: int = 0
    expert_intermediate_size: int = 0
    normalise_gates: bool = False
    stop_token_ids: tuple[int, ...] = ()

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(head_dim)."""
        return float(self.head_dim**-0.5)


def read_config(directory: Path) -> DecoderConfig:
    """The model in `directory`. ValueError names what the embedded decoder cannot do, FileNotFoundError a missing file."""
    from transformers import AutoConfig

    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {directory}")
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    return decoder_config(config)


def decoder_config(config: Any) -> DecoderConfig:
    """From a transformers config object. ValueError lists all that the embedded decoder cannot do with it."""
    if problems := list(_problems(config)):
        raise ValueError("the embedded engines cannot run this model: " + "; ".join(problems))
    family = config.model_type
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies, rope_scaling = _rope(config, head_dim)
    mixture: dict[str, Any] = {}
    if moe_layers := _moe_layers(config):
        mixture = {
            "moe_layers": moe_layers,
            "num_experts": config.num_experts,
            "experts_per_token": config.num_experts_per_tok,
            "expert_intermediate_size": config.moe_intermediate_size,
            "normalise_gates": bool(config.norm_topk_prob),
        }
    attention_bias = bool(getattr(config, "attention_bias", False))
    stop = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return DecoderConfig(
        family=family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        intermediate_size=config.intermediate_size,
        max_positions=config.max_position_embeddings,
        rms_norm_epsilon=config.rms_norm_eps,
        inverse_frequencies=frequencies,
        rope_scaling=rope_scaling,
        query_key_norm=family in ("qwen3", "qwen3_moe"),
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=family != "qwen2" and attention_bias,
        tied_embeddings=bool(config.tie_word_embeddings),
        stop_token_ids=tuple(int(token) for token in stop if token is not None),
        **mixture,
    )


def _problems(config: Any) -> Iterator[str]:
    family = getattr(config, "model_type", None)
    if family not in FAMILIES:
        yield f"model_type '{family}' is not one of {', '.join(FAMILIES)}"
        return
    if config.hidden_act != "silu":
        yield f"hidden_act '{config.hidden_act}' (only silu)"
    if getattr(config, "mlp_bias", False):
        yield "mlp_bias"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        yield "layer_types other than full_attention"
    if getattr(config, "use_sliding_window", False) and getattr(config, "sliding_window", None):
        yield f"sliding_window={config.sliding_window}"
    rope = getattr(config, "rope_parameters", None) or {}
    if (kind := rope.get("rope_type", "default")) not in _ROPE_TYPES:
        yield f"rope_type '{kind}' (only {', '.join(_ROPE_TYPES)})"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor={rope['partial_rotary_factor']}"
    if getattr(config, "quantization_config", None):
        yield "quantised weights"
    if config.num_attention_heads % config.num_key_value_heads:
        yield f"{config.num_attention_heads} heads are no multiple of {config.num_key_value_heads} key-value heads"


def _moe_layers(config: Any) -> tuple[int, ...]:
    if config.model_type != "qwen3_moe" or not config.num_experts:
        return ()
    step, dense = config.decoder_sparse_step, set(config.mlp_only_layers or ())
    return tuple(layer for layer in range(config.num_hidden_layers) if layer not in dense and (layer + 1) % step == 0)


def _rope(config: Any, head_dim: int) -> tuple[tuple[float, ...], float]:
    rope = config.rope_parameters
    if rope.get("rope_type", "default") == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies, scaling = 1.0 / (rope["rope_theta"] ** exponents), 1.0
    else:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies, scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    return tuple(frequencies.tolist()), float(scaling)
