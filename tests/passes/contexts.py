"""Pass contexts made from plain mappings."""

from __future__ import annotations

from typing import Any

from miles_plan.passes.base import PassContext
from miles_plan.passes.compile import context_of
from miles_plan.spec import job_from_mapping


def context(**changes: Any) -> PassContext:
    """A GRPO job on Megatron-core and SGLang, with sections replaced."""
    job: dict[str, Any] = {
        "version": 1,
        "name": "test",
        "model": {"name": "qwen3-8b"},
        "cluster": {"gpu": "h200", "nodes": 1, "gpus_per_node": 4},
        "algorithm": {"kind": "grpo"},
        "data": {"prompts": {"generator": "arithmetic"}, "reward": "math"},
        "rollout": {
            "prompts_per_step": 16,
            "samples_per_prompt": 4,
            "response_tokens": {"max": 4096, "mean": 1500, "p99": 4000},
        },
    }
    return context_of(job_from_mapping(job | changes))[0]
