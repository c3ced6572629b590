"""What the software behind a published row is known to do beyond what the row says, from its documentation and code."""

from __future__ import annotations

import re
from dataclasses import dataclass

from miles_plan.catalog.architecture import ModelArchitecture
from miles_plan.catalog.gpus import Gpu
from miles_plan.cost.layer_time import ComputeOptions
from miles_plan.cost.train_options import Engine
from miles_plan.cost.validation.recipes import recipe_facts
from miles_plan.cost.validation.row_fields import Row, row_precision, row_release


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """How a training stack runs a step. seq_len: its default where a row does not say."""

    name: str
    engine: Engine
    tuned: bool
    seq_len: int = 0


MEGATRON_TUNED = Software(name="Megatron, tuned recipe", engine="megatron", tuned=True)
"""Performance recipes: CUDA graphs, overlapped tensor parallelism, DeepEP or HybridEP (Megatron-Bridge performance guide)."""
MEGATRON = Software(name="Megatron", engine="megatron", tuned=False)
TORCHTITAN = Software(name="torchtitan", engine="fsdp2", tuned=True, seq_len=8192)
"""Its Llama 3 configurations all train on 8,192 tokens unless overridden."""
LLM_FOUNDRY = Software(name="llm-foundry", engine="fsdp2", tuned=True)

SDPA_FLASH2_ON_HOPPER = 0.47
"""FlashAttention-2 through PyTorch's SDPA reaches about half of what FlashAttention-3 does on Hopper (arXiv 2407.08608)."""
FLASH1_ON_HOPPER = 0.33
"""llm-foundry's 2023 runs used Triton and FlashAttention 1 kernels, built for Ampere."""
COMPILED_MOVES, EAGER_MOVES = 0.57, 1.25
"""Bytes moved between products over Transformer Engine's fused kernels: torch.compile fuses more, eager less."""


def software_of(row: Row) -> Software:
    """The stack a row was measured with."""
    source, recipe = str(row.get("source")), str(row.get("recipe"))
    if "torchtitan" in source:
        return TORCHTITAN
    if "llm-foundry" in source:
        return LLM_FOUNDRY
    if "_vl_" in recipe or "functional" in recipe:
        return MEGATRON
    tuned = "performance" in source or "examples/llama" in source or re.search(r"pretrain_\d+gpu", recipe)
    return MEGATRON_TUNED if tuned else MEGATRON


def compute_options(row: Row, software: Software, model: ModelArchitecture, gpu: Gpu) -> ComputeOptions:
    """How the kernels of a row's step ran."""
    precision = row_precision(row)
    if precision == "mxfp8" and precision not in gpu.flops:
        precision = "fp8"
    frozen = is_frozen(row)
    facts = recipe_facts(model.name, str(row.get("recipe") or ""), software.tuned)
    if software.engine == "fsdp2":
        technique = str(row.get("technique") or "").lower()
        hopper = SDPA_FLASH2_ON_HOPPER if software is TORCHTITAN else FLASH1_ON_HOPPER
        return ComputeOptions(
            precision=precision,
            weight_gradients=not frozen,
            cuda_graphs=1.0,
            attention_scale=1.0 if gpu.name == "a100" else hopper,
            moved_scale=COMPILED_MOVES if "compile" in technique else EAGER_MOVES,
            tp_overlap=0.5 if "async" in technique else 0.0,
        )
    if not software.tuned:
        return ComputeOptions(precision=precision, weight_gradients=not frozen, moe_imbalance=facts.imbalance)
    moe = model.moe
    recent = row_release(row) >= "26.06"
    return ComputeOptions(
        precision=precision,
        weight_gradients=not frozen,
        dispatcher="deepep",
        cuda_graphs=1.0 if moe is None or recent else 0.7,  # graphs of layers with experts came with 26.06
        tp_overlap=0.6 if moe is None else 0.0,
        fused_experts=bool(moe and moe.gated and not moe.bias) and gpu.nvlink_domain > 8 and _fuses(row, precision),
    )


def _fuses(row: Row, precision: str) -> bool:
    """NeMo 26.06 fuses permutation and quantisation into the grouped products, and so do its block-scaled recipes."""
    return row_release(row) >= "26.06" or ("pretrain_" in str(row.get("recipe")) and precision in ("mxfp8", "nvfp4"))


def is_frozen(row: Row) -> bool:
    """Whether the language model's own weights do not train: adapters, and vision recipes on mock data."""
    return is_adapter(row) or bool(re.search(r"_vl_.*h100.*mock", str(row.get("recipe"))))


def is_adapter(row: Row) -> bool:
    """Whether only low-rank adapters train."""
    text = f"{row.get('phase') or ''} {row.get('model') or ''} {row.get('recipe') or ''}".lower()
    return "lora" in text or "peft" in text


def recomputation(row: Row, software: Software) -> tuple[str, frozenset[str]]:
    """Recompute mode and modules a row states: `full`, `selective` with Megatron's module names, or none."""
    text = str(row.get("recompute") or "").lower()
    if "full" in text:
        return "full", frozenset()
    if software is TORCHTITAN and ("selective" in text or "sac" in text):
        return "selective", frozenset({"op"})
    modules = frozenset(name for name in _MODULES if re.search(rf"\b{name}\b", text))
    return ("selective", modules) if modules else ("none", modules)


_MODULES = ("core_attn", "mla_up_proj", "mlp", "moe_act", "layernorm", "moe", "shared_experts")
