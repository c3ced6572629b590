"""Which share of a layer's forward runs again in its backward, by what is recomputed."""

from __future__ import annotations

from collections.abc import Set
from functools import lru_cache

import numpy as np

from miles_plan.catalog.architecture import LayerKind
from miles_plan.catalog.ffns import DenseFfn, MoeFfn
from miles_plan.cost.columns import Floats
from miles_plan.cost.gemms import layer_gemms
from miles_plan.cost.layer_time import TERMS
from miles_plan.ir.layout import Recompute

NORM_SHARE, ACTIVATION_SHARE = 0.3, 0.15
"""Norms and activation functions among the bytes a layer moves outside its products."""
EVERY_SECOND_PRODUCT = 0.45
"""FLOPs of the products that per-operator checkpointing runs again (torchtitan keeps every second one)."""


def recomputed_layers(recompute: Recompute, recompute_layers: int, layers: Floats) -> Floats:
    """Share of each stage's layers that recompute anything."""
    if recompute == "none":
        return np.zeros_like(layers)
    if recompute == "full" and recompute_layers:
        return np.minimum(1.0, recompute_layers / np.maximum(layers, 1.0))
    return np.ones_like(layers)


def recomputed_shares(kind: LayerKind, hidden: int, recompute: Recompute, modules: Set[str]) -> dict[str, float]:
    """Share of each term of a layer's forward that runs again."""
    if recompute == "full":
        return dict.fromkeys(TERMS, 1.0)
    out = dict.fromkeys(TERMS, 0.0)
    if "op" in modules:
        out |= {"gemm": EVERY_SECOND_PRODUCT, "memory": 1.0}
    if "core_attn" in modules:
        out["attention"] = 1.0
    ffn = kind.ffn
    if (isinstance(ffn, MoeFfn) and "moe" in modules) or (isinstance(ffn, DenseFfn) and "mlp" in modules):
        out["gemm"] = max(out["gemm"], _ffn_share(kind, hidden))
        out["ep"], out["memory"] = 1.0, max(out["memory"], 0.4 if kind.mixer else 0.8)  # all but norm and residual
    if "layernorm" in modules:
        out["memory"] = min(1.0, out["memory"] + NORM_SHARE)
    if isinstance(ffn, MoeFfn) and "moe_act" in modules and "moe" not in modules:
        out["memory"] = min(1.0, out["memory"] + ACTIVATION_SHARE)
    return out


@lru_cache(maxsize=4096)
def _ffn_share(kind: LayerKind, hidden: int) -> float:
    """FLOPs of the feed-forward part among a layer's products."""
    whole = sum(gemm.n * gemm.k * gemm.times for gemm in layer_gemms(kind, hidden))
    if not kind.mixer:
        return 1.0
    mixer = sum(gemm.n * gemm.k * gemm.times for gemm in layer_gemms(LayerKind(mixer=kind.mixer), hidden))
    return 1.0 - mixer / whole
