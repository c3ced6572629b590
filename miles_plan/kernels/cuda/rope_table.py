"""Tables of cos and sin for `rope`, by one way of computing them, so that a rollout engine and a trainer hold the same bits.

Frequencies are base^(-2i / D) (Su et al. 2021, arXiv 2104.09864), always computed on the CPU, as transformers does: a GPU's power
differs in the last bit of a few, which flips a rounding here and there (with random weights in 70 of 512 samples of 16 tokens). An
angle is position x frequency, rounded to float32. Everything here is elementwise, so a table's length cannot show in its entries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch


def inverse_frequencies(base: float, rotary_size: int) -> torch.Tensor:
    """float32 [rotary_size / 2] on the CPU, by the expression that transformers, Megatron-core and SGLang evaluate."""
    exponent = torch.arange(0, rotary_size, 2, dtype=torch.float32) / rotary_size
    return 1.0 / (base**exponent)


def scaled_frequencies(inverse: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor | None:
    """The frequencies of a scaled RoPE, by the expressions of transformers' `modeling_rope_utils`, to the bit; None for other kinds.

    parameters: transformers' `rope_parameters`. `linear` divides all; `llama3` (Llama 3.1) divides long waves, leaves short ones
    and goes smoothly from one to the other.
    """
    kind = parameters.get("rope_type")
    if kind == "linear":
        return inverse / float(parameters["factor"])
    if kind != "llama3":
        return None
    factor, low, high = (parameters[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    context = parameters["original_max_position_embeddings"]
    wave = 2 * math.pi / inverse
    longest, shortest = context / low, context / high
    divided = torch.where(wave > longest, inverse / factor, inverse)
    smooth = (context / wave - low) / (high - low)
    between = (1 - smooth) * divided / factor + smooth * divided
    return torch.where(~(wave < shortest) & ~(wave > longest), between, divided)


def rotation_tables(angles: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of float32 angles [positions, D / 2], times `scale` (YaRN's, arXiv 2309.00071), contiguous."""
    cos, sin = torch.cos(angles), torch.sin(angles)
    return (cos, sin) if scale == 1.0 else (cos * scale, sin * scale)


def angles_of(inverse: torch.Tensor, positions: int) -> torch.Tensor:
    """position x frequency for positions 0 to `positions`, float32 [positions, D / 2]."""
    return torch.arange(positions, dtype=torch.float32, device=inverse.device)[:, None] * inverse[None, :]
