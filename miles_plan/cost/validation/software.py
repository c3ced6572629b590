"""What the software behind a published row is known to do beyond what the row says, from its documentation and code."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from miles_plan.catalog.architecture import ModelArchitecture
from miles_plan.catalog.gpus import Gpu
from miles_plan.cost.layer_time import ComputeOptions
from miles_plan.cost.software_release import fuses_experts, graphed_share
from miles_plan.cost.train_options import Engine
from miles_plan.cost.validation.recipes import recipe_facts
from miles_plan.cost.validation.row_fields import Row, row_precision, row_release, size_of


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
RING_LOSS = 0.25
"""Attention time a doubling of context parallelism adds in PyTorch: shorter blocks, merged in fp32 ring step by step."""
COMPILED_MOVES, EAGER_MOVES = 0.57, 1.25
"""Bytes moved between products over Transformer Engine's fused kernels: torch.compile fuses more, eager less."""


BRIDGE_HOST_SCALE = 1.5
"""Launching a layer through Megatron-Bridge's general recipes over Megatron-core alone."""
EP_OVERLAP = 0.75
"""Expert exchange hidden behind the other microbatch where a recipe overlaps it (DeepSeek-V3 between nodes)."""


_GRAPHED_RECIPE = re.compile(r"^(?!deepseek_v4).*pretrain_\d+gpu")
FLEX_DISPATCHER = re.compile("nemotron|deepseek|moonlight|kimi|qwen3")
"""Models whose general recipes dispatch through DeepEP or HybridEP too."""


def software_of(row: Row) -> Software:
    """The stack a row was measured with."""
    source, recipe = str(row.get("source")), str(row.get("recipe"))
    if "torchtitan" in source:
        return TORCHTITAN
    if "llm-foundry" in source:
        return LLM_FOUNDRY
    if "_vl_" in recipe or "functional" in recipe or re.search(r"cpu-off|moonlight", f"{source} {row.get('model')}", re.I):
        return MEGATRON  # general recipes, and models without a performance recipe
    tuned = re.search(r"performance|examples/llama|skills/", source)
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
            attention_scale=(1.0 if gpu.name == "a100" else hopper) / (1.0 + RING_LOSS * math.log2(size_of(row, "cp"))),
            moved_scale=COMPILED_MOVES if "compile" in technique else EAGER_MOVES,
            tp_overlap=0.5 if "async" in technique else 0.0,
        )
    if not software.tuned:
        return ComputeOptions(
            precision=precision,
            weight_gradients=not frozen,
            moe_imbalance=(1.0 + facts.imbalance) / 2.0,  # the fullest rank changes from layer to layer
            fused_attention="long_context" not in str(row.get("source")),  # packed long sequences fell back
            cuda_graphs=0.4 if _GRAPHED_RECIPE.search(str(row.get("recipe"))) else 0.0,  # of attention and router
            dispatcher="deepep" if FLEX_DISPATCHER.search(model.name) else "alltoall",
            host_scale=BRIDGE_HOST_SCALE if "Megatron-Bridge" in str(row.get("source")) else 1.0,
        )
    if precision == "nvfp4" and "nemotron-3" in model.name:
        precision = "mxfp8"  # attention, latents, outputs and the last layers stay wider (arXiv 2604.12374 table 3)
    moe = model.moe
    return ComputeOptions(
        precision=precision,
        weight_gradients=not frozen,
        dispatcher="deepep",
        cuda_graphs=graphed_share(row_release(row), model, gpu),
        tp_overlap=0.6 if moe is None else 0.0,
        ep_overlap=EP_OVERLAP if "deepseek-v3" in model.name and size_of(row, "ep") > gpu.nvlink_domain else 0.0,
        fused_experts=fuses_experts(_fusing_release(row, precision), model, gpu),
    )


def _fusing_release(row: Row, precision: str) -> str:
    """The release of a row, taken as one that fuses experts where it is a recipe in block-scaled formats."""
    fused = "pretrain_" in str(row.get("recipe")) and precision in ("mxfp8", "nvfp4")
    return "26.06" if fused else row_release(row)


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
