"""A model of a plan's shape with random weights, made on the GPU: a Hugging Face folder, its tensors, a plain forward pass."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from miles_plan.ir.plan import Plan


def make(plan: Plan, folder: Path) -> float:
    """Write the folder unless it is there; returns the seconds it took."""
    from transformers import AutoConfig, AutoModelForCausalLM

    began = time.perf_counter()
    if not folder.exists():
        fields = dict(plan.run.model.hf_config or {})
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        torch.manual_seed(plan.run.seed)
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        del model
        torch.cuda.empty_cache()
    return time.perf_counter() - began


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The folder's tensors on the GPU; a tied head is left out, as it is in the folder."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path, device="cuda")
    return found


def reference(folder: Path, state: dict[str, torch.Tensor]) -> Any:
    """The transformers model with these weights, or the folder's own where there are none."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda")
    if state:
        model.load_state_dict(state, strict=False)
    return model.eval()
