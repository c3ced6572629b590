"""Facts about published training recipes that their rows leave out, read from the recipes themselves.

All are of Megatron-Bridge (github.com/NVIDIA-NeMo/Megatron-Bridge: src/megatron/bridge/recipes and perf_recipes) unless
said otherwise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from miles_plan.cost.activations import Module

NATURAL_IMBALANCE = 1.2
"""Tokens of the fullest expert rank over the mean with learned routing; benchmark recipes force it to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeFacts:
    """mtp_layers: prediction layers that train along. grad_bytes, moment_bytes, master_bytes, precision_aware: of the
    optimizer. recompute: modules recomputed where the row does not say, or whole layers. fused_loss: Transformer Engine's cross
    entropy, which turns the logits into their gradient in place. imbalance: tokens of the fullest expert rank.
    frozen_vision: the vision tower does not train."""

    mtp_layers: int = 0
    grad_bytes: float = 4.0
    moment_bytes: float = 8.0
    master_bytes: float = 4.0
    precision_aware: bool = False
    recompute: frozenset[Module] | Literal["full"] = frozenset()
    fused_loss: bool = False
    imbalance: float = 1.0
    frozen_vision: bool = False


_MTP_LAYERS = (  # passes through the prediction layers, which share weights where there are two
    (r"nemotron-?3[.-]5-(lightning|nano)|nemotron-?3-(super|ultra)", 2),
    (r"deepseek-?v3\b|deepseek-?v4|glm-?4\.[5-7]\b(?!.*flash)|glm-?5|qwen3\.[5-9]|qwen3-next|ling", 1),
)

_COMPACT_OPTIMIZER = re.compile(r"moonlight|deepseek-?v[34]|kimi|qwen3-30b.*16gpu|qwen35-vl-35b.*16gpu")
"""Precision-aware optimizer: 16-bit gradients and moments under an fp32 master copy."""
_SMALLEST_OPTIMIZER = re.compile(r"nemotron-3-super.*(pretrain-config|sft|h100)")
"""The same under a 16-bit master copy."""

_RECOMPUTED: tuple[tuple[str, frozenset[Module] | Literal["full"]], ...] = (
    (r"gemma4-vl-26b-sft", "full"),
    (r"3-5-(lightning|nano)-pretrain-config", frozenset({"moe", "layernorm", "core_attn"})),
    (r"lightning-sft-openmathinstruct2-packed-config", frozenset({"moe", "layernorm", "core_attn", "mlp"})),
    (r"(lightning|nemotron-3-nano)-pretrain-16gpu-h100", frozenset({"moe", "layernorm"})),
    (r"nemotron-3-nano-pretrain-8gpu-h100", frozenset({"moe", "layernorm"})),
    (r"nemotron-3-super-pretrain-(64gpu-h100|config)", frozenset({"moe", "layernorm", "core_attn"})),
    (r"deepseek-v4.*pretrain", frozenset({"mla_up_proj"})),
)
_BF16_GRADIENTS = re.compile(r"3-5-(lightning|nano)-(pretrain|sft-openmath)")
_FROZEN_VISION = re.compile(r"gemma4-vl")
_GRAPHED_MLP = re.compile(r"llama-?3[.\d]*-70b (sft|lora)", re.IGNORECASE)
"""Fine-tuning recipes that replay the feed-forward part from CUDA graphs: with FP8 on H100, always on Grace-Blackwell
(scripts/performance/configs/llama)."""
_TE_LOSS = re.compile(r"pretrain-8k|nemotron-3-super-(pretrain|sft-16gpu-h100-bf16-config)")


def recipe_facts(model: str, recipe: str, tuned: bool) -> RecipeFacts:
    """What the recipe of a Megatron-Bridge row does; `tuned` marks the performance recipes, which share defaults."""
    named = f"{model} {recipe}".replace("_", "-").lower()
    smallest = bool(_SMALLEST_OPTIMIZER.search(named))
    compact = smallest or bool(_COMPACT_OPTIMIZER.search(named))
    return RecipeFacts(
        mtp_layers=next((layers for pattern, layers in _MTP_LAYERS if re.search(pattern, named)), 0),
        grad_bytes=2.0 if tuned or compact or _BF16_GRADIENTS.search(named) else 4.0,
        moment_bytes=4.0 if compact else 8.0,
        master_bytes=2.0 if smallest else 4.0,
        precision_aware=compact,
        recompute=next((modules for pattern, modules in _RECOMPUTED if re.search(pattern, named)), frozenset()),
        fused_loss=tuned or bool(_TE_LOSS.search(named)),
        frozen_vision=bool(_FROZEN_VISION.search(named)),
        imbalance=1.0 if tuned and "moonlight" not in named else NATURAL_IMBALANCE,  # no benchmark recipe of it
    )


def graphed_modules(model: str, gpu: str, precision: str) -> frozenset[Module]:
    """Modules that the recipe of a tuned row replays from CUDA graphs, apart from whole layers."""
    graphed = _GRAPHED_MLP.search(model) and (precision != "bf16" or gpu.startswith("gb"))
    return frozenset({"mlp"}) if graphed else frozenset()
